"""From an annotated graph to rules: what `node.meta["quantization_annotation"]` says becomes what the planner reads.

An edge is quantized by the consumer's spec for it, or by the producer's spec of its result, which also reaches through
operations that only move values. A result that only float operations read keeps its float value: it isn't rounded for
nobody. Bias specs are ignored: a bias is int32 at the scale of input times weight.
"""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from pennyweight.compat.quantization import _specs
from pennyweight.compat.quantization.quantizer.annotators import kind_of
from pennyweight.compat.quantization.quantizer.quantizer import ANNOTATION
from pennyweight.errors import UnrealisableSite
from pennyweight.graph import ops
from pennyweight.plan import LayerPlan, Rule

_GLUE = ops.BINARY | ops.UNARY | ops.POOLS | {"batch_norm"}
_MOVING = ops.MOVES | ops.SLICES | ops.CLIPS


@dataclass
class Findings:
    """What an annotated graph asks for.

    Attributes:
        rules: one a layer or operation.
        fixed: scale and zero point that are known beforehand, by site.
        ties: groups of sites that share a scale.
        notes: what was not taken over, and why: (name, reason).
        inputs: how often each range rule is asked for by activations; weights likewise.
    """

    rules: list[Rule] = field(default_factory=list)
    fixed: dict[str, tuple[float, float]] = field(default_factory=dict)
    ties: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    inputs: Counter[str] = field(default_factory=Counter)
    weights: Counter[str] = field(default_factory=Counter)


def read(nodes: list[fx.Node], names: Mapping[str, str], types: Mapping[str, str]) -> Findings:
    """The rules that annotated nodes ask for.

    Args:
        nodes: of the annotated graph, in order.
        names: by node name, what the recorder calls the layer or call.
        types: class names of modules by path.

    Raises:
        UnrealisableSite: if a spec is nothing that the engine runs, or operands of one operation have different ones.
    """
    found, edges = Findings(), _Edges()
    sites: dict[fx.Node, list[str]] = {}
    for node in nodes:
        if node.op != "call_function" or node.name not in names:
            continue
        name = names[node.name]
        kind = kind_of(node)
        if kind in ops.FUNCTIONAL_LAYERS | {"embedding"}:
            rule, read_at = _layer(node, kind, name, edges, found)
        elif kind in ops.MATMULS | ops.ATTENTION | _GLUE and edges.annotated(node):
            rule, read_at = _operation(node, kind, name, types.get(name, kind), edges, found)
        else:
            continue
        if rule is None:
            continue
        found.rules.append(rule)
        for position, producer, spec in read_at:
            site = str(LayerPlan(name, kind).input_site(position))
            sites.setdefault(producer, []).append(site)
            if type(spec).__name__ == "FixedQParamsQuantizationSpec":
                found.fixed[site] = float(spec.scale), float(spec.zero_point)
    for group in edges.shared(nodes):
        tied = [site for value in group for site in sites.get(value, [])]
        if len(tied) > 1:
            found.ties.append(tuple(dict.fromkeys(tied)))
    return found


Read = list[tuple[int, fx.Node, Any]]  # operand position, producer, spec


def _layer(node: fx.Node, kind: str, name: str, edges: _Edges, found: Findings) -> tuple[Rule | None, Read]:
    """The rule of a layer with a weight, and the edges that its activations come by."""
    first, second = node.args[0], node.args[1]
    weight_node, input_node = (first, None) if kind == "embedding" else (second, first)
    assert isinstance(weight_node, fx.Node)
    wanted = edges.spec(weight_node, node)
    given = edges.spec(input_node, node) if isinstance(input_node, fx.Node) else None
    weight = _specs.weight_spec(wanted, name, _out_axis(node, kind))
    activation = _specs.activation_spec(given, name)
    if weight is None:
        if wanted is not None and _specs.is_half(wanted):
            return Rule(glob.escape(name), keep=_specs.half_name(wanted)), []
        if activation is not None:
            found.notes.append((name, "its input has a spec, its weight has none"))
        return None, []
    found.weights[_specs.range_of(wanted)] += 1
    if activation is None:
        return Rule(glob.escape(name), weight=weight), []
    if weight.zero != "none":
        raise UnrealisableSite(
            "with integer activations a weight has no zero point", site=f"{name}:weight", spec=str(weight),
            hint="Use torch.per_channel_symmetric or torch.per_tensor_symmetric.",
        )  # fmt: skip
    spec, dynamic = activation
    if not dynamic:
        found.inputs[_specs.range_of(given)] += 1
    assert isinstance(input_node, fx.Node)
    read_at: Read = [] if dynamic else [(0, input_node, given)]
    return Rule(glob.escape(name), weight=weight, input=spec, dynamic=dynamic), read_at


def _operation(
    node: fx.Node, kind: str, name: str, type_name: str, edges: _Edges, found: Findings
) -> tuple[Rule | None, Read]:
    """The rule of an operation between layers, and its quantized edges. All of its operands must have one spec."""
    wanted: Read = []
    missing = False
    for position, operand in enumerate(_operands(node)):
        if not isinstance(operand, fx.Node) or not _is_float(operand) or operand.op == "get_attr":
            continue
        if kind in ops.ATTENTION and position > 2:
            continue
        spec = edges.spec(operand, node)
        missing |= _specs.activation_spec(spec, name) is None
        wanted.append((position, operand, spec))
    if not wanted or missing:
        if any(s is not None for _, _, s in wanted):
            found.notes.append((name, "not every operand has a spec"))
        return None, []
    specs = {_specs.activation_spec(s, name): s for _, _, s in wanted}
    if len(specs) > 1:
        listed = ", ".join(str(s[0]) for s in specs if s is not None)
        raise UnrealisableSite(
            "the operands of one operation need one spec", site=name, spec=listed, hint="Annotate them alike."
        )
    activation = next(iter(specs))
    assert activation is not None
    spec, dynamic = activation
    if dynamic:
        found.notes.append((name, "operations without a weight are not ranged at run time"))
        return None, []
    found.inputs.update(_specs.range_of(s) for _, _, s in wanted)
    types = () if kind in ops.MATMULS | ops.ATTENTION else (type_name,)
    return Rule(glob.escape(name), types, input=spec, optional=True), wanted


def _operands(node: fx.Node) -> list[Any]:
    """Operands in the recorder's order."""
    return [x for a in (*node.args, *node.kwargs.values()) for x in tree_flatten(a)[0]]


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, Tensor) or value.is_floating_point()


def _out_axis(node: fx.Node, kind: str) -> int:
    return 1 if kind.startswith("conv_transpose") else 0


class _Edges:
    """Specs of edges and results, with references to others followed."""

    def annotated(self, node: fx.Node) -> bool:
        """Whether an edge into the node has a spec of its own: operations between layers need one to be integers."""
        specs = getattr(node.meta.get(ANNOTATION), "input_qspec_map", None) or {}
        return any(spec is not None for spec in specs.values())

    def spec(self, producer: fx.Node, consumer: fx.Node, seen: frozenset[Any] = frozenset()) -> Any:
        """The spec under which `consumer` reads the result of `producer`, or None."""
        annotation = consumer.meta.get(ANNOTATION)
        own = (getattr(annotation, "input_qspec_map", None) or {}).get(producer)
        if own is None:
            return self.result(producer, seen)
        return self._followed(own, (producer, consumer), seen)

    def result(self, node: fx.Node, seen: frozenset[Any] = frozenset()) -> Any:
        """The spec of a node's result: its own, or through operations that move values that of what is moved."""
        own = getattr(node.meta.get(ANNOTATION), "output_qspec", None)
        if own is not None:
            return self._followed(own, node, seen)
        moved = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(moved, fx.Node) or kind_of(node) not in _MOVING or node in seen:
            return None
        return self.spec(moved, node, seen | {node})

    def _followed(self, spec: Any, at: Any, seen: frozenset[Any]) -> Any:
        kind = type(spec).__name__
        if kind == "DerivedQuantizationSpec":
            raise UnrealisableSite(
                "only a bias has a scale derived from others, and it needs no spec",
                site=str(at),
                hint="Leave the bias to the converter; give other edges a QuantizationSpec.",
            )
        if kind != "SharedQuantizationSpec":
            return spec
        if at in seen:
            return None
        other = spec.edge_or_node
        seen = seen | {at}
        if isinstance(other, fx.Node):
            return self.result(other, seen)
        return self.spec(other[0], other[1], seen)

    def shared(self, nodes: list[fx.Node]) -> list[list[fx.Node]]:
        """Groups of values that share a scale because a spec says so."""
        parent: dict[fx.Node, fx.Node] = {}

        def root(value: fx.Node) -> fx.Node:
            while (up := parent.get(value, value)) is not value:
                value = up
            return value

        for node in nodes:
            if kind_of(node) in ops.MOVES and node.args and isinstance(node.args[0], fx.Node):
                parent[root(node)] = root(node.args[0])
        for mine, spec in _annotated(nodes):
            if type(spec).__name__ == "SharedQuantizationSpec":
                other = spec.edge_or_node
                parent[root(mine)] = root(other if isinstance(other, fx.Node) else other[0])
        groups: dict[fx.Node, list[fx.Node]] = {}
        for node in nodes:
            groups.setdefault(root(node), []).append(node)
        return [group for group in groups.values() if len(group) > 1]


def _annotated(nodes: list[fx.Node]) -> Iterator[tuple[fx.Node, Any]]:
    """Every annotated value with its spec."""
    for node in nodes:
        annotation = node.meta.get(ANNOTATION)
        if annotation is not None:
            yield from (getattr(annotation, "input_qspec_map", None) or {}).items()
            yield node, getattr(annotation, "output_qspec", None)
