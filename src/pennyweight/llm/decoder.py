"""A language model as one program that takes tokens and what it has seen before: keys and values of every block.

    ids    i64 [1, n]                        the tokens to come
    past   f32 [p, 2, blocks, heads, width]  keys and values of tokens before, then room that no query sees
    count  i64 [1]                           how many tokens there were before, at most p
    ->  logits f32 [1, vocabulary] of the last token,  new f32 [n, 2, blocks, heads, width]

The room lets a caller grow `past` in strides, so that sizes seldom change.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import LowerError
from pennyweight.llm.skeleton import transformers
from pennyweight.program.ir import Program
from pennyweight.program.lower.driver import lower

EXAMPLE = (3, 5)  # tokens to come and entries before, in what the exporter sees
FAR = -1e9  # of a score: its exponential is zero


class Decoder(nn.Module):
    """See the module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.blocks, self.heads, self.width = cache_shape(model)

    def forward(self, ids: Tensor, past: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """See the module."""
        n, p = ids.shape[1], past.shape[0]
        order = torch.arange(n)
        places = order + count
        blank = (torch.arange(p) >= count).float().expand(n, p)
        later = (order[None, :] > order[:, None]).float()
        mask = (torch.cat([blank, later], 1) * FAR)[None, None]
        cache = transformers().DynamicCache()
        before = past.permute(1, 2, 3, 0, 4)  # [2, blocks, heads, p, width]
        for i in range(self.blocks):
            cache.update(before[0, i][None], before[1, i][None], i)
        found = self.model(
            input_ids=ids, attention_mask=mask, position_ids=places[None], past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        keys = torch.stack([layer.keys[0, :, p:] for layer in found.past_key_values.layers])
        values = torch.stack([layer.values[0, :, p:] for layer in found.past_key_values.layers])
        return found.logits[:, -1], torch.stack([keys, values]).permute(3, 0, 1, 2, 4)


def cache_shape(model: Any) -> tuple[int, int, int]:
    """Blocks, heads of keys and values, and their width, as a run of one token shows them.

    Raises:
        LowerError: if the model keeps something else than keys and values of equal shape.
    """
    with torch.no_grad():
        cache = model(torch.zeros(1, 1, dtype=torch.int64), use_cache=True).past_key_values
    layers = getattr(cache, "layers", [])
    shapes = {tuple(t.shape) for layer in layers for t in (getattr(layer, "keys", None), getattr(layer, "values", None))
              if isinstance(t, Tensor)}  # fmt: skip
    if len(shapes) != 1 or len(next(iter(shapes))) != 4:
        raise LowerError("the model does not keep keys and values of one shape", site=type(model).__name__)
    _, heads, _, width = next(iter(shapes))
    return len(layers), heads, width


def lower_decoder(model: Any, tokenizer: str = "") -> Program:
    """The program of a language model, float or quantized, see the module.

    Args:
        model: from `load`; its attention is set to plain products.
        tokenizer: text of `tokenizer.json`, kept with the program.

    Raises:
        LowerError: if the model has no whole-graph form.
    """
    model.set_attn_implementation("eager")
    decoder = Decoder(model).eval()
    n, p = EXAMPLE
    past = torch.zeros(p, 2, decoder.blocks, decoder.heads, decoder.width)
    past[:2] = torch.randn(past[:2].shape, generator=torch.Generator().manual_seed(0)) * 0.1
    ids = torch.arange(n)[None] % int(model.config.vocab_size)
    with torch.no_grad():
        program = lower(decoder, (ids, past, torch.tensor([2])), dynamic={"ids": (1,), "past": (0,)})
    ends = getattr(model.generation_config, "eos_token_id", None)
    program.meta["decoder"] = {
        "blocks": decoder.blocks, "heads": decoder.heads, "width": decoder.width,
        "ends": [ends] if isinstance(ends, int) else list(ends or []), "tokenizer": tokenizer,
        "window": int(getattr(model.config, "max_position_embeddings", 0) or 0),
    }  # fmt: skip
    return program
