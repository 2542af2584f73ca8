"""A language model as one program that takes tokens and what it has seen before: keys and values of every block.

    ids    i64 [1, n]                             the tokens to come
    past   f32 [2, blocks, heads, places, width]  keys and values of tokens before, then room that no query sees
    count  i64 [1]                                how many tokens there were before, at most `places`
    ->  logits f32 [1, vocabulary] of the last token,  new f32 [2, blocks, n, heads, width]

With a cache of 8 bits keys and values are codes, of a scale and a zero point for each token and head: `past` and `new`
are u8, and there are `ranges` f32 [2, blocks, heads, places, 2], [2, blocks, n, heads, 2] of the new ones.
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

EXAMPLE = (3, 5)  # tokens to come and places before, in what the exporter sees
ATTENTION = "pennyweight_past"  # the name under which transformers finds `attend`


class Past:
    """What attention reads and leaves behind in one run of a model."""

    now: Past | None = None  # of the run that is being made

    def __init__(self, past: Tensor, count: Tensor, ranges: Tensor | None = None) -> None:
        self.past, self.count, self.ranges = past, count, ranges
        self.kept: list[tuple[Tensor, ...]] = []  # of each layer: keys, values, and their ranges

    def new(self) -> list[Tensor]:
        """What is to be kept: keys and values [2, blocks, n, heads, width], and their ranges."""
        keys, values, *ranges = (torch.stack(each) for each in zip(*self.kept, strict=True))
        return [torch.stack([keys, values])] + ([torch.stack(ranges)] if ranges else [])


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *,
    scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of transformers' models, over `Past.now`; [1, heads, n, width] each -> [1, n, heads, width].

    Raises:
        LowerError: if the layer does something else than softmax over all tokens before.
    """
    run = Past.now
    assert run is not None, "called outside of a Decoder"
    window = int(getattr(getattr(module, "config", None), "max_position_embeddings", 0) or 0)
    if softcap or others.get("s_aux") is not None or (sliding_window and not 0 < window <= sliding_window):
        raise LowerError("attention with a sliding window, a soft cap or sinks has no program yet",
                         site=type(module).__name__)  # fmt: skip
    block = len(run.kept)
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    factor = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    ops = torch.ops.pennyweight
    if run.ranges is None:
        run.kept.append((key[0], value[0]))
        return ops.past_attention(query, key, value, run.past, run.count, block, factor), None
    y, *new = ops.past_attention_rounded(query, key, value, run.past, run.ranges, run.count, block, factor)
    run.kept.append(tuple(t[0] for t in new))
    return y, None


class Decoder(nn.Module):
    """See the module."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.blocks, self.heads, self.width = cache_shape(model)
        transformers().AttentionInterface.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)

    def forward(
        self, ids: Tensor, past: Tensor, count: Tensor, ranges: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """See the module."""
        run = Past.now = Past(past, count, ranges)
        try:
            found = self.model(
                input_ids=ids, position_ids=(torch.arange(ids.shape[1]) + count)[None], use_cache=False,
                logits_to_keep=1,
            )  # fmt: skip
        finally:
            Past.now = None
        if len(run.kept) != self.blocks:
            raise LowerError(f"{len(run.kept)} attention layers ran, keys and values are kept of {self.blocks}",
                             site=type(self.model).__name__)  # fmt: skip
        return found.logits[:, -1], *run.new()


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


def lower_decoder(model: Any, tokenizer: str = "", cache: str = "") -> Program:
    """The program of a language model, float or quantized, see the module.

    Args:
        model: from `load`; its attention is set to that of programs.
        tokenizer: text of `tokenizer.json`, kept with the program.
        cache: "int8" for keys and values of 8 bits.

    Raises:
        LowerError: if the model has no whole-graph form.
    """
    decoder = Decoder(model).eval()
    n, p = EXAMPLE
    past = torch.zeros(2, decoder.blocks, decoder.heads, p, decoder.width)
    past[..., :2, :] = torch.randn(past[..., :2, :].shape, generator=torch.Generator().manual_seed(0)) * 0.1
    ids = torch.arange(n)[None] % int(model.config.vocab_size)
    given: tuple[Tensor, ...] = (ids, past, torch.tensor([2]))
    dynamic: dict[str | int, tuple[int, ...]] = {"ids": (1,), "past": (3,)}
    if cache:
        ranges = torch.ones(*past.shape[:-1], 2)
        given, dynamic = (
            (ids, past.mul(64).add(128).to(torch.uint8), torch.tensor([2]), ranges),
            dynamic | {"ranges": (3,)},
        )
    with torch.no_grad():
        program = lower(decoder, given, dynamic=dynamic)
    ends = getattr(model.generation_config, "eos_token_id", None)
    program.meta["decoder"] = {
        "blocks": decoder.blocks, "heads": decoder.heads, "width": decoder.width,
        "cache": cache, "ends": [ends] if isinstance(ends, int) else list(ends or []), "tokenizer": tokenizer,
        "window": int(getattr(model.config, "max_position_embeddings", 0) or 0),
    }  # fmt: skip
    return program
