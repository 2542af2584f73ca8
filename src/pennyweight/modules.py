"""Converted modules as plain tensors in a safetensors file, and back: for models that have no whole-graph form.

The file holds every parameter and buffer under its own name, the recipe, the journal and a checksum. Reading it needs
the float model's code and one batch: the recipe is planned again, the layers are converted around dummy codes, and
every tensor is then replaced by the stored one. No calibration data are read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pennyweight.errors import FormatError, PennyweightError, nearest
from pennyweight.exporters.dwt import write_container
from pennyweight.journal import Event, Journal
from pennyweight.passes import Context
from pennyweight.passes.calibrate import quantizers
from pennyweight.passes.solve import Solve
from pennyweight.pipeline import convert, prepare, state
from pennyweight.program.text import dumps, loads
from pennyweight.qtensor import QParams
from pennyweight.recipe import Recipe
from pennyweight.runtime.container import in_file, read_container

MODULE_KEY, RECIPE_KEY, META_KEY = "pennyweight.module", "pennyweight.recipe", "pennyweight.meta"
VERSION = "1"

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class _Slot:
    """One place of the module tree that holds a parameter or buffer, or could."""

    name: str
    module: nn.Module
    key: str
    parameter: bool
    tensor: Tensor | None


def _slots(model: nn.Module) -> Iterator[_Slot]:
    for path, module in model.named_modules():
        for table, parameter in ((module._parameters, True), (module._buffers, False)):
            for key, tensor in table.items():
                yield _Slot(f"{path}.{key}".lstrip("."), module, key, parameter, tensor)


def save_module(model: nn.Module, path: str | os.PathLike[str], meta: dict[str, Any]) -> int:
    """Write the tensors of a converted model; returns the size in bytes.

    Args:
        model: from `quantize` or `convert`.
        path: target.
        meta: plain JSON values to keep with it.

    Raises:
        PennyweightError: if the model is not converted.
        OSError: if the file cannot be written.
    """
    st = state(model)
    if st.stage != "converted":
        raise PennyweightError(f"the model is {st.stage}, not converted", hint="Call pw.convert first.")
    tensors: dict[str, tuple[str, Any]] = {}
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for slot in _slots(model):
        if slot.tensor is None:
            continue
        if id(slot.tensor) in first:
            aliases[slot.name] = first[id(slot.tensor)]
            continue
        first[id(slot.tensor)] = slot.name
        data = slot.tensor.detach().cpu().contiguous()
        if data.dtype not in _NAMES:
            raise FormatError(f"{data.dtype} has no place in a module file", site=slot.name)
        bits = data.view(torch.uint16) if data.dtype == torch.bfloat16 else data
        tensors[slot.name] = _NAMES[data.dtype], bits.numpy()
    metadata = {
        MODULE_KEY: VERSION,
        RECIPE_KEY: st.recipe.to_text(),
        META_KEY: dumps({**meta, "aliases": aliases}),
    }
    return write_container(path, tensors, metadata)


def load_module(model: nn.Module, path: str | os.PathLike[str], example: Any) -> nn.Module:
    """Rebuild a converted model from its file.

    Args:
        model: the float model that it was made from; left untouched.
        path: from `save_module`.
        example: one batch.

    Raises:
        FormatError: if the file breaks a promise, or its tensors are not those of this model.
    """
    container = read_container(path)
    where = container.path
    version = container.metadata.get(MODULE_KEY)
    if version != VERSION:
        what = (
            "the file holds no converted module"
            if version is None
            else f"module version {version[:40]!r} is unknown"
        )
        raise FormatError(what, site=where, hint="Write it with pw.save(model, 'name.safetensors').")
    if RECIPE_KEY not in container.metadata:
        raise FormatError("the file holds no recipe", site=where)
    try:
        meta = loads(container.metadata.get(META_KEY, "{}"), "meta")
        aliases, log = _meta(meta)
    except PennyweightError as error:
        raise in_file(error, where) from error
    recipe = Recipe.parse(container.metadata[RECIPE_KEY])
    result = _skeleton(model, example, recipe)
    stored: dict[str, Tensor] = {}
    for name, (dtype, array) in container.tensors.items():
        if dtype not in _DTYPES:
            raise FormatError(f"tensor {name!r} is {dtype}", site=where)
        bits = torch.from_numpy(array.copy())
        stored[name] = bits.view(torch.bfloat16) if dtype == "BF16" else bits
    _fill(result, stored, aliases, where)
    st = state(result)
    st.recipe, st.journal = recipe, log
    return result


def _meta(meta: Any) -> tuple[dict[str, str], Journal]:
    if type(meta) is not dict:
        raise FormatError("the meta is no JSON object")
    aliases, events = meta.get("aliases", {}), meta.get("journal", [])
    if type(aliases) is not dict or not all(type(v) is str for v in aliases.values()):
        raise FormatError("the aliases are no object of names")
    fits = type(events) is list and all(
        type(e) is list and len(e) == 3 and [type(v) for v in e] == [str, str, dict] for e in events
    )
    if not fits:
        raise FormatError("the journal is no list of [kind, site, data]")
    return aliases, Journal([Event(*e) for e in events])


def _skeleton(model: nn.Module, example: Any, recipe: Recipe) -> nn.Module:
    """The converted model around dummy codes: the recipe's rules and float passes decide its structure."""
    shape_only = dataclasses.replace(recipe, passes=tuple(p for p in recipe.passes if p.stage == "float"))
    prepared = prepare(model, example, shape_only)
    st = state(prepared)
    for quantizer in quantizers(prepared).values():
        one = torch.ones(())
        quantizer.set(QParams(one, None if quantizer.spec.zero == "none" else torch.zeros(())))
    Solve(solver="rtn", range="minmax").run(Context(prepared, st.graph, Journal(), st.plan))
    st.stage = "calibrated"
    return convert(prepared)


def _fill(model: nn.Module, stored: dict[str, Tensor], aliases: dict[str, str], where: str) -> None:
    """Put the stored tensors into their places; every place and every tensor must find its other."""
    slots = list(_slots(model))
    names = [slot.name for slot in slots]
    for name in [*stored, *aliases]:
        if name not in names:
            raise FormatError(
                f"tensor {name!r} has no place in this model",
                site=where,
                hint=nearest(name, names[:200], "places"),
            )
    made: dict[str, Tensor] = {}
    for slot in slots:
        name = aliases.get(slot.name, slot.name)
        new, old = stored.get(name), slot.tensor
        optional = not slot.parameter and slot.key in ("bias", "zero")
        if new is None and old is not None and not optional:
            raise FormatError(
                f"tensor {slot.name!r} is missing",
                site=where,
                hint="Is this the float model it was made from?",
            )
        if new is not None and old is not None and new.shape != old.shape:
            raise FormatError(
                f"tensor {slot.name!r} does not fit this model",
                site=where,
                shapes=f"{tuple(new.shape)} stored, {tuple(old.shape)} wanted",
            )
        if slot.parameter:
            if new is not None and name not in made:
                trains = old is not None and old.requires_grad and new.is_floating_point()
                made[name] = nn.Parameter(new, requires_grad=trains)
            slot.module._parameters[slot.key] = None if new is None else made[name]  # type: ignore[assignment]
        else:
            slot.module._buffers[slot.key] = new
