"""Laws of the storybook study: exact values on constructed readings, honest intervals, resumable runs."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shotstream.evaluation import statistics
from shotstream.evaluation import storybook as study
from shotstream.storybook.captions import Captions, captions
from shotstream.storybook.judge import CharacterReading, Reading
from shotstream.storybook.world import PLACES, Character, ShotScript, World, sample_world

CAST = (
    Character("frog", "purple", "crown", "yellow", "balloon", "green"),
    Character("bear", "orange", "tophat", "blue", "none", "none"),
)
SHOTS = (
    ShotScript((0,), "city", "day", "wide", "walk"),
    ShotScript((0, 1), "beach", "day", "wide", "look"),
    ShotScript((0,), "city", "night", "close", "wave"),
    ShotScript((1,), "beach", "day", "medium", "sit"),
)
STORY = World(0, "train", CAST, tuple((place, place == "city") for place in PLACES), SHOTS)
ALL, NONE = frozenset({"colour", "hat"}), frozenset[str]()
ONCE = Captions("a tale of a frog", ("",) * 4, ((ALL, NONE), (ALL, ALL), (ALL, ALL), (ALL, ALL)))
GLOBAL = Captions("a tale of a purple frog in a crown", ("",) * 4, ((ALL, ALL),) * 4)
NEVER = Captions("a tale of a frog", ("",) * 4, ((NONE, NONE),) * 4)


def perfect(world: World) -> tuple[Reading, ...]:
    readings = []
    for shot in world.shots:
        cast = tuple(
            CharacterReading(place, **vars(world.cast[index]), matched=1.0, confidence={})
            for index, place in study.positions(shot.cast).items()
        )
        where = shot.place, shot.time, shot.framing, world.is_mirrored(shot.place)
        readings.append(Reading(*where, cast=cast, action=shot.action, confidence={}))
    return tuple(readings)


def story(told: Captions = ONCE, **change: object) -> study.JudgedStory:
    whole = study.JudgedStory(STORY, told, perfect(STORY), (21, 42, 63), (21, 42, 63))
    return replace(whole, **change)


def with_shot(k: int, change: Callable[[Reading], Reading]) -> tuple[Reading, ...]:
    readings = list(perfect(STORY))
    readings[k] = change(readings[k])
    return tuple(readings)


def dress(reading: Reading, **looks: str) -> Reading:
    return replace(reading, cast=tuple(replace(member, **looks) for member in reading.cast))


def score(judged: study.JudgedStory, group: str, attribute: str) -> tuple[float, float]:
    """Hits and comparisons."""
    counts = study.tally([judged])[group, attribute][0]
    return float(np.trace(counts)), float(counts.sum())


# What is compared


def test_a_perfect_story_scores_everything_and_asks_what_it_should() -> None:
    tallies = study.tally([story()])
    for (group, name), counts in tallies.items():
        if group != "cuts":
            assert np.trace(counts[0]) == counts.sum(), (group, name)
    assert score(story(), "named", "place") == (4, 4)
    assert score(story(), "named", "species") == (5, 5)
    assert score(story(), "named", "colour") == (5, 5)
    assert score(story(NEVER), "named", "colour") == (0, 0)
    assert score(story(), "free", "shirt") == (3, 3)  # frog in shots 2 and 3, bear in shot 4
    assert score(story(), "free", "accessory_colour") == (2, 2)  # the bear carries nothing
    assert score(story(), "free", "layout") == (2, 2)


@pytest.mark.parametrize(("told", "asked"), [(ONCE, 3), (GLOBAL, 0), (NEVER, 3)])
def test_what_the_text_tells_is_not_memory(told: Captions, asked: int) -> None:
    for attribute in ("colour", "hat"):
        assert score(story(told), "free", attribute) == (asked, asked)
        assert score(story(told), "script", attribute) == (asked, asked)
    assert score(story(told), "free", "shirt") == (3, 3)


def test_real_captions_are_told_where_they_say_so() -> None:
    for seed in range(200):
        world = sample_world(seed)
        told = captions(world)
        style = [study.told_in(told, k) for k in range(len(world.shots))]
        everything = [frozenset().union(*(told_k[i] for told_k in style)) for i in range(len(world.cast))]
        assert everything == list(told.named[-1]), "every naming happens in some text"


def test_one_wrong_reading_counts_once() -> None:
    wrong = story(readings=with_shot(2, lambda r: replace(r, place="snow", action="look")))
    assert score(wrong, "named", "place") == (3, 4)
    assert score(wrong, "named", "action") == (3, 4)
    assert score(wrong, "free", "layout") == (1, 2)  # a layout of another place is not remembered
    shirt = story(readings=with_shot(2, lambda r: dress(r, shirt="red")))
    assert score(shirt, "free", "shirt") == score(shirt, "script", "shirt") == (2, 3)
    assert score(shirt, "free", "hat") == (3, 3)


def test_free_compares_with_the_story_and_script_with_the_truth() -> None:
    changed = story(readings=tuple(dress(reading, shirt="red") for reading in perfect(STORY)))
    assert score(changed, "free", "shirt") == (3, 3)
    assert score(changed, "script", "shirt") == (0, 3)


def test_nobody_recognised_is_wrong_and_no_reference() -> None:
    later = story(readings=with_shot(2, lambda r: replace(r, cast=())))
    assert score(later, "named", "species") == (4, 5)
    assert score(later, "named", "action") == (3, 4)
    assert score(later, "named", "count") == (3, 4)
    assert score(later, "free", "shirt") == (2, 3)
    first = story(readings=with_shot(0, lambda r: replace(r, cast=())))
    assert score(first, "free", "shirt") == (1, 1)  # of the frog nothing was decided
    assert score(first, "script", "shirt") == (3, 3)


def test_cuts_within_a_frame() -> None:
    tallies = study.tally([story(found=(21, 43, 60, 70))])
    assert tallies["cuts", "found"].tolist() == [[2, 3]]
    assert tallies["cuts", "right"].tolist() == [[2, 4]]
    assert tallies["cuts", "exact"].tolist() == [[1, 3]]


# Statistics


def test_statistics_of_a_known_confusion() -> None:
    confusion = np.array([[20.0, 5.0], [10.0, 15.0]])  # the textbook example of Cohen's kappa
    assert float(statistics.agreement(confusion)) == pytest.approx(0.7)
    assert float(statistics.chance(confusion)) == pytest.approx(0.5)
    assert float(statistics.kappa(confusion)) == pytest.approx(0.4)
    assert np.isnan(statistics.agreement(np.zeros((2, 2))))


def test_intervals_are_repeatable_hold_the_value_and_shrink() -> None:
    hits = np.random.default_rng(1).random((400, 1)) < 0.7
    counts = np.concatenate((hits, np.ones_like(hits)), axis=1)
    few, many = (statistics.bootstrap(counts[:n], statistics.ratio, n) for n in (100, 400))
    assert few == statistics.bootstrap(counts[:100], statistics.ratio, 100)
    assert few.low < few.value < few.high
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(2, rel=0.25)
    same = statistics.bootstrap(np.ones((9, 2)), statistics.ratio, 9)
    assert (same.low, same.value, same.high) == (1, 1, 1)
    assert statistics.bootstrap(np.zeros((9, 2)), statistics.ratio, 0).value is None
    assert statistics.bootstrap(np.zeros((0, 2)), statistics.ratio, 0).value is None


def test_intervals_cover_the_truth() -> None:
    random, covered = np.random.default_rng(2), 0
    for _ in range(200):
        counts = np.stack((random.binomial(4, 0.6, 60), np.full(60, 4)), axis=1)
        found = statistics.bootstrap(counts, statistics.ratio, 240)
        covered += found.low <= 0.6 <= found.high
    assert 0.89 <= covered / 200 <= 0.99


def test_shots_of_a_story_do_not_count_as_independent() -> None:
    hits = np.random.default_rng(3).random(60) < 0.6
    together = np.stack((4 * hits, np.full(60, 4)), axis=1)
    apart = np.stack((np.random.default_rng(3).binomial(4, hits.mean(), 60), np.full(60, 4)), axis=1)
    wide, narrow = (statistics.bootstrap(x, statistics.ratio, 240) for x in (together, apart))
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_differences_are_paired() -> None:
    counts = np.stack((np.random.default_rng(4).binomial(4, 0.5, 50), np.full(50, 4)), axis=1)
    none = statistics.difference(counts, counts, statistics.ratio, 200)
    assert (none.low, none.value, none.high) == (0, 0, 0)
    worse = counts - [[1, 0]]
    gap = statistics.difference(counts, worse, statistics.ratio, 200)
    assert (gap.low, gap.value, gap.high) == pytest.approx((0.25, 0.25, 0.25))


# The study


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """A judge that reads what is written in the first pixel: the index in the list of readings."""
    readings: list[Reading] = []
    monkeypatch.setattr(study, "judge", lambda frames: readings[frames[0, 0, 0, 0]])
    monkeypatch.setattr(study, "find_cuts", lambda frames: [])
    return readings


def test_an_interrupted_study_goes_on(instant: list[Reading], tmp_path: Path) -> None:
    worlds = [sample_world(seed, shots=2) for seed in range(4)]
    calls: list[tuple[int, int]] = []
    limit = 2

    def generate(world: World, told: Captions, seed: int) -> list[np.ndarray]:
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append((world.seed, seed))
        first = len(instant)
        instant.extend(perfect(world))
        return [np.full((5, 2, 2, 3), first + k, np.uint8) for k in range(len(world.shots))]

    with pytest.raises(KeyboardInterrupt):
        study.study({"Model A": generate}, worlds, tmp_path, seed=7)
    kept = tmp_path / "model-a.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    kept.write_text(kept.read_text() + '{"key": "half a li')
    limit = 99
    report = study.study({"Model A": generate}, worlds, tmp_path, seed=7)
    assert calls == [(0, 7), (1, 8), (2, 9), (3, 10)], "each story is generated once"
    assert len(kept.read_text().splitlines()) == 4
    assert report.interval("Model A", "named", "place").value == 1
    assert report.interval("Model A", "cuts", "found").value == 0
    again = study.study({"Model A": generate}, worlds, tmp_path, seed=7)
    assert len(calls) == 4
    assert again.json()["rows"] == report.json()["rows"]
    study.study({"Model A": generate}, worlds[:1], tmp_path, seed=8)
    assert len(calls) == 5, "other noise is another result"


def test_the_report_says_what_it_knows(tmp_path: Path) -> None:
    changed = story(readings=with_shot(2, lambda r: dress(r, shirt="red")))
    rows = {"ground truth": study.tally([story(), story()]), "model": study.tally([changed, story()])}
    report = study.Report(rows, study._provenance([STORY, STORY], 0))
    text = report.markdown()
    assert text.count("\n| ground truth |") == text.count("\n| model |") == 4
    assert text.count("\n| chance |") == 3
    assert "0.83 [0.67, 1.00]" in text
    written = json.loads(json.dumps(report.json(), allow_nan=False))
    assert written["rows"]["model"]["free"]["shirt"]["count"] == 6
    assert {"commit", "machine", "date", "world_seeds"} <= set(written["provenance"])
    assert report.difference("model", "ground truth", "free", "shirt").value == pytest.approx(-1 / 6)


def test_a_story_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 4 shots, but 1 were generated"):
        study.judge_story(STORY, ONCE, [np.zeros((5, 2, 2, 3), np.uint8)])
    with pytest.raises(ValueError, match="at least one"):
        study.study({}, [STORY], Path("nowhere"))
