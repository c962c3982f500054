"""Judged stories, and the files that keep them: one line per story as it comes, so that nothing is judged twice.

out/model.jsonl          what the judge saw
out/model/KEY.jpg        the middle frame of every shot, side by side
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shotstream.storybook.captions import Captions, captions
from shotstream.storybook.judge import CharacterReading, Reading, find_cuts, judge
from shotstream.storybook.world import World, sample_world

Generate = Callable[[World, Captions, int], Sequence[NDArray[np.uint8]]]
"""(world, captions, noise seed) -> the shots of a story, each uint8 [f h w 3]."""

Progress = Callable[[int, int], None]
"""Hears (stories done, stories in all)."""

NOISE_STRIDE = 1_000_000
"""Between the noise seeds of a story, so that no two stories share noise: seed 1 of story n is not seed 0 of n + 1."""


@dataclass(frozen=True)
class Finish:
    """How a shot looks, whatever it shows: variance of the Laplacian of its grey levels and mean chroma, of 0..1."""

    sharpness: float
    saturation: float


@dataclass(frozen=True)
class JudgedStory:
    """A story, its telling, and what was seen: a reading per shot, planned and found cuts, and the finish of
    every shot (none in records of before it was measured)."""

    world: World
    captions: Captions
    readings: tuple[Reading, ...]
    planned: tuple[int, ...]
    found: tuple[int, ...]
    finish: tuple[Finish, ...] = ()
    strip: Path | None = None


def judge_story(world: World, told: Captions, shots: Sequence[NDArray[np.uint8]]) -> JudgedStory:
    """Read every shot of a generated story; ValueError when their number is not the script's."""
    if len(shots) != len(world.shots):
        raise ValueError(f"story {world.seed} has {len(world.shots)} shots, but {len(shots)} were generated")
    planned = tuple(accumulate(len(shot) for shot in shots[:-1]))
    found = tuple(find_cuts(np.concatenate(shots)))
    readings, finishes = tuple(judge(shot) for shot in shots), tuple(finish(shot) for shot in shots)
    return JudgedStory(world, told, readings, planned, found, finishes)


def finish(frames: NDArray[np.uint8]) -> Finish:
    """Sharpness and saturation of a shot uint8 [f h w 3], from every fourth frame."""
    pictures = frames[::4].astype(np.float32) / 255
    grey = pictures.mean(-1)
    middle = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    chroma = pictures.max(-1) - pictures.min(-1)
    return Finish(float((around - 4 * middle).var()), float(chroma.mean()))


# Files

LEDGER, ORIGIN = "ledger.jsonl", "origin.json"


def origin(out: Path) -> dict[str, str]:
    """What the results of a folder were made with: model, teacher and judge -> hash; nothing for old ones."""
    path = out / ORIGIN
    return json.loads(path.read_text()) if path.exists() else {}


def row_file(out: Path, row: str) -> Path:
    """Where the judged stories of a row are kept."""
    return out / ("".join(letter if letter.isalnum() else "-" for letter in row.lower()) + ".jsonl")


def judge_row(
    generate: Generate,
    worlds: Sequence[World],
    path: Path,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[JudgedStory]:
    """The stories of one generator: read from `path` if they are there, else generated and appended to it."""
    done = _read(path)
    stories = []
    for n, world in enumerate(worlds):
        told = captions(world)
        key = _key(world, told, seed)
        if key not in done:
            shots = generate(world, told, world.seed + NOISE_STRIDE * seed)
            done[key] = {"key": key, "split": world.split, "seed": world.seed, "noise": seed}
            done[key] |= _record(judge_story(world, told, shots))
            _write_strip(_strip(path, key), shots)
            with path.open("a") as file:
                file.write(json.dumps(done[key]) + "\n")
        stories.append(_story(world, told, done[key], path))
        progress(n + 1, len(worlds))
    return stories


def read_row(path: Path) -> Iterator[JudgedStory]:
    """Every judged story of a file. ValueError if one is of another world than this version draws."""
    for record in _read(path).values():
        told_worlds = ((world, captions(world)) for world in _worlds(record))
        for world, told in told_worlds:
            if _key(world, told, record.get("noise", 0)) == record["key"]:
                yield _story(world, told, record, path)
                break
        else:
            raise ValueError(f"{path}: story {record['seed']} is told otherwise today; judge it again elsewhere")


def _worlds(record: Mapping[str, Any]) -> Iterator[World]:
    """The stories that this record may be of: as long as the seed says, or as long as was asked for."""
    for shots in (None, len(record["readings"])):
        yield sample_world(record["seed"], record["split"], shots)


def _key(world: World, told: Captions, seed: int) -> str:
    """Names a story and its telling, so that results of a changed world are not taken for this one's."""
    return hashlib.sha256(f"{world} {told.global_caption} {told.shots} {seed}".encode()).hexdigest()[:16]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Key -> record. A last line that an interruption left unfinished is cut off."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    return {record["key"]: record for record in map(json.loads, whole.splitlines())}


def _record(story: JudgedStory) -> dict[str, Any]:
    return {
        "planned": story.planned,
        "found": story.found,
        "readings": [asdict(reading) for reading in story.readings],
        "finish": [asdict(each) for each in story.finish],
    }


def _story(world: World, told: Captions, record: Mapping[str, Any], path: Path) -> JudgedStory:
    readings = tuple(
        Reading(**{**reading, "cast": tuple(CharacterReading(**member) for member in reading["cast"])})
        for reading in record["readings"]
    )
    finishes = tuple(Finish(**each) for each in record.get("finish", ()))
    strip = _strip(path, record["key"])
    cuts = tuple(record["planned"]), tuple(record["found"])
    return JudgedStory(world, told, readings, *cuts, finishes, strip if strip.exists() else None)


def _strip(path: Path, key: str) -> Path:
    return path.with_suffix("") / f"{key}.jpg"


def _write_strip(path: Path, shots: Sequence[NDArray[np.uint8]]) -> None:
    path.parent.mkdir(exist_ok=True)
    middles = np.concatenate([shot[len(shot) // 2] for shot in shots], axis=1)
    Image.fromarray(middles).save(path, quality=92)
