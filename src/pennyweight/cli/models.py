"""What MODEL may be on the command line: `package.module:function`, a `.pt2` file, or a Hugging Face directory."""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pennyweight.errors import InputError, PennyweightError

FORMS = "MODEL is package.module:function, a .pt2 file of torch.export.save, or a Hugging Face directory."


@dataclass(frozen=True)
class Loaded:
    """A float model to be quantized, and one batch if the reference brings one."""

    model: nn.Module
    example: Any
    source: str


def load_model(reference: str) -> Loaded:
    """Load the model that a reference names.

    Raises:
        InputError: if it is none of the three forms, or the function gives no module.
        OSError, ImportError: if a file or a package is missing.
    """
    path = Path(reference)
    if path.suffix == ".pt2":
        return _exported(path)
    if path.is_dir():
        return _hugging_face(path)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise InputError(
            "a pickled checkpoint holds no network definition",
            site=reference,
            hint=f"Write a function that builds the network and loads it. {FORMS}",
        )
    found = call_reference(reference)
    model, example = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    if not isinstance(model, nn.Module):
        raise InputError(f"it gives a {type(model).__name__}, not a module", site=reference, hint=FORMS)
    return Loaded(model.eval(), example, reference)


def call_reference(reference: str) -> Any:
    """The object that `package.module:name` names, called if it is a plain function or class.

    Raises:
        InputError: if the text is no reference, nothing has that name, or the function raises.
    """
    value = find_reference(reference)
    if isinstance(value, nn.Module) or not callable(value):
        return value
    try:
        return value()
    except PennyweightError:
        raise
    except Exception as error:
        raise InputError(f"it raised {type(error).__name__}: {error}", site=reference) from error


def find_reference(reference: str) -> Any:
    """The object that `package.module:name` names. The current folder is searched too.

    Raises:
        InputError: if the text is no reference, or nothing has that name.
    """
    module_name, colon, name = reference.partition(":")
    if not colon or not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(f"{reference!r} is no file, folder or reference", hint=FORMS)
    if os.getcwd() not in sys.path:  # noqa: PTH109 (sys.path holds text)
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        value: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise InputError(f"{error}", site=reference, hint="Is it installed, or in this folder?") from error
    for part in name.split("."):
        if not hasattr(value, part):
            raise InputError(f"{module_name} has no {part!r}", site=reference)
        value = getattr(value, part)
    return value


def _exported(path: Path) -> Loaded:
    """A graph of `torch.export.save`, with its layers back and the example it was exported with."""
    from pennyweight.graph.modularize import modularize

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    try:
        program = torch.export.load(path)
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise InputError(
            f"it is no exported program: {type(error).__name__}: {''.join(first)}",
            site=str(path),
            hint="Write it with torch.export.save(torch.export.export(model, args), path).",
        ) from error
    example: Any = None
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        example = dict(kwargs) if kwargs and not args else tuple(args)
    return Loaded(modularize(program.module()), example, str(path))


def _hugging_face(path: Path) -> Loaded:
    """A model of the `transformers` library, from a directory with `config.json` and safetensors weights."""
    config = path / "config.json"
    if not config.is_file():
        raise InputError("the folder has no config.json", site=str(path), hint=FORMS)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"reading the Hugging Face directory {str(path)!r} needs transformers: pip install 'pennyweight[llm]'"
        ) from error
    architectures = json.loads(config.read_text("utf8")).get("architectures") or []
    kind = getattr(transformers, architectures[0], None) if architectures else None
    loader = transformers.AutoModel if kind is None else kind
    model = loader.from_pretrained(path, local_files_only=True, use_safetensors=True)
    example = {"input_ids": torch.ones(1, 16, dtype=torch.int64)} if "input_ids" in _names(model) else None
    return Loaded(model.eval(), example, str(path))


def _names(model: nn.Module) -> list[str]:
    """Parameter names of a model's forward."""
    import inspect

    return list(inspect.signature(model.forward).parameters)
