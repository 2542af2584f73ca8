"""Backends as data. Read where they say something here: operations that no pattern names stay in float."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch


class ObservationType(Enum):
    """How an output relates to its input; the dataflow decides it here."""

    OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT = 0
    OUTPUT_SHARE_OBSERVER_WITH_INPUT = 1
    INPUT_OUTPUT_NOT_OBSERVED = 2


@dataclass
class DTypeConfig:
    """Types that a pattern runs on."""

    input_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    bias_dtype: torch.dtype | None = None
    is_dynamic: bool | None = None


@dataclass
class BackendPatternConfig:
    """One operation, or a sequence of them. Every setter returns the configuration."""

    pattern: Any = None
    observation_type: ObservationType = ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT
    dtype_configs: list[DTypeConfig] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)

    def set_observation_type(self, observation_type: ObservationType) -> BackendPatternConfig:
        """See `ObservationType`."""
        self.observation_type = observation_type
        return self

    def add_dtype_config(self, dtype_config: DTypeConfig) -> BackendPatternConfig:
        """Types that it runs on."""
        self.dtype_configs.append(dtype_config)
        return self

    def set_dtype_configs(self, dtype_configs: list[DTypeConfig]) -> BackendPatternConfig:
        """Types that it runs on."""
        self.dtype_configs = list(dtype_configs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("set_") or name.startswith(
            "_set_"
        ):  # root modules, fuser methods: found by the dataflow

            def keep(value: Any) -> BackendPatternConfig:
                self.extra[name.removeprefix("_").removeprefix("set_")] = value
                return self

            return keep
        raise AttributeError(name)


class BackendConfig:
    """A named list of patterns. Every setter returns the configuration."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.configs: list[BackendPatternConfig] = []

    def set_name(self, name: str) -> BackendConfig:
        """Name it."""
        self.name = name
        return self

    def set_backend_pattern_config(self, config: BackendPatternConfig) -> BackendConfig:
        """Add a pattern."""
        self.configs.append(config)
        return self

    def set_backend_pattern_configs(self, configs: list[BackendPatternConfig]) -> BackendConfig:
        """Add patterns."""
        self.configs.extend(configs)
        return self

    @classmethod
    def from_dict(cls, backend_config_dict: dict[str, Any]) -> BackendConfig:
        """Read the old dictionary form."""
        made = cls(backend_config_dict.get("name", ""))
        for entry in backend_config_dict.get("configs", []):
            made.set_backend_pattern_config(BackendPatternConfig(entry.get("pattern")))
        return made

    def types(self) -> set[Any]:
        """Classes and functions that any pattern names."""
        return {leaf for config in self.configs for leaf in _leaves(config.pattern)}


def _leaves(pattern: Any) -> Iterable[Any]:
    if isinstance(pattern, tuple | list):
        for part in pattern:
            yield from _leaves(part)
    elif pattern is not None:
        yield pattern


def get_native_backend_config() -> BackendConfig:
    """Ours: everything that has an integer form."""
    return BackendConfig("native")


get_fbgemm_backend_config = get_native_backend_config
get_x86_backend_config = get_native_backend_config
get_onednn_backend_config = get_native_backend_config
get_qnnpack_backend_config = get_native_backend_config
