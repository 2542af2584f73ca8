"""Options of the FX face. What they asked of symbolic tracing is not needed: models are followed as they run."""

from __future__ import annotations

from typing import Any

from torch import nn

from pennyweight.errors import PennyweightError

_OWN = "Quantize the whole model and keep or treat single modules by QConfigMapping.set_module_name."


class PrepareCustomConfig:
    """Which modules to leave alone. Every setter returns the configuration."""

    def __init__(self) -> None:
        self.non_traceable_module_names: list[str] = []
        self.non_traceable_module_classes: list[type[nn.Module]] = []
        self.preserved_attributes: list[str] = []
        self.input_quantized_indexes: list[int] = []
        self.output_quantized_indexes: list[int] = []

    def set_non_traceable_module_names(self, module_names: list[str]) -> PrepareCustomConfig:
        """These modules, and all inside of them, stay in float."""
        self.non_traceable_module_names = list(module_names)
        return self

    def set_non_traceable_module_classes(self, module_classes: list[type[nn.Module]]) -> PrepareCustomConfig:
        """Modules of these classes, and all inside of them, stay in float."""
        self.non_traceable_module_classes = list(module_classes)
        return self

    def set_preserved_attributes(self, attributes: list[str]) -> PrepareCustomConfig:
        """Attributes survive anyway: the model keeps its class."""
        self.preserved_attributes = list(attributes)
        return self

    def set_input_quantized_indexes(self, indexes: list[int]) -> PrepareCustomConfig:
        """Inputs of a program are floats, which it rounds itself.

        Raises:
            PennyweightError: if there are any.
        """
        return self._only_empty("set_input_quantized_indexes", indexes)

    def set_output_quantized_indexes(self, indexes: list[int]) -> PrepareCustomConfig:
        """Results of a program are floats.

        Raises:
            PennyweightError: if there are any.
        """
        return self._only_empty("set_output_quantized_indexes", indexes)

    def _only_empty(self, name: str, indexes: list[int]) -> PrepareCustomConfig:
        if indexes:
            raise PennyweightError(
                f"{name} has no counterpart here", hint="Inputs and results are float tensors."
            )
        return self

    def set_standalone_module_name(self, *args: Any, **kwargs: Any) -> PrepareCustomConfig:
        """Raises PennyweightError."""
        raise PennyweightError("standalone modules have no counterpart here", hint=_OWN)

    def set_standalone_module_class(self, *args: Any, **kwargs: Any) -> PrepareCustomConfig:
        """Raises PennyweightError."""
        raise PennyweightError("standalone modules have no counterpart here", hint=_OWN)

    def set_float_to_observed_mapping(self, *args: Any, **kwargs: Any) -> PrepareCustomConfig:
        """Raises PennyweightError."""
        raise PennyweightError(
            "observed modules of one's own have no counterpart here",
            hint="Register a twin: pennyweight.nn.twins.add('MyModule', family).",
        )

    @classmethod
    def from_dict(cls, prepare_custom_config_dict: dict[str, Any]) -> PrepareCustomConfig:
        """Read the old dictionary form.

        Raises:
            PennyweightError: on keys that cannot be honoured.
        """
        made = cls()
        for key, value in prepare_custom_config_dict.items():
            if key == "non_traceable_module_name":
                made.set_non_traceable_module_names(value)
            elif key == "non_traceable_module_class":
                made.set_non_traceable_module_classes(value)
            elif key == "preserved_attributes":
                made.set_preserved_attributes(value)
            elif value:
                raise PennyweightError(f"{key!r} has no counterpart here", hint=_OWN)
        return made

    def to_dict(self) -> dict[str, Any]:
        """The old dictionary form."""
        return {
            "non_traceable_module_name": self.non_traceable_module_names,
            "non_traceable_module_class": self.non_traceable_module_classes,
            "preserved_attributes": self.preserved_attributes,
        }

    def kept(self, model: nn.Module) -> list[str]:
        """Paths of the modules to be left alone."""
        classes = tuple(self.non_traceable_module_classes)
        found = [p for p, m in model.named_modules() if classes and isinstance(m, classes)]
        return [*self.non_traceable_module_names, *found]


class ConvertCustomConfig:
    """Attributes to keep; all are kept."""

    def __init__(self) -> None:
        self.preserved_attributes: list[str] = []

    def set_preserved_attributes(self, attributes: list[str]) -> ConvertCustomConfig:
        """Attributes survive anyway."""
        self.preserved_attributes = list(attributes)
        return self

    def set_observed_to_quantized_mapping(self, *args: Any, **kwargs: Any) -> ConvertCustomConfig:
        """Raises PennyweightError."""
        raise PennyweightError(
            "quantized modules of one's own have no counterpart here",
            hint="Register a twin: pennyweight.nn.twins.add('MyModule', family).",
        )

    @classmethod
    def from_dict(cls, convert_custom_config_dict: dict[str, Any]) -> ConvertCustomConfig:
        """Read the old dictionary form."""
        return cls().set_preserved_attributes(convert_custom_config_dict.get("preserved_attributes", []))

    def to_dict(self) -> dict[str, Any]:
        """The old dictionary form."""
        return {"preserved_attributes": self.preserved_attributes}


class FuseCustomConfig(ConvertCustomConfig):
    """Attributes to keep; all are kept."""
