"""Laws of the storybook study: exact values on constructed readings, honest intervals, resumable runs."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from shotstream import pipeline
from shotstream.cli import app
from shotstream.evaluation import comparison, measures, pictures, records, stages, statistics
from shotstream.evaluation import storybook as study
from shotstream.evaluation.generators import generators, next_shot
from shotstream.evaluation.measures import GROUPS, SCENE, Tally
from shotstream.evaluation.records import JudgedStory
from shotstream.evaluation.report import Report, tallies
from shotstream.evaluation.storybook import Row
from shotstream.session import to_uint8
from shotstream.storybook.captions import Captions, captions
from shotstream.storybook.judge import CharacterReading, Reading
from shotstream.storybook.world import PLACES, Character, ShotScript, World, sample_world
from shotstream.train.checkpoint import File
from shotstream.train.network import Network
from shotstream.train.recipe import RECIPES, fresh
from shotstream.train.run import RunConfig

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
            for index, place in measures.positions(shot.cast).items()
        )
        where = shot.place, shot.time, shot.framing, world.is_mirrored(shot.place)
        readings.append(Reading(*where, cast=cast, action=shot.action, confidence={}))
    return tuple(readings)


def story(told: Captions = ONCE, **change: object) -> JudgedStory:
    whole = JudgedStory(STORY, told, perfect(STORY), (21, 42, 63), (21, 42, 63))
    return replace(whole, **change)


def with_shot(k: int, change: Callable[[Reading], Reading]) -> tuple[Reading, ...]:
    readings = list(perfect(STORY))
    readings[k] = change(readings[k])
    return tuple(readings)


def dress(reading: Reading, **looks: str) -> Reading:
    return replace(reading, cast=tuple(replace(member, **looks) for member in reading.cast))


def score(judged: JudgedStory, group: str, attribute: str) -> tuple[float, float]:
    """Hits and comparisons."""
    counts = measures.count(judged, len(judged.readings))[group, attribute]
    if GROUPS[group].kind is measures.CONFUSION:
        return float(np.trace(counts)), float(counts.sum())
    return float(counts[..., 0].sum()), float(counts[..., 1].sum())


def value(judged: JudgedStory, group: str, name: str) -> float:
    counts = measures.count(judged, len(judged.readings))[group, name]
    return float(GROUPS[group].kind.statistic(counts))


# What is compared


def test_a_perfect_story_scores_everything_and_asks_what_it_should() -> None:
    for group in ("overall", "named", "first", "later", "free", "script", "cuts"):
        for name in GROUPS[group].names:
            assert value(story(), group, name) == 1, (group, name)
    for name in GROUPS["leakage"].names:
        assert value(story(), "leakage", name) == 0, name
    for name in ("named", "free", "script", "unrecognised"):
        assert value(story(), "drift", name) == pytest.approx(0), name
    assert score(story(), "drift", "unrecognised") == (0, 4)
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
        style = [measures.told_in(told, k) for k in range(len(world.shots))]
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


def test_recognised_by_kind_of_shot() -> None:
    kinds = {name: score(story(), "recognised", name) for name in GROUPS["recognised"].names}
    assert sum(hits for hits, _ in kinds.values()) == sum(asked for _, asked in kinds.values()) == 4
    for k, script in enumerate(STORY.shots):
        kind = "pair" if len(script.cast) == 2 else script.framing
        kind = "moving" if kind == "wide" and script.action in ("walk", "jump", "dance") else kind
        gone = story(readings=with_shot(k, lambda r: replace(r, cast=r.cast[1:])))
        hits, asked = kinds[kind]
        assert score(gone, "recognised", kind) == (hits - 1, asked)


def test_cuts_within_a_frame() -> None:
    late = story(found=(21, 43, 60, 70))
    assert score(late, "cuts", "found") == (2, 3)
    assert score(late, "cuts", "right") == (2, 4)
    assert score(late, "cuts", "exact") == (1, 3)


def test_one_mistake_spoils_its_shot_and_its_story() -> None:
    wrong = story(readings=with_shot(2, lambda r: replace(r, place="snow", action="look")))
    assert score(wrong, "overall", "right_shot") == (3, 4)
    assert score(wrong, "overall", "right_first_shot") == (1, 1)
    assert score(wrong, "overall", "right_story") == (0, 1)
    forgotten = story(readings=with_shot(2, lambda r: dress(r, shirt="red")))
    assert score(forgotten, "overall", "right_story") == (1, 1), "nobody asked for the shirt"


def test_the_first_shot_and_the_others_are_all_shots() -> None:
    wrong = story(readings=with_shot(0, lambda r: replace(r, time="night")))
    assert score(wrong, "first", "time") == (0, 1)
    assert score(wrong, "later", "time") == (3, 3)
    for name in measures.TOLD:
        first, later, named = (measures.count(wrong, 4)[group, name] for group in ("first", "later", "named"))
        assert (first + later == named).all()


# Leakage, two characters, drift, diversity


def test_the_previous_shot_shown_again_leaks_everything() -> None:
    first, *others = perfect(STORY)
    copied = story(readings=(first, first, *others[:-1]))
    for name in (*SCENE, "looks"):
        assert value(copied, "leakage", name) == 1, name
    assert value(copied, "free", "shirt") < 1, "the bear of the last shot is a frog"


def test_a_third_value_is_no_leak() -> None:
    third = story(readings=with_shot(1, lambda r: replace(r, place="snow")))
    assert measures.count(third, 4)["leakage", "place"].tolist() == [0, 1 / 4, 3]  # six places less two
    assert value(third, "leakage", "place") == pytest.approx(-1 / 12)
    anything = np.array([[1, 0, 1], [0, 1 / 4, 1], [0, 1 / 4, 1], [0, 1 / 4, 1], [0, 1 / 4, 1], [0, 0, 1]])
    assert statistics.excess(anything.sum(0)) == 0, "of six equally likely places"


def together(*cast: int, shown: tuple[int, ...]) -> JudgedStory:
    """A story of one shot with this cast, in which these characters are shown, from left to right."""
    world = replace(STORY, shots=(replace(SHOTS[1], cast=cast),))
    told = Captions(ONCE.global_caption, ("",), ((ALL, ALL),))
    places = ("centre",) if len(shown) == 1 else ("left", "right")
    members = (
        CharacterReading(place, **vars(CAST[who]), matched=1.0, confidence={})
        for place, who in zip(places, shown, strict=True)
    )
    return JudgedStory(world, told, (replace(perfect(STORY)[1], cast=tuple(members)),), (), ())


@pytest.mark.parametrize(
    ("shown", "rate"),
    [
        ((0, 1), "right"),
        ((1, 0), "swapped"),
        ((0, 0), "doubled"),
        ((1, 1), "doubled"),
        ((0,), "missing"),
        ((), "missing"),
    ],
)
def test_what_can_go_wrong_with_two(shown: tuple[int, ...], rate: str) -> None:
    judged = together(0, 1, shown=shown) if shown else story()
    if not shown:
        judged = replace(together(0, 1, shown=(0,)), readings=(replace(perfect(STORY)[1], cast=()),))
    for name in ("right", "swapped", "doubled", "missing"):
        assert score(judged, "cast", name) == (name == rate, 1), name
    assert score(judged, "cast", "other") == (0, 0)


@pytest.mark.parametrize("shown", [0, 1])
def test_one_instead_of_the_other(shown: int) -> None:
    assert score(together(0, shown=(shown,)), "cast", "other") == (shown, 1)


def test_who_is_who_is_asked_of_what_was_told_of_both() -> None:
    undressed = story(readings=with_shot(1, lambda r: dress(r, shirt="green", accessory="scarf")))
    assert score(undressed, "cast", "right") == (1, 1), "shirts were never told"
    told = Captions("", ("",) * 4, ((ALL, NONE),) * 4)
    alike = with_shot(1, lambda r: dress(r, colour="purple", hat="crown"))
    assert score(story(told, readings=alike), "cast", "right") == (1, 1), "a bear of any colour is the bear"
    assert score(story(readings=alike), "cast", "doubled") == (1, 1), "unless it was told to be orange, in a top hat"


def test_drift_is_the_slope_over_the_shots() -> None:
    random = np.random.default_rng(5)
    counts = random.integers(1, 9, (6, 2)).astype(float)
    values = counts[:, 0] / counts[:, 1]
    fit = np.polyfit(np.arange(6), values, 1, w=np.sqrt(counts[:, 1]))
    assert statistics.slope(counts) == pytest.approx(fit[0])
    assert statistics.slope(np.stack((counts, 2 * counts))) == pytest.approx([fit[0], fit[0]])
    assert np.isnan(statistics.slope(np.zeros((6, 2))))
    one = np.zeros((6, 2))
    one[0] = 1, 1
    assert np.isnan(statistics.slope(one)), "one shot has no slope"


def test_drift_is_counted_by_shot() -> None:
    lost = story(readings=with_shot(3, lambda r: replace(r, cast=())))
    assert measures.count(lost, 6)["drift", "unrecognised"].tolist() == [[0, 1]] * 3 + [[1, 1]] + [[0, 0]] * 2
    assert value(lost, "drift", "unrecognised") > 0 > value(lost, "drift", "named")
    assert measures.count(lost, 4)["drift", "free"][0].tolist() == [0, 0], "nothing to remember in shot 1"


def test_evenness() -> None:
    assert statistics.evenness(np.full(4, 7.0)) == pytest.approx(1)
    assert statistics.evenness(np.array([9.0, 0, 0])) == 0
    assert statistics.evenness(np.array([1.0, 1, 0, 0])) == pytest.approx(0.5)
    assert np.isnan(statistics.evenness(np.zeros(3)))


def test_diversity_counts_first_appearances_alone() -> None:
    tally = measures.count(story(), 4)
    assert tally["diversity", "shirt"].sum() == 2
    assert tally["diversity", "accessory_colour"].sum() == 1  # the bear carries nothing
    assert tally["diversity", "layout"].sum() == 2  # city and beach
    later = story(readings=with_shot(2, lambda r: dress(r, shirt="red")))
    assert (measures.count(later, 4)["diversity", "shirt"] == tally["diversity", "shirt"]).all()


def test_sharpness_and_saturation() -> None:
    grey = np.full((5, 8, 8, 3), 90, np.uint8)
    assert records.finish(grey) == records.Finish(0, 0)
    red = grey * np.array([0, 0, 0], np.uint8) + np.array([255, 0, 0], np.uint8)
    assert records.finish(red).saturation == 1
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    blurred = ((noise[:, :-1].astype(int) + noise[:, 1:]) // 2).astype(np.uint8)
    assert records.finish(blurred).sharpness < 0.8 * records.finish(noise).sharpness


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


def test_a_share_of_the_ceiling_is_paired() -> None:
    counts = np.stack((np.random.default_rng(4).binomial(4, 0.5, 50), np.full(50, 4)), axis=1)
    half = statistics.share(counts * [1, 2], counts, statistics.ratio, 200)
    assert (half.low, half.value, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert half.percent() == "50% [50%, 50%]"
    assert statistics.share(counts, counts * 0, statistics.ratio, 200).text() == "-"


def test_the_same_telling_twice_says_no_more_than_once() -> None:
    """Two noise seeds are pooled within stories: only different stories narrow an interval."""
    wrong = story(readings=with_shot(2, lambda r: replace(r, place="snow")))
    stories = [story(), wrong, story(), wrong, wrong]
    once, twice = Report({"model": tallies([stories], 4)}, {}), Report({"model": tallies([stories, stories], 4)}, {})
    one, two = (report.interval("model", "named", "place") for report in (once, twice))
    assert (one.low, one.value, one.high) == (two.low, two.value, two.high)
    assert two.count == 2 * one.count


# The study


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> list[Reading]:
    """A judge that reads what is written in the first pixel: the index in the list of readings."""
    readings: list[Reading] = []
    monkeypatch.setattr(records, "judge", lambda frames: readings[frames[0, 0, 0, 0]])
    monkeypatch.setattr(records, "find_cuts", lambda frames: [])
    monkeypatch.setattr(pictures, "WIDTH", 4)
    return readings


def shows(readings: list[Reading], instant: list[Reading]) -> list[np.ndarray]:
    """Frames in which the instant judge reads this."""
    first = len(instant)
    instant.extend(readings)
    return [np.full((5, 4, 4, 3), first + k, np.uint8) for k in range(len(readings))]


def right(instant: list[Reading]) -> Row:
    return Row(lambda world, told, seed: shows(list(perfect(world)), instant))


WORLDS = [sample_world(seed, shots=2) for seed in range(4)]


def test_an_interrupted_study_goes_on(instant: list[Reading], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    limit = 2

    def generate(world: World, told: Captions, seed: int) -> list[np.ndarray]:
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append((world.seed, seed))
        return shows(list(perfect(world)), instant)

    rows = {"Model A": Row(generate)}
    with pytest.raises(KeyboardInterrupt):
        study.study(rows, WORLDS, tmp_path)
    kept = tmp_path / "model-a.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    with kept.open("a") as file:
        file.write('{"key": "half a li')
    limit = 99
    report = study.study(rows, WORLDS, tmp_path)
    assert calls == [(0, 0), (1, 1), (2, 2), (3, 3)], "each story is generated once"
    assert len(kept.read_text().splitlines()) == 4
    assert report.interval("Model A", "named", "place").value == 1
    assert report.interval("Model A", "cuts", "found").value == 0
    again = study.study(rows, WORLDS, tmp_path)
    assert len(calls) == 4
    assert again.json()["rows"] == report.json()["rows"]
    both = study.study(rows, WORLDS, tmp_path, (0, 7))
    assert calls[4:] == [(n, n + 7 * records.NOISE_STRIDE) for n in range(4)], "other noise is another telling"
    assert both.interval("Model A", "named", "place").count == 2 * report.interval("Model A", "named", "place").count


def test_what_has_no_noise_is_judged_once(instant: list[Reading], tmp_path: Path) -> None:
    row = replace(right(instant), noisy=False)
    report = study.study({"ground truth": row}, WORLDS, tmp_path, (3, 4))
    assert report.interval("ground truth", "named", "place").count == 8
    assert len((tmp_path / "ground-truth.jsonl").read_text().splitlines()) == 4


def test_results_of_before_the_finish_was_measured_are_read(instant: list[Reading], tmp_path: Path) -> None:
    rows = {"model": right(instant)}
    study.study(rows, WORLDS, tmp_path)
    path = tmp_path / "model.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for record in old:
        del record["finish"], record["noise"]
    path.write_text("".join(json.dumps(record) + "\n" for record in old))
    report = study.study(rows, WORLDS, tmp_path)
    assert len(path.read_text().splitlines()) == 4, "nothing is judged again"
    assert report.interval("model", "drift", "sharpness").value is None
    assert report.interval("model", "drift", "named").value == pytest.approx(0)
    assert "| model | - | - |" in report.markdown(("drift",))
    assert [judged.world for judged in records.read_row(path)] == WORLDS


def test_two_models_do_not_share_a_folder(instant: list[Reading], tmp_path: Path) -> None:
    rows = {"model": right(instant)}
    study.study(rows, WORLDS, tmp_path, models={"model": "aaa"})
    study.study(rows, WORLDS, tmp_path, models={"model": "aaa", "teacher": "ttt"})
    with pytest.raises(ValueError, match="holds results of model aaa, not bbb; use another folder"):
        study.study(rows, WORLDS, tmp_path, models={"model": "bbb"})
    with pytest.raises(ValueError, match="holds results of teacher ttt"):
        study.study(rows, WORLDS, tmp_path, models={"model": "aaa", "teacher": "uuu"})


def test_every_look_at_the_test_stories_is_entered(instant: list[Reading], tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    for seeds in ((0,), (0, 1)):
        study.study({"model": right(instant)}, WORLDS, tmp_path, seeds, models={"model": "aaa"}, ledger=ledger)
    first, second = map(json.loads, ledger.read_text().splitlines())
    assert (first["noise_seeds"], second["noise_seeds"]) == ([0], [0, 1])
    assert first["models"] == {"model": "aaa"} and first["judge"] == study.judge_hash()
    assert first["rows"]["model"]["named"] == 1 and first["stories"] == 4
    assert {"date", "commit", "splits"} <= set(first)
    study.study({"model": right(instant)}, WORLDS, tmp_path)
    assert len(ledger.read_text().splitlines()) == 2, "only when asked"


def test_the_report_says_what_it_knows(instant: list[Reading], tmp_path: Path) -> None:
    def forgets(world: World, told: Captions, seed: int) -> list[np.ndarray]:
        first, *others = perfect(world)
        return shows([first, *(dress(reading, shirt="none") for reading in others)], instant)

    rows = {
        "autoencoder": right(instant),
        "true history": right(instant),
        "without memory": Row(forgets),
    }
    report = study.study(rows, WORLDS, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text == report.markdown()
    for group in GROUPS.values():
        assert text.count(f"**{group.title}: " if group.about else f"**{group.title}**") == 1
    assert text.count("\n| true history - without memory |") == 3
    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    effect = written["differences"]["true history - without memory"]["script"]
    assert (effect["shirt"]["value"], effect["accessory"]["value"]) == (1, 0)
    assert written["of_ceiling"]["without memory"]["free"]["shirt"]["value"] == 0
    assert written["of_ceiling"]["without memory"]["first"]["species"]["value"] == 1
    by_shot = written["rows"]["without memory"]["drift"]["script"]["by_shot"]
    assert by_shot[0]["value"] is None and 0 < by_shot[1]["value"] < 1
    assert {"commit", "machine", "date", "world_seeds", "judge"} <= set(written["provenance"])


def test_a_story_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="has 4 shots, but 1 were generated"):
        records.judge_story(STORY, ONCE, [np.zeros((5, 2, 2, 3), np.uint8)])
    with pytest.raises(ValueError, match="at least one"):
        study.study({}, [STORY], Path("nowhere"))


# Pictures


def test_the_worst_come_first_and_the_grid_is_no_selection(instant: list[Reading], tmp_path: Path) -> None:
    def generate(world: World, told: Captions, seed: int) -> list[np.ndarray]:
        readings = perfect(world)
        if world.seed == 2:
            readings = tuple(replace(reading, place="nowhere", cast=()) for reading in readings)
        return shows(list(readings), instant)

    study.study({"model": Row(generate)}, WORLDS, tmp_path)
    judged = list(records.read_row(tmp_path / "model.jsonl"))
    assert [worst.world.seed for worst in pictures.worst(judged)] == [2, 0, 1, 3]
    assert pictures.mistakes(judged[0]) == "all right"
    assert pictures.mistakes(judged[2]).startswith(f"1: nobody, nowhere for {WORLDS[2].shots[0].place}; 2: nobody")
    with Image.open(tmp_path / "model-worst.png") as sheet:
        assert sheet.height > len(judged) * 240, "a picture of a shot is 240 pixels wide, and these are square"
    with Image.open(tmp_path / "model-grid.png") as grid:
        assert grid.size == (6 * 4, 2 * 4)  # 8 shots of 4 x 4 pixels in lines of 6
        drawn = {round(np.asarray(grid)[y, x].mean()) for x in range(2, 24, 4) for y in (2, 6)}
    assert len(drawn & set(range(8))) >= 6, "every shot is there once (but for what JPEG changes)"


# Comparing two results


def told_by(
    out: Path, instant: list[Reading], wrong: set[int], row: str = "model", worlds: Sequence[World] = WORLDS
) -> Path:
    """A study in which these stories are told wrongly."""

    def generate(world: World, told: Captions, seed: int) -> list[np.ndarray]:
        readings = perfect(world)
        if world.seed in wrong:
            readings = tuple(replace(reading, place="nowhere") for reading in readings)
        return shows(list(readings), instant)

    study.study({row: Row(generate)}, worlds, out)
    return out


def test_two_results_are_compared_story_by_story(instant: list[Reading], tmp_path: Path) -> None:
    a, b = (told_by(tmp_path / name, instant, wrong) for name, wrong in (("a", {1}), ("b", {1, 2})))
    reports = comparison.compare(a, b)
    assert list(reports) == ["model"]
    gap = reports["model"].difference("A", "B", "named", "place")
    assert gap.value == pytest.approx(0.25) and gap.low == 0
    assert reports["model"].difference("A", "B", "named", "time").value == 0
    same = comparison.compare(a, a)["model"]
    for group, names in GROUPS.items():
        for name in names.names:
            assert same.difference("A", "B", group, name).value in (None, 0), (group, name)
    written = comparison.as_json(reports)["model"]
    assert written["differences"]["overall"]["right_story"]["value"] == pytest.approx(0.25)
    assert "| model | 0.25 [0.00, 0.75]" in comparison.markdown(reports)


def test_only_stories_of_both_are_compared(instant: list[Reading], tmp_path: Path) -> None:
    a = told_by(tmp_path / "a", instant, {0})
    b = told_by(tmp_path / "b", instant, set(), worlds=WORLDS[1:])
    report = comparison.compare(a, b)["model"]
    assert report.provenance["stories"] == 3
    assert report.difference("A", "B", "named", "place").value == 0
    c = told_by(tmp_path / "c", instant, set(), worlds=[sample_world(0, shots=3), WORLDS[1]])
    with pytest.raises(ValueError, match="share 1 stories"):
        comparison.compare(a, c)


def test_two_rows_of_one_study_are_compared(instant: list[Reading], tmp_path: Path) -> None:
    told_by(tmp_path, instant, set(), "teacher")
    told_by(tmp_path, instant, {0, 3})
    (report,) = comparison.compare(tmp_path / "model.jsonl", tmp_path / "teacher.jsonl").values()
    assert report.difference("A", "B", "named", "place").value == pytest.approx(-0.5)


def test_what_cannot_be_compared(instant: list[Reading], tmp_path: Path) -> None:
    a, b = (told_by(tmp_path / name, instant, set(), row) for name, row in (("a", "model"), ("b", "teacher")))
    with pytest.raises(ValueError, match="no row in common"):
        comparison.compare(a, b)
    with pytest.raises(ValueError, match="two folders or two files"):
        comparison.compare(a, b / "teacher.jsonl")
    with pytest.raises(ValueError, match="nowhere: no such results"):
        comparison.compare(a, tmp_path / "nowhere")
    (b / "origin.json").write_text('{"judge": "another"}')
    with pytest.raises(ValueError, match="different judges"):
        comparison.compare(a / "model.jsonl", b / "teacher.jsonl")
    record = json.loads((a / "model.jsonl").read_text().splitlines()[0]) | {"seed": 77}
    (a / "model.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="told otherwise today"):
        comparison.compare(a, a)


# Rows


@pytest.fixture(scope="module")
def tiny() -> pipeline.Pipeline:
    return pipeline.load("tiny")


def test_the_rows_without_a_model_score_what_they_must(tiny: pipeline.Pipeline, tmp_path: Path) -> None:
    """Drawn, and read by the real judge."""
    rows = {name: generators(tiny)[name] for name in ("ground truth", "copy previous", "random story")}
    drawn = (sample_world(seed, shots=2) for seed in range(1000))
    world = next(w for w in drawn if w.shots[0].cast == (0, 1) and w.shots[0].place != w.shots[1].place)
    report = study.study(rows, [world], tmp_path)
    for group in ("overall", "cuts"):
        for name in GROUPS[group].names:
            assert report.interval("ground truth", group, name).value == 1, name
    assert report.interval("ground truth", "cast", "right").value == 1
    assert report.interval("copy previous", "leakage", "place").value == 1
    assert report.interval("copy previous", "first", "place").value == 1
    assert report.interval("copy previous", "overall", "right_story").value == 0
    assert report.interval("copy previous", "cuts", "found").value == 0
    assert report.interval("random story", "overall", "right_shot").value == 0


WORLD = sample_world(3, shots=3)
TOLD = captions(WORLD)


@pytest.fixture(scope="module")
def past(tiny: pipeline.Pipeline) -> list[torch.Tensor]:
    frames = tiny.config.shot_frames(), 3, tiny.config.height, tiny.config.width
    return list(torch.rand(2, *frames, generator=torch.Generator().manual_seed(1)) * 2 - 1)


def test_the_teacher_continues_a_story(tiny: pipeline.Pipeline, past: list[torch.Tensor]) -> None:
    state = torch.random.get_rng_state()
    shot = next_shot(tiny, TOLD, past, 5, 2)
    assert torch.equal(state, torch.random.get_rng_state()), "others' random numbers are left alone"
    assert shot.shape == past[0].shape and shot.abs().max() <= 1
    assert torch.equal(shot, next_shot(tiny, TOLD, past, 5, 2))
    assert not torch.equal(shot, next_shot(tiny, TOLD, past, 6, 2)), "other noise"
    assert not torch.equal(shot, next_shot(tiny, TOLD, [past[0], -past[1]], 5, 2)), "other past"
    retold = replace(TOLD, shots=(TOLD.shots[0], TOLD.shots[1], TOLD.shots[0]))
    assert not torch.equal(shot, next_shot(tiny, retold, past, 5, 2)), "other words"
    assert not torch.equal(shot, next_shot(tiny, TOLD, past, 5, 3)), "more steps"


def test_the_teacher_lives_with_its_own_past(tiny: pipeline.Pipeline) -> None:
    rows = generators(tiny, tiny, steps=2)
    shots = rows["teacher"].generate(WORLD, TOLD, 5)
    assert len(shots) == 3
    made: list[torch.Tensor] = []
    for shot in shots:
        made.append(next_shot(tiny, TOLD, made, 5, 2))
        assert np.array_equal(shot, to_uint8(made[-1]))
    assert "teacher" not in generators(tiny)


def test_memory_is_what_the_rows_differ_in(tiny: pipeline.Pipeline) -> None:
    rows = generators(tiny)
    own, alone = (rows[name].generate(WORLD, TOLD, 5) for name in ("model", "without memory"))
    assert len(own) == len(alone) == 3
    assert np.array_equal(own[0], alone[0]), "no first shot has a past"
    assert not np.array_equal(own[1], alone[1])
    repeated = rows["without memory"].generate(WORLD, replace(TOLD, shots=TOLD.shots[:1] * 3), 5)
    assert not np.array_equal(repeated[0], repeated[1]), "every shot has noise of its own"


# Commands


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["eval", *map(str, words)])
    return result.exit_code, result.output


def test_a_study_from_the_command_line(tmp_path: Path) -> None:
    words = (
        "storybook",
        "--out",
        tmp_path / "a",
        "--stories",
        2,
        "--shots",
        1,
        "--validation",
        "--seed",
        1,
        "--seed",
        2,
    )
    code, said = run(*words, "--row", "ground truth")
    assert code == 0, said
    assert "| ground truth | 1.00" in said and str(tmp_path / "a" / "report.md") in said
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    assert result["provenance"]["noise_seeds"] == [1, 2]
    assert result["provenance"]["shots"] == 2
    assert result["provenance"]["world_seeds"][0] < 90_000_000, "these are not the test stories"
    assert not list(tmp_path.rglob("ledger.jsonl"))
    code, said = run("compare", tmp_path / "a", tmp_path / "a", "--json", tmp_path / "gap.json")
    assert code == 0 and "| ground-truth | 0.00" in said
    assert set(json.loads((tmp_path / "gap.json").read_text())) == {"ground-truth"}


def test_late_shots_are_those_from_the_fourth_on() -> None:
    """A stage that loses a shot's place early is not worse in late shots, one that loses it late is."""
    worlds = [sample_world(seed, shots=6) for seed in range(3)]

    def stage(lost: int | None) -> list[Tally]:
        judged = []
        for world in worlds:
            readings = [replace(r, place="nowhere") if k == lost else r for k, r in enumerate(perfect(world))]
            judged.append(JudgedStory(world, captions(world), tuple(readings), (), ()))
        return tallies([judged], 6)

    report = Report({"right": stage(None), "early": stage(1), "late": stage(4)}, {})
    assert stages.late(report, "right", "named").value == stages.late(report, "early", "named").value == 1
    assert stages.late_difference(report, "early", "right", "named").value == 0
    lost = stages.late_difference(report, "late", "right", "named")
    assert lost.value is not None and lost.high is not None and lost.high < 0
    at = report.by_shot("late", "named")
    assert [shot.value == 1 for shot in at] == [True, True, True, True, False, True]
    slope = report.difference("late", "early", "drift", "named")
    assert slope.value is not None and slope.value < 0, "the later, the more it falls"


def test_stages_from_the_command_line(tmp_path: Path) -> None:
    recipe, runs = RECIPES["storybook-smoke"], RunConfig(dtype="float32")
    parts = {"ode": fresh(recipe, 0), "stage1": fresh(recipe, 1), "autoencoder": pipeline.build(recipe.config)[1]}
    for name, module in parts.items():
        (tmp_path / name).mkdir()
        File(tmp_path / name).write({"network": Network(module, runs)}, 1)
    chosen = ("--stories", 2, "--seeds", 2, "--shots", 1, "--validation", "--preset", "storybook-smoke")
    code, said = run("stages", tmp_path, "--stages", "ode,stage1", *chosen, "--out", tmp_path / "out")
    assert code == 0 and "| ode | " in said and str(tmp_path / "out" / "stages.md") in said
    written = (tmp_path / "out" / "stages.md").read_text()
    assert "| stage1 - ode | " in written and "noise seeds [0, 1]" in written
    numbers = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert set(numbers["stages"]) == {"ode", "stage1"} and set(numbers["differences"]) == {"stage1 - ode"}
    assert {"commit", "machine", "models", "noise_seeds"} <= numbers["provenance"].keys()
    code, said = run("stages", tmp_path, "--stages", "ode,stage2", *chosen, "--out", tmp_path / "out")
    assert code == 3 and "train stage 'stage2' first" in said
    code, said = run("stages", tmp_path, "--stages", "ode,nothing", *chosen, "--out", tmp_path / "out")
    assert code == 2 and "unknown stage 'nothing'" in said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("storybook", "--row", "nobody"), 2, "unknown row 'nobody'"),
        (("storybook", "--split", "other"), 2, "unknown split 'other'"),
        (("storybook", "--model", "tiny"), 2, "makes 96 x 64 frames"),
        (("storybook", "--teacher", "nowhere.safetensors"), 3, "nowhere.safetensors: no such file"),
        (("compare", "nowhere", "nowhere"), 2, "nowhere: no such results"),
    ],
)
def test_wrong_words_are_one_line(words: tuple[str, ...], code: int, said: str, tmp_path: Path) -> None:
    out = ("--out", tmp_path) if words[0] == "storybook" else ()
    exit_code, output = run(*words, *out)
    assert exit_code == code and said in output and len(output.splitlines()) == 1


def test_a_model_file_needs_to_be_told_its_teacher(tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.symlink_to(Path(pipeline.__file__).parent / "storybook" / "weights" / "storybook.safetensors")
    code, said = run("storybook", "--model", file, "--row", "teacher", "--out", tmp_path / "out")
    assert code == 2 and "name its model file by --teacher" in said


def test_the_ledger_lies_with_the_results_of_the_repository(tmp_path: Path) -> None:
    root = Path(study.__file__).parents[3]
    expected = root / "benchmarks" / "results" if (root / "benchmarks" / "results").is_dir() else tmp_path
    assert study.ledger_file(tmp_path) == expected / "ledger.jsonl"
