"""The storybook study: stories are generated, read back by the judge, and compared with what was asked for.

Three questions, each per attribute and with an interval over stories:
- named: does a shot show what the text up to there says?
- cuts: does the picture change where, and only where, the script cuts?
- memory: is what no text of a shot tells the same as when it was last decided? "free" compares with the first
  appearance in the same generated story, "script" with the truth, for stories continued from true shots.

Whatever cannot be recognised counts as wrong; what cannot be asked is left out and shows in the counts.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shotstream.evaluation import statistics
from shotstream.evaluation.statistics import Floats, Interval
from shotstream.storybook.captions import COLOUR_WORDS, Captions, Naming, captions, tokenize
from shotstream.storybook.draw import render
from shotstream.storybook.judge import CharacterReading, Reading, find_cuts, judge
from shotstream.storybook.world import (
    ACCESSORIES,
    ACCESSORY_COLOURS,
    ACTIONS,
    COLOURS,
    FRAMINGS,
    HATS,
    NAMED,
    PLACES,
    SHIRTS,
    SPECIES,
    TIMES,
    UNNAMED,
    World,
)

Generate = Callable[[World, Captions, int], Sequence[NDArray[np.uint8]]]
"""(world, captions, noise seed) -> the shots of a story, each uint8 [f h w 3]."""

MISSING = "missing"
TOLERANCE = 1
"""Frames by which a cut may be early or late."""

LOOKS = {
    "species": SPECIES,
    "colour": COLOURS,
    "hat": HATS,
    "shirt": SHIRTS,
    "accessory": ACCESSORIES,
    "accessory_colour": ACCESSORY_COLOURS,
}
_SHOT = {
    "place": PLACES,
    "time": TIMES,
    "framing": FRAMINGS,
    "action": ACTIONS,
    "count": ("0", "1", "2"),
}
_MEMORY = {name: LOOKS[name] for name in (*NAMED, *UNNAMED)} | {"layout": ("plain", "mirrored")}
VALUES = {
    "named": _SHOT | {name: LOOKS[name] for name in ("species", *NAMED)},
    "free": _MEMORY,
    "script": _MEMORY,
}
"""Group -> attribute -> its values; `layout` is the side from which a place is seen when a story returns."""

CUTS = ("found", "right", "exact")
"""Planned cuts that were found, found cuts that were planned, planned cuts found at the very frame."""


@dataclass(frozen=True)
class JudgedStory:
    """A story, its telling, and what the judge saw: a reading per shot, and planned and found cuts."""

    world: World
    captions: Captions
    readings: tuple[Reading, ...]
    planned: tuple[int, ...]
    found: tuple[int, ...]


def judge_story(world: World, told: Captions, shots: Sequence[NDArray[np.uint8]]) -> JudgedStory:
    """Read every shot of a generated story; ValueError when their number is not the script's."""
    if len(shots) != len(world.shots):
        raise ValueError(f"story {world.seed} has {len(world.shots)} shots, but {len(shots)} were generated")
    planned = tuple(accumulate(len(shot) for shot in shots[:-1]))
    found = tuple(find_cuts(np.concatenate(shots)))
    return JudgedStory(world, told, tuple(judge(shot) for shot in shots), planned, found)


def ground_truth(world: World, told: Captions, seed: int) -> list[NDArray[np.uint8]]:
    """The generator of the first row: the story as it is drawn. No story can be read better."""
    return [shot.frames for shot in render(world)]


# What is compared


def seen(reading: Reading, position: str, attribute: str) -> str:
    """An attribute of who stands there, "missing" when nobody does."""
    looks = {member.position: member for member in reading.cast}
    return str(getattr(looks[position], attribute)) if position in looks else MISSING


def positions(cast: Sequence[int]) -> dict[int, str]:
    """Character -> where the script puts it."""
    return dict(zip(cast, ("centre",) if len(cast) == 1 else ("left", "right"), strict=True))


def told_in(told: Captions, shot: int) -> Naming:
    """Per character, what the text of this very shot tells: its own caption and the global one."""
    known = told.named[shot]
    if any(word in tokenize(told.global_caption) for words in COLOUR_WORDS.values() for word in words):
        return known
    before = told.named[shot - 1] if shot else (frozenset(),) * len(known)
    return tuple(now - then for now, then in zip(known, before, strict=True))


Pair = tuple[str, str, str, str]
"""Group, attribute, what it should be, what was seen."""


def pairs(story: JudgedStory) -> Iterator[Pair]:
    """Everything the readings of a story are compared with."""
    yield from _named_pairs(story)
    yield from _memory_pairs(story)
    yield from _layout_pairs(story)


def _named_pairs(story: JudgedStory) -> Iterator[Pair]:
    for shot, reading, named in zip(story.world.shots, story.readings, story.captions.named, strict=True):
        yield "named", "place", shot.place, reading.place
        yield "named", "time", shot.time, reading.time
        yield "named", "framing", shot.framing, reading.framing
        yield "named", "action", shot.action, reading.action if reading.found else MISSING
        yield "named", "count", str(len(shot.cast)), str(len(reading.cast))
        for index, position in positions(shot.cast).items():
            for attribute in ("species", *sorted(named[index])):
                script = str(getattr(story.world.cast[index], attribute))
                yield "named", attribute, script, seen(reading, position, attribute)


def _memory_pairs(story: JudgedStory) -> Iterator[Pair]:
    first: dict[int, tuple[Reading, str]] = {}
    for k, (shot, reading) in enumerate(zip(story.world.shots, story.readings, strict=True)):
        told = told_in(story.captions, k)
        for index, position in positions(shot.cast).items():
            if index not in first:
                first[index] = reading, position
                continue
            for attribute in (*NAMED, *UNNAMED):
                if attribute in told[index]:
                    continue
                now = seen(reading, position, attribute)
                references = {
                    "free": seen(*first[index], attribute),
                    "script": str(getattr(story.world.cast[index], attribute)),
                }
                for group, reference in references.items():
                    if (
                        reference in VALUES[group][attribute]
                    ):  # not of the missing, nor the colour of no accessory
                        yield group, attribute, reference, now


def _layout_pairs(story: JudgedStory) -> Iterator[Pair]:
    """The side from which a place is seen, when a story returns to it."""
    sides: dict[str, str] = {}
    for shot, reading in zip(story.world.shots, story.readings, strict=True):
        side = _side(reading.mirrored) if reading.place == shot.place else MISSING
        if shot.place in sides:
            yield "script", "layout", _side(story.world.is_mirrored(shot.place)), side
            if sides[shot.place] != MISSING:
                yield "free", "layout", sides[shot.place], side
        sides.setdefault(shot.place, side)


def _side(mirrored: bool) -> str:
    return "mirrored" if mirrored else "plain"


# Counting


Tallies = dict[tuple[str, str], Floats]
"""(group, attribute) -> a confusion matrix per story [story reference reading]; for cuts, hits and all
[story 2]."""


def tally(stories: Sequence[JudgedStory]) -> Tallies:
    """Count every comparison of every story."""
    index = {
        (group, name): {value: i for i, value in enumerate((*values, MISSING))}
        for group, attributes in VALUES.items()
        for name, values in attributes.items()
    }
    tallies: Tallies = {key: np.zeros((len(stories), len(i), len(i))) for key, i in index.items()}
    tallies |= {("cuts", name): np.zeros((len(stories), 2)) for name in CUTS}
    for n, story in enumerate(stories):
        for group, name, reference, reading in pairs(story):
            place = index[group, name]
            tallies[group, name][n, place[reference], place.get(reading, place[MISSING])] += 1
        tallies["cuts", "found"][n] = _hits(story.planned, story.found, TOLERANCE)
        tallies["cuts", "right"][n] = _hits(story.found, story.planned, TOLERANCE)
        tallies["cuts", "exact"][n] = _hits(story.planned, story.found, 0)
    return tallies


def _hits(wanted: Iterable[int], present: Sequence[int], tolerance: int) -> tuple[int, int]:
    near = [any(abs(w - p) <= tolerance for p in present) for w in wanted]
    return sum(near), len(near)


# The study


@dataclass(frozen=True)
class Report:
    """The tallies of every row over the same stories, the first row being the ceiling, and their origin."""

    rows: Mapping[str, Tallies]
    provenance: Mapping[str, Any]

    def interval(self, row: str, group: str, attribute: str) -> Interval:
        """Accuracy or agreement, with its 95 % interval over stories."""
        counts = self.rows[row][group, attribute]
        return statistics.bootstrap(counts, _statistic(group), _count(group, counts))

    def kappa(self, row: str, group: str, attribute: str) -> Interval:
        """Agreement beyond chance, 1 when perfect; for the confusion matrices, not for cuts."""
        counts = self.rows[row][group, attribute]
        return statistics.bootstrap(counts, statistics.kappa, _count(group, counts))

    def chance(self, row: str, group: str, attribute: str) -> float | None:
        """What the marginals of this row alone would give."""
        value = float(statistics.chance(self.rows[row][group, attribute].sum(0)))
        return value if np.isfinite(value) else None

    def difference(self, first: str, second: str, group: str, attribute: str) -> Interval:
        """How much better the first row is than the second, paired by story."""
        a, b = self.rows[first][group, attribute], self.rows[second][group, attribute]
        return statistics.difference(a, b, _statistic(group), _count(group, a))

    def markdown(self) -> str:
        """Four tables, one row per generator; the last row is chance under the marginals of the first."""
        where = ", ".join(f"{key} {self.provenance[key]}" for key in ("stories", "date", "commit", "machine"))
        tables = [self._table(group, title) for group, title in _TITLES.items()]
        return "\n\n".join([*tables, f"95 % intervals over stories in brackets. {where}."]) + "\n"

    def _table(self, group: str, title: str) -> str:
        names = CUTS if group == "cuts" else tuple(VALUES[group])
        lines = [["", *(name.replace("_", " ") for name in names)], ["---"] * (len(names) + 1)]
        lines += [[row, *(self._cell(row, group, name) for name in names)] for row in self.rows]
        if group != "cuts":
            ceiling = next(iter(self.rows))
            by_chance = [self.chance(ceiling, group, name) for name in names]
            lines.append(["chance", *("-" if value is None else f"{value:.2f}" for value in by_chance)])
        return "\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in lines)])

    def _cell(self, row: str, group: str, name: str) -> str:
        text = str(self.interval(row, group, name))
        if group in ("free", "script") and (kappa := self.kappa(row, group, name).value) is not None:
            text += f" κ {kappa:.2f}"
        return text

    def json(self) -> dict[str, Any]:
        """Every number of the report, with counts, chance and kappa: row -> group -> attribute."""
        rows: dict[str, Any] = {}
        for row, tallies in self.rows.items():
            for group, name in tallies:
                entry = asdict(self.interval(row, group, name))
                if group != "cuts":
                    kappa = asdict(self.kappa(row, group, name))
                    entry |= {"chance": self.chance(row, group, name), "kappa": kappa}
                rows.setdefault(row, {}).setdefault(group, {})[name] = entry
        return {"provenance": dict(self.provenance), "rows": rows}


_TITLES = {
    "named": "What the text says is seen",
    "cuts": f"Cuts, within {TOLERANCE} frame",
    "free": "Memory: what no text of the shot tells is as at the first appearance",
    "script": "Memory: what no text of the shot tells is as in the script",
}


def _statistic(group: str) -> statistics.Statistic:
    return statistics.ratio if group == "cuts" else statistics.agreement


def _count(group: str, counts: Floats) -> int:
    return int(counts[:, 1].sum() if group == "cuts" else counts.sum())


def study(
    generators: Mapping[str, Generate],
    worlds: Sequence[World],
    out: Path,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda row, done, total: None,
) -> Report:
    """Run every generator over the same stories, with the same noise seeds, and write the report to `out`.

    Judged stories are kept in `out/ROW.jsonl` as they come, so an interrupted study goes on where it stopped;
    use another folder for another checkpoint. `seed` shifts the noise seeds; `progress` hears (row, done,
    total).
    """
    if not worlds or not generators:
        raise ValueError("a study needs at least one generator and one story")
    out.mkdir(parents=True, exist_ok=True)
    rows = {
        row: tally(judge_row(generate, worlds, out / f"{_slug(row)}.jsonl", seed, row, progress))
        for row, generate in generators.items()
    }
    report = Report(rows, _provenance(worlds, seed))
    (out / "result.json").write_text(json.dumps(report.json(), indent=1) + "\n")
    (out / "report.md").write_text(report.markdown())
    return report


def judge_row(
    generate: Generate,
    worlds: Sequence[World],
    path: Path,
    seed: int = 0,
    row: str = "",
    progress: Callable[[str, int, int], None] = lambda row, done, total: None,
) -> list[JudgedStory]:
    """The stories of one generator: read from `path` if they are there, else generated and appended to it."""
    done = _read(path)
    stories = []
    for n, world in enumerate(worlds):
        told = captions(world)
        key = _key(world, told, seed)
        if key not in done:
            story = judge_story(world, told, generate(world, told, seed + world.seed))
            done[key] = _record(story)
            with path.open("a") as file:
                file.write(
                    json.dumps({"key": key, "split": world.split, "seed": world.seed} | done[key]) + "\n"
                )
        stories.append(_story(world, told, done[key]))
        progress(row, n + 1, len(worlds))
    return stories


def _key(world: World, told: Captions, seed: int) -> str:
    """Names a story and its telling, so that results of a changed world are not taken for this one's."""
    return hashlib.sha256(f"{world} {told.global_caption} {told.shots} {seed}".encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Key -> record. A last line that an interruption left unfinished is cut off."""
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole)
    return {record["key"]: record for record in map(json.loads, whole.splitlines())}


def _record(story: JudgedStory) -> dict[str, Any]:
    readings = [asdict(reading) for reading in story.readings]
    return {"planned": list(story.planned), "found": list(story.found), "readings": readings}


def _story(world: World, told: Captions, record: Mapping[str, Any]) -> JudgedStory:
    readings = tuple(
        Reading(**{**reading, "cast": tuple(CharacterReading(**member) for member in reading["cast"])})
        for reading in record["readings"]
    )
    return JudgedStory(world, told, readings, tuple(record["planned"]), tuple(record["found"]))


def _slug(row: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in row.lower())


def _provenance(worlds: Sequence[World], seed: int) -> dict[str, Any]:
    return {
        "stories": len(worlds),
        "shots": sum(len(world.shots) for world in worlds),
        "splits": sorted({world.split for world in worlds}),
        "world_seeds": [world.seed for world in worlds],
        "noise_seed": seed,
        "bootstrap": {"resamples": statistics.RESAMPLES, "seed": statistics.SEED},
        "commit": _commit(),
        "machine": platform.platform(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """The commit of the package, with a + when files have changed since; "unknown" outside a repository."""
    try:
        command = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--dirty=+",
            "--exclude=*",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
