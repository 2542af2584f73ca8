"""Rules to sites: which tensors get which spec, which sites must share one, and what stays in float and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pennyweight.errors import NothingQuantized, SpecError, UnrealisableSite, UnusedRule, nearest
from pennyweight.graph import ops
from pennyweight.graph.graph import Graph, Node, Ref
from pennyweight.spec import QuantSpec

Keep = Literal["", "float32", "float16", "bfloat16"]
Matrix = tuple[int, ...]  # shape of a weight's matrix view, [out, in]

WEIGHTED = ops.CONVS | {"Linear", "Embedding", "EmbeddingBag", "MultiheadAttention"}
RECURRENT = frozenset({"LSTM", "GRU", "LSTMCell", "GRUCell"})
LEAVES = WEIGHTED | RECURRENT | ops.NORMS
WEIGHT_ONLY = frozenset({"Embedding", "EmbeddingBag"})
ATTENTION_INNER = (
    "query",
    "key",
    "value",
    "context",
)  # operands of the products inside of nn.MultiheadAttention


@dataclass(frozen=True, slots=True, order=True)
class Site:
    """One tensor in one place, as text `path:tensor`.

    `tensor` is "weight", "input" and the like for a module, `op/index:operand` for a function call:
    "layer1.0.conv1:weight", "layer1.0:add/0:1".
    """

    path: str
    tensor: str

    def __str__(self) -> str:
        return f"{self.path}:{self.tensor}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The inverse of `str`."""
        path, _, tensor = text.partition(":")
        return cls(path, tensor)


def fits(spec: QuantSpec, shape: Matrix) -> bool:
    """Whether the blocks of a spec divide a matrix."""
    try:
        spec.scale_shape(shape)
    except SpecError:
        return False
    return True


@dataclass(frozen=True, slots=True)
class Rule:
    """What matching layers get. The first rule that matches a layer decides.

    Args:
        match: glob on the module path, or on `path:op/index` for a function call ("*" also crosses dots).
        types: module class names or operation names ("Linear", "add"); empty matches every type.
        weight: spec of the weight on its matrix view [out, in * kernel]; None leaves it in float.
        input: spec of the activations; None leaves them in float.
        dynamic: range the activations at run time instead of calibrating them.
        keep: leave the layer in float, its weights stored as said.
        narrow: with keep "bfloat16": round the activations too, so that bf16 numbers are multiplied (and summed in
            float32); function calls are then layers as well.
        fitting: match only weights that the block divides; others go on to the next rule.
        optional: do not complain when the rule matches nothing.
    """

    match: str = "*"
    types: tuple[str, ...] = ()
    weight: QuantSpec | None = None
    input: QuantSpec | None = None
    dynamic: bool = False
    keep: Keep = ""
    narrow: bool = False
    fitting: bool = False
    optional: bool = False

    def matches(self, name: str, kind: str, matrices: Sequence[Matrix] = ()) -> bool:
        """Whether the rule decides for a layer of this name and type, whose weights are such matrices."""
        if (self.types and kind not in self.types) or not fnmatch.fnmatchcase(name, self.match):
            return False
        return not self.fitting or self.weight is None or all(fits(self.weight, m) for m in matrices)

    def __str__(self) -> str:
        parts = [f"match={self.match!r}"]
        parts += [f"types={list(self.types)}"] if self.types else []
        parts += [f"keep={self.keep}"] if self.keep else [f"weight={self.weight} input={self.input}"]
        return f"Rule({', '.join(parts)})"


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one module or function call gets.

    Attributes:
        name: module path, or `path:op/index`.
        kind: class or operation name.
        weight: spec of the weight, if it is quantized.
        inputs: spec of each quantized operand, by position (0 for a module's input).
        dynamic: whether the operands are ranged at run time.
        keep: storage format of a layer kept in float.
        narrow: whether its operands are rounded to that format.
        weights: names of the weights, as the module calls them ("weight_ih_l0").
        inner: spec of each quantized tensor inside of a module ("query" of an attention).
    """

    name: str
    kind: str
    weight: QuantSpec | None = None
    inputs: dict[int, QuantSpec] = field(default_factory=dict)
    dynamic: bool = False
    keep: Keep = ""
    narrow: bool = False
    weights: tuple[str, ...] = ("weight",)
    inner: dict[str, QuantSpec] = field(default_factory=dict)

    @property
    def is_call(self) -> bool:
        """Whether this is a function call rather than a module."""
        return ":" in self.name

    def input_site(self, position: int) -> Site:
        """The site of one operand."""
        if self.is_call:
            path, _, call = self.name.partition(":")
            return Site(path, f"{call}:{position}")
        return Site(self.name, "input" if position == 0 else f"input{position}")

    def sites(self) -> dict[Site, QuantSpec]:
        """All sites of the layer."""
        found = {self.input_site(p): s for p, s in self.inputs.items()}
        found |= {Site(self.name, tensor): s for tensor, s in self.inner.items()}
        path, _, call = self.name.partition(":")
        for weight in self.weights if self.weight is not None else ():
            found[Site(path, f"{call}:{weight}" if call else weight)] = self.weight  # type: ignore[assignment]
        return found


@dataclass(frozen=True)
class Plan:
    """The decision for a whole model.

    Attributes:
        layers: by name, those that are quantized or converted.
        ties: groups of sites that see the same values, moved about, and so must share one scale.
        kept: by name, why a layer that could be quantized stays in float.
    """

    layers: dict[str, LayerPlan]
    ties: tuple[tuple[Site, ...], ...]
    kept: dict[str, str]

    def sites(self) -> dict[Site, QuantSpec]:
        """Every quantized tensor of the model with its spec."""
        return {site: spec for layer in self.layers.values() for site, spec in layer.sites().items()}

    def __getitem__(self, name: str) -> LayerPlan:
        return self.layers[name]


def make_plan(
    graph: Graph, rules: Sequence[Rule], matrices: Mapping[str, Mapping[str, Matrix]] | None = None
) -> Plan:
    """Apply rules to a recorded model.

    Layers with weights and matrix products are quantized as their rule says. The operations between them (sums,
    products, pools, tables) follow where their result flows, moved or clipped, into an integer operation: values then
    stay integers from one product to the next. The last summand that comes fresh from a product stays in its
    accumulator.

    Args:
        graph: from `record`.
        rules: the first that matches a layer decides.
        matrices: shapes of the weights of each layer by their names, to check blocks against.

    Raises:
        SpecError: if a block does not divide a weight.
        UnusedRule: if a rule that is not optional matches no layer.
        NothingQuantized: if no layer is quantized.
        UnrealisableSite: if a rule asks for what a layer cannot have.
    """
    used: set[int] = set()
    named: dict[str, list[Node]] = {}
    for node in graph:
        if node.kind in ("module", "call"):
            named.setdefault(node.name, []).append(node)
    layers: dict[str, LayerPlan] = {}
    kept: dict[str, str] = {}
    for name, nodes in named.items():
        if _is_layer(nodes[0]):
            shapes = matrices.get(name, {}) if matrices else {}
            rule = _first(rules, nodes[0], used, tuple(shapes.values()))
            if rule is None:
                kept[name] = "no rule matches"
            else:
                _plan_layer(name, nodes[0], rule, layers, kept, tuple(shapes) or ("weight",))
                if name in layers:
                    _check_blocks(layers[name], shapes)
    glue = _plan_glue(graph, named, rules, layers, kept, used)
    layers.update(glue)
    unused = [r for i, r in enumerate(rules) if i not in used and not r.optional]
    if unused:
        names = [*named, *graph.module_types]
        raise UnusedRule(
            f"{unused[0]} matches nothing",
            hint=nearest(unused[0].match, list(dict.fromkeys(names))[:40], "layers"),
        )
    if not any(layer.weight or layer.inputs or layer.keep for layer in layers.values()):
        raise NothingQuantized(
            "the rules quantize nothing in this model",
            hint="Layers that can be quantized: " + (", ".join(list(kept)[:20]) or "none found") + ".",
        )
    return Plan(layers, _ties(graph, layers), kept)


def _is_layer(node: Node) -> bool:
    if node.kind == "module":
        return node.op in LEAVES - ops.NORMS
    return node.op in ops.FUNCTIONAL_LAYERS | ops.MATMULS | ops.ATTENTION


def _check_blocks(layer: LayerPlan, shapes: Mapping[str, Matrix]) -> None:
    for name, shape in shapes.items() if layer.weight is not None else ():
        try:
            layer.weight.scale_shape(shape)  # type: ignore[union-attr]
        except SpecError as error:
            raise SpecError(
                error.what,
                site=f"{layer.name}:{name}",
                spec=str(layer.weight),
                shapes=str(shape),
                hint=error.hint,
            ) from None


def _first(rules: Sequence[Rule], node: Node, used: set[int], shapes: Sequence[Matrix] = ()) -> Rule | None:
    for i, rule in enumerate(rules):
        if rule.matches(node.name, node.op, shapes):
            used.add(i)
            return rule
    return None


_AT_RUN_TIME: tuple[tuple[int | None, ...], ...] = (
    (),
    (1, None),
)  # blocks of activations: per tensor, per token


def _plan_layer(
    name: str,
    node: Node,
    rule: Rule,
    layers: dict[str, LayerPlan],
    kept: dict[str, str],
    weights: tuple[str, ...],
) -> None:
    if rule.keep:
        if rule.narrow and rule.keep != "bfloat16":
            raise UnrealisableSite(
                "only bf16 activations can be multiplied",
                site=name,
                spec=str(rule),
                hint="Set keep = 'bfloat16'.",
            )
        kept[name] = f"kept in {rule.keep} by rule {rule.match!r}"
        if rule.keep != "float32" and (node.kind == "module" or rule.narrow):
            layers[name] = LayerPlan(name, node.op, keep=rule.keep, narrow=rule.narrow)
        return
    weight, inputs = rule.weight, {0: rule.input} if rule.input else {}
    inner: dict[str, QuantSpec] = {}
    if node.op in ops.MATMULS:
        weight, inputs = None, {0: rule.input, 1: rule.input} if rule.input else {}
    elif node.op in ops.ATTENTION:
        weight, inputs = None, dict.fromkeys((0, 1, 2), rule.input) if rule.input else {}
    elif node.op in ops.FUNCTIONAL_LAYERS and 1 not in node.params:
        weight, inputs = None, {}
        kept[name] = "its weight is computed at run time"
        return
    elif node.op in WEIGHT_ONLY:
        inputs = {}
    elif node.op == "MultiheadAttention" and rule.input:
        inputs = dict.fromkeys((0, 1, 2), rule.input)
        inner = {} if rule.dynamic else dict.fromkeys(ATTENTION_INNER, rule.input)
    specs = {p: s for p, s in inputs.items() if s is not None}
    dynamic = bool(specs) and (rule.dynamic or node.op in RECURRENT)
    if not node.params and weight is None and dynamic:
        kept[name] = "has no weight, and activations are ranged at run time"
        return
    if weight is None and specs and node.op not in ops.MATMULS | ops.ATTENTION:
        raise UnrealisableSite(
            "activations are quantized but the weight is not",
            site=name,
            spec=str(rule),
            hint="Give the rule a weight.",
        )
    if any(not s.per_tensor for s in specs.values()) and not dynamic:
        raise UnrealisableSite(
            "calibrated activations need one scale per tensor",
            site=name,
            spec=str(specs[0]),
            hint="Use [*], or set dynamic for one scale per token.",
        )
    if dynamic:
        _refuse_at_run_time(name, node, specs)
    if weight is None and not specs:
        kept[name] = "the rule quantizes nothing here"
        return
    if node.op in RECURRENT and specs and specs[0].per_tensor:
        raise UnrealisableSite(
            "recurrent layers range every row of inputs and states at run time",
            site=name,
            spec=str(rule),
            hint="Give them a rule with input uint8[1,*]+z.",
        )
    layers[name] = LayerPlan(name, node.op, weight, specs, dynamic, weights=weights, inner=inner)


def _refuse_at_run_time(name: str, node: Node, specs: Mapping[int, QuantSpec]) -> None:
    convolution = node.op in ops.CONVS or node.op in ops.FUNCTIONAL_LAYERS - {"linear"}
    for spec in specs.values():
        per_token = spec.block == (1, None) and not convolution
        if spec.grid not in ("uint8", "int8") or spec.zero != "int" or not (per_token or spec.per_tensor):
            raise UnrealisableSite(
                "activations ranged at run time have 8 bits, a zero point, and a scale for the tensor or each token",
                site=name,
                spec=str(spec),
                hint="Use uint8[*]+z." if convolution else "Use uint8[1,*]+z or uint8[*]+z.",
            )


def _glue_kind(node: Node) -> str:
    """Which family of in-between operation a node is, or ""."""
    tensors = [r for r in node.inputs if r is not None]
    if node.kind == "module":
        return "norm" if node.op in ops.NORMS else ""
    if node.op in ops.BINARY:
        if len(tensors) == 2 and not node.params and node.op != "sub":
            return "binary"
        return "unary" if len(tensors) == 1 and not node.params and len(node.scalars) else ""
    if node.op in ops.POOLS or (node.op in ops.UNARY and len(tensors) == 1):
        return "unary"
    return ""


def _plan_glue(
    graph: Graph,
    named: dict[str, list[Node]],
    rules: Sequence[Rule],
    layers: dict[str, LayerPlan],
    kept: dict[str, str],
    used: set[int],
) -> dict[str, LayerPlan]:
    """Choose the in-between operations whose result flows into an integer operation."""
    wanted: set[Ref] = set()
    signs: set[Ref] = set()
    chosen: dict[str, LayerPlan] = {}
    moving = ops.MOVES | ops.SLICES | ops.JOINS | ops.CLIPS
    for node in reversed(graph.nodes):
        layer = layers.get(node.name) if node.kind in ("module", "call") else None
        if layer is not None:
            if not layer.dynamic:
                for p, r in enumerate(node.inputs):
                    if r is not None and p in layer.inputs:
                        (signs if layer.inputs[p].grid == "binary" else wanted).add(r)
            continue
        flows = any(Ref(node.id, i) in wanted for i in range(len(node.outputs)))
        if node.kind == "call" and node.op in moving:
            if flows:
                wanted.update(r for r in node.inputs if r is not None)
            continue
        # a sign needs no codes before it: what it reads stays in float, and so do the sums before that
        flows = flows and not any(Ref(node.id, i) in signs for i in range(len(node.outputs)))
        kind = _glue_kind(node)
        if not kind or not _float_inputs(graph, node):
            continue
        rule = _first(rules, node, used)
        if rule is None or rule.input is None or rule.dynamic or rule.keep:
            continue
        if not flows and not (rule.types and node.op in rule.types):
            kept.setdefault(node.name, "its result is not read by an integer operation")
            continue
        positions = [p for p, r in enumerate(node.inputs) if r is not None]
        if node.op == "add" and kind == "binary":
            fresh = _fresh(graph, node, layers)
            positions = [p for p in positions if p != fresh]
        wanted.update(r for p, r in enumerate(node.inputs) if r is not None and p in positions)
        chosen[node.name] = LayerPlan(node.name, node.op, None, dict.fromkeys(positions, rule.input))
        kept.pop(node.name, None)
    return chosen


def _float_inputs(graph: Graph, node: Node) -> bool:
    refs = [r for r in node.inputs if r is not None]
    return bool(refs) and all(graph.value(r).dtype.startswith(("float", "bfloat")) for r in refs)


def _fresh(graph: Graph, node: Node, layers: dict[str, LayerPlan]) -> int | None:
    """The operand of a sum that may stay in its accumulator: fresh from a product, used here alone, computed last."""
    best, latest = None, -1
    shapes = {graph.value(r).shape for r in node.inputs if r is not None}
    if len(shapes) != 1:
        return None
    for position, ref in enumerate(node.inputs):
        while ref is not None and len(graph.users(ref)) == 1:
            producer = graph.producer(ref)
            layer = layers.get(producer.name) if producer.kind in ("module", "call") else None
            if layer is not None and not layer.dynamic and layer.inputs and producer.op not in ops.ATTENTION:
                if producer.op not in RECURRENT and producer.id > latest:
                    best, latest = position, producer.id
                break
            if producer.kind != "call" or not producer.op.startswith(("dropout", "identity")):
                break
            ref = producer.inputs[0]
    return best


def _ties(graph: Graph, layers: dict[str, LayerPlan]) -> tuple[tuple[Site, ...], ...]:
    """Group the calibrated sites that read the same values on the same grid: union of values over moves and joins."""
    parent: dict[Ref, Ref] = {}

    def root(ref: Ref) -> Ref:
        while (up := parent.get(ref, ref)) != ref:
            ref = up
        return ref

    def union(a: Ref, b: Ref) -> None:
        parent[root(b)] = root(a)

    accumulators: set[Ref] = set()  # values still in the accumulator of a product, moved about
    for node in graph:
        if node.kind not in ("module", "call"):
            continue
        refs = [r for r in node.inputs if r is not None]
        outs = [Ref(node.id, i) for i in range(len(node.outputs))]
        if node.name in layers and layers[node.name].kind not in ops.UNARY | ops.POOLS:
            accumulators.update(outs)
        elif node.op in ops.JOINS:
            for r in refs:
                union(r, outs[0])
        elif node.kind == "call" and (node.op in ops.MOVES or node.op in ops.SLICES) and refs:
            if refs[0] in accumulators:
                accumulators.update(outs)
            if node.op in ops.MOVES or refs[0] not in accumulators:
                for out in outs:
                    union(refs[0], out)
    groups: dict[tuple[Ref, QuantSpec], dict[Site, None]] = {}
    for node in graph:
        layer = layers.get(node.name) if node.kind in ("module", "call") else None
        if layer is None or layer.dynamic:
            continue
        for position, ref in enumerate(node.inputs):
            if ref is not None and position in layer.inputs:
                groups.setdefault((root(ref), layer.inputs[position]), {})[layer.input_site(position)] = None
    merged = _merge([list(g) for g in groups.values()])
    return tuple(tuple(sorted(g)) for g in merged if len(g) > 1)


def _merge(groups: Iterable[list[Site]]) -> list[set[Site]]:
    """Join groups that share a site (a layer that is called several times)."""
    out: list[set[Site]] = []
    for group in groups:
        joined = set(group)
        apart = []
        for other in out:
            if joined & other:
                joined |= other
            else:
                apart.append(other)
        out = [*apart, joined]
    return out
