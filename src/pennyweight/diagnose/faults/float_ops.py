"""Operations left in float between integer ones: values are decoded for them and rounded again."""

from __future__ import annotations

from collections.abc import Callable

from pennyweight.diagnose.finding import Case, Finding, causes
from pennyweight.diagnose.simulate import Simulation
from pennyweight.errors import LowerError, PennyweightError
from pennyweight.graph import ops
from pennyweight.graph.graph import Node, Ref
from pennyweight.pipeline import quantize
from pennyweight.recipe import Recipe
from pennyweight.tune.costs import run_ns

_FREE = ops.MOVES | ops.SLICES | ops.JOINS | ops.CLIPS | ops.NORMS
_ARITHMETIC_ONLY = frozenset("size shape dim numel arange zeros ones full item".split())


def _integer(simulation: Simulation, name: str) -> bool:
    layer = simulation.plan.layers.get(name)
    return layer is not None and not layer.keep and bool(layer.inputs) and not layer.dynamic


def _before(simulation: Simulation, node: Node) -> bool:
    """Whether values come from integer layers, moved at most."""
    stack = [r for r in node.inputs if r is not None]
    while stack:
        producer = simulation.graph.producer(stack.pop())
        if producer.kind in ("module", "call") and _integer(simulation, producer.name):
            return True
        if producer.kind in ("module", "call") and (producer.op in _FREE or producer.op == "Identity"):
            stack += [r for r in producer.inputs if r is not None]
    return False


def _after(simulation: Simulation, node: Node) -> bool:
    """Whether integer layers read the result, moved at most."""
    stack = [Ref(node.id, i) for i in range(len(node.outputs))]
    while stack:
        for user, _ in simulation.graph.users(stack.pop()):
            if user.kind in ("module", "call") and _integer(simulation, user.name):
                return True
            if user.kind in ("module", "call") and (user.op in _FREE or user.op == "Identity"):
                stack += [Ref(user.id, i) for i in range(len(user.outputs))]
    return False


@causes.register("float operation between integer ones")
def between(case: Case) -> list[Finding]:
    """Nodes without integer form whose neighbours on both sides have one."""
    simulation, found = case.simulation, []
    kept = simulation.plan.kept
    names = {n.name for n in simulation.graph}
    for node in simulation.graph:
        if node.kind not in ("module", "call") or _integer(simulation, node.name) or node.name not in names:
            continue
        if node.op in _FREE | _ARITHMETIC_ONLY or node.op in ("Identity", "Dropout"):
            continue
        if not node.outputs or not node.outputs[0].dtype.startswith(("float", "bfloat")):
            continue
        if not (_before(simulation, node) and _after(simulation, node)):
            continue
        reason = kept.get(node.name, "there is no integer kernel for it")
        found.append(
            Finding(
                "float operation between integer ones", node.name,
                f"{node.op} runs in float ({reason}); values are decoded before it and rounded again after it",
                "Quantize it (drop the rule that keeps it), or use an operation with an integer form."
                if "by rule" in reason else
                "Replace it by an operation with an integer form (relu, hardswish, avg_pool, add, mul, ...).",
                severity=0.1, timing=_quantized_too(node.name) if "by rule" in reason else None,
            )
        )  # fmt: skip
    return found


def _quantized_too(name: str) -> Callable[[Simulation], float]:
    def timing(simulation: Simulation) -> float:
        """Microseconds a run takes less where the rules that keep this layer are dropped; 0 where it cannot be made."""
        rules = tuple(
            r for r in simulation.recipe.rules
            if not (r.keep and any(n.name == name and r.matches(n.name, n.op) for n in simulation.graph))
        )  # fmt: skip
        recipe = Recipe(simulation.recipe.name, rules, simulation.recipe.passes)
        try:
            other = quantize(simulation.float_model, simulation.batches, recipe, progress=False)
            times = run_ns(
                {"now": simulation.quantized, "then": other}, simulation.batches[0], threads=0, seconds=0.3
            )
        except (LowerError, PennyweightError):
            return 0.0
        return (times["now"] - times["then"]) / 1e3

    return timing
