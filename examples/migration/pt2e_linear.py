"""Quantization-aware training of a small linear network through PT2 export."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from pennyweight.compat.export import capture_pre_autograd_graph
from pennyweight.compat.quantization import move_exported_model_to_eval
from pennyweight.compat.quantization.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
from pennyweight.compat.quantization.quantizer.xnnpack_quantizer import (
    XNNPACKQuantizer,
    get_symmetric_quantization_config,
)
from pennyweight.compat.export import export_for_training


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(16, 32)
        self.dropout = nn.Dropout(0.1)
        self.out = nn.Linear(32, 4)

    def forward(self, x):
        return self.out(self.dropout(torch.relu(self.hidden(x))))


def samples(count, seed):
    """Points of four overlapping clouds."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(0, 4, (count,), generator=generator)
    return centres[labels] + 1.2 * torch.randn(count, 16, generator=generator), labels


def train(model, steps, rate):
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    for step in range(steps):
        x, y = samples(64, seed=step + 1)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def accuracy(model):
    x, y = samples(2000, seed=10_000)
    with torch.no_grad():
        return 100 * float((model(x).argmax(1) == y).float().mean())


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--program", action="store_true", help="through export_for_training")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = TwoLayers()
    train(model, args.steps, rate=0.05)
    found = {"float": accuracy(model.eval())}

    example = (samples(2, seed=0)[0],)
    batch = torch.export.Dim("batch")
    model.train()
    if args.program:
        exported = export_for_training(model, example, dynamic_shapes={"x": {0: batch}}).module()
    else:
        exported = capture_pre_autograd_graph(model, example, dynamic_shapes={"x": {0: batch}})

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_qat=True))
    prepared = prepare_qat_pt2e(exported, quantizer)
    train(prepared, args.steps // 2, rate=0.01)
    move_exported_model_to_eval(prepared)
    found["fake-quantized"] = accuracy(prepared)

    quantized = convert_pt2e(prepared)
    found["quantized"] = accuracy(quantized)

    path = args.out / "pt2e_linear.pt2"
    torch.export.save(torch.export.export(quantized, example, dynamic_shapes={"x": {0: batch}}), path)
    loaded = torch.export.load(path).module()
    found["loaded"] = accuracy(loaded)

    for name, value in found.items():
        print(f"{name:<15} {value:.2f} %")
    return found, quantized


if __name__ == "__main__":
    main()
