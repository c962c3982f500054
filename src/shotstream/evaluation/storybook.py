"""The storybook study: stories are generated, read back by the judge, and compared with what was asked for."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from shotstream.bench.machine import commit
from shotstream.evaluation import statistics
from shotstream.evaluation.pictures import draw_grid, draw_worst
from shotstream.evaluation.records import LEDGER, ORIGIN, Generate, judge_row, origin, row_file
from shotstream.evaluation.report import Report, tallies
from shotstream.storybook import draw, judge
from shotstream.storybook.world import World

Progress = Callable[[str, int, int], None]
"""Hears (row, stories done, stories in all)."""


def print_progress(row: str, done: int, total: int) -> None:
    """A line for every ten stories."""
    if done % 10 == 0 or done == total:
        print(f"{row}: {done} of {total} stories", flush=True)


@dataclass(frozen=True)
class Row:
    """A line of the report: who generates, and whether noise has a part in it (else one seed says all)."""

    generate: Generate
    noisy: bool = True


def study(
    rows: Mapping[str, Row],
    worlds: Sequence[World],
    out: Path,
    seeds: Sequence[int] = (0,),
    progress: Progress = lambda row, done, total: None,
    models: Mapping[str, str] | None = None,
    ledger: Path | None = None,
) -> Report:
    """Run every row over the same stories, once per noise seed, and write the report to `out`.

    Judged stories are kept in `out/ROW.jsonl` as they come, so an interrupted study goes on where it stopped.
    models: what generates, name -> hash; a folder of other models is refused with ValueError.
    ledger: the file that lists every look at the test stories.
    """
    if not worlds or not rows or not seeds:
        raise ValueError("a study needs at least one row, one story and one noise seed")
    models = dict(models or {})
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, models | {"judge": judge_hash()})
    shots = max(len(world.shots) for world in worlds)
    counted = {}
    for name, row in rows.items():
        path, used = row_file(out, name), list(seeds) if row.noisy else [0]
        judged = [judge_row(row.generate, worlds, path, seed, partial(progress, name)) for seed in used]
        counted[name] = tallies(judged, shots)
        everything = [story for stories in judged for story in stories]
        draw_grid(everything, out / f"{path.stem}-grid.png")
        draw_worst(everything, out / f"{path.stem}-worst.png", name)
    report = Report(counted, _provenance(worlds, seeds, models))
    _write(out / "result.json", json.dumps(report.json(), indent=1) + "\n")
    _write(out / "report.md", report.markdown())
    if ledger:
        enter(ledger, report)
    return report


def enter(ledger: Path, report: Report) -> None:
    """Append one line to the ledger: when, which commit and models, which stories, and how every row did."""
    kept = ("date", "commit", "models", "judge", "splits", "stories", "shots", "noise_seeds")
    headline = {
        row: {name: report.interval(row, "overall", name).value for name in ("named", "first", "free", "script")}
        for row in report.rows
    }
    line = json.dumps({key: report.provenance[key] for key in kept} | {"rows": headline})
    with ledger.open("a") as file:
        file.write(line + "\n")


def ledger_file(out: Path) -> Path:
    """benchmarks/results/ledger.jsonl of the repository, or in `out` when the package is installed elsewhere."""
    results = Path(__file__).parents[3] / "benchmarks" / "results"
    return (results if results.is_dir() else out) / LEDGER


def judge_hash() -> str:
    """Names the judge and the drawings it compares with, comments aside: results of two are never mixed."""
    code = "".join(ast.dump(ast.parse(inspect.getsource(module))) for module in (judge, draw))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


def _claim(out: Path, models: Mapping[str, str]) -> None:
    """A folder holds the results of one set of models: stories of two would be counted as one's."""
    known = origin(out)
    for name in known.keys() & models.keys():
        if known[name] != models[name]:
            raise ValueError(f"{out}: holds results of {name} {known[name]}, not {models[name]}; use another folder")
    _write(out / ORIGIN, json.dumps(known | dict(models), indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    unfinished = path.with_name(f".{path.name}.part")
    unfinished.write_text(text)
    unfinished.replace(path)


def _provenance(worlds: Sequence[World], seeds: Sequence[int], models: Mapping[str, str]) -> dict[str, Any]:
    return {
        "stories": len(worlds),
        "shots": sum(len(world.shots) for world in worlds),
        "splits": sorted({world.split for world in worlds}),
        "world_seeds": [world.seed for world in worlds],
        "noise_seeds": list(seeds),
        "bootstrap": {"resamples": statistics.RESAMPLES, "seed": statistics.SEED},
        "models": dict(models),
        "judge": judge_hash(),
        "commit": commit() or "unknown",
        "machine": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
