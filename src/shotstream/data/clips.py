"""Multi-shot video clips as a table: what is in the videos, where they are cut, and what is wrong with any of it.

A table is JSON lines, one clip each (paths are relative to the table):

    {"video": "boat.mp4", "global_caption": "A fisher ...", "shots": [{"caption": "...", "start": 0, "end": 81}, ...]}

`end` is exclusive; there may be gaps between shots. Without any `start` and `end` the cuts are found (`cuts.py`).
The reference's CSV (`video_path`, `json_path`, `frame_number`) with its caption files is read as well.
"""

from __future__ import annotations

import ast
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shotstream.data.cuts import find_cuts
from shotstream.errors import Failure

Read = Callable[[], object]


class ShotRow(BaseModel):
    """A shot as written: frames [start, end) of the video."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)
    caption: str = Field(min_length=1)
    start: int | None = Field(None, ge=0)
    end: int | None = Field(None, ge=1)


class ClipRow(BaseModel):
    """A clip as written."""

    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)
    video: str = Field(min_length=1)
    global_caption: str = ""
    shots: list[ShotRow] = Field(min_length=1)


@dataclass(frozen=True)
class Shot:
    caption: str
    start: int
    end: int  # exclusive

    @property
    def frames(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Clip:
    """A clip that has been checked: every shot has its frames, in order."""

    video: Path
    global_caption: str
    shots: tuple[Shot, ...]


class BadRow(ValueError):
    """A row that cannot be used: where it stands, and what is wrong with it."""


def rows(table: Path) -> Iterator[tuple[str, ClipRow | BadRow]]:
    """Every row of a table (.jsonl, or the reference's .csv), with its place. Raises BadRow for an unknown kind."""
    readers = {".jsonl": _json_lines, ".csv": _reference}
    if table.suffix not in readers:
        raise BadRow(f"{table}: unknown kind of table; use .jsonl, or the reference's .csv")
    for number, read in readers[table.suffix](table):
        where = f"{table}:{number}"
        row: ClipRow | BadRow
        try:
            row = ClipRow.model_validate(read())
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the row"
            told = first["msg"].lower().replace("dictionary or instance of cliprow", "object of fields")
            row = BadRow(f"{where}: {place}: {told}")
        except (ValueError, TypeError, SyntaxError, OSError) as error:
            row = BadRow(f"{where}: {error}")
        yield where, row


def _json_lines(table: Path) -> Iterator[tuple[int, Read]]:
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").split("\n"), 1):  # a caption may hold U+2028
        if line.strip():
            yield number, partial(json.loads, line)


def _reference(table: Path) -> Iterator[tuple[int, Read]]:
    with table.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            yield number, partial(_from_reference, table.parent, row)


def _from_reference(folder: Path, row: dict[str, str]) -> dict[str, object]:
    """A row of the reference's training table; captions beyond its ranges are left out, missing ones are an error."""
    lacking = [name for name in ("video_path", "json_path", "frame_number") if not row.get(name)]
    if lacking:
        raise ValueError(f"no {', '.join(lacking)}")
    captions = json.loads((folder / row["json_path"]).read_text(encoding="utf-8"))
    ranges = ast.literal_eval(row["frame_number"])
    names = [f"shot{i}" for i in range(1, len(ranges) + 1)]
    missing = [name for name in names if name not in captions]
    if missing:
        raise ValueError(f"{row['json_path']} has no {', '.join(missing)}, but {len(ranges)} ranges are given")
    shots = [
        {"caption": captions[name], "start": start, "end": end}
        for name, (start, end) in zip(names, ranges, strict=True)
    ]
    return {"video": row["video_path"], "global_caption": captions.get("global_caption", ""), "shots": shots}


def checked(where: str, row: ClipRow, folder: Path, threshold: float = 0.5) -> Clip:
    """The clip of a row, its video opened and its frames counted; cuts are found if it gives none. Raises BadRow."""
    video = folder / row.video
    count = _count_frames(where, video)
    given = [shot.start is not None and shot.end is not None for shot in row.shots]
    if any(shot.start is not None or shot.end is not None for shot in row.shots) and not all(given):
        lacking = given.index(False) + 1
        raise BadRow(f"{where}: shot {lacking} has no start and end; give them for every shot, or for none")
    if all(given):
        shots = tuple(Shot(s.caption, s.start or 0, s.end or 0) for s in row.shots)
    else:
        shots = _between_cuts(where, row, video, count, threshold)
    before = 0
    for number, shot in enumerate(shots, 1):
        if shot.start >= shot.end:
            raise BadRow(f"{where}: shot {number} is empty: frames [{shot.start}, {shot.end})")
        if shot.start < before:
            overlap = f"starts at frame {shot.start}, before shot {number - 1} ends ({before})"
            raise BadRow(f"{where}: shot {number} {overlap}")
        if shot.end > count:
            raise BadRow(f"{where}: shot {number} ends at frame {shot.end}, but {row.video} has {count} frames")
        before = shot.end
    return Clip(video, row.global_caption, shots)


def _between_cuts(where: str, row: ClipRow, video: Path, count: int, threshold: float) -> tuple[Shot, ...]:
    try:
        small = np.stack([frame for _, frame in _frames(video, 27, 48)])
    except BadRow as error:
        raise BadRow(f"{where}: {error}") from None
    try:
        edges = [0, *find_cuts(small, threshold), count]
    except Failure as error:  # no detector: other rows may do without
        raise BadRow(f"{where}: {error}") from None
    if len(edges) != len(row.shots) + 1:
        found = f"{len(edges) - 2} cuts found, at {edges[1:-1]}" if len(edges) > 2 else "no cut found"
        raise BadRow(f"{where}: {found}, but {len(row.shots)} captions; give start and end, or another --threshold")
    return tuple(Shot(s.caption, a, b) for s, a, b in zip(row.shots, edges, edges[1:], strict=False))


def _count_frames(where: str, video: Path) -> int:
    """Frames of a video by its packets, without decoding."""
    try:
        with av.open(f"file:{video}") as container:
            stream = container.streams.video[0]
            return sum(1 for packet in container.demux(stream) if packet.size)
    except (OSError, av.error.FFmpegError, IndexError) as error:
        reason = "no video in it" if isinstance(error, IndexError) else getattr(error, "strerror", "") or str(error)
        raise BadRow(f"{where}: {video}: {reason}") from None


def _frames(video: Path, height: int, width: int) -> Iterator[tuple[int, np.ndarray]]:
    """Number and picture (uint8 `h w 3`, resized whatever its shape) of every frame. Raises BadRow where they end in
    something that is no picture.
    """
    try:
        with av.open(f"file:{video}") as container:
            for number, frame in enumerate(container.decode(video=0)):
                yield number, np.asarray(frame.to_image().resize((width, height), Image.Resampling.BICUBIC))
    except (OSError, av.error.FFmpegError) as error:
        raise BadRow(f"{video}: cannot be decoded: {getattr(error, 'strerror', '') or error}") from None


def shot_pictures(clip: Clip, height: int, width: int) -> Iterator[tuple[Shot, np.ndarray]]:
    """Each shot with its frames, uint8 [f h w 3], one in memory at a time. Raises BadRow if the video ends early."""
    frames = _frames(clip.video, height, width)
    for number, shot in enumerate(clip.shots, 1):
        pictures = []
        for at, picture in frames:
            if at >= shot.start:
                pictures.append(picture)
            if at + 1 >= shot.end:
                break
        if len(pictures) != shot.frames:
            raise BadRow(f"{clip.video}: only {len(pictures)} of {shot.frames} frames of shot {number} can be decoded")
        yield shot, np.stack(pictures)
