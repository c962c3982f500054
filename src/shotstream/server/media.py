"""Live pictures: frames become fragments as they are made, and fragments reach every viewer that keeps up.

`Encoder` (H.264, VP9 or AV1) and `MotionJpeg` turn frames into `Fragment`s; they run in the session's own thread.
`Broadcast` hands the messages of one encoder to its viewers; it lives on the event loop and never waits for
any of them: a viewer whose queue is full loses what is in it and goes on at the next shot, which is a key frame.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any, Protocol

import av
import av.error
import numpy as np
from av.codec.context import Flags
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image

from shotstream.server.fmp4 import (
    Sample,
    Track,
    av1_sample,
    av1_track,
    fragment,
    h264_sample,
    h264_track,
    init_segment,
    vp9_track,
)

_GROUP = 3  # frames of a fragment: a quarter second at 12 frames per second; the fewer, the sooner seen
_BT709 = 1
_THREADS = "/proc/self/task"  # of this process, other libraries' too


@dataclass(frozen=True)
class Fragment:
    """Consecutive encoded frames. `data`: what viewers are sent; `samples`: the same for a file."""

    data: bytes
    samples: tuple[Sample, ...]


class Source(Protocol):
    """What a broadcast sends: how a stream starts, and frames as fragments."""

    mime: str
    size: tuple[int, int]
    opening: bytes

    def encode(self, frames: np.ndarray, first: int, key: bool) -> Iterator[Fragment]: ...


@dataclass(frozen=True)
class Coder:
    """An encoder of FFmpeg and how it is told to answer every frame with a packet at once."""

    name: str
    options: dict[str, str]


# In the order of choice. A GPU's encoder is taken only if opening it shows that this machine has one.
_X264 = {"preset": "veryfast", "crf": "18", "tune": "zerolatency", "forced-idr": "1", "sc_threshold": "0"}
_NVENC = {"preset": "p4", "tune": "ull", "zerolatency": "1", "rc": "vbr", "cq": "20", "bf": "0", "forced-idr": "1"}
_VP9 = {"crf": "24", "b": "0", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
_SVT = {"preset": "12", "crf": "28", "svtav1-params": "pred-struct=1:lookahead=0:lp=1"}
CODERS: dict[str, tuple[Coder, ...]] = {
    "h264": (Coder("h264_nvenc", _NVENC), Coder("libx264", _X264)),
    "vp9": (Coder("libvpx-vp9", _VP9),),
    "av1": (Coder("av1_nvenc", _NVENC), Coder("libsvtav1", _SVT)),
}
_FOURCC = {"avc1": "h264", "avc3": "h264", "vp09": "vp9", "av01": "av1"}


def negotiate(types: Sequence[str], preferred: str) -> str | None:
    """The codec for a viewer that plays these MIME types: the preferred one, else H.264, VP9, AV1; None for none."""
    plays = {codec for text in types for fourcc, codec in _FOURCC.items() if fourcc in text.lower()}
    order = (preferred, *CODERS)
    return next((codec for codec in order if codec in plays and available(codec)), None)


def available(codec: str) -> bool:
    """Whether this machine encodes it."""
    return _coder(codec) is not None


class Encoder:
    """One codec for the whole life of a session: a key frame where asked, else a long chain of differences.

    size: width and height of the frames given; scale: how many times they are enlarged.
    """

    def __init__(self, codec: str, size: tuple[int, int], fps: int, scale: int = 1) -> None:
        coder = _coder(codec)
        if coder is None:
            raise ValueError(f"no encoder for {codec!r} on this machine; one of {', '.join(CODERS)}")
        self.codec = codec
        self.size = (size[0] * scale, size[1] * scale)
        self._context = _open(coder, self.size, fps)
        self.track = self._describe(fps)
        self.mime = self.track.mime
        self.opening = init_segment(self.track)

    def encode(self, frames: np.ndarray, first: int, key: bool) -> Iterator[Fragment]:
        """uint8 `f h w 3` -> fragments, each as soon as its frames are encoded.

        first: number of the first frame on the timeline. key: make that one a key frame.
        """
        for group in np.array_split(frames, max(1, len(frames) // _GROUP)):
            samples = tuple(self._sample(frame, first + i, key and not i) for i, frame in enumerate(group))
            yield Fragment(fragment(self.track, first, samples), samples)
            first, key = first + len(group), False

    def _sample(self, frame: np.ndarray, number: int, key: bool) -> Sample:
        picture = _picture(frame, self.size, number)
        if key:
            picture.pict_type = PictureType.I
        (packet,) = self._context.encode(picture)
        return Sample(_payload(self.codec, bytes(packet)), packet.is_keyframe)

    def _describe(self, fps: int) -> Track:
        extradata = self._context.extradata or b""
        match self.codec:
            case "h264":
                return h264_track(extradata, *self.size, fps)
            case "av1":
                return av1_track(extradata, *self.size, fps)
        return vp9_track(*self.size, fps)


class MotionJpeg:
    """Every frame a JPEG: for viewers that have nothing but an image element."""

    mime = "multipart/x-mixed-replace; boundary=frame"
    opening = b""

    def __init__(self, size: tuple[int, int], scale: int = 1) -> None:
        self.size = (size[0] * scale, size[1] * scale)

    def encode(self, frames: np.ndarray, first: int, key: bool) -> Iterator[Fragment]:
        """uint8 `f h w 3` -> one fragment per frame."""
        for frame in frames:
            data = jpeg(frame, self.size)
            yield Fragment(data, (Sample(data, True),))


def jpeg(frame: np.ndarray, size: tuple[int, int] | None = None, quality: int = 85) -> bytes:
    """One uint8 `h w 3` frame as JPEG, resized to `size` (width, height) if given."""
    image = Image.fromarray(frame)
    if size and image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


@cache
def _coder(codec: str) -> Coder | None:
    """The first encoder of this machine that opens and answers each of three frames at once."""
    return next((coder for coder in CODERS.get(codec, ()) if _answers(coder)), None)


def _answers(coder: Coder) -> bool:
    size = (256, 128)
    try:
        context = _open(coder, size, 12)
        grey = np.full((size[1], size[0], 3), 128, np.uint8)
        return all(len(context.encode(_picture(grey, size, number))) == 1 for number in range(3))
    except (av.error.FFmpegError, ValueError):  # not in this build, or no such device here
        return False


def _open(coder: Coder, size: tuple[int, int], fps: int) -> Any:
    context: Any = av.CodecContext.create(coder.name, "w")
    context.width, context.height = size
    context.pix_fmt = "yuv420p"
    context.time_base, context.framerate = Fraction(1, fps), Fraction(fps)
    context.gop_size = 1_000_000  # key frames are ours to ask for
    context.thread_count = 1  # the same bytes on every machine, and no frame waits in a thread
    context.color_range = ColorRange.MPEG
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.flags |= Flags.global_header
    context.options = coder.options
    with _same_priority():
        context.open()
    return context


@contextmanager
def _same_priority() -> Iterator[None]:
    """Keep real-time priority off: SVT-AV1, where it may, gives it to whoever opens it and to all threads it starts."""
    if sys.platform != "linux":
        yield
        return
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    before = {*os.listdir(_THREADS)} - {str(threading.get_native_id())}
    try:
        yield
    finally:
        for thread in {*os.listdir(_THREADS)} - before:
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setscheduler(int(thread), policy, priority)


def _picture(frame: np.ndarray, size: tuple[int, int], number: int) -> av.VideoFrame:
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    picture = rgb.reformat(
        *size,
        "yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.LANCZOS,
    )
    picture.pts = number
    return picture


def _payload(codec: str, packet: bytes) -> bytes:
    match codec:
        case "h264":
            return h264_sample(packet)
        case "av1":
            return av1_sample(packet)
    return packet


# Viewers

Message = str | bytes


class Viewer:
    """One viewer's queue, bounded in bytes. `get` waits; `offer` never does."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.drops = 0
        self._messages: deque[Message] = deque()
        self._bytes = 0
        self._skipping = False  # until the next shot begins
        self._closed = False
        self._news = asyncio.Event()

    def offer(self, message: Message, begins_shot: bool = False) -> bool:
        """Queue a message; False if the viewer was too slow and has just been cut."""
        if self._skipping and not begins_shot:
            return True
        self._skipping = False
        cut = self._bytes + len(message) > self.limit
        if cut:
            self._messages.clear()
            self._bytes, self._skipping = 0, not begins_shot
            self.drops += 1
        if not self._skipping:
            self._messages.append(message)
            self._bytes += len(message)
            self._news.set()
        return not cut

    def close(self) -> None:
        """No more will come: `get` ends after what is queued."""
        self._closed = True
        self._news.set()

    async def get(self) -> Message | None:
        """The next message; None when there will be none."""
        while not self._messages:
            if self._closed:
                return None
            self._news.clear()
            await self._news.wait()
        message = self._messages.popleft()
        self._bytes -= len(message)
        return message


@dataclass
class Broadcast:
    """One encoder's messages for all its viewers. Everything here happens on the event loop."""

    source: Source
    fps: int
    viewers: set[Viewer] = field(default_factory=set)
    _running: list[Message] = field(default_factory=list)  # of the shot being made, for those who come late

    def join(self, limit: int) -> Viewer:
        """A new viewer: it gets the opening, and the running shot from its beginning."""
        viewer = Viewer(limit)
        width, height = self.source.size
        init = {"type": "init", "mime": self.source.mime, "fps": self.fps, "width": width, "height": height}
        for message in (json.dumps(init), self.source.opening, *self._running):
            if message:
                viewer.offer(message)
        self.viewers.add(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        self.viewers.discard(viewer)
        viewer.close()

    def begin_shot(self, **shot: Any) -> int:
        self._running = []
        return self._publish(json.dumps({"type": "shot", **shot}), begins_shot=True)

    def send(self, data: bytes) -> int:
        """A fragment for everybody. Returns how many viewers were too slow and have been cut."""
        return self._publish(data)

    def end_shot(self, **shot: Any) -> int:
        drops = self._publish(json.dumps({"type": "shot_end", **shot}))
        self._running = []
        return drops

    def close(self) -> None:
        for viewer in self.viewers:
            viewer.close()
        self.viewers.clear()

    def _publish(self, message: Message, begins_shot: bool = False) -> int:
        self._running.append(message)
        return sum(not viewer.offer(message, begins_shot) for viewer in self.viewers)
