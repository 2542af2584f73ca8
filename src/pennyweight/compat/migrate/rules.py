"""Where names of torch and torchao went: data for the rewriting of imports and attribute chains.

What moved is rewritten. What is gone is left as it stands, and its line is reported with the reason and the new way
to say it. `torch.backends.quantized.engine = name` becomes a call of `set_backend(name)`, because torch refuses an
engine that it was not built with, while the name still says which rules are meant; only reading it is reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

_HERE = "pennyweight.compat"

# module (or function) of old -> the same here; whatever stands behind it stays. The longest match counts.
MODULES = {
    "torch.ao.quantization": f"{_HERE}.quantization",
    "torch.quantization": f"{_HERE}.quantization",
    "torch.ao.nn": f"{_HERE}.nn",
    "torch.nn.quantized": f"{_HERE}.nn.quantized",
    "torch.nn.quantizable": f"{_HERE}.nn.quantizable",
    "torch.nn.intrinsic": f"{_HERE}.nn.intrinsic",
    "torch.nn.qat": f"{_HERE}.nn.qat",
    "torchao.quantization": f"{_HERE}.torchao.quantization",
    "torchao.quantization.prototype.qat": f"{_HERE}.torchao.quantization.qat",
    "torchao.quantization.pt2e": f"{_HERE}.quantization",
    "torchao.quantization.pt2e.export_utils": f"{_HERE}.quantization.pt2e.export_utils",
    "torchao.quantize_": f"{_HERE}.torchao.quantization.quantize_",
    "torchao.autoquant": f"{_HERE}.torchao.quantization.autoquant",
    "executorch.backends.xnnpack.quantizer": f"{_HERE}.quantization.quantizer",
    "torch._export.capture_pre_autograd_graph": f"{_HERE}.export.capture_pre_autograd_graph",
    "torch.export.export_for_training": f"{_HERE}.export.export_for_training",
}

# torch stays installed; these may not: an import of them goes where nothing of them stays in use
PACKAGES = ("torchao", "executorch")

# an attribute that was assigned to -> the function that takes the value
SETTERS = {"torch.backends.quantized.engine": f"{_HERE}.quantization.set_backend"}


@dataclass(frozen=True)
class Gone:
    """What has no counterpart under its old name: why, and what to write instead."""

    why: str
    instead: str


_CODES = Gone(
    "torch is giving up tensors of quantized dtypes",
    "pw.QTensor holds codes, scale and zero point as plain tensors; converted models quantize their inputs themselves.",
)
_ENGINES = Gone(
    "the engine chooses kernels by instruction set, and `pennyweight doctor` lists them",
    "Name the backend where its rules are asked for: get_default_qconfig('x86').",
)
_SCRIPT = Gone(
    "a converted model's integer operations have no TorchScript form",
    "Write pw.save(model, 'model.dwt'), and pw.load('model.dwt').run(x), which needs no torch.",
)

# reported in every file
GONE = {
    **dict.fromkeys(("torch.backends.quantized.engine", "torch.backends.quantized.supported_engines"), _ENGINES),
    "torch.quantize_per_tensor": _CODES,
    "torch.quantize_per_tensor_dynamic": _CODES,
    "torch.quantize_per_channel": _CODES,
    "torch.ops.quantized": Gone(
        "converted models call the operations of this package", "Let convert make the call: quantize the module."
    ),
    "torch.ao.ns": Gone("layers are compared here by the journal", "pw.journal(model) has every weight's error."),
    "torchao.dtypes": Gone("no tensor subclasses are made here", "pw.QTensor holds codes, scale and zero point."),
    "torch.utils.mobile_optimizer": Gone(
        _SCRIPT.why, "Write pw.save(model, 'model.dwt'); the engine plans layouts and fusions itself."
    ),
}  # fmt: skip

# reported in files that quantize: elsewhere these are ordinary torch
SUSPECT = {
    **{
        f"torch.jit.{name}": _SCRIPT
        for name in ("script", "trace", "save", "load", "freeze", "optimize_for_inference", "fuser")
    },
    "torch.onnx.export": Gone(
        "torch's exporter does not know the integer operations of a converted model",
        "Write pw.save(model, 'model.dwt'), or export the float model.",
    ),
    "torch._inductor": Gone(
        "the inductor's int8 lowering is not used", "Leave it out: converted models run on integer kernels as they are."
    ),
    "torch._dynamo.export": Gone(
        "it no longer gives the graph that quantizers annotate",
        "Call pennyweight.compat.export.capture_pre_autograd_graph(model, args).",
    ),
}  # fmt: skip

# reported in files that quantize and speak of the inductor
LOWERING = {
    "torch.compile": Gone(
        "nothing is left to lower: a converted model calls integer kernels by itself",
        "Leave it out, or plan the whole graph: pw.save(model, 'model.dwt').",
    ),
}  # fmt: skip

# methods of quantized tensors and of scripted modules, whatever they are called on; in files that quantize
METHODS = {
    **dict.fromkeys(
        (
            "int_repr",
            "q_scale",
            "q_zero_point",
            "q_per_channel_scales",
            "q_per_channel_zero_points",
            "qscheme",
        ),
        _CODES,
    ),
    "_save_for_lite_interpreter": _SCRIPT,
}

# patterns of old names that the modules here lack -> what to write instead; the first match counts
INSTEAD = {
    "*numeric_suite*": GONE["torch.ao.ns"].instead,
    "*_mappings": "Layers are matched by type: pw.Rule(types=...) in a pw.Recipe.",
    "*.get_*_operator": "Layers are matched by type: pw.Rule(types=...) in a pw.Recipe.",
    "*.swap_module": "Layers are matched by type: pw.Rule(types=...) in a pw.Recipe.",
    "*.get_combined_dict": "Write {**defaults, **additional}.",
    "*.quantization.fx.*": "The recorded graph of a model is pw.record(model, example).",
    "*.quantize_jit*": _SCRIPT.instead,
    "*.nn.*": "Prepare the float layer; pw.journal(model) lists what convert made of it.",
    "torchao.*": "pw.quantize(model, batches, recipe=...) with one of pw.presets(), or a pw.Recipe of your own.",
    "*": "Say it as a pw.Recipe: rules choose the layers and their formats, passes do the rest.",
}


def moved(name: str) -> str | None:
    """The new name of a module or of what is in it; None for what stays.

    >>> moved("torch.ao.quantization.observer")
    'pennyweight.compat.quantization.observer'
    """
    root = root_of(name)
    return None if root is None else MODULES[root] + name[len(root) :]


def root_of(name: str) -> str | None:
    """The part of an old name that `MODULES` has, the longest; None for what stays.

    >>> root_of("torch.quantization.observer"), root_of("torch.nn.Linear")
    ('torch.quantization', None)
    """
    return next(around for around in _around(name) if around is None or around in MODULES)


def gone(name: str, *tables: dict[str, Gone]) -> Gone | None:
    """What a table says about a name, or about the nearest thing around it."""
    for around in _around(name):
        for table in tables:
            if around in table:
                return table[around]
    return None


def instead_of(name: str) -> str:
    """What to write instead of an old name that the modules here lack."""
    return next(text for pattern, text in INSTEAD.items() if fnmatchcase(name, pattern))


def _around(name: str) -> list[str | None]:
    """`a.b.c`, `a.b`, `a` and at last None."""
    parts = name.split(".")
    return [*(".".join(parts[:count]) for count in range(len(parts), 0, -1)), None]
