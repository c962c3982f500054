"""Laws of the picture-book world: visible cuts, disjoint splits, honest captions, separable colours."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from shotstream.storybook import captions as text
from shotstream.storybook import draw
from shotstream.storybook import world as w

TRAIN = [w.sample_world(seed) for seed in range(2000)]
HELDOUT = [w.sample_world(seed, "heldout") for seed in range(500)]
TOLD = [text.captions(story, seed=3) for story in TRAIN]
LAYOUT = tuple((place, False) for place in w.PLACES)


def one_shot(action: str = "look", framing: str = "wide", **looks: str) -> w.World:
    who = replace(w.Character("bear", "red", "none", "blue", "none", "none"), **looks)
    shot = w.ShotScript((0,), "meadow", "day", framing, action)
    return w.World(0, "train", (who,), LAYOUT, (shot,))


def looks_of(story: w.World) -> set[tuple[str, str]]:
    return {(who.species, who.colour) for who in story.cast}


def scenes_of(story: w.World) -> set[tuple[str, str]]:
    return {(shot.place, shot.time) for shot in story.shots}


# Stories


def test_a_seed_always_tells_the_same_story() -> None:
    assert [w.sample_world(seed) for seed in range(50)] == TRAIN[:50]
    assert len(set(TRAIN)) == len(TRAIN)
    shot, golden = TRAIN[0].shots[0], ("frog", "desert", "medium")
    assert (TRAIN[0].cast[0].species, shot.place, shot.framing) == golden, "published seeds would change meaning"


def test_consecutive_shots_change_place_or_framing() -> None:
    for story in TRAIN + HELDOUT:
        for before, after in zip(story.shots, story.shots[1:], strict=False):
            assert (before.place, before.framing) != (after.place, after.framing)


def test_about_half_of_the_later_shots_return() -> None:
    later = [(story, k) for story in TRAIN for k in range(1, len(story.shots))]
    returns = [story.shots[k].place in {s.place for s in story.shots[:k]} for story, k in later]
    assert np.mean(returns) == pytest.approx(0.5, abs=0.04)


def test_pairs_differ_and_have_both_appeared_by_the_second_shot() -> None:
    pairs = [story for story in TRAIN if len(story.cast) == 2]
    assert len(pairs) / len(TRAIN) == pytest.approx(0.25, abs=0.03)
    for story in pairs:
        first, second = story.cast
        assert first.species != second.species and first.colour != second.colour
        assert {i for shot in story.shots[:2] for i in shot.cast} == {0, 1}
        assert all(shot.framing != "close" for shot in story.shots if len(shot.cast) == 2)


def test_clothes_can_be_told_from_the_body() -> None:
    for story in TRAIN + HELDOUT:
        for who in story.cast:
            assert who.shirt != who.colour
            assert who.accessory_colour not in (who.shirt, who.colour)
            assert (who.accessory == "none") == (who.accessory_colour == "none")


def test_a_close_up_shows_only_what_can_be_seen_in_one() -> None:
    shots = [shot for story in TRAIN + HELDOUT for shot in story.shots]
    assert all(shot.action in w.FRAMING_ACTIONS[shot.framing] for shot in shots)


def test_splits_are_disjoint() -> None:
    for story in TRAIN:
        assert not looks_of(story) & w.HELDOUT_LOOKS
        assert not scenes_of(story) & w.HELDOUT_SCENES
    for story in HELDOUT:
        assert (story.cast[0].species, story.cast[0].colour) in w.HELDOUT_LOOKS
    assert set().union(*map(scenes_of, HELDOUT)) >= w.HELDOUT_SCENES
    assert len(set().union(*map(looks_of, TRAIN))) == len(w.SPECIES) * len(w.COLOURS) - len(w.HELDOUT_LOOKS)


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_the_number_of_shots_can_be_chosen(count: int) -> None:
    assert len(w.sample_world(5, shots=count).shots) == count
    with pytest.raises(ValueError, match="at least one"):
        w.sample_world(5, shots=0)


# Pictures


def test_rendering_is_deterministic_and_a_longer_shot_begins_the_same() -> None:
    story = TRAIN[1]
    short, long = draw.render_shot(story, 0, 9), draw.render_shot(story, 0, 33)
    assert (long.frames[:9] == short.frames).all() and (long.mask[:9] == short.mask).all()
    assert short.frames.shape == (9, draw.HEIGHT, draw.WIDTH, 3) and short.frames.dtype == np.uint8
    assert short.mask.shape == (9, draw.HEIGHT, draw.WIDTH) and short.mask.dtype == np.bool_
    assert [len(shot.frames) for shot in draw.render(story)] == [draw.SHOT_FRAMES] * len(story.shots)
    for wrong in (0, 20, 23):
        with pytest.raises(ValueError, match=r"4k \+ 1"):
            draw.render_shot(story, 0, wrong)


def test_cuts_are_much_larger_than_motion() -> None:
    every_cut, every_motion = [], []
    for story in TRAIN[:25]:
        frames = np.concatenate([shot.frames for shot in draw.render(story)]).astype(np.int16)
        change = np.abs(np.diff(frames, axis=0)).mean((1, 2, 3)) / 255
        at_cut = np.arange(1, len(frames)) % draw.SHOT_FRAMES == 0
        for cut in np.flatnonzero(at_cut):
            around = change[cut - 8 : cut + 9]
            assert change[cut] == around.max() and change[cut] > max(0.04, 1.8 * np.median(around))
        every_cut += change[at_cut].tolist()
        every_motion += change[~at_cut].tolist()
    assert np.median(every_cut) > 10 * np.median(every_motion)


def test_the_mask_is_exactly_where_the_cast_is() -> None:
    story = one_shot("wave", accessory="balloon", accessory_colour="yellow")
    rendered = draw.render_shot(story, 0, 5)
    empty = np.asarray(draw.background("meadow", "day", False, "wide")).astype(np.int16)
    changed = np.abs(rendered.frames - empty).max(-1) > 90  # more than the shadow changes
    assert not (changed & ~rendered.mask).sum(axis=(1, 2)).max() > 60  # only soft edges
    assert 0.08 < rendered.mask.mean() < 0.25
    balloon = np.abs(rendered.frames[0] - np.array(draw.PALETTE["yellow"], np.int16)).max(-1) < 8
    assert balloon.sum() > 300 and rendered.mask[0][balloon].all()


def test_characters_keep_their_colours_at_every_time_of_day() -> None:
    for time in w.TIMES:
        story = one_shot()
        shot = replace(story.shots[0], time=time)
        frame = draw.render_shot(replace(story, shots=(shot,)), 0, 1).frames[0]
        for colour in ("red", "blue"):
            assert (frame == draw.PALETTE[colour]).all(-1).sum() > 300


def test_no_background_comes_near_a_character_colour() -> None:
    scenes = [
        np.asarray(draw.background(place, time, False, framing)).reshape(-1, 3)
        for place in w.PLACES
        for time in w.TIMES
        for framing in w.FRAMINGS
    ]
    red, green, blue = np.concatenate(scenes).astype(np.uint32).T
    packed = np.unique(red << 16 | green << 8 | blue)
    pixels = np.stack([packed >> 16, packed >> 8 & 255, packed & 255], -1).astype(float)
    for colour in w.COLOURS:
        assert np.linalg.norm(pixels - draw.PALETTE[colour], axis=1).min() > 70, colour
    bodies = np.array([draw.PALETTE[colour] for colour in w.COLOURS], float)
    apart = np.linalg.norm(bodies[:, None] - bodies[None], axis=-1) + 1e3 * np.eye(len(bodies))
    assert apart.min() > 90


def test_all_backgrounds_differ_clearly() -> None:
    scenes = {
        (place, time, mirrored): np.asarray(draw.background(place, time, mirrored, framing), np.int16)
        for framing in w.FRAMINGS
        for place in w.PLACES
        for time in w.TIMES
        for mirrored in (False, True)
    }
    keys = list(scenes)
    for i, first in enumerate(keys):
        for second in keys[i + 1 :]:
            assert np.abs(scenes[first] - scenes[second]).mean() > 5, (first, second)


def test_a_walk_crosses_the_picture_and_comes_back() -> None:
    mask = draw.render_shot(one_shot("walk"), 0, 41).mask
    centre = [np.nonzero(frame)[1].mean() / draw.WIDTH for frame in mask]
    assert centre[0] == pytest.approx(0.35, abs=0.03) and centre[20] == pytest.approx(0.65, abs=0.03)
    assert centre[40] == pytest.approx(centre[0], abs=0.01)


@pytest.mark.parametrize("action", [a for a in w.ACTIONS if a != "walk"])
def test_other_actions_repeat_and_move(action: str) -> None:
    frames = draw.render_shot(one_shot(action), 0, 41).frames
    assert (frames[: draw.PERIOD] == frames[draw.PERIOD : 2 * draw.PERIOD]).all()
    assert (frames[: draw.PERIOD] != frames[0]).any()


def test_a_jump_is_high_and_a_seat_is_low() -> None:
    def top(action: str) -> list[int]:
        mask = draw.render_shot(one_shot(action), 0, 17).mask
        return [int(np.nonzero(frame.any(1))[0][0]) for frame in mask]

    assert 16 <= top("look")[0] - min(top("jump")) <= 20
    assert min(top("sit")) >= top("look")[0] + 8


def test_a_close_up_is_filled_by_the_head_and_still_shows_the_shirt() -> None:
    wide, medium, close = (draw.render_shot(one_shot("look", f), 0, 1) for f in w.FRAMINGS)
    assert 2 * wide.mask.mean() < medium.mask.mean()
    head = close.mask[0].any(0).sum()
    assert 75 <= head <= 110
    assert (close.frames[0] == draw.PALETTE["blue"]).all(-1).sum() > 800


# Words


def test_captions_are_deterministic_and_vary_with_the_seed() -> None:
    assert text.captions(TRAIN[4], 1) == text.captions(TRAIN[4], 1)
    assert len({text.captions(TRAIN[4], seed) for seed in range(20)}) > 15


def test_captions_fit_and_use_the_whole_vocabulary() -> None:
    used: set[str] = set()
    for story, told in zip(TRAIN, TOLD, strict=True):
        assert len(told.shots) == len(told.named) == len(story.shots)
        for caption in told.shots:
            tokens = text.tokenize(f"{told.global_caption}. {caption}")
            assert len(tokens) <= 24
            used.update(tokens)
    assert used == set(text.VOCABULARY)
    assert 120 <= len(text.VOCABULARY) <= 200 and list(text.VOCABULARY) == sorted(used)


def test_unnamed_attributes_are_never_told() -> None:
    forbidden = {"shirt", "scarf", "balloon", "white", "jumper", "sweater"}
    assert not forbidden & set(text.VOCABULARY)
    for story, told in zip(TRAIN, TOLD, strict=True):
        allowed = {word for who in story.cast for word in text.COLOUR_WORDS[who.colour]}
        colours = {word for words in text.COLOUR_WORDS.values() for word in words}
        spoken = set(text.tokenize(" ".join([told.global_caption, *told.shots])))
        assert not (spoken & colours) - allowed


def test_named_says_what_has_been_named() -> None:
    for story, told in zip(TRAIN, TOLD, strict=True):
        for k, naming in enumerate(told.named):
            spoken = set(text.tokenize(" ".join([told.global_caption, *told.shots[: k + 1]])))
            for who, named in zip(story.cast, naming, strict=True):
                assert ("colour" in named) == bool(spoken & set(text.COLOUR_WORDS[who.colour]))
                if len(story.cast) == 1:
                    assert ("hat" in named) == bool(spoken & {"crown", "cap", "tophat", "hat"})
                if "hat" in named:
                    hats = {"crown": {"crown"}, "cap": {"cap"}, "tophat": {"tophat", "hat"}, "none": {"hat"}}
                    assert spoken & hats[who.hat]


def test_looks_are_named_once() -> None:
    colours = {word for words in text.COLOUR_WORDS.values() for word in words}
    styles: Counter[str] = Counter()
    for story, told in zip(TRAIN, TOLD, strict=True):
        told_in_global = len(colours & set(text.tokenize(told.global_caption)))
        mentions = sum(word in colours for caption in told.shots for word in text.tokenize(caption))
        if told_in_global:
            assert told_in_global == len(story.cast) and mentions == 0
            styles["global"] += 1
        else:
            assert mentions in (0, len(story.cast))
            styles["first" if mentions else "never"] += 1
    for style, share in text.STYLES.items():
        assert styles[style] / len(TRAIN) == pytest.approx(share, abs=0.04)


def test_tokens_of_free_text() -> None:
    assert text.tokenize("A close-up of the GREEN bear, waving!") == ["close", "green", "bear", "waving"]
    assert text.unknown_words("a dragon and the bear: a Dragon flies") == ["dragon", "flies"]
    assert text.unknown_words("") == []
    assert not text.STOP_WORDS & set(text.VOCABULARY)
