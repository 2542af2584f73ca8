"""Ristretto's search: halve the width of one group after the other, combine what was accepted, fine-tune.

Source: Gysel et al. 2018 (arXiv:1604.03168), section 5.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pennyweight.errors import EmptyCalibration, SolverError
from pennyweight.journal import Journal
from pennyweight.pipeline import calibrate, convert, prepare
from pennyweight.recipe import Recipe
from pennyweight.tune.fine_tune import Loader, fine_tuned
from pennyweight.tune.fixed_point import (
    GROUPS,
    PARAMETERS,
    WIDEST,
    Simulated,
    Widths,
    fixed_point_recipe,
    widest,
)

ACTIVATIONS = (16, 8, 4, 2)


@dataclass
class Tuned:
    """What a search found.

    Attributes:
        model: converted; runs, saves and lowers as any other.
        recipe: what made it, to quantize or fine-tune with.
        widths: bits by group.
        headroom: bits that the integer lengths of activations have beyond Ristretto's, 0 or 1.
        float_accuracy, simulated_accuracy, accuracy: of the float model, of the simulated one before any fine-tuning,
            of the converted model.
        fine_tuned: whether its weights were trained after the search.
        rows: integer and fractional length of every site.
        journal: a `trial` event for each model that was evaluated.
    """

    model: nn.Module
    recipe: Recipe
    widths: dict[str, int]
    headroom: int
    float_accuracy: float
    simulated_accuracy: float
    accuracy: float
    rows: list[dict[str, Any]]
    journal: Journal
    fine_tuned: bool = False

    def table(self) -> Any:
        """The rows as a `rich.table.Table`."""
        from rich.table import Table

        title = f"float {self.float_accuracy:.4g}, integers {self.accuracy:.4g}"
        table = Table("site", "group", title=title)
        for column in ("bits", "IL", "FL"):
            table.add_column(column, justify="right")
        for row in self.rows:
            table.add_row(*(str(row[k]) for k in ("site", "group", "bits", "IL", "FL")))
        return table


def search(
    model: nn.Module,
    batches: list[Any],
    evaluate: Callable[[nn.Module], float],
    goal: float,
    *,
    parameters: str = "fixed_point",
    train: Loader | None = None,
    loss: Callable[[Any, Any], Any] = F.cross_entropy,
    train_steps: int = 0,
    seed: int = 0,
    progress: bool = False,
    journal: Journal | None = None,
) -> Tuned:
    """Try widths for each group with the others in float, halving while the loss is at most `goal`; then all together.

    Where the groups together lose more than `goal`, the narrowest of them is widened by one step, and of several the
    one that lost most alone, until they do not. Integer lengths of activations are one bit short of the greatest value
    seen, as Ristretto has them; where no width meets the goal so, because what saturates costs more than the bit gains,
    activations are searched once more with lengths that hold all values. The result is converted, and evaluated on its
    integers.

    With a loader to train on, the network is fine-tuned at these widths, or at the widest where the search found none,
    and kept if that is better; then group after group, the widest first, is narrowed by a step and fine-tuned again,
    as long as the loss is at most `goal`. Every training starts from the float model. Beside minifloats activations
    stay floats. Arguments and errors: see `tune`.
    """
    if not batches:
        raise EmptyCalibration(
            "fixed point needs data to find integer lengths", hint="Pass some ten batches."
        )
    log = Journal() if journal is None else journal
    shown = _printer(progress)
    ladders = {GROUPS[0]: PARAMETERS[parameters], GROUPS[1]: PARAMETERS[parameters], GROUPS[2]: ACTIVATIONS}
    simulated = Simulated(model, batches, parameters, log)

    def measured(widths: Widths, what: str) -> float:
        with torch.no_grad():
            accuracy = float(evaluate(simulated.set(widths)))
        log.add(
            "trial",
            what,
            accuracy=accuracy,
            headroom=simulated.headroom,
            **{g: b or 32 for g, b in widths.items()},
        )
        shown(f"{what:>14}  {', '.join(f'{g} {b}' for g, b in widths.items()) or 'float'}: {accuracy:.4g}")
        return accuracy

    alone: dict[tuple[str, int], float] = {}

    def narrowest(group: str) -> int:
        """The last width that loses at most the goal, 8 at most; 8 where none does but 16."""
        found = 0
        for bits in ladders[group]:
            alone[group, bits] = measured({group: bits}, "alone")
            if baseline - alone[group, bits] > allowed:
                break
            found = bits
        if not found:
            raise SolverError(
                f"{group} lose {baseline - alone[group, ladders[group][0]]:.4g}, more than {goal}, already at "
                f"{ladders[group][0]} bits",
                hint="Accept a greater loss, or fine-tune; with few samples, evaluate on more of them.",
            )
        return min(found, WIDEST)

    def combined(accepted: dict[str, int]) -> float | None:
        """Widen until all together lose at most the goal, and return the accuracy; None where 8 bits are too few."""
        while True:
            together = measured(accepted, "together")
            if baseline - together <= allowed:
                return together
            narrow = [g for g in accepted if accepted[g] < min(WIDEST, ladders[g][0])]
            if not narrow:
                return None
            worst = min(narrow, key=lambda g: (accepted[g], alone[g, accepted[g]]))
            accepted[worst] = ladders[worst][ladders[worst].index(accepted[worst]) - 1]

    baseline = measured({}, "float")
    allowed = goal + 1e-9 * max(1.0, abs(baseline))  # 0.964 - 0.954 is more than 0.01 in binary
    groups = simulated.groups()
    accepted = {group: narrowest(group) for group in groups if group != GROUPS[2]}
    weights, together, losses = dict(accepted), None, []
    for headroom in (0, 1) if GROUPS[2] in groups else (0,):
        simulated.headroom, accepted = headroom, dict(weights)
        if headroom:
            shown("the lengths of activations now hold all values")
        try:
            if GROUPS[2] in groups:
                accepted[GROUPS[2]] = narrowest(GROUPS[2])
            together = combined(accepted)
        except SolverError as error:
            if headroom:
                raise
            losses.append(error.what)
            continue
        if together is not None:
            break
        last = log.of("trial")[-1].data["accuracy"]
        losses.append(
            f"{baseline - last:.4g} at {accepted}" + " with lengths that hold all values" * headroom
        )
    if together is None and train is None:
        parts = ", ".join(f"{g} at {b} bits {baseline - a:.4g}" for (g, b), a in alone.items() if b == WIDEST)
        raise SolverError(
            f"no widths of at most {WIDEST} bits lose at most {goal}: together {'; '.join(losses)}; alone {parts}",
            hint="Accept a greater loss, or fine-tune; with few samples, evaluate on more of them.",
        )
    if together is None:  # fine-tuning has to make up for what is lost
        together = measured(accepted, "together")

    def recipe_of(widths: dict[str, int]) -> Recipe:
        conv, fc = (widths.get(group, widest(parameters)) for group in GROUPS[:2])
        return fixed_point_recipe(parameters, conv, fc, widths.get(GROUPS[2], WIDEST), simulated.headroom)

    def scored(candidate: nn.Module, widths: dict[str, int], what: str) -> float:
        with torch.no_grad():
            found = float(evaluate(candidate))
        log.add("trial", what, accuracy=found, headroom=simulated.headroom, **widths)
        return found

    recipe = recipe_of(accepted)
    integers = convert(calibrate(prepare(model, batches[0], recipe), batches, progress=False))
    accuracy, tuned = scored(integers, accepted, "integers"), False
    if train is not None:
        steps = train_steps or sum(1 for _ in train())

        def trained(widths: dict[str, int]) -> tuple[nn.Module, float]:
            made = fine_tuned(model, batches, recipe_of(widths), train, loss, steps, seed)
            found = scored(made, widths, "fine-tuned")
            shown(f"    fine-tuned  {', '.join(f'{g} {b}' for g, b in widths.items())}: {found:.4g}")
            return made, found

        better, found = trained(accepted)
        if found > accuracy:
            integers, accuracy, tuned = better, found, True
        if baseline - accuracy > allowed:
            raise SolverError(
                f"at {accepted} the loss is {baseline - accuracy:.4g} after {steps} steps of fine-tuning, "
                f"more than {goal}",
                hint="Accept a greater loss, or train for longer.",
            )
        for group in sorted(accepted, key=lambda g: -accepted[g]):
            for bits in ladders[group][ladders[group].index(accepted[group]) + 1 :]:
                narrower = {**accepted, group: bits}
                better, found = trained(narrower)
                if baseline - found > allowed:
                    break
                accepted, integers, accuracy, tuned = narrower, better, found, True
                together = measured(accepted, "together")
        recipe = recipe_of(accepted)
    rows = simulated.table(accepted)
    done = Tuned(
        integers, recipe, accepted, simulated.headroom, baseline, together, accuracy, rows, log, tuned
    )
    if progress:
        from rich.console import Console

        Console().print(done.table())
    return done


def _printer(show: bool) -> Callable[[str], None]:
    if not show:
        return lambda text: None
    from rich.console import Console

    console = Console()
    return lambda text: console.print(text, highlight=False)
