"""`shotstream bench`: how fast a model generates on this machine, and where its time goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from shotstream.errors import FAILED, MISSING, USAGE, Failure, one_line_errors
from shotstream.options import AllFast, Fp8, TinyDecoder


def bench(
    model: Annotated[str, typer.Option(help="storybook, tiny, or the path of a model file.")] = "storybook",
    out: Annotated[Path | None, typer.Option(help="Also write the numbers here, as JSON.")] = None,
    json_line: Annotated[bool, typer.Option("--json", help="Print one JSON line instead of the table.")] = False,
    shots: Annotated[int, typer.Option(min=1, help="Shots that count, after two to warm up.")] = 5,
    chunks: Annotated[int | None, typer.Option(min=1, help="Chunks per shot.", show_default="the model's")] = None,
    growth: Annotated[int, typer.Option(min=0, help="Shots of the story that must not grow slow; 0 skips it.")] = 40,
    sessions: Annotated[int, typer.Option(min=1, help="Viewers served at once, at most.")] = 2,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto: a GPU if there is one.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")] = None,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: time this process computed; for a busy machine, with --threads 1.")
    ] = "wall",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="On a GPU: compile the DiT's blocks, record its passes. Exact.")
    ] = False,
    fast: AllFast = False,
    fp8: Fp8 = False,
    tiny_decoder: TinyDecoder = False,
    predict: Annotated[
        bool, typer.Option("--predict", help="Only print what Wan at 480p should reach at given rates.")
    ] = False,
) -> None:
    """Measure speed, latency, memory and where the time goes."""
    from shotstream.bench.report import predictions, table

    with one_line_errors():
        if predict:
            from shotstream.bench.prediction import H200
            from shotstream.bench.prediction import predict as expected
            from shotstream.config import PRESETS

            print(predictions(expected(PRESETS["wan-1.3b"], rates) for rates in H200))
            return
        if clock not in ("wall", "cpu"):
            raise Failure(f"unknown clock {clock!r}; use wall or cpu", USAGE)
        if 0 < growth < 17:
            raise Failure(
                f"--growth {growth}: shots 8 to 12 are compared with the last five; give 17 or more, or 0", USAGE
            )

        import torch

        from shotstream.bench.measurement import Settings, measure
        from shotstream.config import Fast
        from shotstream.evaluation.fast import compare
        from shotstream.film import DeviceError, find_device
        from shotstream.pipeline import ModelError, load

        if threads:
            torch.set_num_threads(threads)
        try:
            where = find_device(device)
            if clock == "cpu" and (where.startswith("cuda") or torch.get_num_threads() > 1):
                raise Failure("--clock cpu adds up all threads and knows no GPU; use --threads 1 on a CPU", USAGE)
            wanted = Fast.chosen(fast, fp8, tiny_decoder)
            pipeline = load(model, where, fast=wanted, compiled=compiled)
        except ModelError as error:
            raise Failure(str(error), MISSING) from None
        except DeviceError as error:
            raise Failure(str(error), USAGE) from None
        settings = Settings(shots=shots, chunks=chunks, growth=growth, sessions=sessions, clock=clock)  # type: ignore[arg-type]
        result = measure(pipeline, settings)
        if wanted:
            result["fast"] = compare(load(model, where, compiled=compiled), pipeline)
        if out:
            _write(out, json.dumps(result, indent=1) + "\n")
        print(json.dumps(result) if json_line else table(result))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        remedy = "check the folder, its permissions and the space there"
        raise Failure(f"{path}: {error.strerror}; {remedy}", FAILED) from None
