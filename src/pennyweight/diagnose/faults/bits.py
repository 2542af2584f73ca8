"""Layers that mind their few bits: what is left when nothing is wrong with ranges or channels."""

from __future__ import annotations

from pennyweight.diagnose.finding import Case, Finding, causes, in_float

MOST = 3  # layers that are named
SHARE = 0.2  # of the noise at the output


@causes.register("sensitive layer")
def sensitive(case: Case) -> list[Finding]:
    """The layers whose rounding, alone, makes most of the noise at the output."""
    simulation = case.simulation
    total = 10 ** (-simulation.simulated.sqnr_db / 10)
    noises = {name: simulation.alone(name).noise for name in simulation.weights}
    found = []
    for name, noise in sorted(noises.items(), key=lambda item: -item[1])[:MOST]:
        layer = simulation.plan.layers[name]
        if noise < SHARE * total:
            continue
        found.append(
            Finding(
                "sensitive layer", name,
                f"its rounding alone ({layer.weight}, inputs {next(iter(layer.inputs.values()), 'float')}) makes "
                f"{100 * min(1.0, noise / max(total, 1e-30)):.0f} % of the noise at the output",
                "Give it more bits, or keep it in bf16; a reconstruction (AdaRound) or training recovers some of it.",
                in_float(name), severity=0.0, broad=True,
            )
        )  # fmt: skip
    return found
