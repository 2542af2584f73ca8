"""How many elements share a scale, in torchao's words."""

from __future__ import annotations

from dataclasses import dataclass

from pennyweight.errors import SpecError


class Granularity:
    """Base of what follows."""


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale."""


@dataclass(frozen=True)
class PerAxis(Granularity):
    """One scale per index of an axis."""

    axis: int = 0


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale per row."""

    dim: int = -1


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale per token, ranged at run time."""


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per `group_size` inputs of a row."""

    group_size: int = 32


def block_text(granularity: Granularity) -> str:
    """The block of a weight's spec, on its matrix view [out, in].

    Raises:
        SpecError: on a granularity that a weight cannot have here.
    """
    if isinstance(granularity, PerTensor):
        return "*"
    if isinstance(granularity, PerRow) or (isinstance(granularity, PerAxis) and granularity.axis == 0):
        return "1,*"
    if isinstance(granularity, PerGroup):
        return str(granularity.group_size)
    raise SpecError(
        f"a weight cannot have {granularity}", hint="PerGroup(n), PerAxis(0), PerRow() or PerTensor()."
    )
