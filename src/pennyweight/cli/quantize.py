"""`pennyweight quantize`: a model and some inputs to a quantized file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.cli.options import Batch, Json, Limit, RecipeName, find_recipe, numbers
from pennyweight.cli.output import emit, note


def command(
    model: Annotated[
        str, typer.Argument(help="package.module:function, a .pt2 file, or a Hugging Face directory.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="File to write: .dwt, or .safetensors for modules.")
    ],
    calib: Annotated[
        str, typer.Option(help=".npy, .npz, a folder of images, or package.module:function.")
    ] = "",
    recipe: RecipeName = "int8",
    keep: Annotated[
        list[str] | None, typer.Option(help="Leave layers that match this glob in float. Repeatable.")
    ] = None,
    keep_slow_layers_float: Annotated[
        bool,
        typer.Option(
            "--keep-slow-layers-float", help="Measure, and leave layers in float that are faster so, here."
        ),
    ] = False,
    batch: Batch = 32,
    limit: Limit = 512,
    size: Annotated[int, typer.Option(min=0, help="Images: side of the square cut from the middle.")] = 0,
    resize: Annotated[int, typer.Option(min=0, help="Images: bring the shorter side to this first.")] = 0,
    mean: Annotated[str, typer.Option(help="Images: mean of each channel, on 0..1.")] = "",
    std: Annotated[str, typer.Option(help="Images: standard deviation of each channel, on 0..1.")] = "",
    gray: Annotated[bool, typer.Option(help="Images: one channel.")] = False,
    page: Annotated[
        Path, typer.Option("--report", help="HTML report to write; measured on some batches.")
    ] = Path(),
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    compress: Annotated[bool, typer.Option(help="Deflate the file: smaller, slower to load.")] = False,
    json: Json = False,
) -> None:
    """Quantize MODEL and write it to a file.

    Example: pennyweight quantize my.package:make_resnet --calib images/ --size 224 -o resnet.dwt
    """
    import pennyweight as pw
    from pennyweight.cli.data import ImageOptions, load_data
    from pennyweight.cli.models import load_model
    from pennyweight.errors import EmptyCalibration
    from pennyweight.pipeline import model_bytes

    chosen = find_recipe(recipe)
    if keep:
        chosen = chosen.keep(*keep)
    options = ImageOptions(size, resize, numbers(mean, "--mean"), numbers(std, "--std"), gray)
    batches = load_data(calib, batch, limit, options) if calib else None
    if out.suffix == ".dwt" and not out.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(out.parent)!r} to write {out.name!r} into")
    loaded = load_model(model)
    if batches is None:
        if loaded.example is None:
            raise EmptyCalibration("there is no --calib, and the model brings no example", site=model)
        if chosen.needs():
            raise EmptyCalibration(
                f"recipe {chosen.name!r} calibrates activations: it needs --calib",
                site=model,
                hint="Give it a few hundred inputs, or use --recipe int8-dynamic, which needs none.",
            )
    source = batches if batches is not None else [loaded.example]
    quantized = pw.quantize(
        loaded.model,
        source,
        chosen,
        example=loaded.example,
        keep_slow_layers_float=keep_slow_layers_float,
        seed=seed,
    )
    if page != Path():
        shown = list(source() if callable(source) else source)[:4]
        pw.report(quantized, page, against=loaded.model, batches=shown)
    note(f"lowering and writing {out}")
    pw.save(quantized, out, compress=compress)
    result = summary(pw.journal(quantized), model, recipe, out, model_bytes(loaded.model))
    emit(result, tables(result), json)


def summary(log: Any, model: str, recipe: str, out: Path, float_bytes: int) -> dict[str, Any]:
    """What was done, as plain values."""
    lowered = log.of("lowered")
    return {
        "model": model,
        "recipe": recipe,
        "file": str(out),
        "bytes": out.stat().st_size,
        "float_bytes": float_bytes,
        "smaller": float_bytes / out.stat().st_size,
        "sites": len(log.of("site")),
        "kept": log.rows("kept"),
        "slow": log.rows("slow"),
        "notes": [event.data.get("text", "") for event in log.of("note")],
        "difference": lowered[-1].data if lowered else None,
    }


def tables(result: dict[str, Any]) -> dict[str, Any]:
    """The summary as tables."""
    rows = [
        {"": "file", "value": result["file"]},
        {
            "": "bytes",
            "value": f"{result['float_bytes']:,} -> {result['bytes']:,} ({result['smaller']:.2f} x smaller)",
        },
        {"": "quantized", "value": f"{result['sites']} sites, {len(result['kept'])} layers kept in float"},
    ]
    if result["difference"]:
        d = result["difference"]
        rows.append(
            {
                "": "program",
                "value": f"{d['ops']} ops; against the eager integer model on {d['samples']} samples: "
                f"largest difference {d['max_abs']:.3g}, {d['sqnr_db']:.1f} dB",
            }
        )
    rows += [{"": "note", "value": text} for text in result["notes"]]
    return {"": rows, "kept in float": result["kept"], "slower than float, measured": result["slow"]}
