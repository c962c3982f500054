"""The stages of a recipe side by side: what each adds to the one before, and how they drift over long stories.

    shotstream eval stages runs --stages next,stage1,stage2 --stories 200 --seeds 2 --out runs/stages
    shotstream eval stages runs --stages stage1,stage2 --shots 10 --out runs/stages-10

All tell the same stories with the same noise, living with their own past, so every difference is paired.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from shotstream.evaluation import statistics
from shotstream.evaluation.report import Report, differences, entries, table
from shotstream.evaluation.statistics import Floats, Interval
from shotstream.train.recipe import RECIPES, export

LATE = 4
"""The first shot that counts as late."""

TABLES = ("overall", "named", "free", "script", "recognised", "cuts", "drift")
"""Groups of measures in which stages are compared."""

CURVES = ("named", "free", "script", "unrecognised", "sharpness", "saturation")
"""Drift measures of which the value at every shot is shown, and those of late shots compared."""


def exported(preset: str, stages: Sequence[str], root: Path, out: Path) -> dict[str, Path]:
    """The model files of these stages of the recipe in `root`, written to `out`. ValueError for an unknown preset or
    stage, FileNotFoundError for one that was not trained.
    """
    if preset not in RECIPES:
        raise ValueError(f"unknown preset {preset!r}; presets: {', '.join(RECIPES)}")
    recipe = RECIPES[preset]
    for stage in stages:
        recipe.stage(stage)
    out.mkdir(parents=True, exist_ok=True)
    return {stage: export(recipe, stage, root, out / f"{stage}.safetensors") for stage in stages}


def write(report: Report, stages: Sequence[str], out: Path) -> Path:
    """The tables as Markdown and JSON; returns the path of the first, `stages.md`."""
    steps = {f"{after} - {before}": (after, before) for before, after in pairwise(stages)}
    (out / "stages.json").write_text(json.dumps(_json(report, stages, steps), indent=1) + "\n")
    path = out / "stages.md"
    path.write_text(_markdown(report, stages, steps))
    return path


def late(report: Report, stage: str, name: str) -> Interval:
    """A drift measure over the late shots of all stories."""
    counts = report.counts(stage, "drift", name)
    return statistics.bootstrap(counts, of_late, _observed(counts))


def late_difference(report: Report, after: str, before: str, name: str) -> Interval:
    """How much better or worse the late shots of one stage are than those of another, paired by story."""
    first, second = (report.counts(stage, "drift", name) for stage in (after, before))
    return statistics.difference(first, second, of_late, _observed(first))


def of_late(counts: Floats) -> Floats:
    """[.. shot 2]: the ratio over the late shots."""
    return statistics.ratio(counts[..., LATE - 1 :, :].sum(-2))


def _observed(counts: Floats) -> int:
    return int(counts[:, LATE - 1 :, 1].sum())


def _markdown(report: Report, stages: Sequence[str], steps: dict[str, tuple[str, str]]) -> str:
    compared = {title: partial(report.difference, *pair) for title, pair in steps.items()}
    parts = ["# Stages"]
    for group in TABLES:
        parts += [report.group(group), differences("Difference", group, compared)]
    parts += [report.curve(name) for name in CURVES]
    lines = [[stage, *(late(report, stage, name).text(3) for name in CURVES)] for stage in stages]
    lines += [
        [title, *(late_difference(report, *pair, name).text(3) for name in CURVES)] for title, pair in steps.items()
    ]
    parts += [table(f"Shots {LATE} and later", CURVES, lines), report.footer()]
    return "\n\n".join(parts) + "\n"


def _json(report: Report, stages: Sequence[str], steps: dict[str, tuple[str, str]]) -> dict[str, Any]:
    values = {stage: entries(TABLES, partial(report.interval, stage)) for stage in stages}
    curves = {stage: {name: [asdict(at) for at in report.by_shot(stage, name)] for name in CURVES} for stage in stages}
    last = {stage: {name: asdict(late(report, stage, name)) for name in CURVES} for stage in stages}
    return {
        "provenance": dict(report.provenance),
        "stages": {stage: values[stage] | {"by_shot": curves[stage], "late": last[stage]} for stage in stages},
        "differences": {
            title: entries(TABLES, partial(report.difference, *pair))
            | {"late": {name: asdict(late_difference(report, *pair, name)) for name in CURVES}}
            for title, pair in steps.items()
        },
    }
