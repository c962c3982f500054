"""Video files, by PyAV alone: written while they are made, read frame by frame; and contact sheets.

    with VideoWriter("out.mp4", fps=12, size=(192, 128), scale=3) as video:
        for chunk in session.stream():
            if chunk.index == 0:
                video.begin_shot(chunk.shot.caption)
            video.write(chunk.frames)
            if chunk.is_last:
                video.end_shot()

The file is written under a temporary name and renamed when it is whole. If the block is left by an exception
(Ctrl-C and a full disk too), the shot under way is dropped and the finished shots become the file: it always
plays, and its last chapter is never half a shot; a note of the exception says what was kept. Memory does not
grow with the length of the film.

Frames here are uint8 RGB `f h w 3`; `frames_to_uint8` makes them of floats in [-1, 1].
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import av.container.core
import av.error
import numpy as np
from av.packet import Packet
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image, ImageDraw, ImageFont

Array = Any  # a NumPy array or a torch tensor; this module imports no torch


class VideoError(RuntimeError):
    """A video that cannot be written or read, in one line: file, what is wrong, what to do."""


@dataclass(frozen=True)
class Chapter:
    """A named part of a video, in seconds."""

    title: str
    start: float
    end: float


@dataclass(frozen=True)
class _Format:
    container: str
    codec: str
    pixels: str
    codec_options: dict[str, str]
    container_options: dict[str, str]
    chapters: bool = True


# Every encoder answers a frame with its packet at once (no look-ahead, no B-frames): when a shot ends, all of
# it is out, and nothing of it is lost if the next moment is Ctrl-C.
_FORMATS = {
    ".mp4": _Format(
        "mp4",
        "libx264",
        "yuv420p",
        {"crf": "16", "preset": "veryfast", "tune": "zerolatency", "bf": "0", "forced-idr": "1"},
        {"movflags": "+faststart"},
    ),
    ".webm": _Format(
        "webm",
        "libvpx-vp9",
        "yuv420p",
        {
            "crf": "24",
            "b": "0",
            "deadline": "realtime",
            "cpu-used": "6",
            "lag-in-frames": "0",
        },
        {},
    ),
    ".gif": _Format("gif", "gif", "pal8", {}, {}, chapters=False),
}


VIDEO_KINDS = tuple(_FORMATS)
SHEET_KINDS = (".png", ".jpg", ".jpeg", ".webp")


def check_output(path: str | Path, kinds: Iterable[str] = VIDEO_KINDS) -> None:
    """Refuse an output that could not be written, before an hour of work. Raises VideoError."""
    path = Path(path)
    if path.suffix.lower() not in kinds:
        raise VideoError(f"{path}: unknown kind of file {path.suffix!r}; use one of {', '.join(kinds)}")
    with _explained(path):
        _unfinished(path).exists()  # raises if a name is too long, or a folder may not be looked into
        if path.is_dir():
            raise VideoError(f"{path}: is a folder; give it a file name")
        if not path.parent.is_dir():
            raise VideoError(f"{path}: there is no folder {path.parent}; make it first")
        if not os.access(path.parent, os.W_OK):
            raise VideoError(f"{path}: the folder {path.parent} is not writable; choose another")


def check_outputs(video: str | Path, sheet: str | Path | None = None) -> None:
    """`check_output` of a video and of its contact sheet, if there will be one."""
    check_output(video)
    if sheet:
        check_output(sheet, SHEET_KINDS)


def display_scale(size: tuple[int, int]) -> int:
    """How many times to enlarge small frames (width, height) so that players show them well: 192x128 by 3."""
    return max(1, min(4, 384 // size[1]))


def frames_to_uint8(frames: Array) -> np.ndarray:
    """`... c h w` floats in [-1, 1] -> `... h w c` uint8, rounded and clipped."""
    if hasattr(frames, "detach"):
        frames = frames.detach().float()  # NumPy knows no bfloat16
    levels = np.rint((np.clip(_to_numpy(frames), -1, 1) + 1) * 127.5).astype(np.uint8)
    return np.moveaxis(levels, -3, -1)


def _to_numpy(frames: Array) -> np.ndarray:
    return np.asarray(frames.cpu() if hasattr(frames, "cpu") else frames)  # a tensor may be on a GPU


class VideoWriter:
    """Writes shots to an .mp4, .webm or .gif file, with a chapter per shot (GIF has none).

    A thread of its own encodes them while the next ones are made; what fails there is raised by the next call.

    path: the final name, replaced only when the new file is whole.
    fps: frames per second. size: width and height of the frames given.
    scale: enlarge by this factor (Lanczos). title, comment: metadata (GIF has none). chapters: False leaves them out.
    Raises VideoError.
    """

    def __init__(
        self,
        path: str | Path,
        fps: int,
        size: tuple[int, int],
        scale: int = 1,
        title: str = "",
        comment: str = "",
        chapters: bool = True,
    ) -> None:
        check_output(path)
        self.path = Path(path)
        self.size = size
        self.frames = 0  # of finished shots
        self.shots = 0  # finished
        self._format = _FORMATS[self.path.suffix.lower()]
        self._rate = Fraction(fps)
        self._width, self._height = size[0] * scale, size[1] * scale
        if self._format.pixels == "yuv420p" and (self._width % 2 or self._height % 2):
            sides = f"{self._width}x{self._height}"
            raise VideoError(f"{path}: cannot hold {sides}, sides must be even; use an even scale, or .gif")
        self._with_chapters = chapters and self._format.chapters
        self._title: str | None = None  # of the shot under way
        self._next = 0  # number of the next frame
        self._packets: list[Packet] = []  # of the shot under way
        self._chapters: list[av.container.core.Chapter] = []
        self._closed = False
        self._bytes = 4 * len(title + comment)  # of the whole file, all but the index
        self._temporary = _unfinished(self.path)
        self._encoder = ThreadPoolExecutor(1, "encoder")
        self._job: Future[None] | None = None  # the frames being encoded
        self._open(title, comment)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        try:
            self.abort()
            error.add_note(self._kept())
        except VideoError as failure:
            error.add_note(f"nothing could be kept: {failure}")

    def begin_shot(self, title: str) -> None:
        """Start a shot (and its chapter); ends the one before it."""
        self.end_shot()
        self._title = title

    def write(self, frames: Array) -> None:
        """Append frames, uint8 `f h w 3`, to the shot under way. They must not change any more."""
        if self._title is None:
            raise ValueError("write() before begin_shot()")
        frames = _to_numpy(frames)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self.size[::-1], 3):
            wanted = f"uint8 (f, {self.size[1]}, {self.size[0]}, 3)"
            raise ValueError(f"frames are {frames.dtype} {frames.shape}, not {wanted}")
        self._wait()  # for the frames before: memory stays bounded, and errors come soon
        self._job = self._encoder.submit(self._encode, frames)

    def end_shot(self) -> None:
        """The shot under way is finished: from now on it is kept, whatever happens."""
        if self._title is None:
            return
        self._wait()
        title, start, self._title = self._title, self.frames, None
        if self._next == start:
            return
        with _explained(self.path):
            self._bytes += sum(packet.size for packet in self._packets)
            self._check_room()
            self._container.mux(self._packets)
        self._packets = []
        self.shots += 1
        self.frames = self._next
        self._chapters.append(
            {
                "id": self.shots,
                "start": start,
                "end": self.frames,
                "time_base": 1 / self._rate,
                "metadata": {"title": title},
            }
        )

    def close(self) -> None:
        """End the last shot and give the file its name. Nothing written, no file. Closing twice is fine."""
        self.end_shot()
        self._finish()

    def abort(self) -> None:
        """Drop the shot under way; the finished ones become the file. Without any (`shots` is 0), no file."""
        with suppress(VideoError):  # whatever its frames came to, the shot is dropped
            self._wait()
        self._title, self._packets = None, []
        self._finish()

    # Inside

    def _encode(self, frames: np.ndarray) -> None:
        with _explained(self.path):
            for frame in frames:
                self._packets += self._stream.encode(self._picture(frame))
                self._next += 1

    def _wait(self) -> None:
        job, self._job = self._job, None
        if job:
            job.result()

    def _open(self, title: str, comment: str) -> None:
        kind = self._format
        with _explained(self.path):
            self._container = av.open(_url(self._temporary), "w", format=kind.container, options=kind.container_options)
            self._container.metadata.update({k: v for k, v in (("title", title), ("comment", comment)) if v})
            stream = self._container.add_stream(kind.codec, rate=self._rate, options=kind.codec_options)
        assert isinstance(stream, av.VideoStream)
        self._stream, codec = stream, stream.codec_context
        codec.width, codec.height, codec.pix_fmt = self._width, self._height, kind.pixels
        codec.time_base = 1 / self._rate
        codec.thread_count = 1  # the same bytes on every machine
        if kind.pixels == "yuv420p":
            codec.color_range = ColorRange.MPEG
            codec.colorspace = codec.color_primaries = codec.color_trc = _BT709

    def _picture(self, frame: np.ndarray) -> av.VideoFrame:
        """One RGB frame, enlarged, in the encoder's pixels and colours; a shot's first is a key frame."""
        rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        if self._format.pixels == "pal8":
            picture = _paletted(rgb.reformat(self._width, self._height, interpolation=Interpolation.LANCZOS))
        else:
            picture = rgb.reformat(
                self._width,
                self._height,
                self._format.pixels,
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=Interpolation.LANCZOS,
            )
        picture.pts, picture.time_base = self._next, 1 / self._rate
        if self._next == self.frames:
            picture.pict_type = PictureType.I
        return picture

    def _check_room(self) -> None:
        """Refuse a shot while there is still room to end the file: after a failed write FFmpeg can save nothing."""
        size = 64 * (1024 + self._next) + self._bytes  # some bytes per frame for the index, and a reserve
        written = self._temporary.stat().st_size if self._temporary.exists() else 0  # WebM waits for seconds
        if size > written + shutil.disk_usage(self.path.parent).free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _kept(self) -> str:
        """What a video that ended early holds, for people."""
        if not self.shots:
            return "no shot was finished, so nothing was written"
        shots = "the finished shot is" if self.shots == 1 else f"the {self.shots} finished shots are"
        return f"{shots} in {self.path} ({self.frames} frames)"

    def _finish(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._encoder.shutdown()
        try:
            with _explained(self.path):
                if self.shots:
                    self._stream.encode(None)  # nothing is left in the encoder; this only ends it
                    if self._with_chapters:
                        self._container.set_chapters(self._chapters)
                self._container.close()
                if self.shots:
                    self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


_BT709 = 1  # the number of BT.709 for matrix, primaries and transfer alike


def _paletted(rgb: av.VideoFrame) -> av.VideoFrame:
    """256 colours chosen for this frame, without dithering, which flickers and compresses badly."""
    image = Image.fromarray(rgb.to_ndarray(format="rgb24")).quantize(256, dither=Image.Dither.NONE)
    palette = np.zeros((256, 4), np.uint8)  # alpha, red, green, blue
    palette[:, 0] = 255
    colours = np.asarray(image.getpalette(), np.uint8).reshape(-1, 3)
    palette[: len(colours), 1:] = colours
    return av.VideoFrame.from_ndarray((np.asarray(image), palette), format="pal8")  # type: ignore[arg-type]


_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what FFmpeg and the file system say into one line."""
    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or str(error)
        remedy = "free some space or choose another disk" if error.errno in _NO_SPACE else "check the path"
        raise VideoError(f"{path}: {reason}; {remedy}") from error


def _unfinished(path: Path) -> Path:
    """The name of a file until it is whole."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _url(path: str | Path) -> str:
    return f"file:{path}"  # or FFmpeg would take "take 1: forest.mp4" for a protocol


def read_video(path: str | Path) -> Iterator[np.ndarray]:
    """The frames of a video, one after the other: RGB uint8 `h w 3`. Raises VideoError."""
    with _explained(Path(path)), av.open(_url(path)) as container:
        for frame in container.decode(video=0):
            yield frame.to_ndarray(format="rgb24")


def read_chapters(path: str | Path) -> list[Chapter]:
    """The chapters of a video, in order. Raises VideoError."""
    with _explained(Path(path)), av.open(_url(path)) as container:
        return [_chapter(chapter) for chapter in container.chapters()]


def _chapter(raw: av.container.core.Chapter) -> Chapter:
    unit = raw["time_base"] or Fraction(1, av.time_base)
    return Chapter(raw["metadata"].get("title", ""), float(raw["start"] * unit), float(raw["end"] * unit))


# Contact sheets

_MARGIN, _GAP, _LINE = 24, 8, 24  # pixels
_PAPER, _INK = (252, 250, 246), (38, 38, 44)


@dataclass
class _Row:
    caption: str
    wanted: list[int]  # frame numbers
    seen: int = 0
    pictures: list[Image.Image] = field(default_factory=list)


class ContactSheet:
    """A page with a row per shot: its caption and evenly spaced frames. Keeps only the pictures it will show.

    columns: pictures per shot. width: of a picture, in pixels.
    """

    def __init__(self, title: str = "", columns: int = 5, width: int = 240) -> None:
        self.title = title
        self.columns = columns
        self.width = width
        self._rows: list[_Row] = []

    def begin_shot(self, caption: str, frames: int) -> None:
        """Start a row for a shot that will have `frames` frames; the first and the last will be shown."""
        picks = np.linspace(0, frames - 1, min(self.columns, frames)).round().astype(int)
        self._rows.append(_Row(caption, picks.tolist()))

    def write(self, frames: Array) -> None:
        """The next frames of the shot, uint8 `f h w 3`."""
        row = self._rows[-1]
        for number in row.wanted:
            if row.seen <= number < row.seen + len(frames):
                row.pictures.append(self._picture(frames[number - row.seen]))
        row.seen += len(frames)

    def image(self) -> Image.Image:
        """The sheet so far. Raises ValueError if no frame was written."""
        rows = [row for row in self._rows if row.pictures]
        if not rows:
            raise ValueError("a contact sheet without frames")
        height = rows[0].pictures[0].height
        page_width = 2 * _MARGIN + self.columns * (self.width + _GAP) - _GAP
        texts = [_wrap(f"{i}. {row.caption}", page_width - 2 * _MARGIN) for i, row in enumerate(rows, 1)]
        top = _MARGIN + (48 if self.title else 0)
        page_height = top + sum(_LINE * len(lines) + height + _MARGIN for lines in texts)
        page = Image.new("RGB", (page_width, page_height), _PAPER)
        draw = ImageDraw.Draw(page)
        title = _wrap(self.title, page_width - 2 * _MARGIN, limit=1, size=28)[0]
        draw.text((_MARGIN, _MARGIN - 4), title, _INK, _font(28))
        for row, lines in zip(rows, texts, strict=True):
            for line in lines:
                draw.text((_MARGIN, top - 4), line, _INK, _font(17))
                top += _LINE
            for column, picture in enumerate(row.pictures):
                page.paste(picture, (_MARGIN + column * (self.width + _GAP), top))
            top += height + _MARGIN
        return page

    def save(self, path: str | Path) -> None:
        """Write the sheet as .png, .jpg or .webp; the name appears when it is whole. Raises VideoError."""
        check_output(path, SHEET_KINDS)
        path = Path(path)
        temporary = _unfinished(path)
        try:
            with _explained(path):
                self.image().save(temporary, format=Image.registered_extensions()[path.suffix.lower()])
                temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _picture(self, frame: Array) -> Image.Image:
        image = Image.fromarray(_to_numpy(frame))
        height = round(image.height * self.width / image.width)
        return image.resize((self.width, height), Image.Resampling.LANCZOS)


def contact_sheet(shots: Sequence[Array], captions: Sequence[str], columns: int = 5, title: str = "") -> Image.Image:
    """A contact sheet of whole shots, each uint8 `f h w 3`."""
    sheet = ContactSheet(title, columns)
    for frames, caption in zip(shots, captions, strict=True):
        sheet.begin_shot(caption, len(frames))
        sheet.write(frames)
    return sheet.image()


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _wrap(text: str, width: int, limit: int = 3, size: int = 17) -> list[str]:
    """Lines of at most `width` pixels; what does not fit into `limit` lines ends in an ellipsis."""
    font = _font(size)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > limit:
        while font.getlength(lines[limit - 1] + " ...") > width:
            lines[limit - 1] = lines[limit - 1][:-1]
        lines = [*lines[: limit - 1], lines[limit - 1] + " ..."]
    return lines
