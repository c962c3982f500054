"""Reads a shot of the storybook world back from its pixels: who is there, in what, doing what, and where.

Nothing here is trained. The world is small enough to be drawn again: the judge looks for the description
whose picture comes closest. First the empty scene, one of 108; then who stands in front of it, by a
coordinate descent over looks and action. Every guess is asked how much better than the empty scene it
explains the picture. Distances are capped per pixel, so that a blurred edge or a wrong corner costs little:
the judge is meant for generated pictures, which are never exactly right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from shotstream.storybook.draw import (
    BOX,
    CAMERA,
    GROUND,
    HEIGHT,
    LEAP,
    PALETTE,
    STATIONS,
    STRIDES,
    WIDTH,
    Pose,
    background,
    motion,
    sprite,
)
from shotstream.storybook.world import (
    ACCESSORIES,
    ACCESSORY_COLOURS,
    COLOURS,
    FRAMING_ACTIONS,
    FRAMINGS,
    HATS,
    PLACES,
    SHIRTS,
    SPECIES,
    TIMES,
    Character,
)

Floats = NDArray[np.float32]

FRAMES_READ = 6
CAP, COLOUR_CAP = 60.0, 150.0
"""Largest difference of a pixel that counts, as the mean over its channels (0..255): between two pictures,
and between a picture and a plain colour."""

CELL, NEAR, LEAST_MATCHED = 3, 30.0, 0.42
"""A character is recognised when this share of its drawing, in cells of 3 x 3 pixels so that blur counts little,
is within 30 levels of the picture. In nearly all wide shots behind a linear autoencoder it is, with a median of
.73; in the middle of cross-fades .28, in empty scenes .28 at most, in noise .07."""

LAGS, SHIFTS = (0, -2, 2), (0, -2, 2)
"""How far a generated motion may be out of step, in frames, and a character out of place, in pixels."""

CUT_LEAST, CUT_TIMES, CUT_AROUND = 0.04, 2.0, 8
"""A cut is the largest change within 8 frames, at least .04 of the range, and twice the median there: on 180
rendered stories the weakest of 469 cuts is .052 and 3.0 times; every other such peak is below .034 or below
1.8 times."""


@dataclass(frozen=True)
class CharacterReading:
    """One character as seen, standing "left", "right" or in the "centre".

    `matched` is the share of its drawing that the picture agrees with; `confidence` says for each attribute
    how much less the next best value explains, 0..1.
    """

    position: str
    species: str
    colour: str
    hat: str
    shirt: str
    accessory: str
    accessory_colour: str
    matched: float
    confidence: Mapping[str, float]


@dataclass(frozen=True)
class Reading:
    """One shot as seen, its cast from left to right: nobody when no character could be recognised."""

    place: str
    time: str
    framing: str
    mirrored: bool
    cast: tuple[CharacterReading, ...]
    action: str
    confidence: Mapping[str, float]

    @property
    def found(self) -> bool:
        return bool(self.cast)


def judge(frames: NDArray[np.uint8]) -> Reading:
    """Read one shot, uint8 [f 128 192 3]; ValueError for another shape. The first two frames do not count."""
    if frames.ndim != 4 or frames.shape[1:] != (HEIGHT, WIDTH, 3) or not len(frames):
        raise ValueError(f"a storybook shot is uint8 [f {HEIGHT} {WIDTH} 3], not {list(frames.shape)}")
    view, certainty = _look(frames)
    guesses = _first_guesses(view)
    for _ in range(2):
        guesses, margins = _refine(view, guesses)
    cast = [_describe(view, guess, sure) for guess, sure in zip(guesses, margins, strict=True)]
    return Reading(
        *view.scene,
        cast=tuple(member for member in cast if member.matched >= LEAST_MATCHED),
        action=guesses[0].action,
        confidence={**certainty, "action": margins[0]["action"]},
    )


def find_cuts(frames: NDArray[np.uint8]) -> list[int]:
    """The first frame of every shot of a video uint8 [f h w 3] but the first."""
    if len(frames) < 2:
        return []
    change = np.array([np.abs(b.astype(np.int16) - a).mean() / 255 for a, b in pairwise(frames)])
    cuts = []
    for i, here in enumerate(change):
        around = change[max(0, i - CUT_AROUND) : i + CUT_AROUND + 1]
        if here == around.max() and here > max(CUT_LEAST, CUT_TIMES * np.median(around)):
            cuts.append(i + 1)
    return cuts


# The scene


class Scene(NamedTuple):
    place: str
    time: str
    framing: str
    mirrored: bool


class _View(NamedTuple):
    """What the search looks at: `f` frames of a shot, halved unless the shot is wide.

    Costs are distances of every pixel, 0..CAP to the empty scene [f h w] and 0..COLOUR_CAP to each colour of
    the palette [f h w 7].
    """

    scene: Scene
    times: tuple[int, ...]
    pictures: Floats
    empty: Floats
    empty_costs: Floats
    colour_costs: Floats


def _shrink(pictures: Floats, factor: int) -> Floats:
    """[.. h w c] -> [.. h/factor w/factor c], each pixel a mean."""
    *rest, h, w, c = pictures.shape
    cells = pictures.reshape(*rest, h // factor, factor, w // factor, factor, c)
    return cells.mean(axis=(-4, -2), dtype=np.float32)


def _factor(framing: str) -> int:
    return 1 if framing == "wide" else 2


def _empty(scene: Scene) -> Floats:
    picture = background(scene.place, scene.time, scene.mirrored, scene.framing)
    return np.asarray(picture, dtype=np.float32)


@cache
def _scenes() -> tuple[tuple[Scene, ...], Floats]:
    """Every empty scene, and a quarter-size picture of each."""
    scenes = tuple(Scene(*values) for values in product(PLACES, TIMES, FRAMINGS, (False, True)))
    return scenes, _shrink(np.stack([_empty(scene) for scene in scenes]), 4)


def _look(frames: NDArray[np.uint8]) -> tuple[_View, dict[str, float]]:
    """The view of a shot in front of the scene that fits best, and how sure each part of the scene is."""
    last = len(frames) - 1
    times = sorted({round(t) for t in np.linspace(min(2, last), last, FRAMES_READ)})
    pictures = frames[times].astype(np.float32)
    scenes, empties = _scenes()
    still = np.median(_shrink(pictures, 4), axis=0)
    costs = np.minimum(np.abs(empties - still).mean(-1), CAP).mean((1, 2))
    best = scenes[int(costs.argmin())]
    certainty = {
        part: 1 - float(costs.min() / min(c for s, c in zip(scenes, costs, strict=True) if s[k] != best[k]))
        for k, part in enumerate(Scene._fields)
    }
    factor = _factor(best.framing)
    pictures, empty = _shrink(pictures, factor), _shrink(_empty(best), factor)
    palette = np.array(list(PALETTE.values()), np.float32)
    colours = np.stack([np.abs(pictures - colour).mean(-1) for colour in palette], axis=-1)
    view = _View(
        best,
        tuple(times),
        pictures,
        empty,
        np.minimum(np.abs(pictures - empty).mean(-1), CAP),
        np.minimum(colours, COLOUR_CAP),
    )
    return view, certainty


# A character drawn again


class _Guess(NamedTuple):
    """Somebody of unknown colours: they are read off the picture once the shape is fixed."""

    position: str
    species: str
    action: str
    hat: str = "none"
    accessory: str = "none"
    lag: int = 0
    shift: tuple[int, int] = (0, 0)

    def bare(self) -> _Guess:
        return self._replace(hat="none", accessory="none")


class _Template(NamedTuple):
    """A drawing whose colours are left open, halved unless the shot is wide.

    The picture is `base + parts @ colours + (1 - alpha) * scene`: base [h w 3], alpha [h w], and
    parts [h w 3], the shares (0..255) of body, shirt and accessory. `corner` is (left, top) of the cut-out in
    the whole drawing.
    """

    corner: tuple[int, int]
    base: NDArray[np.uint8]
    alpha: NDArray[np.uint8]
    parts: NDArray[np.uint8]


class _Fit(NamedTuple):
    """`gain`: what a guess explains better than the empty scene.

    `colours` [3 7] are the costs of every palette colour for body, shirt and accessory.
    """

    gain: float
    colours: NDArray[np.float64]


PARTS = {"colour": COLOURS, "shirt": SHIRTS, "accessory_colour": ACCESSORY_COLOURS}
PROBES = (
    {"colour": "red", "shirt": "green", "accessory_colour": "green"},
    {"colour": "yellow", "shirt": "orange", "accessory_colour": "blue"},
)
"""Two sets of colours: from one to the other body, shirt and accessory change along green, red and blue, so
that two drawings tell every pixel's share of all three."""

_CHOICES = np.array([[name in options for name in PALETTE] for options in PARTS.values()])
_PALETTE = np.array(list(PALETTE.values()), np.float32)


def _premultiplied(species: str, hat: str, accessory: str, pose: Pose, framing: str, probe: int) -> Floats:
    who = Character(species=species, hat=hat, accessory=accessory, **PROBES[probe])
    rgba = np.asarray(sprite(who, pose, CAMERA[framing][0], False), dtype=np.float32)
    rgba[..., :3] *= rgba[..., 3:] / 255
    return _shrink(rgba, _factor(framing))


@lru_cache(maxsize=8000)  # all there are: 5,301 in 1,200 stories; a smaller one is no cache at all
def _template(species: str, hat: str, accessory: str, pose: Pose, framing: str) -> _Template:
    """Draw a character in two sets of colours: where the drawing changes, and how much, are its parts."""
    first, second = (_premultiplied(species, hat, accessory, pose, framing, probe) for probe in (0, 1))
    start, end = (np.array([PALETTE[name] for name in probe.values()], np.float32) for probe in PROBES)
    parts = np.clip((second - first)[..., :3] @ np.linalg.inv(end - start), 0, 1)
    base = np.clip(first[..., :3] - parts @ start, 0, 255)
    rows, columns = (np.flatnonzero(first[..., 3].any(axis)) for axis in (1, 0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    whole = [np.round(x[box]).astype(np.uint8) for x in (base, first[..., 3], parts * 255)]
    return _Template((int(columns[0]), int(rows[0])), *whole)


def _flip(drawn: _Template, framing: str) -> _Template:
    """Mirrored about the middle of the whole drawing."""
    width = round((BOX[2] - BOX[0]) * CAMERA[framing][0]) // _factor(framing)
    (left, top), *whole = drawn
    return _Template((width - left - drawn.alpha.shape[1], top), *(x[:, ::-1] for x in whole))


def _drawings(view: _View, guess: _Guess) -> Iterator[tuple[int, tuple[slice, slice], _Template]]:
    """For every frame in which the guess can be seen: its index, where, and that part of the drawing."""
    framing, factor = view.scene.framing, _factor(view.scene.framing)
    zoom, middle = CAMERA[framing]
    ground = HEIGHT / 2 + (GROUND - middle) * zoom
    height, width = view.empty.shape[:2]
    stride = STRIDES[guess.position] / zoom
    for i, time in enumerate(view.times):
        pose, dx, dy = motion(guess.action, time + guess.lag, stride=stride, leap=LEAP / zoom)
        drawn = _template(guess.species, guess.hat, guess.accessory, pose, framing)
        if guess.position == "left":
            drawn = _flip(drawn, framing)
        x = WIDTH * STATIONS[guess.position] + (dx + BOX[0]) * zoom + guess.shift[0]
        y = ground + (dy + BOX[1]) * zoom + guess.shift[1]
        left, top = round(x / factor) + drawn.corner[0], round(y / factor) + drawn.corner[1]
        h, w = drawn.alpha.shape
        rows = slice(max(0, top), min(height, top + h))
        columns = slice(max(0, left), min(width, left + w))
        if rows.start < rows.stop and columns.start < columns.stop:
            cut = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
            yield i, (rows, columns), _Template((0, 0), *(x[cut] for x in drawn[1:]))


def _fit(view: _View, guess: _Guess) -> _Fit:
    """How well a guess explains the shot in the colours that suit it best."""
    drawings = list(_drawings(view, guess))
    costs = np.full((3, len(PALETTE)), 1e-3)
    for i, (rows, columns), drawn in drawings:
        for part in range(3 if guess.accessory != "none" else 2):
            costs[part] += view.colour_costs[i, rows, columns][drawn.parts[..., part] > 190].sum(0)
    costs[~_CHOICES] = np.inf
    gain = 0.0
    for i, window, drawn in drawings:
        off = _distance(view.pictures[i][window], _coloured(view, window, drawn, costs))
        gain += float((view.empty_costs[i][window] - np.minimum(off, CAP)).sum())
    return _Fit(gain, costs)


def _distance(first: Floats, second: Floats) -> Floats:
    """Mean difference of the three channels [.. 3] -> [..]; what `mean` gives, in a third of its time."""
    red, green, blue = np.moveaxis(np.abs(first - second), -1, 0)
    distance: Floats = (red + green + blue) / 3
    return distance


def _coloured(view: _View, window: tuple[slice, slice], drawn: _Template, costs: NDArray[np.float64]) -> Floats:
    """The picture of a drawing before the scene in the colours that cost least."""
    colours = _PALETTE[costs.argmin(1)] / 255
    clear = 1 - drawn.alpha[..., None] * np.float32(1 / 255)
    return drawn.base + drawn.parts.astype(np.float32) @ colours + clear * view.empty[window]


def _matched(view: _View, guess: _Guess, fit: _Fit) -> float:
    """The share of the coarse cells of a drawing that agree with the picture."""
    near, size = 0, 0
    for i, window, drawn in _drawings(view, guess):
        redrawn = _coloured(view, window, drawn, fit.colours)
        h, w = (n // CELL * CELL for n in drawn.alpha.shape)
        difference = _shrink((view.pictures[i][window] - redrawn)[:h, :w], CELL)
        solid = _shrink(drawn.alpha[:h, :w, None].astype(np.float32), CELL)[..., 0] > 127
        near += int(np.count_nonzero(np.abs(difference[solid]).mean(-1) < NEAR))
        size += int(np.count_nonzero(solid))
    return near / size if size else 0.0


# The search


def _first_guesses(view: _View) -> list[_Guess]:
    """Who may stand where, bare-headed and with empty hands: every species at every action."""
    actions = FRAMING_ACTIONS[view.scene.framing]
    best: dict[tuple[str, str], tuple[float, _Guess]] = {}
    positions = ("centre",) if view.scene.framing == "close" else tuple(STATIONS)
    for position, action in product(positions, actions):
        guesses = [_Guess(position, species, action) for species in SPECIES]
        best[position, action] = max((max(0.0, _fit(view, g).gain), g) for g in guesses)
    layouts = [
        [best[position, action] for position in group if (position, action) in best]
        for action in actions
        for group in (("centre",), ("left", "right"))
    ]
    chosen = max(layouts, key=lambda layout: sum(gain for gain, _ in layout))
    return [guess for _, guess in chosen]


def _refine(view: _View, guesses: Sequence[_Guess]) -> tuple[list[_Guess], list[dict[str, float]]]:
    """One round of the descent: everybody's place, head and accessory, then the action of all together.

    Each step leaves out what it does not decide on, so that few drawings serve all stories.
    """
    refined: list[_Guess] = []
    margins: list[dict[str, float]] = []
    for guess in guesses:
        x, y = guess.shift
        moved = [guess._replace(shift=(x + dx, y + dy)) for dx, dy in product(SHIFTS, SHIFTS)]
        guess, _ = _settle(moved, [_fit(view, g).gain for g in moved])
        heads = [guess._replace(species=species, hat=hat) for species, hat in product(SPECIES, HATS)]
        guess, sure = _settle(heads, [_fit(view, g._replace(accessory="none")).gain for g in heads], "species", "hat")
        hands = [guess._replace(accessory=accessory) for accessory in ACCESSORIES]
        guess, more = _settle(hands, [_fit(view, g).gain for g in hands], "accessory")
        refined.append(guess)
        margins.append(sure | more)
    actions = list(product(FRAMING_ACTIONS[view.scene.framing], LAGS))
    acting = [[guess._replace(action=action, lag=lag) for action, lag in actions] for guess in refined]
    gains = np.sum([[_fit(view, g.bare()).gain for g in options] for options in acting], axis=0).tolist()
    chosen = [_settle(options, gains, "action") for options in acting]
    return [guess for guess, _ in chosen], [sure | more for sure, (_, more) in zip(margins, chosen, strict=True)]


def _settle(options: Sequence[_Guess], gains: Sequence[float], *names: str) -> tuple[_Guess, dict[str, float]]:
    """The option that explains most; per name, the share of it that no option of another value explains."""
    gain, best = max(zip(gains, options, strict=True), key=lambda pair: pair[0])
    margins: dict[str, float] = {}
    for name in names:
        others = [g for g, o in zip(gains, options, strict=True) if getattr(o, name) != getattr(best, name)]
        margins[name] = min(1.0, 1 - max(others) / gain) if gain > 0 else 0.0
    return best, margins


def _describe(view: _View, guess: _Guess, margins: Mapping[str, float]) -> CharacterReading:
    fit = _fit(view, guess)
    looks = {part: list(PALETTE)[row.argmin()] for part, row in zip(PARTS, fit.colours, strict=True)}
    confidence = {name: margins[name] for name in ("species", "hat", "accessory")}
    for part, row in zip(PARTS, np.sort(fit.colours), strict=True):
        confidence[part] = float(1 - row[0] / row[1])
    if guess.accessory == "none":
        looks["accessory_colour"], confidence["accessory_colour"] = "none", margins["accessory"]
    return CharacterReading(
        position=guess.position,
        species=guess.species,
        hat=guess.hat,
        accessory=guess.accessory,
        matched=_matched(view, guess, fit),
        confidence=confidence,
        **looks,
    )
