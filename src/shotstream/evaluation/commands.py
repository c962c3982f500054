"""`shotstream eval ...`: measured quality from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shotstream.errors import MISSING, USAGE, Failure, one_line_errors

if TYPE_CHECKING:
    from shotstream.pipeline import Pipeline
    from shotstream.storybook.world import World

eval_app = typer.Typer(help="Measure a model.", no_args_is_help=True)

ROWS = (
    "ground truth",
    "autoencoder",
    "teacher",
    "teacher true history",
    "model",
    "true history",
    "without memory",
    "other memory",
    "copy previous",
    "random story",
)
TEST_SEED, VALIDATION_SEED = 90_000_000, 80_000_000
"""First seeds of the stories that claims are tested on, and of those that choose checkpoints: no training story is
drawn from here on."""


@eval_app.callback()
def _group() -> None:
    """Measure a model."""


@eval_app.command("storybook")
def storybook(
    out: Annotated[Path, typer.Option(help="Folder of the results; a stopped study goes on there.")],
    model: Annotated[str, typer.Option(help="Name of a built-in model, or path of a model file.")] = "storybook",
    teacher: Annotated[
        str | None, typer.Option(metavar="FILE", help="Model file of the teacher.", show_default="storybook's own")
    ] = None,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Steps of the teacher.")] = 25,
    stories: Annotated[int, typer.Option(min=2, help="Held-out stories.")] = 100,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Shots of every story.", show_default="2 to 5, as the story has it")
    ] = None,
    seed: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Noise seed; may be repeated.", show_default="0")
    ] = None,
    split: Annotated[str, typer.Option(help="heldout: unseen combinations; train: seen ones.")] = "heldout",
    validation: Annotated[
        bool, typer.Option("--validation", help="Stories to choose a checkpoint by, instead of the test stories.")
    ] = False,
    rows: Annotated[list[str] | None, typer.Option("--row", metavar="ROW", help=f"Some of: {', '.join(ROWS)}.")] = None,
) -> None:
    """Generate stories, read them back by the judge, and report accuracy and memory with 95 % intervals."""
    from shotstream.evaluation.generators import generators
    from shotstream.evaluation.storybook import ledger_file, print_progress, study

    with one_line_errors():
        if unknown := set(rows or ()) - set(ROWS):
            raise Failure(f"unknown row {unknown.pop()!r}; rows: {', '.join(ROWS)}", USAGE)
        worlds = _worlds(stories, shots, split, validation)
        pipeline = _load(model)
        guide = _load(teacher) if teacher else _default_teacher(model)
        chosen = generators(pipeline, guide, teacher_steps)
        wanted = rows or [row for row in ROWS if row in chosen]
        if absent := [row for row in wanted if row not in chosen]:
            raise Failure(f"row {absent[0]!r} needs the teacher of {model!r}; name its model file by --teacher", USAGE)
        models = {"model": pipeline.revision}
        if guide:
            models |= {"teacher": guide.revision, "teacher steps": str(teacher_steps)}
        ledger = None if validation else ledger_file(out)
        try:
            report = study(
                {row: chosen[row] for row in wanted}, worlds, out, seed or [0], print_progress, models, ledger
            )
        except ValueError as error:
            raise Failure(str(error), USAGE) from None
        print(report.markdown(("overall",)))
        print(f"all tables: {out / 'report.md'}; pictures beside it")


@eval_app.command("fast")
def fast(
    out: Annotated[Path, typer.Option(help="Folder of the results; a stopped study goes on there.")],
    model: Annotated[str, typer.Option(help="Any model that fast mode works for.")] = "storybook",
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto: a GPU if there is one.")] = "auto",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; with 1, the time computed counts.", show_default="torch's")
    ] = None,
    ways: Annotated[
        list[str] | None, typer.Option("--way", metavar="WAY", help="fp8, tiny decoder, or fp8 + tiny decoder.")
    ] = None,
    stories: Annotated[int, typer.Option(min=0, help="Stories that the judge reads; 0: none.")] = 12,
) -> None:
    """Measure each part of fast mode beside the exact model: how fast, how like it, and what the judge sees."""
    import torch

    from shotstream.evaluation.fast import WAYS, measure, table
    from shotstream.evaluation.storybook import print_progress
    from shotstream.film import DeviceError, find_device
    from shotstream.pipeline import ModelError, load
    from shotstream.storybook.world import sample_world

    with one_line_errors():
        if unknown := set(ways or ()) - WAYS.keys():
            raise Failure(f"unknown way {unknown.pop()!r}; ways: {', '.join(WAYS)}", USAGE)
        if threads:
            torch.set_num_threads(threads)
        try:
            where = find_device(device)
            exact = load(model, where)
            pipelines = {name: load(model, where, fast=WAYS[name]) for name in ways or WAYS}
        except ModelError as error:
            raise Failure(str(error), MISSING) from None
        except DeviceError as error:
            raise Failure(str(error), USAGE) from None
        if stories:
            _check_readable(exact, f"{model!r} (--stories 0 leaves the judge out)")
        worlds = [sample_world(VALIDATION_SEED + i, "train") for i in range(stories)]
        out.mkdir(parents=True, exist_ok=True)
        result = measure(exact, pipelines, out, worlds, print_progress)
        (out / "fast.json").write_text(json.dumps(result, indent=1) + "\n")
        print(table(result))


@eval_app.command("compare")
def compare_results(
    first: Annotated[
        Path, typer.Argument(metavar="A", help="Folder of a study, or the .jsonl file of one of its rows.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B", help="The same of another one.")],
    out: Annotated[Path | None, typer.Option("--json", help="Also write the numbers as JSON.")] = None,
) -> None:
    """A minus B: what two studies of the same stories differ in, paired by story, with 95 % intervals."""
    from shotstream.evaluation.comparison import as_json, compare, markdown

    with one_line_errors():
        try:
            reports = compare(first, second)
        except ValueError as error:
            raise Failure(str(error), USAGE) from None
        if out:
            out.write_text(json.dumps(as_json(reports), indent=1) + "\n")
        print(markdown(reports))


@eval_app.command("stages")
def stages_of_a_recipe(
    root: Annotated[Path, typer.Argument(metavar="RUNS", help="Folder of the recipe (`--out` of `shotstream train`).")],
    out: Annotated[Path, typer.Option(help="Folder of the results; a stopped study goes on there.")],
    stages: Annotated[
        str, typer.Option(metavar="A,B,...", help="Stages that generate, in order.")
    ] = "ode,stage1,stage2",
    preset: Annotated[str, typer.Option(help="The recipe.")] = "storybook",
    stories: Annotated[int, typer.Option(min=2, help="Held-out stories.")] = 200,
    seeds: Annotated[int, typer.Option(min=1, help="Noise seeds: every story is told so often.")] = 2,
    shots: Annotated[
        int | None, typer.Option(min=1, help="Shots of every story.", show_default="2 to 5, as the story has it")
    ] = None,
    split: Annotated[str, typer.Option(help="heldout: unseen combinations; train: seen ones.")] = "heldout",
    validation: Annotated[
        bool, typer.Option("--validation", help="Stories to choose a checkpoint by, instead of the test stories.")
    ] = False,
) -> None:
    """What each stage of a recipe adds to the one before, paired by story, and how they drift over long stories."""
    from shotstream.evaluation.generators import generators
    from shotstream.evaluation.stages import exported, write
    from shotstream.evaluation.storybook import ledger_file, print_progress, study

    with one_line_errors():
        worlds = _worlds(stories, shots, split, validation)
        names = stages.split(",")
        try:
            files = exported(preset, names, root, out)
            pipelines = {name: _load(str(path)) for name, path in files.items()}
            rows = {name: generators(pipeline)["model"] for name, pipeline in pipelines.items()}
            models = {name: pipeline.revision for name, pipeline in pipelines.items()}
            ledger = None if validation else ledger_file(out)
            report = study(rows, worlds, out, range(seeds), print_progress, models, ledger)
        except ValueError as error:
            raise Failure(str(error), USAGE) from None
        except FileNotFoundError as error:
            raise Failure(str(error), MISSING) from None
        path = write(report, names, out)
        print(report.markdown(("overall",)))
        print(f"all tables: {path}, and the same numbers as JSON beside it")


def _worlds(stories: int, shots: int | None, split: str, validation: bool) -> list[World]:
    from shotstream.storybook.world import sample_world

    if split not in ("heldout", "train"):
        raise Failure(f"unknown split {split!r}; splits: heldout, train", USAGE)
    first = VALIDATION_SEED if validation else TEST_SEED
    return [sample_world(first + i, split, shots) for i in range(stories)]  # type: ignore[arg-type]


def _load(model: str) -> Pipeline:
    from shotstream.pipeline import ModelError, load

    try:
        pipeline = load(model)
    except ModelError as error:
        raise Failure(str(error), MISSING) from None
    _check_readable(pipeline, repr(model))
    return pipeline


def _check_readable(pipeline: Pipeline, name: str) -> None:
    """Whether the judge can read what the model makes."""
    from shotstream.storybook.draw import HEIGHT, WIDTH

    if (pipeline.config.width, pipeline.config.height) != (WIDTH, HEIGHT):
        made = f"{pipeline.config.width} x {pipeline.config.height}"
        raise Failure(f"model {name} makes {made} frames, and the judge reads {WIDTH} x {HEIGHT}", USAGE)


def _default_teacher(model: str) -> Pipeline | None:
    """The teacher that lies beside the built-in model; a model file brings none."""
    from importlib.resources import files

    path = Path(str(files("shotstream") / "storybook" / "weights" / "storybook-teacher.safetensors"))
    return _load(str(path)) if model == "storybook" and path.exists() else None
