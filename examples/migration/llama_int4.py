"""Quantization-aware training of a small Llama: int8 activations, int4 weights."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from pennyweight.compat.torchao.quantization.qat import Int8DynActInt4WeightQATQuantizer


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = (w(x).view(b, t, self.heads, -1).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        half = q.shape[-1] // 2
        angle = torch.arange(t)[:, None] / 10000 ** (torch.arange(half) / half)
        c, s = angle.cos(), angle.sin()

        def turn(z):
            a, e = z[..., :half], z[..., half:]
            return torch.cat([a * c - e * s, a * s + e * c], -1)

        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        return self.wo(y.transpose(1, 2).reshape(b, t, d))


class Layer(nn.Module):
    def __init__(self, width, hidden, heads):
        super().__init__()
        self.norm1, self.attention = RMSNorm(width), Attention(width, heads)
        self.norm2 = RMSNorm(width)
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        y = self.norm2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Llama(nn.Module):
    def __init__(self, vocabulary=128, width=64, hidden=128, heads=4, layers=2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width, hidden, heads) for _ in range(layers)])
        self.norm, self.head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def windows(text, count, seed):
    """Windows of 32 characters and what follows each."""
    ids = torch.tensor(list(text.encode("ascii", "replace")))
    starts = torch.randint(len(ids) - 33, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = torch.stack([ids[s : s + 33] for s in starts])
    return rows[:, :-1], rows[:, 1:]


def train(model, text, steps, rate):
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    model.train()
    for step in range(steps):
        x, y = windows(text, 16, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()


def loss(model, text):
    x, y = windows(text, 64, seed=10_000)
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(x).flatten(0, 1), y.flatten()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, nargs=2, default=(200, 50), help="in float, then with quantization")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    text = Path(__file__).read_text()
    torch.manual_seed(0)
    model = Llama()
    train(model, text, args.steps[0], 2e-3)
    result = {"float": loss(model, text)}

    quantizer = Int8DynActInt4WeightQATQuantizer(groupsize=32)
    model = quantizer.prepare(model)
    train(model, text, args.steps[1], 5e-4)
    result["trained"] = loss(model, text)

    model = quantizer.convert(model)
    result["converted"] = loss(model, text)
    torch.save(model.state_dict(), args.out / "int4.pt")
    return model, windows(text, 2, seed=0)[0], result


if __name__ == "__main__":
    _, _, figures = main()
    for name, value in figures.items():
        print(f"{name}: {value:.4f}")
