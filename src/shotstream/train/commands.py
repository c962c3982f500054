"""`shotstream train ...`: recipes from the command line."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from shotstream.errors import USAGE, Failure, one_line_errors

train_app = typer.Typer(help="Train a model, stage by stage; every stage resumes.", no_args_is_help=True)

Preset = Annotated[str, typer.Option(help="storybook, storybook-large, storybook-smoke or wan-1.3b.")]
Out = Annotated[Path, typer.Option(help="Folder of the whole recipe; each stage has a folder in it.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="task.kind=next, runs.steps=100, ...")
]
SetAny = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="next.runs.steps=100 (one stage), runs.batch=16 (all), ..."),
]
Chosen = Annotated[
    list[str] | None,
    typer.Option(
        "--option", metavar="FIELD=VALUE", help="Alternatives of the paper: context=first, inject=channel, ..."
    ),
]


@train_app.command("all")
def all_stages(
    preset: Preset = "storybook", out: Out = Path("runs"), assignments: SetAny = None, options: Chosen = None
) -> None:
    """Run every stage of a recipe, skip what is finished, and write the model file."""
    from shotstream.train.recipe import run_all

    with one_line_errors():
        recipe = _recipe(preset, options)
        path = _checked(lambda: run_all(recipe, out, assignments or []))
        print(f"model: {path}  (try: shotstream generate examples/lantern.yaml --model {path})")


@train_app.command("stage")
def one_stage(
    name: Annotated[
        str,
        typer.Argument(help="data, autoencoder, tiny-decoder, image, shot, next, pairs, ode, stage1, stage2."),
    ],
    preset: Preset = "storybook",
    out: Out = Path("runs"),
    assignments: Set = None,
    options: Chosen = None,
) -> None:
    """Run or resume one stage of a recipe."""
    from shotstream.train.recipe import run_stage

    with one_line_errors():
        recipe = _recipe(preset, options)
        _checked(lambda: run_stage(recipe, name, out, assignments or []))


@train_app.command("export")
def export_model(
    path: Annotated[Path, typer.Argument(help="The model file to write (.safetensors).")],
    stage: Annotated[str, typer.Option(help="Whose averaged weights; default: the recipe's student.")] = "",
    preset: Preset = "storybook",
    out: Out = Path("runs"),
) -> None:
    """Write the model file of a trained stage."""
    from shotstream.train.recipe import export

    with one_line_errors():
        if path.suffix != ".safetensors":
            raise Failure(f"{path}: a model file's name ends in .safetensors", USAGE)
        recipe = _recipe(preset)
        print(f"model: {_checked(lambda: export(recipe, stage or recipe.student, out, path))}")


@train_app.command("dry-run")
def dry_run(
    preset: Preset = "wan-1.3b",
    layers: Annotated[int, typer.Option(min=0, help="Layers of the DiT; 0: all.")] = 0,
    height: Annotated[int, typer.Option(min=0, help="Pixels; 0: the preset's.")] = 0,
    width: Annotated[int, typer.Option(min=0, help="Pixels; 0: the preset's.")] = 0,
    chunks: Annotated[int, typer.Option(min=0, help="Chunks of a shot; 0: the preset's.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Samples per process.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    only_plan: Annotated[bool, typer.Option("--plan", help="Print the memory plan and stop.")] = False,
) -> None:
    """Two steps of every stage on noise, at real shapes: a memory plan, then what it took."""
    from shotstream.train import dry_run as rehearsal
    from shotstream.train import processes

    with one_line_errors():
        recipe = _recipe(preset)
        config = _checked(lambda: rehearsal.shrunk(recipe.config, layers, height, width, chunks))
        device = device if only_plan else _checked(lambda: processes.device(device))
        shards = processes.start(device).processes
        if processes.leads():
            print(f"{preset}: {rehearsal.text_of(config)}, {shards} processes, {batch} samples each; GiB per process")
        for stage in recipe.stages:
            if processes.leads() and rehearsal.trains_a_dit(stage):
                need = rehearsal.memory(stage, config, shards, batch)
                parts = (need.states, need.gathered, need.activations, need.total)
                told = zip(("states", "gathered", "activations", "total"), parts, strict=True)
                print(
                    f"plan {stage.name}: " + ", ".join(f"{name} {size / 2**30:.2f}" for name, size in told), flush=True
                )
        if only_plan:
            return

        def tell(step: rehearsal.Step) -> None:
            learn = f"{step.trained / 1e6:.1f} M learn here"
            print(
                f"done {step.stage}: 2 steps in {step.seconds:.1f} s, peak {step.peak_gib:.2f} GiB, {learn}", flush=True
            )

        rehearsal.dry_run(recipe, config, device, batch, tell)
        processes.stop()


def ablate(
    out: Annotated[Path, typer.Option(help="Folder of the table, and of a folder per row.")],
    preset: Preset = "storybook",
    base: Annotated[
        Path | None,
        typer.Option(help="Recipe folder with data, autoencoder, image and shot.", show_default="<out>/base"),
    ] = None,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Some rows only.")] = None,
    stories: Annotated[int, typer.Option(min=2, help="Stories told by every row.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Noise seeds per story.")] = 2,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Sampling steps of the rows about the teacher.")] = 25,
    assignments: SetAny = None,
) -> None:
    """Train the alternatives that the paper ablates with equal budgets, judge them, and write a table."""
    from shotstream.train.ablation import ablate as run

    with one_line_errors():
        recipe = _recipe(preset)
        if not recipe.is_storybook:
            raise Failure(f"--preset {preset}: the judge reads storybook pictures; use storybook", USAGE)
        task = partial(run, recipe, out, base, rows or (), stories, range(seeds), assignments or (), teacher_steps)
        print(_checked(task).read_text())


def _recipe(preset: str, options: list[str] | None = None):  # type: ignore[no-untyped-def]  # Recipe would import torch
    from shotstream.config import override
    from shotstream.train.recipe import RECIPES

    if preset not in RECIPES:
        raise Failure(f"unknown preset {preset!r}; presets: {', '.join(RECIPES)}", USAGE)
    recipe = RECIPES[preset]
    return _checked(lambda: recipe.chosen(override(recipe.options, options))) if options else recipe


def _checked(task):  # type: ignore[no-untyped-def]
    """Wrong settings, missing earlier stages and files that do not fit become one line."""
    from shotstream.checkpoints import ModelError

    try:
        return task()
    except (ValueError, FileNotFoundError, ModelError) as error:
        raise Failure(str(error), USAGE) from None
