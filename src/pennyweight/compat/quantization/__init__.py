"""`torch.ao.quantization` as it was. Each name is fetched from its module when it is first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from pennyweight.errors import nearest

_PLACES = {  # public name -> the module that has it
    **dict.fromkeys(
        ("allow_exported_model_train_eval", "move_exported_model_to_eval", "move_exported_model_to_train"),
        "pt2e.export_utils",
    ),
    **dict.fromkeys(("prepare_pt2e", "prepare_qat_pt2e", "convert_pt2e"), "quantize_pt2e"),
}


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module, once."""
    if name not in _PLACES:
        raise AttributeError(f"{__name__} has no {name!r}. {nearest(name, _PLACES, 'public names')}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
