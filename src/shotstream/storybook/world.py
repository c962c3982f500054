"""The picture-book world: what a story contains, and how one is sampled. No pixels here, and no torch.

A `World` describes a story completely: `draw.render` turns it into frames and `captions.captions` into text,
both always in the same way. Attributes in `UNNAMED` never reach a caption: across a cut
only memory can keep them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "heldout"]

SPECIES = ("cat", "bear", "bunny", "frog", "duck")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
HATS = ("none", "crown", "cap", "tophat")
SHIRTS = ("red", "yellow", "green", "blue", "purple", "white")
ACCESSORIES = ("none", "scarf", "balloon")
ACCESSORY_COLOURS = ("red", "yellow", "green", "blue")
PLACES = ("meadow", "beach", "forest", "city", "desert", "snow")
TIMES = ("day", "sunset", "night")
FRAMINGS = ("wide", "medium", "close")
ACTIONS = ("walk", "jump", "wave", "sit", "dance", "look")

NAMED = ("colour", "hat")
UNNAMED = ("shirt", "accessory", "accessory_colour")

FRAMING_ACTIONS = {"wide": ACTIONS, "medium": ACTIONS, "close": ("wave", "look")}
"""A close-up shows head and shoulders, so only actions of the face and the arms can be seen in it."""

MOVING = ("walk", "jump", "dance")
"""Actions that move the whole body."""

HELDOUT_LOOKS = frozenset(
    {
        ("cat", "green"),
        ("bear", "yellow"),
        ("bunny", "blue"),
        ("bunny", "orange"),
        ("frog", "purple"),
        ("duck", "red"),
    }
)
"""Pairs of species and colour that no training story contains; every held-out story has one as its lead."""

HELDOUT_SCENES = frozenset({("city", "day"), ("desert", "night"), ("snow", "sunset")})
"""Pairs of place and time that no training story contains; about a third of the held-out shots show one."""

ACTION_WEIGHTS = {"walk": 3, "jump": 2, "wave": 2, "sit": 2, "dance": 2, "look": 1}
PAIR_RATE, BOTH_RATE, RETURN_RATE, SAME_TIME_RATE, HELDOUT_SCENE_RATE = 0.25, 0.3, 0.5, 0.7, 1 / 3


@dataclass(frozen=True)
class Character:
    """One member of the cast. Without an accessory, `accessory` and `accessory_colour` are both "none"."""

    species: str
    colour: str
    hat: str
    shirt: str
    accessory: str
    accessory_colour: str


@dataclass(frozen=True)
class ShotScript:
    """One shot: `cast` holds indices into `World.cast`, left to right; all of them do the same action."""

    cast: tuple[int, ...]
    place: str
    time: str
    framing: str
    action: str

    @property
    def is_small_motion(self) -> bool:
        """Whether somebody moves through a wide shot: what is hardest to encode, to draw and to generate."""
        return self.framing == "wide" and self.action in MOVING


@dataclass(frozen=True)
class World:
    """A whole story; `mirrored` is the layout of every place, the same whenever the story returns to it."""

    seed: int
    split: Split
    cast: tuple[Character, ...]
    mirrored: tuple[tuple[str, bool], ...]
    shots: tuple[ShotScript, ...]

    def is_mirrored(self, place: str) -> bool:
        return dict(self.mirrored)[place]


def sample_world(seed: int, split: Split = "train", shots: int | None = None) -> World:
    """The story of this seed: 2 to 5 shots unless `shots` says how many; the same on every machine."""
    if split not in ("train", "heldout"):
        raise ValueError(f"unknown split {split!r}: use 'train' or 'heldout'")
    if shots is not None and shots < 1:
        raise ValueError(f"a story needs at least one shot, not {shots}")
    random = Random(f"storybook world {split} {seed} {shots}")
    count = shots or random.randint(2, 5)
    cast = _sample_cast(random, split)
    mirrored = tuple((place, random.random() < 0.5) for place in PLACES)
    return World(seed, split, cast, mirrored, _sample_shots(random, split, len(cast), count))


def _sample_cast(random: Random, split: Split) -> tuple[Character, ...]:
    looks = [(species, colour) for species in SPECIES for colour in COLOURS]
    seen = [look for look in looks if look not in HELDOUT_LOOKS]
    lead = random.choice(seen if split == "train" else sorted(HELDOUT_LOOKS))
    if random.random() >= PAIR_RATE:
        return (_dress(random, *lead),)
    others = [look for look in seen if look[0] != lead[0] and look[1] != lead[1]]
    return _dress(random, *lead), _dress(random, *random.choice(others))


def _dress(random: Random, species: str, colour: str) -> Character:
    hat = random.choice(HATS)
    shirt = random.choice([c for c in SHIRTS if c != colour])
    accessory = random.choices(ACCESSORIES, (1, 2, 2))[0]
    accessory_colour = random.choice([c for c in ACCESSORY_COLOURS if c not in (colour, shirt)])
    return Character(species, colour, hat, shirt, accessory, "none" if accessory == "none" else accessory_colour)


def _sample_shots(random: Random, split: Split, cast_size: int, count: int) -> tuple[ShotScript, ...]:
    story_time = random.choice(TIMES)
    shots: list[ShotScript] = []
    for index in range(count):
        cast = _sample_presence(random, shots, cast_size, last_chance=index == min(1, count - 1))
        place, time = _sample_scene(random, split, _sample_place(random, shots), story_time)
        framings = [framing for framing in FRAMINGS if len(cast) == 1 or framing != "close"]  # too tight for two
        if shots and shots[-1].place == place:  # a cut nobody can see is none: change place or framing
            framings = [framing for framing in framings if framing != shots[-1].framing]
        framing = random.choice(framings)
        action = _sample_action(random, framing, len(cast))
        shots.append(ShotScript(cast, place, time, framing, action))
    return tuple(shots)


def _sample_action(random: Random, framing: str, cast_size: int) -> str:
    actions = FRAMING_ACTIONS[framing]
    if framing == "close":
        return random.choice(actions)
    if framing == "medium" and cast_size > 1:  # a raised arm would cover the neighbour's face
        actions = tuple(action for action in actions if action != "wave")
    return random.choices(actions, [ACTION_WEIGHTS[action] for action in actions])[0]


def _sample_presence(random: Random, shots: Sequence[ShotScript], size: int, last_chance: bool) -> tuple[int, ...]:
    """Who is in the next shot: one character or both; by the second shot both have been seen."""
    if size == 1:
        return (0,)
    both, one = random.random() < BOTH_RATE, random.randrange(2)
    missing = [i for i in range(size) if not any(i in shot.cast for shot in shots)]
    if both or (last_chance and len(missing) == 2):
        return (0, 1)
    return (missing[0],) if last_chance and missing else (one,)


def _sample_place(random: Random, shots: Sequence[ShotScript]) -> str:
    visited = sorted({shot.place for shot in shots})
    fresh = [place for place in PLACES if place not in visited]
    back = visited and (random.random() < RETURN_RATE or not fresh)
    return random.choice(visited if back else fresh)


def _sample_scene(random: Random, split: Split, place: str, story_time: str) -> tuple[str, str]:
    """Place and time of a shot: mostly the time of the story, and never a held-out pair in training."""
    if split == "heldout" and random.random() < HELDOUT_SCENE_RATE:
        return random.choice(sorted(HELDOUT_SCENES))
    times = [time for time in TIMES if (place, time) not in HELDOUT_SCENES]
    same = story_time in times and random.random() < SAME_TIME_RATE
    return place, story_time if same else random.choice(times)
