"""Annotating the patterns that backends share: products with what follows them, sums, pools, joins."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import Tensor, fx
from torch.fx import Node

from pennyweight.compat.quantization.quantizer.quantizer import (
    ANNOTATION,
    QuantizationAnnotation,
    QuantizationSpec,
    SharedQuantizationSpec,
)
from pennyweight.graph import ops
from pennyweight.graph.record import op_name

Filter = Callable[[Node], bool]
CLIPS = ops.CLIPS & {"relu", "relu6", "hardtanh", "clamp"}
PRODUCTS = ops.FUNCTIONAL_LAYERS


@dataclass(frozen=True)
class Named:
    """Constructor of the observer or fake-quantizer of a name, looked up when it is called."""

    __name__: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """An instance of that class."""
        from importlib import import_module

        place = "fake_quantize" if "FakeQuant" in self.__name__ else "observer"
        return getattr(import_module(f"pennyweight.compat.quantization.{place}"), self.__name__)(
            *args, **kwargs
        )


@dataclass(eq=True, frozen=True)
class QuantizationConfig:
    """Specs of what an operation reads, gives and holds; None for what stays in float."""

    input_activation: QuantizationSpec | None
    output_activation: QuantizationSpec | None
    weight: QuantizationSpec | None
    bias: QuantizationSpec | None
    is_qat: bool = False

    @property
    def is_dynamic(self) -> bool:
        """Whether activations are ranged at run time."""
        return self.input_activation is not None and self.input_activation.is_dynamic


def kind_of(node: Node) -> str:
    """The operation of a node by the name that all its spellings share; "" for nodes that call nothing."""
    return op_name(node.target) if node.op == "call_function" and callable(node.target) else ""


def is_annotated(nodes: Iterable[Node]) -> bool:
    """Whether an annotator took one of the nodes."""
    return any(getattr(n.meta.get(ANNOTATION), "_annotated", False) for n in nodes)


def followed(node: Node, kinds: frozenset[str] | set[str]) -> Node | None:
    """The only reader of a node, if it is of such a kind."""
    users = list(node.users)
    return users[0] if len(users) == 1 and kind_of(users[0]) in kinds else None


def chain_from(node: Node) -> list[Node]:
    """A product or sum with the batch norm and the clip behind it, where they are its only readers."""
    chain = [node]
    for kinds in ({"batch_norm"}, CLIPS):
        after = followed(chain[-1], kinds)
        if after is not None:
            chain.append(after)
    return chain


def source(node: Node) -> Node:
    """The node whose values, moved or clipped by nodes that no annotator took, a node gives."""
    while (
        kind_of(node) in ops.MOVES | ops.CLIPS and not is_annotated([node]) and isinstance(node.args[0], Node)
    ):
        node = node.args[0]
    return node


def annotate_chain(chain: list[Node], inputs: dict[Node, Any], output: Any) -> None:
    """Specs into the first node of a pattern and out of the last; all of it is taken."""
    for node in chain:
        node.meta[ANNOTATION] = QuantizationAnnotation(_annotated=True)
    chain[0].meta[ANNOTATION].input_qspec_map = inputs
    chain[-1].meta[ANNOTATION].output_qspec = output


def annotate_products(
    model: fx.GraphModule,
    config: QuantizationConfig,
    wanted: Filter,
    kinds: Iterable[str] = PRODUCTS,
    *,
    output: bool = True,
) -> None:
    """Linear layers and convolutions, with the norm and the clip behind them."""
    for node in model.graph.nodes:
        chain = list(takewhile(wanted, chain_from(node))) if kind_of(node) in kinds else []
        if not chain or is_annotated(chain):
            continue
        specs = (config.input_activation, config.weight, config.bias)
        inputs = {n: s for n, s in zip(node.args[:3], specs, strict=False) if isinstance(n, Node)}
        annotate_chain(chain, inputs, config.output_activation if output else None)


def annotate_binary(
    model: fx.GraphModule,
    config: QuantizationConfig,
    wanted: Filter,
    kinds: Iterable[str],
    *,
    output: bool = True,
) -> None:
    """Sums and products of two float tensors, matrix products too, with the clip behind them."""
    for node in model.graph.nodes:
        if kind_of(node) not in kinds or not all(_is_float(a) for a in node.args[:2]):
            continue
        chain = list(takewhile(wanted, chain_from(node)))
        if not chain or is_annotated(chain):
            continue
        inputs = {a: config.input_activation for a in node.args[:2] if isinstance(a, Node)}
        annotate_chain(chain, inputs, config.output_activation if output else None)


def annotate_pools(
    model: fx.GraphModule,
    config: QuantizationConfig,
    wanted: Filter,
    kinds: Iterable[str],
    *,
    follow: bool = False,
) -> None:
    """Joins, whose operands and result share a scale, and pools, which do well with a scale of their own.

    follow: only where what they read, moved or clipped, comes from an annotated node.
    """
    for node in model.graph.nodes:
        if kind_of(node) not in kinds or is_annotated([node]) or not wanted(node):
            continue
        first = node.args[0]
        operands = [a for a in (first if isinstance(first, list | tuple) else [first]) if _is_float(a)]
        if not operands or (follow and not all(is_annotated([source(a)]) for a in operands)):
            continue
        lead = (operands[0], node)
        inputs: dict[Node, Any] = dict.fromkeys(operands, SharedQuantizationSpec(lead))
        inputs[operands[0]] = config.input_activation
        joined = kind_of(node) in ops.JOINS
        annotate_chain([node], inputs, SharedQuantizationSpec(lead) if joined else config.output_activation)


def _is_float(value: Any) -> bool:
    tensor = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def module_of(node: Node) -> list[tuple[str, str]]:
    """Paths and class names of the modules that a node was made in, outermost first."""
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return [
        (str(path), kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}")
        for path, kind in stack
    ]


def in_module_named(name: str) -> Filter:
    """Nodes made in the module of a path, or below."""
    return lambda node: any(path == name or path.startswith(f"{name}.") for path, _ in module_of(node))


def in_module_type(kind: Any) -> Filter:
    """Nodes made in a module of a class; `kind` is the class or its full name."""
    full = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return lambda node: any(made_by == full for _, made_by in module_of(node))
