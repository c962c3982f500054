"""What is asked of a judged story. Every answer is an array of counts, a tally, that can be summed over stories.

- named: does a shot show what the text up to there says? Of all shots, the first ones, the later ones
- free, script: is what no text of a shot tells as it was last decided? "free" compares with the first appearance
  in the same generated story, "script" with the truth, for stories continued from true shots
- recognised: in which kinds of shots can the cast be recognised?
- cuts: does the picture change where, and only where, the script cuts?
- leakage: does a shot show what belongs to the shot before it?
- cast: does each of two characters stand where it should, once?
- diversity: is what nobody asked for chosen evenly over the stories?
- drift: what changes from shot to shot of a story

Whatever cannot be recognised counts as wrong; what cannot be asked is left out and shows in the counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from shotstream.evaluation import statistics
from shotstream.evaluation.records import JudgedStory
from shotstream.evaluation.statistics import Floats, Statistic
from shotstream.storybook.captions import COLOUR_WORDS, Captions, Naming, tokenize
from shotstream.storybook.judge import CharacterReading, Reading
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
    ShotScript,
)

MISSING = "missing"
TOLERANCE = 1
"""Frames by which a cut may be early or late."""

Values = dict[str, tuple[str, ...]]

LOOKS: Values = {
    "species": SPECIES,
    "colour": COLOURS,
    "hat": HATS,
    "shirt": SHIRTS,
    "accessory": ACCESSORIES,
    "accessory_colour": ACCESSORY_COLOURS,
}
SCENE: Values = {
    "place": PLACES,
    "time": TIMES,
    "framing": FRAMINGS,
    "action": ACTIONS,
    "count": ("0", "1", "2"),
}
LAYOUT: Values = {"layout": ("plain", "mirrored")}
"""The side from which a place is seen, the same whenever a story returns there."""

TOLD: Values = SCENE | {name: LOOKS[name] for name in ("species", *NAMED)}
REMEMBERED: Values = {name: LOOKS[name] for name in (*NAMED, *UNNAMED)} | LAYOUT
FREE: Values = {name: LOOKS[name] for name in UNNAMED} | LAYOUT
VALUES = {"named": TOLD, "first": TOLD, "later": TOLD, "free": REMEMBERED, "script": REMEMBERED}
"""Group -> attribute -> its values, for what is counted in confusion matrices."""


@dataclass(frozen=True)
class Kind:
    """A way of counting: what the counts say, and of how many observations they are."""

    statistic: Statistic
    observations: Callable[[Floats], float]


CONFUSION = Kind(statistics.agreement, lambda counts: float(counts.sum()))
RATIO = Kind(statistics.ratio, lambda counts: float(counts[..., 1].sum()))
EXCESS = Kind(statistics.excess, lambda counts: float(counts[..., 2].sum()))
EVENNESS = Kind(statistics.evenness, lambda counts: float(counts.sum()))
SLOPE = Kind(statistics.slope, lambda counts: float(counts[..., 1].sum()))


@dataclass(frozen=True)
class Group:
    """Measures of one kind, a table of the report."""

    title: str
    kind: Kind
    names: tuple[str, ...]
    about: str = ""


GROUPS = {
    "overall": Group(
        "At a glance",
        RATIO,
        ("named", "first", "later", "free", "script", "right_shot", "right_first_shot", "right_story"),
        "what the text says is seen: in all shots, in shot 1, later; looks that no text of the shot tells are as they "
        "first appeared, as in the script; shots and stories in which all that is named is right",
    ),
    "named": Group("What the text says is seen", CONFUSION, tuple(TOLD)),
    "first": Group("What the text says is seen in shot 1", CONFUSION, tuple(TOLD)),
    "later": Group("What the text says is seen in later shots", CONFUSION, tuple(TOLD)),
    "free": Group(
        "Memory, free", CONFUSION, tuple(REMEMBERED), "what no text of the shot tells is as at the first appearance"
    ),
    "script": Group(
        "Memory, script", CONFUSION, tuple(REMEMBERED), "what no text of the shot tells is as in the script"
    ),
    "recognised": Group(
        "Recognised",
        RATIO,
        ("close", "medium", "wide", "moving", "pair"),
        "shots in which everybody is: close-ups, medium shots, wide shots of one who stands and of one who moves, and "
        "shots of two",
    ),
    "cuts": Group(
        "Cuts",
        RATIO,
        ("found", "right", "exact"),
        f"planned ones found, and found ones planned, within {TOLERANCE} frame; planned ones found at the very frame",
    ),
    "leakage": Group(
        "Leakage from the previous shot",
        EXCESS,
        (*SCENE, "looks"),
        "where the script changes, how much likelier the former value is seen than any third one",
    ),
    "cast": Group(
        "Two characters",
        RATIO,
        ("right", "swapped", "doubled", "missing", "other"),
        "both where they should be, each where the other should be, the same one twice, fewer than two; "
        "and where one should be alone, the other one",
    ),
    "diversity": Group(
        "Evenness of what no text tells", EVENNESS, tuple(FREE), "entropy over stories, of the largest possible one"
    ),
    "drift": Group(
        "Drift",
        SLOPE,
        ("named", "free", "script", "unrecognised", "sharpness", "saturation"),
        "change per shot of a story",
    ),
}

Tally = dict[tuple[str, str], Floats]
"""(group, name) -> counts of one story: confusion [wanted seen], ratio [2], excess [3], evenness [value] or
slope [shot 2], as the statistics of these kinds say."""


def empty(shots: int) -> Tally:
    """The tally of nothing, for stories of at most `shots` shots."""
    sizes: dict[Kind, Callable[[str, str], tuple[int, ...]]] = {
        CONFUSION: lambda group, name: (len(VALUES[group][name]) + 1,) * 2,
        RATIO: lambda group, name: (2,),
        EXCESS: lambda group, name: (3,),
        EVENNESS: lambda group, name: (len(FREE[name]),),
        SLOPE: lambda group, name: (shots, 2),
    }
    return {
        (group, name): np.zeros(sizes[GROUPS[group].kind](group, name))
        for group in GROUPS
        for name in GROUPS[group].names
    }


def count(story: JudgedStory, shots: int) -> Tally:
    """Everything that is asked of a story; `shots`: of the longest one it is summed with."""
    tally = empty(shots)
    _count_pairs(tally, story)
    _count_cuts(tally, story)
    for previous, script, reading in zip(story.world.shots, story.world.shots[1:], story.readings[1:], strict=False):
        _count_leakage(tally, story, previous, script, reading)
    for k, (script, reading) in enumerate(zip(story.world.shots, story.readings, strict=True)):
        _count_cast(tally, story, k, script, reading)
        tally["recognised", _kind(script)] += (len(reading.cast) == len(script.cast), 1)
        tally["drift", "unrecognised"][k] += (not reading.found, 1)
    for name, value in _choices(story):
        if value in FREE[name]:
            tally["diversity", name][FREE[name].index(value)] += 1
    for k, each in enumerate(story.finish):
        tally["drift", "sharpness"][k] += (each.sharpness, 1)
        tally["drift", "saturation"][k] += (each.saturation, 1)
    return tally


def add(first: Tally, second: Tally) -> Tally:
    """The counts of both: the same story told twice is still one story."""
    return {key: counts + second[key] for key, counts in first.items()}


# Wanted and seen


class Pair(NamedTuple):
    """One comparison: its group, attribute and shot, what should be seen, and what was."""

    group: str
    attribute: str
    shot: int
    wanted: str
    seen: str


def pairs(story: JudgedStory) -> Iterator[Pair]:
    """Everything the readings of a story are compared with: "named", "free" and "script"."""
    yield from _named_pairs(story)
    yield from _memory_pairs(story)
    yield from _layout_pairs(story)


def look(reading: Reading, position: str, attribute: str) -> str:
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


def _scene(script: ShotScript) -> dict[str, str]:
    """What the script says of a shot as a whole."""
    return {name: str(getattr(script, name)) for name in SCENE if name != "count"} | {"count": str(len(script.cast))}


def _kind(script: ShotScript) -> str:
    """A name of the group "recognised"."""
    if len(script.cast) == 2:
        return "pair"
    return "moving" if script.is_small_motion else script.framing


def _seen_scene(reading: Reading) -> dict[str, str]:
    seen = {"place": reading.place, "time": reading.time, "framing": reading.framing}
    return seen | {"action": reading.action if reading.found else MISSING, "count": str(len(reading.cast))}


def _named_pairs(story: JudgedStory) -> Iterator[Pair]:
    for k, (script, reading) in enumerate(zip(story.world.shots, story.readings, strict=True)):
        wanted, seen = _scene(script), _seen_scene(reading)
        for name in SCENE:
            yield Pair("named", name, k, wanted[name], seen[name])
        for index, position in positions(script.cast).items():
            for name in ("species", *sorted(story.captions.named[k][index])):
                value = str(getattr(story.world.cast[index], name))
                yield Pair("named", name, k, value, look(reading, position, name))


def _memory_pairs(story: JudgedStory) -> Iterator[Pair]:
    first: dict[int, tuple[Reading, str]] = {}
    for k, (script, reading) in enumerate(zip(story.world.shots, story.readings, strict=True)):
        told = told_in(story.captions, k)
        for index, position in positions(script.cast).items():
            if index not in first:
                first[index] = reading, position
                continue
            for name in (*NAMED, *UNNAMED):
                if name in told[index]:
                    continue
                references = {
                    "free": look(*first[index], name),
                    "script": str(getattr(story.world.cast[index], name)),
                }
                for group, wanted in references.items():
                    if wanted in LOOKS[name]:  # not of the missing, nor the colour of no accessory
                        yield Pair(group, name, k, wanted, look(reading, position, name))


def _layout_pairs(story: JudgedStory) -> Iterator[Pair]:
    """The side from which a place is seen, when a story returns to it."""
    sides: dict[str, str] = {}
    for k, (script, reading) in enumerate(zip(story.world.shots, story.readings, strict=True)):
        side = _side(reading.mirrored) if reading.place == script.place else MISSING
        if script.place in sides:
            yield Pair("script", "layout", k, _side(story.world.is_mirrored(script.place)), side)
            if sides[script.place] != MISSING:
                yield Pair("free", "layout", k, sides[script.place], side)
        sides.setdefault(script.place, side)


def _side(mirrored: bool) -> str:
    return "mirrored" if mirrored else "plain"


def _choices(story: JudgedStory) -> Iterator[tuple[str, str]]:
    """What was drawn at every first appearance although no text asks for it: attribute and value."""
    met: set[int] = set()
    visited: set[str] = set()
    for script, reading in zip(story.world.shots, story.readings, strict=True):
        for index, position in positions(script.cast).items():
            if index not in met:
                yield from ((name, look(reading, position, name)) for name in UNNAMED)
            met.add(index)
        if script.place not in visited and reading.place == script.place:
            yield "layout", _side(reading.mirrored)
        visited.add(script.place)


# Counting


def _count_pairs(tally: Tally, story: JudgedStory) -> None:
    wrong: set[int] = set()
    for pair in pairs(story):
        hit = pair.seen == pair.wanted
        groups = [pair.group]
        if pair.group == "named":
            groups.append("later" if pair.shot else "first")
            wrong |= set() if hit else {pair.shot}
        values = (*VALUES[pair.group][pair.attribute], MISSING)
        cell = values.index(pair.wanted), values.index(pair.seen) if pair.seen in values else len(values) - 1
        for group in groups:
            tally[group, pair.attribute][cell] += 1
            if pair.attribute not in LAYOUT:
                tally["overall", group] += (hit, 1)
        if pair.attribute not in LAYOUT:
            tally["drift", pair.group][pair.shot] += (hit, 1)
    shots = len(story.readings)
    tally["overall", "right_shot"] += (shots - len(wrong), shots)
    tally["overall", "right_first_shot"] += (0 not in wrong, 1)
    tally["overall", "right_story"] += (not wrong, 1)


def _count_cuts(tally: Tally, story: JudgedStory) -> None:
    """Planned cuts that were found, found cuts that were planned, planned cuts found at the very frame."""
    tally["cuts", "found"] += _hits(story.planned, story.found, TOLERANCE)
    tally["cuts", "right"] += _hits(story.found, story.planned, TOLERANCE)
    tally["cuts", "exact"] += _hits(story.planned, story.found, 0)


def _hits(wanted: Iterable[int], present: Sequence[int], tolerance: int) -> tuple[int, int]:
    near = [any(abs(w - p) <= tolerance for p in present) for w in wanted]
    return sum(near), len(near)


def _count_leakage(
    tally: Tally, story: JudgedStory, previous: ShotScript, script: ShotScript, reading: Reading
) -> None:
    """Where the script changes from one shot to the next: is the former value seen, or any third one?"""
    before, now, seen = _scene(previous), _scene(script), _seen_scene(reading)
    for name, values in SCENE.items():
        tally["leakage", name] += _leak(values, before[name], now[name], seen[name])
    if len(previous.cast) == len(script.cast) == 1:
        (old,), (new,) = previous.cast, script.cast
        for name, values in LOOKS.items():
            former, wanted = (str(getattr(story.world.cast[index], name)) for index in (old, new))
            tally["leakage", "looks"] += _leak(values, former, wanted, look(reading, "centre", name))


def _leak(values: Sequence[str], before: str, now: str, seen: str) -> tuple[float, float, float]:
    if before == now or before not in values or now not in values:
        return 0, 0, 0
    third = seen in values and seen not in (before, now)
    return float(seen == before), third / (len(values) - 2), 1


def _count_cast(tally: Tally, story: JudgedStory, shot: int, script: ShotScript, reading: Reading) -> None:
    """In stories of two characters: who stands where."""
    if len(story.world.cast) < 2:
        return
    seen = tuple(_who(story, shot, member) for member in reading.cast)
    if len(script.cast) == 1:
        (here,) = script.cast
        tally["cast", "other"] += (seen == (1 - here,), 1)
        return
    missing = len(seen) < 2
    tally["cast", "right"] += (seen == script.cast, 1)
    tally["cast", "swapped"] += (seen == script.cast[::-1], 1)
    tally["cast", "doubled"] += (not missing and seen[0] is not None and seen[0] == seen[1], 1)
    tally["cast", "missing"] += (missing, 1)


def _who(story: JudgedStory, shot: int, member: CharacterReading) -> int | None:
    """Whose looks a figure has, of those that were told of both characters; None if it has as much of either."""
    told = frozenset.intersection(*story.captions.named[shot])
    agree = [
        sum(getattr(member, name) == getattr(who, name) for name in ("species", *told)) for who in story.world.cast
    ]
    return None if agree[0] == agree[1] else int(np.argmax(agree))
