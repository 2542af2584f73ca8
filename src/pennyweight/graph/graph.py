"""The recorded dataflow: nodes are module calls and function calls, edges are tensors. Read only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property


@dataclass(frozen=True, slots=True, order=True)
class Ref:
    """Output `index` of node `node`."""

    node: int
    index: int = 0


@dataclass(frozen=True, slots=True)
class Value:
    """Shape and dtype of one output."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Node:
    """One call.

    Attributes:
        id: position in the order of execution.
        kind: "input", "module" (a leaf module), "call" (a torch function) or "output".
        path: path of the leaf module, or of the innermost module around a function call.
        op: class name of the module, or normalised name of the function ("add" for `+`, `add_`, `torch.add`).
        index: how many calls of this op the same forward of that module made before; for modules the call count.
        inputs: producers of the tensor operands, in order of position; None where an operand is no recorded tensor.
        params: names of parameters and buffers among the operands, by operand position.
        outputs: shape and dtype of every tensor output.
        scalars: operands that are plain numbers, by position.
    """

    id: int
    kind: str
    path: str
    op: str
    index: int
    inputs: tuple[Ref | None, ...]
    params: dict[int, str]
    outputs: tuple[Value, ...]
    scalars: dict[int, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """How the node is called in messages and sites: a module path, or `path:op/index`."""
        return self.path if self.kind == "module" else f"{self.path}:{self.op}/{self.index}"


@dataclass(frozen=True)
class Graph:
    """Nodes in order of execution. Several runs may be recorded into one graph; equal nodes are not joined."""

    nodes: tuple[Node, ...]
    module_types: dict[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __getitem__(self, index: int) -> Node:
        return self.nodes[index]

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def _users(self) -> dict[Ref, tuple[tuple[Node, int], ...]]:
        table: dict[Ref, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for position, ref in enumerate(node.inputs):
                if ref is not None:
                    table.setdefault(ref, []).append((node, position))
        return {ref: tuple(users) for ref, users in table.items()}

    def users(self, ref: Ref) -> tuple[tuple[Node, int], ...]:
        """Nodes that read a value, each with the operand position."""
        return self._users.get(ref, ())

    def producer(self, ref: Ref) -> Node:
        """The node that made a value."""
        return self.nodes[ref.node]

    def modules(self, path: str) -> tuple[Node, ...]:
        """All calls of the leaf module at `path`."""
        return tuple(n for n in self.nodes if n.kind == "module" and n.path == path)

    def value(self, ref: Ref) -> Value:
        """Shape and dtype of a value."""
        return self.nodes[ref.node].outputs[ref.index]
