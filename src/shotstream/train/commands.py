"""`shotstream train ...`: recipes from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shotstream.errors import USAGE, Failure, one_line_errors

train_app = typer.Typer(help="Train a model, stage by stage; every stage resumes.", no_args_is_help=True)

Preset = Annotated[str, typer.Option(help="storybook, storybook-large or storybook-smoke.")]
Out = Annotated[Path, typer.Option(help="Folder of the whole recipe; each stage has a folder in it.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="task.kind=next, runs.steps=100, ...")
]


@train_app.command("all")
def all_stages(preset: Preset = "storybook", out: Out = Path("runs"), assignments: Set = None) -> None:
    """Run every stage of a recipe, skip what is finished, and write the model file."""
    from shotstream.train.recipe import run_all

    with one_line_errors():
        recipe = _recipe(preset)
        path = _checked(lambda: run_all(recipe, out, assignments or []))
        print(f"model: {path}  (try: shotstream generate examples/lantern.yaml --model {path})")


@train_app.command("stage")
def one_stage(
    name: Annotated[str, typer.Argument(help="data, autoencoder, image, shot, next, pairs, ode, stage1, stage2.")],
    preset: Preset = "storybook",
    out: Out = Path("runs"),
    assignments: Set = None,
) -> None:
    """Run or resume one stage of a recipe."""
    from shotstream.train.recipe import run_stage

    with one_line_errors():
        recipe = _recipe(preset)
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
        recipe = _recipe(preset)
        _checked(lambda: export(recipe, stage or recipe.student, out, path))


def _recipe(preset: str):  # type: ignore[no-untyped-def]  # Recipe would import torch at start-up
    from shotstream.train.recipe import RECIPES

    if preset not in RECIPES:
        raise Failure(f"unknown preset {preset!r}; presets: {', '.join(RECIPES)}", USAGE)
    return RECIPES[preset]


def _checked(task):  # type: ignore[no-untyped-def]
    """Wrong settings and missing earlier stages become one line."""

    try:
        return task()
    except (ValueError, FileNotFoundError) as error:
        raise Failure(str(error), USAGE) from None
