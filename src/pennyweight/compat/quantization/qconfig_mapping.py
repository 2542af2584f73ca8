"""`QConfigMapping`: which layers get which `QConfig`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from pennyweight.compat.quantization.qconfig import (
    QConfigAny,
    default_symmetric_qnnpack_qat_qconfig,
    default_symmetric_qnnpack_qconfig,
    get_default_qat_qconfig,
    get_default_qconfig,
)
from pennyweight.errors import InputError, nearest

_KEYS = ("", "object_type", "module_name_regex", "module_name", "module_name_object_type_order")


class QConfigMapping:
    """Later ones win: global, object type, name by pattern, name, name with type and order.

    Every setter returns the mapping. None leaves what it names in float.
    """

    def __init__(self) -> None:
        self.global_qconfig: QConfigAny = None
        self.object_type_qconfigs: OrderedDict[Callable[..., Any] | str, QConfigAny] = OrderedDict()
        self.module_name_regex_qconfigs: OrderedDict[str, QConfigAny] = OrderedDict()
        self.module_name_qconfigs: OrderedDict[str, QConfigAny] = OrderedDict()
        self.module_name_object_type_order_qconfigs: OrderedDict[
            tuple[str, Callable[..., Any] | str, int], QConfigAny
        ] = OrderedDict()

    def set_global(self, global_qconfig: QConfigAny) -> QConfigMapping:
        """For everything that nothing else names."""
        self.global_qconfig = global_qconfig
        return self

    def set_object_type(self, object_type: Callable[..., Any] | str, qconfig: QConfigAny) -> QConfigMapping:
        """For a module class, a function, or the name of a method."""
        self.object_type_qconfigs[object_type] = qconfig
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: QConfigAny) -> QConfigMapping:
        """For modules whose path matches a regular expression; the first that matches decides."""
        self.module_name_regex_qconfigs[module_name_regex] = qconfig
        return self

    def set_module_name(self, module_name: str, qconfig: QConfigAny) -> QConfigMapping:
        """For the module at a path, and everything inside of it."""
        self.module_name_qconfigs[module_name] = qconfig
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: Callable[..., Any] | str, index: int, qconfig: QConfigAny
    ) -> QConfigMapping:
        """For the call number `index` of an operation inside of the module at a path."""
        self.module_name_object_type_order_qconfigs[(module_name, object_type, index)] = qconfig
        return self

    def to_dict(self) -> dict[str, Any]:
        """The old dictionary form."""
        return {
            "": self.global_qconfig,
            "object_type": [(k, v) for k, v in self.object_type_qconfigs.items()],
            "module_name_regex": [(k, v) for k, v in self.module_name_regex_qconfigs.items()],
            "module_name": [(k, v) for k, v in self.module_name_qconfigs.items()],
            "module_name_object_type_order": [
                (*k, v) for k, v in self.module_name_object_type_order_qconfigs.items()
            ],
        }

    @classmethod
    def from_dict(cls, qconfig_dict: dict[str, Any]) -> QConfigMapping:
        """Read the old dictionary form.

        Raises:
            InputError: on unknown keys.
        """
        made = cls()
        for key in qconfig_dict:
            if key not in _KEYS:
                raise InputError(
                    f"unknown key {key!r} of a qconfig dictionary", hint=nearest(key, _KEYS, "keys")
                )
        made.set_global(qconfig_dict.get(""))
        for kind, qconfig in qconfig_dict.get("object_type", []):
            made.set_object_type(kind, qconfig)
        for pattern, qconfig in qconfig_dict.get("module_name_regex", []):
            made.set_module_name_regex(pattern, qconfig)
        for name, qconfig in qconfig_dict.get("module_name", []):
            made.set_module_name(name, qconfig)
        for name, kind, index, qconfig in qconfig_dict.get("module_name_object_type_order", []):
            made.set_module_name_object_type_order(name, kind, index, qconfig)
        return made

    def __repr__(self) -> str:
        entries = "\n".join(f" {k or 'global'}: {v}" for k, v in self.to_dict().items())
        return f"QConfigMapping (\n{entries}\n)"


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    """A backend's rules after training, for everything."""
    return QConfigMapping().set_global(get_default_qconfig(backend, version))


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    """A backend's rules in training, for everything."""
    return QConfigMapping().set_global(get_default_qat_qconfig(backend, version))


def get_symmetric_qnnpack_qconfig_mapping() -> QConfigMapping:
    """int8 activations, symmetric weights per tensor."""
    return QConfigMapping().set_global(default_symmetric_qnnpack_qconfig)


def get_symmetric_qnnpack_qat_qconfig_mapping() -> QConfigMapping:
    """The same in training."""
    return QConfigMapping().set_global(default_symmetric_qnnpack_qat_qconfig)
