"""The difference between two results: student and teacher, one stage and the next; paired by story."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

from shotstream.evaluation.measures import GROUPS, add, count
from shotstream.evaluation.records import LEDGER, JudgedStory, origin, read_row
from shotstream.evaluation.report import Report, differences, entries
from shotstream.storybook.world import World


def compare(first: Path, second: Path) -> dict[str, Report]:
    """Row -> a report of the stories that two results share, with rows "A" and "B".

    Both are folders of studies, compared in every row they share, or both are files of single rows. ValueError
    if there is nothing to compare, or if different judges read them.
    """
    for path in (first, second):
        if not path.exists():
            raise ValueError(f"{path}: no such results; make them with `shotstream eval storybook`")
    if first.is_dir() != second.is_dir():
        raise ValueError(f"compare two folders or two files, not {first} with {second}")
    judges = [origin(path if path.is_dir() else path.parent).get("judge") for path in (first, second)]
    if None not in judges and judges[0] != judges[1]:
        raise ValueError(f"{first} and {second} were read by different judges, {judges[0]} and {judges[1]}")
    if not first.is_dir():
        return {f"{first.stem} - {second.stem}": _compared(first, second)}
    shared = sorted({path.name for path in first.glob("*.jsonl")} & {path.name for path in second.glob("*.jsonl")})
    if not (rows := [name for name in shared if name != LEDGER]):
        raise ValueError(f"{first} and {second} have no row in common; give two files, such as {first / 'model.jsonl'}")
    return {name.removesuffix(".jsonl"): _compared(first / name, second / name) for name in rows}


def _compared(first: Path, second: Path) -> Report:
    sides = [_by_world(path) for path in (first, second)]
    shared = [world for world in sides[0] if world in sides[1]]
    if len(shared) < 2:
        raise ValueError(f"{first} and {second} share {len(shared)} stories: use the same --split and --shots")
    shots = max(len(world.shots) for world in shared)
    rows = {
        name: [reduce(add, (count(story, shots) for story in side[world])) for world in shared]
        for name, side in zip("AB", sides, strict=True)
    }
    return Report(rows, {"A": str(first), "B": str(second), "stories": len(shared)})


def _by_world(path: Path) -> dict[World, list[JudgedStory]]:
    told: dict[World, list[JudgedStory]] = {}
    for story in read_row(path):
        told.setdefault(story.world, []).append(story)
    return told


def markdown(reports: Mapping[str, Report]) -> str:
    """A minus B, a table per group with a line per row."""
    parts = []
    for group in GROUPS:
        cells = {row: partial(report.difference, "A", "B") for row, report in reports.items()}
        parts.append(differences("A - B", group, cells))
    origins = [report.provenance for report in reports.values()]
    where = "; ".join(f"A {row['A']}, B {row['B']}, {row['stories']} stories" for row in origins)
    return "\n\n".join([*parts, f"Paired 95 % intervals over stories in brackets. {where}."]) + "\n"


def as_json(reports: Mapping[str, Report]) -> dict[str, Any]:
    """A minus B: row -> group -> name, and where A and B come from."""
    return {
        row: {
            "provenance": dict(report.provenance),
            "differences": entries(tuple(GROUPS), partial(report.difference, "A", "B")),
        }
        for row, report in reports.items()
    }
