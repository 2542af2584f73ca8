"""`pennyweight diagnose`: why a recipe costs a model its accuracy, and what helps."""

from __future__ import annotations

from typing import Annotated

import typer

from pennyweight.cli.options import Batch, Json, Limit, RecipeName, find_recipe, numbers
from pennyweight.cli.output import emit, note


def command(
    model: Annotated[str, typer.Argument(help="The float MODEL (see quantize).")],
    calib: Annotated[
        str, typer.Option(help="DATA to calibrate with; the model's own example otherwise.")
    ] = "",
    data: Annotated[
        str, typer.Option(help="DATA to compare on, as the model will see it; --calib otherwise.")
    ] = "",
    recipe: RecipeName = "int8",
    target: Annotated[
        str, typer.Option(help="native, or no-vnni: x86 runtimes that add bytes in 16 bits.")
    ] = "native",
    layers: Annotated[bool, typer.Option(help="Also measure each layer alone.")] = True,
    batch: Batch = 32,
    limit: Limit = 128,
    size: Annotated[int, typer.Option(min=0, help="Images: side of the square cut from the middle.")] = 0,
    mean: Annotated[str, typer.Option(help="Images: mean of each channel, on 0..1.")] = "",
    std: Annotated[str, typer.Option(help="Images: standard deviation of each channel, on 0..1.")] = "",
    json: Json = False,
) -> None:
    """Quantize MODEL, compare it with float layer by layer, and name what is wrong.

    Each cause comes with a remedy, and with the gain that was measured by trying it.
    """
    import pennyweight as pw
    from pennyweight.cli.data import ImageOptions, load_data
    from pennyweight.cli.models import load_model
    from pennyweight.errors import EmptyCalibration

    loaded = load_model(model)
    options = ImageOptions(size, 0, numbers(mean, "--mean"), numbers(std, "--std"))
    if not calib and loaded.example is None:
        raise EmptyCalibration("there is no --calib, and the model brings no example", site=model)
    batches = list(load_data(calib, batch, limit, options)()) if calib else [loaded.example]
    shown = list(load_data(data, batch, limit, options)()) if data else batches
    quantized = pw.quantize(loaded.model, batches, find_recipe(recipe), example=loaded.example)
    found = pw.diagnose(loaded.model, quantized, shown, target=target, layers=layers)
    result = {"model": model, "recipe": recipe, **found.to_dict()}
    tables = {
        f"outputs are {found.sqnr_db:.1f} dB from float's, the greatest entry agrees on {100 * found.agree:.1f} %":
            found.rows(),
        "layers": found.layers,
    }  # fmt: skip
    emit(result, tables, json)
    for text in found.notes:
        note(text)
    if not found.findings:
        note("Nothing stands out: what is left is the rounding noise of all layers together.")
