"""Laws of the judge: it reads what was drawn, sees nobody where nobody is, and finds the cuts."""

from collections.abc import Callable

import numpy as np
import pytest

from shotstream.storybook import draw, judge
from shotstream.storybook.world import Character, ShotScript, World, sample_world

CAST = (
    Character("frog", "purple", "crown", "yellow", "balloon", "green"),
    Character("bear", "orange", "tophat", "blue", "scarf", "red"),
)
LOOKS = ("species", "colour", "hat", "shirt", "accessory", "accessory_colour")
SHOTS = (
    ShotScript((0,), "forest", "night", "close", "wave"),
    ShotScript((0,), "city", "sunset", "wide", "walk"),
    ShotScript((1,), "snow", "night", "wide", "jump"),
    ShotScript((0, 1), "desert", "day", "medium", "dance"),
)
STORY = World(0, "train", CAST, tuple((s.place, k % 2 == 1) for k, s in enumerate(SHOTS)), SHOTS)
PICTURES = [shot.frames for shot in draw.render(STORY)]


def blurred(frames: np.ndarray) -> np.ndarray:
    """Out of focus by more than a pixel, and noisy."""
    soft = frames.astype(np.float64)
    for axis in (1, 2, 1, 2):
        soft = (np.roll(soft, 1, axis) + soft + np.roll(soft, -1, axis)) / 3
    noise = np.random.default_rng(0).normal(0, 8, soft.shape)
    return np.clip(soft + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("degrade", [lambda x: x, blurred], ids=["drawn", "blurred"])
def test_reads_what_was_drawn(degrade: Callable[[np.ndarray], np.ndarray]) -> None:
    right = []
    for k, (shot, frames) in enumerate(zip(SHOTS, PICTURES, strict=True)):
        seen = judge.judge(degrade(frames))
        right += [seen.place == shot.place, seen.time == shot.time, seen.framing == shot.framing]
        right += [seen.action == shot.action, seen.mirrored == (k % 2 == 1)]
        assert [c.position for c in seen.cast] == (["centre"] if len(shot.cast) == 1 else ["left", "right"])
        for member, index in zip(seen.cast, shot.cast, strict=True):
            right += [getattr(member, name) == getattr(CAST[index], name) for name in LOOKS]
            assert all(0 <= sure <= 1 for sure in member.confidence.values())
    assert np.mean(right) >= 0.95


@pytest.mark.parametrize("shot", [1, 2, 3])
def test_draws_a_character_where_the_renderer_does(shot: int) -> None:
    script = SHOTS[shot]
    view, _ = judge._look(PICTURES[shot])
    for index, position in zip(script.cast, ("left", "right") if len(script.cast) > 1 else ("centre",), strict=True):
        who = CAST[index]
        guess = judge._Guess(position, who.species, script.action, who.hat, who.accessory)
        true = judge._fit(view, guess)
        assert judge._matched(view, guess, true) > 0.9
        for shift in ((-2, 0), (2, 0), (0, -2), (0, 2)):
            assert judge._fit(view, guess._replace(shift=shift)).gain < true.gain
        for lag in (-2, 2):
            assert judge._fit(view, guess._replace(lag=lag)).gain < true.gain


def test_nobody_is_recognised_where_nobody_is() -> None:
    empty = np.repeat(np.asarray(draw.background("city", "day", False, "wide"))[None], 21, axis=0)
    noise = np.random.default_rng(0).integers(0, 256, empty.shape, dtype=np.uint8)
    for frames in (empty, noise):
        assert not judge.judge(frames).found


def test_reads_clips_of_any_length() -> None:
    for frames in (1, 5):
        seen = judge.judge(PICTURES[3][-frames:])
        assert (seen.place, seen.framing, len(seen.cast)) == ("desert", "medium", 2)


def test_finds_every_cut_and_no_other() -> None:
    for seed in range(5):
        video = np.concatenate([shot.frames for shot in draw.render(sample_world(seed))])
        assert judge.find_cuts(video) == list(range(21, len(video), 21))
    assert judge.find_cuts(PICTURES[2]) == []
    assert judge.find_cuts(PICTURES[2][:1]) == []


def test_refuses_other_pictures() -> None:
    with pytest.raises(ValueError, match=r"\[f 128 192 3\], not \[21, 64, 96, 3\]"):
        judge.judge(np.zeros((21, 64, 96, 3), np.uint8))
