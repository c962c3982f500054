"""Single frames of a take's video, as JPEG. Takes do not change, so what was asked for last is kept."""

from __future__ import annotations

from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np

from shotstream.server.media import jpeg
from shotstream.video import read_video


def frame_jpeg(path: Path, number: int, width: int | None = None) -> bytes | None:
    """Frame `number` (from 0), scaled to `width` if given; None if the video is shorter. Raises VideoError."""
    return _frame(path, path.stat().st_mtime_ns, number, width)


@lru_cache(maxsize=512)
def _frame(path: Path, changed: int, number: int, width: int | None) -> bytes | None:
    frame = next(islice(read_video(path), number, None), None)
    return None if frame is None else jpeg(frame, _size(frame, width))


def _size(frame: np.ndarray, width: int | None) -> tuple[int, int] | None:
    height = frame.shape[0]
    return None if width is None else (width, round(height * width / frame.shape[1]))
