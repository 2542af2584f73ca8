"""Keys and values of a few bits: rounded per token and head as they enter the cache, computed with in floats.

    k' = (clamp(rint(k r) + z, 0, 2^b - 1) - z) s     over the width of one head, ranged when the token comes

A token's keys and values are rounded once, so a window read at once and token by token gives the same.
Source: per-token asymmetric rounding as in Liu et al. 2024, KIVI (arXiv:2402.02750), section 3, for values; keys alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pennyweight.errors import InputError, nearest
from pennyweight.llm.block import round_tokens
from pennyweight.llm.schemes import Scheme
from pennyweight.llm.skeleton import transformers
from pennyweight.spec import QuantSpec

NAMES = {"int8": "uint8[1,*]+z", "int4": "uint4[1,*]+z"}
_MARK = "_pennyweight_cache"


def cache_spec(name: str) -> QuantSpec:
    """The spec of a name: one scale and zero point for each token and head.

    Raises:
        InputError: on an unknown name.
    """
    if name not in NAMES:
        raise InputError(f"there is no cache of {name!r}", hint=nearest(name, NAMES, "caches"))
    return QuantSpec.parse(NAMES[name])


def cache_bytes(name: str, tokens: int, blocks: int, heads: int, width: int) -> int:
    """Bytes of keys and values: codes, and a half-precision scale and a zero point for each token and head."""
    bits = 8 if name == "int8" else 4 if name == "int4" else 32
    each = width * bits // 8 + (0 if bits == 32 else 3)
    return 2 * tokens * blocks * heads * each


def round_cache(model: nn.Module, name: str) -> nn.Module:
    """Let a model round what it keeps of every token, whether a cache is handed on or not; returns the model.

    Args:
        model: of `transformers`, that takes `past_key_values`.
        name: int8 or int4.

    Raises:
        InputError: on an unknown name.
    """
    spec = cache_spec(name)
    scheme = Scheme(spec, spec)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = transformers().DynamicCache()
        if not hasattr(cache, _MARK):
            setattr(cache, _MARK, name)
            cache.update = _rounded(cache.update, scheme)
        return args, {**kwargs, "past_key_values": cache}

    model.register_forward_pre_hook(before, with_kwargs=True)
    return model


def _rounded(update: Callable[..., Any], scheme: Scheme) -> Callable[..., Any]:
    def rounded(keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return update(round_tokens(keys, scheme), round_tokens(values, scheme), *args, **kwargs)

    return rounded
