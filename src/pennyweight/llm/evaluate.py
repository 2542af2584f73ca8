"""Perplexity and generation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pennyweight.errors import InputError, NonFinite
from pennyweight.llm.load import logits
from pennyweight.llm.stream import calls_without_cache
from pennyweight.progress import track
from pennyweight.runtime.decode import Decoding

TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Perplexity:
    """`exp` of the mean cross entropy of the next token.

    Attributes:
        value: the perplexity.
        tokens: predicted tokens.
        windows: consecutive windows of text that do not overlap.
        window: tokens of each; the first of each is not predicted.
        losses: mean cross entropy of each window, float64 [windows]; to compare models window by window.
    """

    value: float
    tokens: int
    windows: int
    window: int
    losses: Tensor


def perplexity(
    model: nn.Module, ids: Tensor, window: int = 512, *, limit: int = 0, progress: bool = False
) -> Perplexity:
    """Perplexity over consecutive windows.

    Args:
        model: returns logits, as those of `load` do.
        ids: int64 [n].
        window: tokens of a window.
        limit: windows at most; 0 for all.
        progress: show a bar.

    Raises:
        InputError: if the text is shorter than one window.
        NonFinite: if a loss is no number.
    """
    count = len(ids) // window
    if count == 0 or window < 2:
        raise InputError(
            f"the text has {len(ids)} tokens, one window needs {max(window, 2)}",
            hint="Give more text, or a smaller --window.",
        )
    count = min(count, limit) if limit else count
    rows = ids[: count * window].view(count, window)
    losses: list[Tensor] = []
    parts: Iterable[Tensor] = rows.split(max(1, TOKENS_AT_ONCE // window))
    for part in track(list(parts), "perplexity", show=progress):
        y = logits(model, part)[:, :-1].float()
        each = F.cross_entropy(y.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
        losses.append(each.view(len(part), -1).double().mean(1))
    found = torch.cat(losses)
    mean = float(found.mean())
    if not math.isfinite(mean):
        raise NonFinite("the loss is no number", site=type(model).__name__)
    return Perplexity(math.exp(mean), count * (window - 1), count, window, found)


def apart(model: nn.Module, base: nn.Module, ids: Tensor, window: int = 512, *, limit: int = 0) -> float:
    """`|y' - y| / |y|` of the first results of two models, over consecutive windows: for encoders.

    Args:
        model: quantized.
        base: float.
        ids: int64 [n].
        window: tokens of a window.
        limit: windows at most; 0 for all.

    Raises:
        InputError: if the text is shorter than one window.
    """
    count = len(ids) // window
    if count == 0:
        raise InputError(f"the text has {len(ids)} tokens, one window needs {window}", hint="Give more text.")
    count = min(count, limit) if limit else count
    off = all_ = 0.0
    for part in ids[: count * window].view(count, window).split(max(1, TOKENS_AT_ONCE // window)):
        with torch.no_grad():
            y, wanted = (m(part, **calls_without_cache(m))[0] for m in (model, base))
        off += float((y - wanted).double().pow(2).sum())
        all_ += float(wanted.double().pow(2).sum())
    return math.sqrt(off / max(all_, 1e-30))


def decoded_perplexity(decoding: Decoding, ids: Tensor, window: int = 512, *, limit: int = 4) -> Perplexity:
    """Perplexity of a `.dwt` file, token by token through its keys and values, over the first windows of a text.

    Args:
        decoding: of the file.
        ids: int64 [n].
        window: tokens of a window.
        limit: windows at most.

    Raises:
        InputError: if the text is shorter than one window.
    """
    count = min(len(ids) // window, limit)
    if count == 0:
        raise InputError(f"the text has {len(ids)} tokens, one window needs {window}", hint="Give more text.")
    losses = []
    for row in ids[: count * window].view(count, window):
        decoding.begin()
        y = [torch.from_numpy(decoding.step([token])) for token in row[:-1].tolist()]
        losses.append(F.cross_entropy(torch.stack(y), row[1:], reduction="none").double().mean())
    found = torch.stack(losses)
    return Perplexity(math.exp(float(found.mean())), count * (window - 1), count, window, found)


def generate(model: Any, ids: Tensor, *, tokens: int = 64, temperature: float = 0.0, seed: int = 0) -> Tensor:
    """Continue a prompt by `model.generate`, with a cache of keys and values.

    Args:
        model: from `load`.
        ids: int64 [n].
        tokens: how many to add at most.
        temperature: 0 takes the likeliest token.
        seed: of the choice.

    Returns:
        int64 [n + added].

    Raises:
        InputError: on an empty prompt.
    """
    if ids.numel() == 0:
        raise InputError("the prompt is empty")
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0, "max_new_tokens": tokens}
    if temperature > 0:
        options["temperature"] = temperature
    if getattr(model.generation_config, "pad_token_id", None) is None:
        options["pad_token_id"] = getattr(model.generation_config, "eos_token_id", None) or 0
    batch = ids[None]
    with torch.no_grad():
        found: Tensor = model.generate(
            batch, attention_mask=torch.ones_like(batch), use_cache=True, **options
        )
    return found[0]
