"""What a layer may be given: the formats that the search chooses from, one entry each."""

from __future__ import annotations

import glob
from dataclasses import dataclass

from pennyweight.plan import WEIGHT_ONLY, Keep, LayerPlan, Rule
from pennyweight.registry import Registry
from pennyweight.spec import QuantSpec


@dataclass(frozen=True)
class LayerFormat:
    """A format of a layer's weight and of what it reads.

    Args:
        weight: bits of a weight; with `grid` the spec is `grid[1,*]`, one scale per output channel.
        input: bits of the activations.
        grid: of the weight, "" for floats.
        input_grid: of the activations, "" for floats.
        keep: storage of a layer that stays in float.
        base: whether the recipe that is searched from says it already, so that no rule is needed.
    """

    weight: int
    input: int
    grid: str = ""
    input_grid: str = ""
    keep: Keep = ""
    base: bool = False

    @property
    def weight_spec(self) -> QuantSpec | None:
        """One scale per row."""
        return QuantSpec.parse(f"{self.grid}[1,*]") if self.grid else None

    @property
    def input_spec(self) -> QuantSpec | None:
        """One scale per tensor, with a zero point."""
        return QuantSpec.parse(f"{self.input_grid}[*]+z") if self.input_grid else None

    @property
    def integer(self) -> bool:
        """Whether the layer multiplies integers."""
        return not self.keep

    def rule(self, layer: LayerPlan) -> Rule | None:
        """The rule that gives one layer this format; None where the base recipe does."""
        match = glob.escape(layer.name)
        if self.keep == "float32":
            return Rule(match, keep="float32", optional=True)
        if self.keep:
            return Rule(match, keep=self.keep, narrow=True, optional=True)
        if self.base:
            return None
        spec = None if layer.kind in WEIGHT_ONLY else self.input_spec
        return Rule(match, weight=self.weight_spec, input=spec, optional=True)


layer_formats: Registry[LayerFormat] = Registry("formats of layers")
layer_formats.add("float32", LayerFormat(32, 32, keep="float32"))
layer_formats.add("bf16", LayerFormat(16, 16, keep="bfloat16"))
layer_formats.add("int8", LayerFormat(8, 8, "int8n", "uint8", base=True))
for _bits in (2, 3, 4, 5, 6):
    _grid = f"int{_bits}n" if _bits > 3 else f"int{_bits}"
    layer_formats.add(f"int{_bits}", LayerFormat(_bits, 8, _grid, "uint8"))
for _bits in (2, 3, 4):
    _grid = f"int{_bits}n" if _bits > 3 else f"int{_bits}"
    layer_formats.add(f"w{_bits}a{_bits}", LayerFormat(_bits, _bits, _grid, f"uint{_bits}"))
