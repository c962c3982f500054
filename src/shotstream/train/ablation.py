"""The paper's ablations (Tables 3 and 4) in the storybook world: every alternative with the same budget, then judged.

    shotstream ablate --out runs/ablation                                     everything, resumable
    shotstream ablate --out runs/ablation --base runs --row "first frame"     some rows, on stages that are there
    shotstream ablate --out runs/ablation --set next.runs.steps=400           another budget, the same for every row

Rows about the teacher train stage `next` from the same `shot` and are judged as teachers; rows about the student go on
from there and are judged as students. A row differs from the chosen one in one thing. All tell the same stories.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from shotstream.evaluation.generators import generators
from shotstream.evaluation.records import Generate
from shotstream.evaluation.report import Report
from shotstream.evaluation.statistics import Interval
from shotstream.evaluation.storybook import Row, print_progress, study
from shotstream.models.text import Words
from shotstream.pipeline import Pipeline
from shotstream.storybook.world import sample_world
from shotstream.train import processes
from shotstream.train.dmd import DMDConfig
from shotstream.train.model import Options
from shotstream.train.ode import ODEConfig
from shotstream.train.recipe import Recipe, fresh, load_weights, run_stage, trained_vae

TEST_SEED = 95_000_000
"""First seed of the stories told: none of training, and none of the study's test stories."""

BASE = ("data", "autoencoder", "image", "shot")
"""Stages that no alternative changes."""


@dataclass(frozen=True)
class Arm:
    """A row of the table: the one thing in which it differs, and the stages trained for it."""

    group: str
    options: Options = field(default_factory=Options)
    stages: tuple[str, ...] = ("next",)  # the last is judged; those before `next` and those not named are shared
    changes: Mapping[str, Sequence[str]] = field(default_factory=dict)  # stage -> overrides


_STUDENT = ("ode", "stage1", "stage2")
_WHOLE = ("next", *_STUDENT)
TEACHER, STUDENT = "teacher (chosen)", "student (chosen)"


def arms(recipe: Recipe) -> dict[str, Arm]:
    """All rows, by name; the two chosen ones first, because others go on from their stages."""
    both = recipe.stage("stage1").runs.steps + recipe.stage("stage2").runs.steps
    budget = f"runs.steps={both}"
    start = {"stage1": ["init=ode"]}  # every row by the paper's way, whatever the recipe goes on from
    return {
        TEACHER: Arm("chosen"),
        STUDENT: Arm("chosen", stages=_STUDENT, changes=start),
        "first frame": Arm("context", Options(context="first")),
        "first and last frame": Arm("context", Options(context="first-last")),
        "target's caption only": Arm("captions", Options(captions="target")),
        "channel concatenation": Arm("injection", Options(inject="channel")),
        "attention only": Arm("tuning", changes={"next": ["task.tune=attention"]}),
        "no phase": Arm("shots told apart", Options(shots="none"), _WHOLE, start),
        "learned embedding": Arm("shots told apart", Options(shots="embedding"), _WHOLE, start),
        "stage 1 only": Arm("distillation", stages=("stage1",), changes={"stage1": [budget, "init=ode"]}),
        "stage 2 only": Arm(
            "distillation", stages=("stage2",), changes={"stage2": [budget, "init=ode", "task.critic=teacher"]}
        ),
    }


def ablate(
    recipe: Recipe,
    out: Path,
    base: Path | None = None,
    rows: Sequence[str] = (),
    stories: int = 100,
    seeds: Sequence[int] = (0, 1),
    overrides: Sequence[str] = (),
    teacher_steps: int = 25,
) -> Path:
    """Train and judge `rows` (default: all) and write the table; returns its path (`.json` is beside it).

    `base`: the folder of a recipe whose first stages are there already. `overrides`: `next.runs.steps=400` for one
    stage, `runs.batch=16` for all. `teacher_steps`: of sampling. Everything resumes. Raises ValueError for an unknown
    row or field.
    """
    recipe = recipe.overridden(overrides)
    table = arms(recipe)
    if unknown := set(rows) - table.keys():
        raise ValueError(f"unknown row {unknown.pop()!r}; rows: {', '.join(table)}")
    if base is None:
        base = out / "base"
        for name in BASE:
            run_stage(recipe, name, base, [])
    asked = rows or table
    wanted = {*asked, TEACHER, *(STUDENT for name in asked if table[name].stages[-1] != "next")}
    chosen = [name for name in table if name in wanted]
    for name in chosen:
        train(recipe, table[name], folder(out, name), base, out)
    if not processes.leads():
        return out / "ablation.md"
    pipelines = {name: _pipeline(recipe, table[name], folder(out, name)) for name in chosen}
    told = {name: Row(_generate(recipe, table[name], pipeline, teacher_steps)) for name, pipeline in pipelines.items()}
    worlds = [sample_world(TEST_SEED + i, "heldout") for i in range(stories)]
    report = study(
        told, worlds, out / "judged", seeds, print_progress, models={name: p.revision for name, p in pipelines.items()}
    )
    return write(report, {name: table[name] for name in chosen}, out)


def folder(out: Path, row: str) -> Path:
    """Where a row's stages are."""
    return out / "".join(letter if letter.isalnum() else "-" for letter in row)


def train(recipe: Recipe, arm: Arm, root: Path, base: Path, out: Path) -> None:
    """Train the stages of one row, beside links to those that it shares."""
    root.mkdir(parents=True, exist_ok=True)
    shared = dict.fromkeys((*BASE, "vae-linear.safetensors"), base)
    if "next" not in arm.stages:
        shared |= {"next": folder(out, TEACHER), "ode": folder(out, STUDENT)}
    stages = _with_pairs(recipe, arm)
    for name, home in shared.items():
        if name not in stages and home != root and (home / name).exists() and not (root / name).is_symlink():
            (root / name).symlink_to(os.path.relpath(home / name, root))
    variant = recipe.chosen(arm.options)
    for name in stages:
        run_stage(variant, name, root, list(arm.changes.get(name, ())))


def _with_pairs(recipe: Recipe, arm: Arm) -> list[str]:
    task = recipe.stage("ode").task
    reads = isinstance(task, ODEConfig) and task.source == "pairs" and "ode" in arm.stages
    return [stage for name in arm.stages for stage in (("pairs", name) if reads and name == "ode" else (name,))]


def _pipeline(recipe: Recipe, arm: Arm, root: Path) -> Pipeline:
    """A row's model, ready to tell stories."""
    variant = recipe.chosen(arm.options)
    model = load_weights(fresh(variant, 0), root / arm.stages[-1]).eval().requires_grad_(False)
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    assert isinstance(model.text, Words)
    return Pipeline(variant.config, model.dit, trained_vae(recipe, root), model.text, digest.hexdigest()[:12])


def _generate(recipe: Recipe, arm: Arm, pipeline: Pipeline, teacher_steps: int) -> Generate:
    """How a row's model tells a story, living with its own past."""
    is_student = isinstance(recipe.stage(arm.stages[-1]).task, DMDConfig)
    return generators(pipeline, pipeline, teacher_steps)["model" if is_student else "teacher"].generate


MEASURES = (("overall", "named"), ("overall", "free"), ("overall", "script"), ("cuts", "right"), ("drift", "free"))


def write(report: Report, table: Mapping[str, Arm], out: Path) -> Path:
    """The table as Markdown and JSON: every measure with its interval, and its difference to the chosen row."""
    entries: dict[str, Any] = {}
    for name, arm in table.items():
        chosen = STUDENT if arm.stages[-1] != "next" else TEACHER
        entries[name] = {"group": arm.group, "options": asdict(arm.options), "compared_with": chosen}
        for group, measure in MEASURES:
            own = report.interval(name, group, measure)
            less = report.difference(name, chosen, group, measure)
            entries[name][f"{group}.{measure}"] = {"value": asdict(own), "difference": asdict(less)}
    whole = {"provenance": dict(report.provenance), "rows": entries}
    _replace(out / "ablation.json", json.dumps(whole, indent=1) + "\n")
    lines = ["| what differs | row | " + " | ".join(f"{group} {name}" for group, name in MEASURES) + " |"]
    lines += ["|---|---|" + "---|" * len(MEASURES)]
    for name, arm in table.items():
        lines.append(f"| {arm.group} | {name} | " + " | ".join(_cell(entries[name], *m) for m in MEASURES) + " |")
    told = ("stories", "noise_seeds", "date", "commit", "machine")
    where = ", ".join(f"{key} {report.provenance[key]}" for key in told)
    note = "95 % intervals over stories; in the second line of a cell, the paired difference to the chosen row."
    _replace(out / "ablation.md", "\n".join(["# Ablations", "", *lines, "", f"{note} {where}."]) + "\n")
    return out / "ablation.md"


def _cell(entry: Mapping[str, Any], group: str, measure: str) -> str:
    both = entry[f"{group}.{measure}"]
    own, less = (Interval(**both[kind]) for kind in ("value", "difference"))
    return own.text() if entry["group"] == "chosen" else f"{own.text()}<br>{less.text()}"


def _replace(path: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text)
    os.replace(unfinished, path)
