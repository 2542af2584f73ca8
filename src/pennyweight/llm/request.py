"""What is wanted of a run, and what its steps share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from pennyweight.errors import InputError, nearest
from pennyweight.llm.directory import Directory
from pennyweight.llm.methods import Method
from pennyweight.llm.schemes import Scheme, scheme_of
from pennyweight.llm.skeleton import Skeleton
from pennyweight.measure import peak_bytes
from pennyweight.spec import QuantSpec

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Request:
    """What is wanted of a run.

    Args:
        scheme: name or spec of the blocks' linear layers, see `schemes`.
        group: inputs that share a scale.
        asymmetric: give weights a zero point.
        method: how codes are found, see `methods`.
        head: scheme of linear layers outside of the blocks; empty leaves them in float.
        embeddings: spec of tables; empty leaves them in float.
        windows: calibration windows at most.
        window: tokens of each.
        sequential: layers of a block see what the quantized layers before them in it make.
        smooth: exponent of SmoothQuant's scales of inputs; 0 for none.
        awq: scale inputs as AWQ does, whatever the method.
        rotate: rotate the hidden states.
        hadamard: turn what layers read that no rotation of the hidden states reaches, while the model runs.
        retarget: aim at what the layers of the float network would answer.
        steps: of methods that train.
        rate: of their first steps, see `autoround.Training`; 0 leaves it to them.
        seed: of the choice of windows.
        to: format of the result, see `targets`.
        cache: int8 or int4 keys and values, see `cache`; empty leaves them in float.
        layers: schemes of single layers of the blocks, pairs of path and text; see `mixed`.
    """

    scheme: str = "w4a8"
    group: int | None = None
    asymmetric: bool = False
    method: str = "searched"
    head: str = ""
    embeddings: str = ""
    windows: int = 128
    window: int = 512
    sequential: bool = True
    smooth: float = 0.0
    awq: bool = False
    rotate: bool = False
    hadamard: bool = False
    retarget: bool = False
    steps: int = 200
    rate: float = 0.0
    seed: int = 0
    to: str = "pennyweight"
    cache: str = ""
    layers: tuple[tuple[str, str], ...] = ()


@dataclass
class Run:
    """A run under way.

    Attributes:
        turn: the rotation of the hidden states, float64, or None.
        schemes: of every layer and table that is quantized.
    """

    directory: Directory
    skeleton: Skeleton
    request: Request
    scheme: Scheme
    method: Method
    report: Report
    turn: Tensor | None = None
    start: float = field(default_factory=time.perf_counter)
    schemes: dict[str, Scheme] = field(init=False)

    def __post_init__(self) -> None:
        self.schemes = schemes_of(self.skeleton, self.request, self.scheme)

    def inside(self, path: str) -> dict[str, Scheme]:
        """Schemes of a block's linear layers, by path inside of it."""
        return {n.removeprefix(f"{path}."): s for n, s in self.schemes.items() if n.startswith(f"{path}.")}

    def say(self, what: str, site: str, **data: Any) -> None:
        """One line of progress, with the time since the start and the most memory used so far."""
        seconds = round(time.perf_counter() - self.start, 1)
        self.report({"what": what, "site": site, "seconds": seconds, "memory": peak_bytes(), **data})


def schemes_of(skeleton: Skeleton, request: Request, scheme: Scheme) -> dict[str, Scheme]:
    """The scheme of every layer and table that is quantized.

    Raises:
        InputError: for tables that do more than look up, and schemes of layers that are in no block.
    """
    found = {}
    own = {path: Scheme.parse(text) for path, text in request.layers}
    for path, module in skeleton.model.named_modules():
        if isinstance(module, nn.Linear):
            inside = skeleton.inside(path)
            if inside or request.head:
                found[path] = own.pop(path, scheme) if inside else head_scheme(request, scheme)
        elif isinstance(module, nn.Embedding) and request.embeddings:
            if type(module) is not nn.Embedding:
                raise InputError("this table does more than look up rows", site=path, spec=type(module).__name__,
                                 hint="Leave --embeddings out.")  # fmt: skip
            found[path] = Scheme(QuantSpec.parse(request.embeddings))
    if own:
        unknown = next(iter(own))
        hint = nearest(unknown, [p for p in found if skeleton.inside(p)], "layers")
        raise InputError("a scheme is for a layer that no block has", site=unknown, hint=hint)
    return found


def head_scheme(request: Request, scheme: Scheme) -> Scheme:
    """Scheme of the layers outside of the blocks: `same` is that of the blocks.

    Raises:
        InputError: for calibrated activations.
    """
    found = scheme if request.head == "same" else scheme_of(request.head, request.group)
    if found.static:
        raise InputError(
            "the output layer's activations are ranged at run time", spec=str(found), hint="--head w8a8."
        )
    return found
