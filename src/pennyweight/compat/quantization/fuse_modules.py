"""Fusing by name: after training a norm is folded into the layer before it; in training it stays beside it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from pennyweight.errors import InputError, nearest
from pennyweight.passes import replace_module
from pennyweight.passes.fold_batch_norm import fold_pair

_RELU = (nn.ReLU, nn.ReLU6)


def fuse_modules(
    model: nn.Module, modules_to_fuse: Sequence[Any], inplace: bool = False, fuser_func: Any = None,
    fuse_custom_config_dict: Any = None,
) -> nn.Module:  # fmt: skip
    """Fold norms into the convolutions and linear layers before them; ReLUs stay where they are and cost nothing.

    Args:
        model: in eval mode.
        modules_to_fuse: a list of paths, or of such lists: [conv, bn], [conv, bn, relu], [conv, relu], [linear, relu],
            [linear, bn], [bn, relu].
        inplace: change the model rather than a copy.
        fuser_func: read for the signature's sake.
        fuse_custom_config_dict: likewise.

    Raises:
        InputError: on paths that are not there, other sequences, or a model in train mode.
    """
    root = model if inplace else copy.deepcopy(model)
    for group in _groups(modules_to_fuse):
        found = _checked(root, group)
        if any(m.training for m in found if isinstance(m, _BatchNorm)):
            raise InputError(
                "a model in train mode cannot be folded", site=group[0],
                hint="model.eval() first, or fuse_modules_qat for training.",
            )  # fmt: skip
        if len(found) > 1 and isinstance(found[1], _BatchNorm):
            replace_module(root, found[0], fold_pair(found[0], found[1]))
            replace_module(root, found[1], nn.Identity())
    return root


def fuse_modules_qat(
    model: nn.Module, modules_to_fuse: Sequence[Any], inplace: bool = False, fuser_func: Any = None,
    fuse_custom_config_dict: Any = None,
) -> nn.Module:  # fmt: skip
    """Check the names; norms stay alive in training and are folded exactly at conversion, found by the dataflow.

    Raises:
        InputError: see `fuse_modules`; also on a model in eval mode.
    """
    root = model if inplace else copy.deepcopy(model)
    for group in _groups(modules_to_fuse):
        found = _checked(root, group)
        if any(not m.training for m in found if isinstance(m, _BatchNorm)):
            raise InputError(
                "a model in eval mode cannot be prepared for training", site=group[0],
                hint="model.train() first, or fuse_modules after training.",
            )  # fmt: skip
    return root


def _groups(given: Sequence[Any]) -> list[list[str]]:
    return [list(given)] if given and isinstance(given[0], str) else [list(group) for group in given]


def _checked(root: nn.Module, group: list[str]) -> list[nn.Module]:
    names = dict(root.named_modules())
    for path in group:
        if path not in names:
            raise InputError(
                f"there is no module {path!r}", hint=nearest(path, [n for n in names if n], "modules")
            )
    found = [names[path] for path in group]
    kinds = "".join(
        "l" if isinstance(m, _ConvNd | nn.Linear) else "n" if isinstance(m, _BatchNorm)
        else "r" if isinstance(m, _RELU) else "i" if isinstance(m, nn.Identity) else "?"
        for m in found
    )  # fmt: skip
    if kinds.replace("i", "n") not in ("ln", "lnr", "lr", "nr"):
        what = ", ".join(type(m).__name__ for m in found)
        raise InputError(
            f"cannot fuse {what}", site=", ".join(group),
            hint="[conv or linear, norm, relu], [conv or linear, norm], [conv or linear, relu] or [norm, relu].",
        )  # fmt: skip
    return found
