"""Where names of torch and torchao went: data for the rewriting of imports and attribute chains."""

from __future__ import annotations

_HERE = "pennyweight.compat"

# module of old -> module here; whatever stands behind it stays
MODULES = {
    "torch.ao.quantization": f"{_HERE}.quantization",
    "torch.quantization": f"{_HERE}.quantization",
    "torch.ao.nn": f"{_HERE}.nn",
    "torch.nn.quantized": f"{_HERE}.nn.quantized",
    "torch.nn.intrinsic": f"{_HERE}.nn.intrinsic",
    "torch.nn.qat": f"{_HERE}.nn.qat",
    "torchao.quantization.prototype.qat": f"{_HERE}.torchao.quantization.qat",
    "torchao.quantization.pt2e": f"{_HERE}.quantization",
    "torchao.quantization": f"{_HERE}.torchao.quantization",
    "executorch.backends.xnnpack.quantizer": f"{_HERE}.quantization.quantizer",
    "torch._export.capture_pre_autograd_graph": f"{_HERE}.export.capture_pre_autograd_graph",
    "torch.export.export_for_training": f"{_HERE}.export.export_for_training",
}

# what has no counterpart -> what to write instead; reported by line, left as it is
GONE = {
    "torch.backends.quantized": "Remove it: kernels are chosen by instruction set. Name the backend in "
    "get_default_qconfig('x86').",
    "torch.quantize_per_tensor": "Tensors of quantized dtypes are going away: pw.formats and pw.QTensor hold codes.",
    "torch.quantize_per_channel": "Tensors of quantized dtypes are going away: pw.formats and pw.QTensor hold codes.",
    "torch.quantize_per_tensor_dynamic": "Tensors of quantized dtypes are going away: pw.QTensor holds codes.",
    "torch.ops.quantized": "Converted modules call the ops of this package by themselves.",
    "torch.ao.ns": "Compare layers by pw.journal(model), which has the error of every weight.",
    "torch._inductor.config.freezing": "Not needed: converted models run on this package's own engine.",
}

# only worth a word in files that quantize
SUSPECT = {
    "torch.jit.script": "Save with pw.save(model, 'model.dwt') and run with pw.load, which needs no torch.",
    "torch.jit.trace": "Save with pw.save(model, 'model.dwt') and run with pw.load, which needs no torch.",
    "torch.jit.save": "Save with pw.save(model, 'model.dwt').",
    "torch.jit.load": "Load with pw.load('model.dwt').",
}


def moved(name: str) -> str | None:
    """The new name of a module or of what is in it; None for what stays.

    >>> moved("torch.ao.quantization.observer")
    'pennyweight.compat.quantization.observer'
    """
    for old in sorted(MODULES, key=len, reverse=True):
        if name == old or name.startswith(f"{old}."):
            return MODULES[old] + name[len(old) :]
    return None


def reason(name: str, table: dict[str, str]) -> str | None:
    """What to write instead of a name, if a table has it or something around it."""
    return next((text for old, text in table.items() if name == old or name.startswith(f"{old}.")), None)
