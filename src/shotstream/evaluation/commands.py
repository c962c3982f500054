"""`shotstream eval ...`: measured quality from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shotstream.errors import MISSING, USAGE, Failure, one_line_errors

eval_app = typer.Typer(help="Measure a model.", no_args_is_help=True)

ROWS = ("ground truth", "autoencoder", "model", "without memory", "other memory", "true history")


@eval_app.callback()
def _group() -> None:
    """Measure a model."""


@eval_app.command("storybook")
def storybook(
    out: Annotated[Path, typer.Option(help="Folder of the results; a stopped study goes on there.")],
    model: Annotated[str, typer.Option(help="Name of a built-in model, or path of a model file.")] = "storybook",
    stories: Annotated[int, typer.Option(min=2, help="Held-out stories.")] = 100,
    seed: Annotated[int, typer.Option(help="Shifts the noise seeds.")] = 0,
    split: Annotated[str, typer.Option(help="heldout: unseen combinations; train: seen ones.")] = "heldout",
    rows: Annotated[list[str] | None, typer.Option("--row", help=f"Some of: {', '.join(ROWS)}.")] = None,
) -> None:
    """Generate stories, read them back by the judge, and report accuracy and memory with 95 % intervals."""
    from shotstream.evaluation.generators import generators
    from shotstream.evaluation.storybook import study
    from shotstream.pipeline import ModelError, load
    from shotstream.storybook.draw import HEIGHT, WIDTH
    from shotstream.storybook.world import sample_world

    with one_line_errors():
        if unknown := set(rows or ()) - set(ROWS):
            raise Failure(f"unknown row {unknown.pop()!r}; rows: {', '.join(ROWS)}", USAGE)
        if split not in ("heldout", "train"):
            raise Failure(f"unknown split {split!r}; splits: heldout, train", USAGE)
        try:
            pipeline = load(model)
        except ModelError as error:
            raise Failure(str(error), MISSING) from None
        if (pipeline.config.width, pipeline.config.height) != (WIDTH, HEIGHT):
            made = f"{pipeline.config.width} x {pipeline.config.height}"
            raise Failure(f"model {model!r} makes {made} frames, and the judge reads {WIDTH} x {HEIGHT}", USAGE)
        worlds = [sample_world(TEST_SEED + i, split) for i in range(stories)]  # type: ignore[arg-type]
        chosen = generators(pipeline, worlds)
        report = study({row: chosen[row] for row in rows or ROWS}, worlds, out, seed, _progress)
        print(report.markdown())


TEST_SEED = 90_000_000
"""First seed of the test stories: no training story is drawn from here on."""


def _progress(row: str, done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        print(f"{row}: {done} of {total} stories", flush=True)
