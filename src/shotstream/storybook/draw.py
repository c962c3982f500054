"""Pictures of the storybook world, drawn with Pillow: flat shapes, few and large, the same on every run.

A scene is laid out once in the units of the wide shot (192 x 128, feet on `GROUND`); a framing is a camera
that looks at a part of it. Characters are drawn around their feet and placed on the finished background.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import cos, pi, radians, sin
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from shotstream.storybook.world import Character, World

WIDTH, HEIGHT, FPS, SHOT_FRAMES = 192, 128, 12, 21
PERIOD = 20
"""Frames after which every motion except a walk repeats."""

POSITIONS = {1: ("centre",), 2: ("left", "right")}
STATIONS = {"centre": 0.5, "left": 0.31, "right": 0.69}
"""Where the feet of a cast of one, and of two, stand: shares of the width."""

STRIDES, LEAP = {"centre": 28, "left": 12, "right": 12}, 18
"""Half the length of a walk and the height of a jump, in pixels."""

Colour = tuple[int, int, int]
Point = tuple[float, float]

PALETTE: dict[str, Colour] = {
    "red": (226, 38, 44),
    "orange": (255, 130, 10),
    "yellow": (255, 222, 20),
    "green": (30, 165, 60),
    "blue": (30, 95, 235),
    "purple": (150, 45, 205),
    "white": (252, 252, 252),
}
"""Colours of bodies, shirts and accessories: saturated, and used by no background."""

HAT_COLOURS: dict[str, Colour] = {"crown": (255, 196, 0), "cap": (255, 95, 170), "tophat": (40, 34, 52)}
OUTLINE: Colour = (44, 34, 56)
CREAM: Colour = (255, 236, 208)
PINK: Colour = (255, 150, 170)
AMBER: Colour = (255, 172, 30)
WHITE: Colour = (255, 255, 255)

GROUND = 114.0
CAMERA = {"wide": (1.0, 64.0), "medium": (1.5, 75.0), "close": (2.0, 72.0)}
"""Framing -> zoom, and the height of the scene that lands in the middle of the picture."""

SUPERSAMPLE = 2
SKY = {
    "day": ((150, 203, 238), (226, 242, 248)),
    "sunset": ((186, 150, 190), (255, 208, 168)),
    "night": ((46, 50, 92), (98, 104, 150)),
}
LIGHT = {
    "day": (255, 255, 255),
    "sunset": (255, 208, 186),
    "night": (124, 138, 190),
}


class Rendered(NamedTuple):
    """Frames uint8 [f h w 3] and mask bool [f h w]: the pixels covered by the cast and what it carries."""

    frames: NDArray[np.uint8]
    mask: NDArray[np.bool_]


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """`first` with `share` (0..1) of `second` mixed in."""
    r, g, b = (round(x + (y - x) * share) for x, y in zip(first, second, strict=True))
    return r, g, b


class Pen:
    """Draws shapes given in scene units onto a picture of `scale` pixels per unit."""

    def __init__(self, image: Image.Image, scale: float, origin: Point) -> None:
        self.draw = ImageDraw.Draw(image)
        self.scale, self.origin = scale, origin

    def at(self, x: float, y: float) -> Point:
        return self.origin[0] + x * self.scale, self.origin[1] + y * self.scale

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour, edge: float = 0) -> None:
        """An ellipse; `edge` is the width of its outline, which lies inside."""
        box = (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))
        if edge:
            self.draw.ellipse(box, fill, OUTLINE, round(edge * self.scale))
        else:
            self.draw.ellipse(box, fill)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, edge: float = 0) -> None:
        box = (*self.at(x0, y0), *self.at(x1, y1))
        if edge:
            self.draw.rectangle(box, fill, OUTLINE, round(edge * self.scale))
        else:
            self.draw.rectangle(box, fill)

    def polygon(self, points: Sequence[Point], fill: Colour, edge: float = 0) -> None:
        corners = [self.at(*p) for p in points]
        self.draw.polygon(corners, fill)
        if edge:
            self.draw.line([*corners, *corners[:2]], OUTLINE, round(edge * self.scale), joint="curve")

    def line(self, points: Sequence[Point], width: float, fill: Colour) -> None:
        """A line with round joints and ends."""
        path = [self.at(*p) for p in points]
        self.draw.line(path, fill, max(1, round(width * self.scale)))
        radius = width * self.scale / 2
        for x, y in path:
            self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)

    def limb(self, points: Sequence[Point], width: float, fill: Colour, edge: float) -> None:
        self.line(points, width, OUTLINE)
        self.line(points, width - 2 * edge, fill)

    def dome(self, x: float, y: float, radius: float, fill: Colour, edge: float = 0) -> None:
        """The upper half of a disc."""
        box = (*self.at(x - radius, y - radius), *self.at(x + radius, y + radius))
        self.draw.pieslice(box, 180, 360, fill, OUTLINE if edge else None, round(edge * self.scale))

    def arc(self, x: float, y: float, rx: float, ry: float, start: float, end: float, width: float) -> None:
        """Part of the outline of an ellipse, in degrees clockwise from the right."""
        box = (*self.at(x - rx, y - ry), *self.at(x + rx, y + ry))
        self.draw.arc(box, start, end, OUTLINE, max(1, round(width * self.scale)))


# Backgrounds


@cache
def background(place: str, time: str, mirrored: bool, framing: str) -> Image.Image:
    """The empty scene as one camera sees it: RGB, 192 x 128. Shared: copy it before drawing on it."""
    zoom, middle = CAMERA[framing]
    factor = 4
    image = Image.new("RGB", (WIDTH * factor, HEIGHT * factor))
    scale = zoom * factor
    pen = Pen(image, scale, (WIDTH / 2 * factor - WIDTH / 2 * scale, HEIGHT / 2 * factor - middle * scale))
    _sky(pen, time)
    _SCENES[place](pen, time)
    image = image.reduce(factor)
    return ImageOps.mirror(image) if mirrored else image


def _shade(colour: Colour, time: str) -> Colour:
    r, g, b = (value * light // 255 for value, light in zip(colour, LIGHT[time], strict=True))
    return r, g, b


def _sky(pen: Pen, time: str) -> None:
    top, bottom = SKY[time]
    for y in range(0, 92):
        pen.rectangle(0, y, WIDTH, y + 1, mix(top, bottom, y / 91))
    if time == "day":
        pen.ellipse(136, 42, 15, 15, (255, 246, 190))
        for x, y, r in ((84, 26, 8), (95, 22, 11), (107, 26, 8)):
            pen.ellipse(x, y, r, r * 0.8, (250, 253, 255))
    elif time == "sunset":
        pen.ellipse(138, 60, 24, 24, (255, 224, 176))
        pen.ellipse(138, 60, 18, 18, (255, 236, 200))
    else:
        pen.polygon(_crescent(132, 46, 16), (240, 236, 210))
        for x, y in ((92, 20), (20, 22), (172, 22)):
            pen.polygon([(x, y - 5), (x + 1.5, y - 1.5), (x + 5, y), (x + 1.5, y + 1.5)], (226, 224, 208))
            pen.polygon([(x, y + 5), (x - 1.5, y + 1.5), (x - 5, y), (x - 1.5, y - 1.5)], (226, 224, 208))
            pen.ellipse(x, y, 2.2, 2.2, (226, 224, 208))


def _crescent(x: float, y: float, radius: float) -> list[Point]:
    """The outline of a moon that opens to the upper left."""
    turns = [radians(-120 + 210 * step / 24) for step in range(25)]
    outer = [(x + radius * cos(a), y + radius * sin(a)) for a in turns]
    (ax, ay), (bx, by) = outer[-1], outer[0]
    inner = []
    for step in range(1, 12):
        share = step / 12
        bulge = radius * 0.75 * sin(pi * share)
        inner.append((ax + (bx - ax) * share + bulge * 0.8, ay + (by - ay) * share + bulge * 0.25))
    return outer + inner


def _meadow(pen: Pen, time: str) -> None:
    pen.ellipse(30, 122, 120, 56, _shade((192, 218, 164), time))
    pen.ellipse(170, 124, 100, 52, _shade((176, 208, 150), time))
    pen.rectangle(0, 94, WIDTH, HEIGHT, _shade((160, 200, 132), time))
    pen.rectangle(42, 60, 54, 100, _shade((160, 128, 108), time))
    for x, y, r in ((34, 58, 16), (62, 58, 16), (48, 40, 22)):
        pen.ellipse(x, y, r, r, _shade((132, 180, 124), time))
    for x, y in ((152, 104), (176, 116), (20, 114)):
        for dx, dy in ((-3, 0), (3, 0), (0, -3), (0, 3)):
            pen.ellipse(x + dx, y + dy, 2.8, 2.8, _shade((250, 236, 240), time))
        pen.ellipse(x, y, 2.4, 2.4, _shade((240, 206, 130), time))


def _beach(pen: Pen, time: str) -> None:
    pen.rectangle(0, 64, WIDTH, 92, _shade((138, 194, 208), time))
    pen.rectangle(0, 86, WIDTH, 92, _shade((212, 234, 236), time))
    pen.rectangle(0, 90, WIDTH, HEIGHT, _shade((242, 224, 184), time))
    pen.polygon([(138, 72), (162, 72), (157, 80), (143, 80)], _shade((186, 142, 120), time))
    pen.polygon([(149, 44), (149, 70), (136, 70)], _shade((250, 248, 244), time))
    pen.polygon([(152, 50), (152, 70), (162, 70)], _shade((236, 226, 220), time))
    pen.line([(38, 104), (42, 82), (49, 62), (56, 48)], 8, _shade((172, 138, 112), time))
    for dx, dy in ((-30, 6), (-22, -14), (0, -20), (20, -10), (22, 10)):
        tip, bend = (56 + dx, 46 + dy + 6), (56 + dx * 0.55, 46 + dy * 0.75 - 4)
        pen.line([(56, 46), bend, tip], 7, _shade((126, 174, 130), time))


def _pine(pen: Pen, x: float, base: float, size: float, green: Colour, trunk: Colour) -> None:
    pen.rectangle(x - size * 0.08, base - size * 0.15, x + size * 0.08, base, trunk)
    for step in range(3):
        bottom, half = base - size * (0.12 + 0.26 * step), size * (0.36 - 0.07 * step)
        top = bottom - size * 0.42
        pen.polygon([(x - half, bottom), (x + half, bottom), (x, top)], green)


def _forest(pen: Pen, time: str) -> None:
    pen.rectangle(0, 54, WIDTH, 96, _shade((158, 186, 166), time))
    trunk = _shade((140, 116, 104), time)
    for x in (10, 80, 116, 152, 188):
        _pine(pen, x, 96, 62 if x != 152 else 74, _shade((126, 166, 140), time), trunk)
    pen.rectangle(0, 94, WIDTH, HEIGHT, _shade((150, 168, 126), time))
    _pine(pen, 46, 104, 92, _shade((92, 134, 112), time), trunk)
    pen.rectangle(147, 98, 155, 112, _shade((240, 230, 214), time))
    pen.dome(151, 100, 14, _shade((206, 140, 136), time))
    for x, y in ((144, 95), (151, 90), (158, 95)):
        pen.ellipse(x, y, 2.2, 2.2, _shade((248, 236, 228), time))


def _city(pen: Pen, time: str) -> None:
    window = (222, 208, 150) if time == "night" else _shade((228, 238, 240), time)
    houses = (
        (-2, 32, 50, (196, 178, 178)),
        (32, 72, 18, (164, 178, 196)),
        (72, 112, 58, (206, 192, 170)),
        (112, 150, 42, (180, 168, 190)),
        (150, 194, 62, (176, 192, 184)),
    )
    for x0, x1, top, colour in houses:
        pen.rectangle(x0, top, x1, 98, _shade(colour, time))
        width = (x1 - x0) / 5
        for y in range(top + 8, 84, 20):
            for x in (x0 + width, x0 + 3 * width):
                pen.rectangle(x, y, x + width, y + 11, window)
    pen.rectangle(0, 94, WIDTH, 102, _shade((214, 208, 206), time))
    pen.rectangle(0, 102, WIDTH, HEIGHT, _shade((152, 150, 160), time))
    for x in (4, 56, 108, 160):
        pen.rectangle(x, 119, x + 28, 122, _shade((232, 228, 220), time))


def _desert(pen: Pen, time: str) -> None:
    mesa = [(122, 96), (130, 62), (136, 58), (170, 58), (176, 66), (186, 96)]
    pen.polygon(mesa, _shade((206, 158, 138), time))
    pen.polygon([(126, 79), (179.5, 79), (181.5, 86), (124.5, 86)], _shade((222, 180, 156), time))
    pen.ellipse(40, 128, 90, 48, _shade((236, 204, 174), time))
    pen.rectangle(0, 92, WIDTH, HEIGHT, _shade((224, 182, 148), time))
    green = _shade((130, 164, 132), time)
    pen.line([(48, 100), (48, 38)], 13, green)
    pen.line([(48, 78), (31, 76), (30, 56)], 9, green)
    pen.line([(48, 66), (66, 64), (67, 46)], 9, green)


def _snow(pen: Pen, time: str) -> None:
    rock, cap = _shade((168, 184, 206), time), _shade((244, 248, 252), time)
    for x, top, half in ((104, 34, 62), (168, 50, 46)):
        pen.polygon([(x - half, 98), (x, top), (x + half, 98)], rock)
        run, drop = half * 0.36, (98 - top) * 0.36
        zigzag = [(x + run, top + drop), (x + run / 3, top + drop * 0.7), (x - run / 3, top + drop * 1.1)]
        pen.polygon([(x, top), *zigzag, (x - run, top + drop)], cap)
    pen.rectangle(0, 92, WIDTH, HEIGHT, _shade((222, 232, 244), time))
    pen.ellipse(40, 104, 60, 16, _shade((222, 232, 244), time))
    pen.rectangle(26, 66, 70, 100, _shade((184, 152, 134), time))
    pen.rectangle(42, 80, 54, 100, _shade((134, 108, 104), time))
    pen.rectangle(58, 74, 66, 84, (222, 208, 150) if time == "night" else _shade((226, 236, 238), time))
    pen.rectangle(56, 34, 64, 56, _shade((164, 134, 124), time))
    pen.polygon([(18, 70), (48, 40), (78, 70)], cap)
    _pine(pen, 152, 104, 50, _shade((124, 156, 148), time), _shade((140, 116, 104), time))


_SCENES = {
    "meadow": _meadow,
    "beach": _beach,
    "forest": _forest,
    "city": _city,
    "desert": _desert,
    "snow": _snow,
}


# Motion


@dataclass(frozen=True)
class Pose:
    """How a character holds itself; equal poses share one drawing.

    Arms are degrees from hanging down (90 is level); `wave` raises the free arm instead and leans it outwards
    by so many degrees. In scene units: `feet` are lifted, `sway` moves head and body sideways and `sink`
    downwards, `turn` moves the face across the head.
    """

    arms: tuple[int, int] = (20, 20)
    feet: tuple[float, float] = (0.0, 0.0)
    sway: float = 0.0
    sink: float = 0.0
    turn: float = 0.0
    wave: int | None = None
    blink: bool = False
    sit: bool = False


class Motion(NamedTuple):
    """A pose, and where its feet are: `x` and `y` (downwards) in scene units from the standing place."""

    pose: Pose
    x: float = 0.0
    y: float = 0.0


def motion(action: str, frame: int, stride: float = 28.0, leap: float = 18.0) -> Motion:
    """What an action looks like at any frame; a walk goes from -stride to +stride in 20 frames, then back.

    `stride` and `leap`, the height of a jump, are in scene units. Other actions repeat after `PERIOD`.
    """
    angle = 2 * pi * (frame % PERIOD) / PERIOD
    swing = round(sin(angle), 2)
    blink = frame % PERIOD in range(13, 17)
    if action == "walk":
        leg = frame % 40
        right = leg < 20
        x = stride * (leg / 10 - 1 if right else 3 - leg / 10)
        lift = round(7 * swing)
        feet = (float(max(0, lift)), float(max(0, -lift)))
        arms = (25 + round(30 * swing), 25 - round(30 * swing))
        pose = Pose(arms, feet, sway=2.0 * swing, turn=2.5 if right else -2.5)
        return Motion(pose, x, -2.5 * abs(swing))
    if action == "jump":
        rise = round((1 - cos(angle)) / 2, 2)
        reach = 30 + round(95 * rise)
        return Motion(Pose((reach, reach), (2 * rise, 2 * rise), sink=4 * (1 - rise)), y=-leap * rise)
    if action == "wave":
        return Motion(Pose(wave=round(26 * swing)))
    if action == "sit":
        return Motion(Pose(arms=(38, 38), sink=10.0 + (0.7 if swing > 0 else 0.0), blink=blink, sit=True))
    if action == "dance":
        arms = (100 + round(50 * swing), 100 - round(50 * swing))
        lift = round(6 * swing)
        feet = (float(max(0, lift)), float(max(0, -lift)))
        return Motion(Pose(arms, feet, sway=5.0 * swing, turn=2.0 * swing), x=7 * swing)
    if action == "look":
        return Motion(Pose(turn=4.0 * swing, blink=blink))
    raise ValueError(f"unknown action {action!r}")


# Characters

EDGE = 1.5
BOX = (-52.0, -84.0, 52.0, 12.0)
"""The part of the plane around a character's feet that its drawing covers: left, top, right, bottom."""


@lru_cache(maxsize=512)
def sprite(character: Character, pose: Pose, zoom: float, flipped: bool) -> Image.Image:
    """A character in a pose: RGBA, `BOX` times `zoom` pixels large. Shared: do not draw on it."""
    scale = zoom * SUPERSAMPLE
    size = (round((BOX[2] - BOX[0]) * scale), round((BOX[3] - BOX[1]) * scale))
    image = Image.new("RGBA", size, (*OUTLINE, 0))
    _character(Pen(image, scale, (-BOX[0] * scale, -BOX[1] * scale)), character, pose)
    image = image.reduce(SUPERSAMPLE)
    return ImageOps.mirror(image) if flipped else image


def _character(pen: Pen, who: Character, pose: Pose) -> None:
    """Back to front. The left arm is free; the right one holds the balloon."""
    body, shirt = PALETTE[who.colour], PALETTE[who.shirt]
    x, y = pose.sway, pose.sink
    if who.species == "cat":
        tail = [(8, -8 + y), (22, -6 + y), (28, -14 + y), (25, -24 + y)]
        pen.limb(tail, 7, body, EDGE)
    if not pose.sit:
        _legs(pen, _foot(who), pose)
    hand = _arm_hand(pose.arms[1], x, y, 1) if who.accessory != "balloon" else (x + 21.0, -24.0 + y)
    if who.accessory == "balloon":
        _balloon(pen, PALETTE[who.accessory_colour], hand, x, y)
    _arm(pen, [(x + 11, -21 + y), hand], shirt, body)
    if pose.wave is None:
        _arm(pen, [(x - 11, -21 + y), _arm_hand(pose.arms[0], x, y, -1)], shirt, body)
    pen.ellipse(x * 0.6, -15 + y, 15, 12.5, shirt, EDGE)
    if pose.sit:
        _soles(pen, _foot(who))
    _head(pen, who, body, x, y - 42, pose)
    if who.accessory == "scarf":
        _scarf(pen, PALETTE[who.accessory_colour], x, y)
    if pose.wave is not None:
        elbow = (x - 23.0, -20.0 + y)
        reach = radians(pose.wave + 8)
        raised = (elbow[0] - 19 * sin(reach), elbow[1] - 19 * cos(reach))
        _arm(pen, [(x - 11, -20 + y), elbow, raised], shirt, body)


def _arm_hand(angle: int, x: float, y: float, side: int) -> Point:
    return x + side * (11 + 14 * sin(radians(angle))), -21 + y + 14 * cos(radians(angle))


def _arm(pen: Pen, path: Sequence[Point], sleeve: Colour, hand: Colour) -> None:
    pen.limb(path, 8, sleeve, EDGE)
    pen.ellipse(*path[-1], 5, 5, hand, EDGE)


def _foot(who: Character) -> Colour:
    return AMBER if who.species == "duck" else PALETTE[who.colour]


def _soles(pen: Pen, colour: Colour) -> None:
    """The feet of someone who sits and faces us."""
    for side in (-1, 1):
        pen.ellipse(side * 17, -4, 9.5, 8.5, colour, EDGE)
        pen.ellipse(side * 17.5, -4, 5, 4.5, mix(colour, CREAM, 0.7))


def _legs(pen: Pen, colour: Colour, pose: Pose) -> None:
    for side, lift in zip((-1, 1), pose.feet, strict=True):
        hip = side * 7 + pose.sway * 0.4
        pen.limb([(hip, -9 + pose.sink), (side * 7, -4 - lift)], 9, colour, EDGE)
        pen.ellipse(side * 9, -3.5 - lift, 7.5, 4, colour, EDGE)


def _balloon(pen: Pen, colour: Colour, hand: Point, x: float, y: float) -> None:
    top = -52 + y * 0.5
    pen.line([hand, (x * 0.5 + 36, top + 12)], 1.2, OUTLINE)
    pen.polygon([(x * 0.5 + 33, top + 16), (x * 0.5 + 39, top + 16), (x * 0.5 + 36, top + 11)], colour, EDGE)
    pen.ellipse(x * 0.5 + 36, top, 12.5, 13.5, colour, EDGE)
    pen.ellipse(x * 0.5 + 32, top - 5, 2.5, 3.5, mix(colour, WHITE, 0.7))


def _scarf(pen: Pen, colour: Colour, x: float, y: float) -> None:
    pen.limb([(x + 7, -22 + y), (x + 9, -9 + y)], 9, colour, EDGE)
    pen.limb([(x - 12, -24 + y), (x, -21.5 + y), (x + 12, -24 + y)], 9, colour, EDGE)


def _head(pen: Pen, who: Character, body: Colour, x: float, y: float, pose: Pose) -> None:
    """The head around its centre (x, y), 40 wide; the face moves with the turn of the head."""
    light, face = mix(body, WHITE, 0.55), x + pose.turn
    if who.species == "cat":
        for side in (-1, 1):
            pen.polygon([(x + side * 20, y - 2), (x + side * 19, y - 30), (x + side * 3, y - 14)], body, EDGE)
            pen.polygon([(x + side * 16.5, y - 12), (x + side * 16.5, y - 23), (x + side * 10, y - 15)], PINK)
    elif who.species == "bear":
        for side in (-1, 1):
            pen.ellipse(x + side * 16, y - 14, 8.5, 8.5, body, EDGE)
            pen.ellipse(x + side * 16.5, y - 15, 4.5, 4.5, light)
    elif who.species == "bunny":
        for side in (-1, 1):
            pen.limb([(x + side * 10, y - 12), (x + side * 14, y - 33)], 12, body, EDGE)
            pen.line([(x + side * 10.5, y - 16), (x + side * 13.7, y - 32)], 4.5, PINK)
    elif who.species == "duck" and who.hat == "none":
        for dx, dy in ((-7, -23), (7, -23), (0, -27)):
            pen.limb([(x, y - 14), (x + dx, y + dy)], 6, body, EDGE)
    pen.ellipse(x, y, 20, 18, body, EDGE)
    _hat(pen, who.hat, x, y - (18 if who.species == "frog" else 14))  # a frog wears it between its eyes
    _FACES[who.species](pen, body, face, y)
    eye_y, eye_x = (y - 16, 12.5) if who.species == "frog" else (y - 2, 8.5)
    if who.species == "frog":
        for side in (-1, 1):
            pen.ellipse(x + side * eye_x, eye_y, 9, 9, body, EDGE)
    _eyes(pen, x + pose.turn * 0.5, eye_y, eye_x, pose)


def _eyes(pen: Pen, x: float, y: float, apart: float, pose: Pose) -> None:
    for side in (-1, 1):
        centre = x + side * apart
        if pose.blink:
            pen.arc(centre, y - 2, 5, 4.5, 20, 160, 1.8)
            continue
        pen.ellipse(centre, y, 5.8, 6.6, WHITE, 1.0)
        pen.ellipse(centre + pose.turn * 0.55, y + 0.5, 3.4, 4.0, OUTLINE)
        pen.ellipse(centre + pose.turn * 0.55 + 1.2, y - 1.2, 1.3, 1.3, WHITE)


def _cat_face(pen: Pen, body: Colour, x: float, y: float) -> None:
    pen.ellipse(x - 3.6, y + 9, 4.6, 3.8, CREAM)
    pen.ellipse(x + 3.6, y + 9, 4.6, 3.8, CREAM)
    pen.polygon([(x - 3, y + 4.5), (x + 3, y + 4.5), (x, y + 8)], (240, 90, 120))
    for side in (-1, 1):
        pen.line([(x + side * 9, y + 8), (x + side * 19, y + 5.5)], 1.1, OUTLINE)
        pen.line([(x + side * 9, y + 10.5), (x + side * 18, y + 12)], 1.1, OUTLINE)


def _bear_face(pen: Pen, body: Colour, x: float, y: float) -> None:
    pen.ellipse(x, y + 8.5, 9.5, 7, CREAM)
    pen.ellipse(x, y + 5, 4.2, 3, OUTLINE)
    pen.arc(x, y + 8, 4, 4, 20, 160, 1.3)


def _bunny_face(pen: Pen, body: Colour, x: float, y: float) -> None:
    for side in (-1, 1):
        pen.ellipse(x + side * 13, y + 7.5, 3.6, 2.8, PINK)
    pen.rectangle(x - 4, y + 8.5, x + 4, y + 15, WHITE, 1.0)
    pen.line([(x, y + 9), (x, y + 14)], 0.9, OUTLINE)
    pen.ellipse(x, y + 6.5, 3.4, 2.6, (240, 90, 120))


def _frog_face(pen: Pen, body: Colour, x: float, y: float) -> None:
    pen.ellipse(x, y + 5, 15, 9.5, mix(body, WHITE, 0.45))
    pen.ellipse(x, y + 0.5, 16, 7, body)
    pen.arc(x, y - 1, 15, 9, 10, 170, 1.8)


def _duck_face(pen: Pen, body: Colour, x: float, y: float) -> None:
    pen.ellipse(x, y + 9.5, 8, 5, mix(AMBER, OUTLINE, 0.25), EDGE)
    pen.ellipse(x, y + 7, 12.5, 4.6, AMBER, EDGE)


_FACES = {"cat": _cat_face, "bear": _bear_face, "bunny": _bunny_face, "frog": _frog_face, "duck": _duck_face}


def _hat(pen: Pen, hat: str, x: float, y: float) -> None:
    """A hat whose rim is at y."""
    if hat == "none":
        return
    colour = HAT_COLOURS[hat]
    if hat == "crown":
        spikes = [(-12, 0), (-13, -13), (-6, -7), (0, -16), (6, -7), (13, -13), (12, 0)]
        pen.polygon([(x + dx, y + dy) for dx, dy in spikes], colour, EDGE)
        pen.ellipse(x, y - 4, 2.6, 2.6, (226, 38, 44))
    elif hat == "cap":
        pen.dome(x, y, 14, colour, EDGE)
        pen.limb([(x - 2, y - 0.5), (x + 23, y - 0.5)], 6, colour, EDGE)
    else:
        pen.rectangle(x - 10, y - 18, x + 10, y, colour)
        pen.rectangle(x - 10, y - 6, x + 10, y - 2, (250, 250, 250))
        pen.line([(x - 16, y), (x + 16, y)], 4.5, colour)


# Shots


def render(world: World, frames: int = SHOT_FRAMES) -> list[Rendered]:
    """All shots of a story, each of `frames` frames."""
    return [render_shot(world, index, frames) for index in range(len(world.shots))]


def render_shot(world: World, shot_index: int, frames: int = SHOT_FRAMES) -> Rendered:
    """One shot of 4k + 1 frames at 12 frames per second; a longer one begins with the same frames."""
    if frames < 1 or frames % 4 != 1:
        raise ValueError(f"a shot has 4k + 1 frames (1, 5, .., 21, ..), not {frames}")
    shot = world.shots[shot_index]
    scene = background(shot.place, shot.time, world.is_mirrored(shot.place), shot.framing)
    cast = [world.cast[index] for index in shot.cast]
    pictures = np.empty((frames, HEIGHT, WIDTH, 3), np.uint8)
    masks = np.empty((frames, HEIGHT, WIDTH), np.bool_)
    for frame in range(frames):
        picture, mask = _frame(scene, cast, shot.framing, shot.action, frame)
        pictures[frame] = np.asarray(picture)
        masks[frame] = np.asarray(mask) >= 128
    return Rendered(pictures, masks)


def _frame(
    scene: Image.Image, cast: Sequence[Character], framing: str, action: str, frame: int
) -> tuple[Image.Image, Image.Image]:
    zoom, middle = CAMERA[framing]
    ground = HEIGHT / 2 + (GROUND - middle) * zoom
    where = POSITIONS[len(cast)]
    pose, dx, dy = motion(action, frame, stride=STRIDES[where[0]] / zoom, leap=LEAP / zoom)
    picture, mask = scene.copy(), Image.new("L", scene.size)
    feet = [WIDTH * STATIONS[position] + dx * zoom for position in where]
    for x in feet:
        shadow = _shadow(zoom)
        picture.paste(OUTLINE, (round(x - shadow.width / 2), round(ground - shadow.height / 2)), shadow)
    for index, (who, x) in enumerate(zip(cast, feet, strict=True)):
        drawing = sprite(who, pose, zoom, flipped=len(cast) == 2 and index == 0)
        corner = (round(x + BOX[0] * zoom), round(ground + (dy + BOX[1]) * zoom))
        picture.paste(drawing, corner, drawing)
        mask.paste(255, corner, drawing)
    return picture, mask


@cache
def _shadow(zoom: float) -> Image.Image:
    size = (round(44 * zoom), round(9 * zoom))
    image = Image.new("L", (size[0] * 4, size[1] * 4))
    ImageDraw.Draw(image).ellipse((0, 0, size[0] * 4 - 1, size[1] * 4 - 1), 70)
    return image.reduce(4)
