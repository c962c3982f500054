"""Tables with intervals over stories: of one study, and of the difference between two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial, reduce
from typing import Any

import numpy as np

from shotstream.evaluation import statistics
from shotstream.evaluation.measures import CONFUSION, GROUPS, SLOPE, Tally, add, count
from shotstream.evaluation.records import JudgedStory
from shotstream.evaluation.statistics import Floats, Interval

CEILING = "autoencoder"
OF_CEILING = ("overall", "first", "free")
BY_SHOT_OF_CEILING = ("named", "free", "script")
"""Groups, and drift measures, whose share of the ceiling is reported."""

EFFECTS = {
    "true history - without memory": ("true history", "without memory"),
    "true history - other memory": ("true history", "other memory"),
    "model - without memory": ("model", "without memory"),
    "true history - model": ("true history", "model"),
    "model - teacher": ("model", "teacher"),
    "true history - teacher true history": ("true history", "teacher true history"),
}
"""Differences that are always reported: what memory does, what living with one's own past costs, and the teacher."""

OF_EFFECTS = ("overall", "script", "drift")

Read = Callable[[str, str], Interval]
"""(group, name) -> the number of a cell."""


def tallies(judged: Sequence[Sequence[JudgedStory]], shots: int) -> list[Tally]:
    """Per story, the counts of all its tellings; `judged` holds the same stories once per noise seed."""
    tellings = zip(*([count(story, shots) for story in stories] for stories in judged), strict=True)
    return [reduce(add, counts) for counts in tellings]


@dataclass(frozen=True)
class Report:
    """The tallies of every row over the same stories, and their origin."""

    rows: Mapping[str, Sequence[Tally]]
    provenance: Mapping[str, Any]

    def counts(self, row: str, group: str, name: str) -> Floats:
        """[story ...], as `measures.Tally` says."""
        return np.stack([tally[group, name] for tally in self.rows[row]])

    def interval(self, row: str, group: str, name: str) -> Interval:
        """A measure with its 95 % interval over stories."""
        counts, kind = self.counts(row, group, name), GROUPS[group].kind
        return statistics.bootstrap(counts, kind.statistic, int(kind.observations(counts)))

    def kappa(self, row: str, group: str, name: str) -> Interval:
        """Agreement beyond chance, 1 when perfect; for the confusion matrices."""
        counts = self.counts(row, group, name)
        return statistics.bootstrap(counts, statistics.kappa, int(counts.sum()))

    def chance(self, row: str, group: str, name: str) -> float | None:
        """What the marginals of this row alone would give, for the confusion matrices."""
        value = float(statistics.chance(self.counts(row, group, name).sum(0)))
        return value if np.isfinite(value) else None

    def by_shot(self, row: str, name: str) -> list[Interval]:
        """A drift measure at every shot index, from 1."""
        shots = np.moveaxis(self.counts(row, "drift", name), 1, 0)
        return [statistics.bootstrap(counts, statistics.ratio, int(counts[:, 1].sum())) for counts in shots]

    def by_shot_of_ceiling(self, row: str, name: str) -> list[Interval]:
        """The same as a share of the autoencoder's."""
        both = (np.moveaxis(self.counts(which, "drift", name), 1, 0) for which in (row, CEILING))
        return [
            statistics.share(ours, ceiling, statistics.ratio, int(ours[:, 1].sum()))
            for ours, ceiling in zip(*both, strict=True)
        ]

    def difference(self, first: str, second: str, group: str, name: str) -> Interval:
        """How much the first row exceeds the second, paired by story."""
        return self._paired(statistics.difference, first, second, group, name)

    def of_ceiling(self, row: str, group: str, name: str) -> Interval:
        """A measure as a share of the autoencoder's, paired by story."""
        return self._paired(statistics.share, row, CEILING, group, name)

    def _paired(self, compare: Callable[..., Interval], first: str, second: str, group: str, name: str) -> Interval:
        a, b, kind = self.counts(first, group, name), self.counts(second, group, name), GROUPS[group].kind
        return compare(a, b, kind.statistic, int(kind.observations(a)))

    def effects(self) -> dict[str, tuple[str, str]]:
        """The differences of which both rows are here."""
        return {title: pair for title, pair in EFFECTS.items() if self.rows.keys() >= set(pair)}

    # As text

    def markdown(self, groups: Sequence[str] = tuple(GROUPS)) -> str:
        """Of these groups: a table each, drift by shot, shares of the ceiling, and differences between rows."""
        parts = [self.group(group) for group in groups]
        if "drift" in groups:
            parts += [self.curve(name) for name in GROUPS["drift"].names]
        if CEILING in self.rows:
            parts += [self._of_ceiling(group) for group in OF_CEILING if group in groups]
            parts += [self._by_shot_of_ceiling(name) for name in BY_SHOT_OF_CEILING if "drift" in groups]
        if effects := self.effects():
            cells = {title: partial(self.difference, *pair) for title, pair in effects.items()}
            parts += [differences("Differences", group, cells) for group in OF_EFFECTS if group in groups]
        return "\n\n".join([*parts, self.footer()]) + "\n"

    def group(self, group: str) -> str:
        """A table of measures, a line per row."""
        kinds = GROUPS[group]
        lines = [[row, *(self._cell(row, group, name) for name in kinds.names)] for row in self.rows]
        if kinds.kind is CONFUSION:
            ceiling = next(iter(self.rows))
            by_chance = [self.chance(ceiling, group, name) for name in kinds.names]
            lines.append(["chance", *("-" if value is None else f"{value:.2f}" for value in by_chance)])
        return table(f"{kinds.title}: {kinds.about}" if kinds.about else kinds.title, kinds.names, lines)

    def _of_ceiling(self, group: str) -> str:
        kinds = GROUPS[group]
        lines = [
            [row, *(self.of_ceiling(row, group, name).percent() for name in kinds.names)]
            for row in self.rows
            if row != CEILING
        ]
        return table(f"Of the {CEILING}'s ceiling: {kinds.title}", kinds.names, lines)

    def _cell(self, row: str, group: str, name: str) -> str:
        text = self.interval(row, group, name).text(_digits(group, name))
        if group in ("free", "script") and (kappa := self.kappa(row, group, name).value) is not None:
            text += f" κ {kappa:.2f}"
        return text

    def curve(self, name: str) -> str:
        """A drift measure at every shot, a line per row."""
        form = f".{_digits('', name)}f"
        shots = {row: self.by_shot(row, name) for row in self.rows}
        return _shots(f"Drift by shot: {name}", shots, form)

    def _by_shot_of_ceiling(self, name: str) -> str:
        shots = {row: self.by_shot_of_ceiling(row, name) for row in self.rows if row != CEILING}
        return _shots(f"Of the {CEILING}'s ceiling, by shot: {name}", shots, ".0%")

    def footer(self) -> str:
        """What was measured, when and where."""
        said = {key: self.provenance[key] for key in ("stories", "noise_seeds", "date", "commit", "machine")}
        where = ", ".join(
            f"{key.replace('_', ' ')} {value}" for key, value in (said | self.provenance["models"]).items()
        )
        return f"95 % intervals over stories in brackets. {where}."

    def json(self) -> dict[str, Any]:
        """Every number of the report, with counts, chance, kappa and values by shot: row -> group -> name."""
        rows = {
            row: {group: {name: self._entry(row, group, name) for name in GROUPS[group].names} for group in GROUPS}
            for row in self.rows
        }
        effects = {
            title: entries(OF_EFFECTS, partial(self.difference, *pair)) for title, pair in self.effects().items()
        }
        report = {"provenance": dict(self.provenance), "rows": rows, "differences": effects}
        if CEILING in self.rows:
            report["of_ceiling"] = {row: self._entries_of_ceiling(row) for row in self.rows}
        return report

    def _entries_of_ceiling(self, row: str) -> dict[str, Any]:
        by_shot = {name: [asdict(at) for at in self.by_shot_of_ceiling(row, name)] for name in BY_SHOT_OF_CEILING}
        return entries(OF_CEILING, partial(self.of_ceiling, row)) | {"by_shot": by_shot}

    def _entry(self, row: str, group: str, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = asdict(self.interval(row, group, name))
        if GROUPS[group].kind is CONFUSION:
            entry |= {"chance": self.chance(row, group, name), "kappa": asdict(self.kappa(row, group, name))}
        if GROUPS[group].kind is SLOPE:
            entry["by_shot"] = [asdict(shot) for shot in self.by_shot(row, name)]
        return entry


def entries(groups: Sequence[str], read: Read) -> dict[str, Any]:
    """group -> name -> value, low, high and count."""
    return {group: {name: asdict(read(group, name)) for name in GROUPS[group].names} for group in groups}


def differences(title: str, group: str, cells: Mapping[str, Read]) -> str:
    """The table of a group in Markdown, a line per entry of `cells`."""
    names = GROUPS[group].names
    lines = [[line, *(read(group, name).text(_digits(group, name)) for name in names)] for line, read in cells.items()]
    return table(f"{title}: {GROUPS[group].title}", names, lines)


def table(title: str, names: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; each of `lines` begins with what it is of."""
    head = [["", *(name.replace("_", " ") for name in names)], ["---"] * (len(names) + 1)]
    return "\n".join([f"**{title}**", "", *("| " + " | ".join(line) + " |" for line in [*head, *lines])])


def _shots(title: str, shots: Mapping[str, Sequence[Interval]], form: str) -> str:
    """Values alone: with twenty shots there is no room for intervals; they are in the JSON."""
    lines = [
        [row, *("-" if at.value is None else format(at.value, form) for at in line)] for row, line in shots.items()
    ]
    return table(title, [str(k) for k in range(1, max(map(len, lines), default=1))], lines)


def _digits(group: str, name: str) -> int:
    """Slopes and what is no share are small numbers."""
    return 4 if group == "drift" or name in ("sharpness", "saturation") else 2
