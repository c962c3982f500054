"""Exports: files made of the takes that the head shows, one after the other, in the background."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from shotstream.project import CommandError, Take
from shotstream.server.protocol import Export
from shotstream.server.refusals import LimitReached, NotReady, Unknown
from shotstream.story import StoryError
from shotstream.video import ContactSheet, VideoError, VideoWriter, read_video

if TYPE_CHECKING:
    from shotstream.server.live import Live

KEPT = 8  # finished exports of a session
OnFrame = Callable[[int], None]
"""Told how many frames are done."""


@dataclass(frozen=True)
class Part:
    """A shot of an export: its number, its words and its take's file."""

    number: int
    caption: str
    take: Take
    video: Path

    @property
    def title(self) -> str:
        return " ".join(f"{self.number}. {self.caption}".split())[:120]


@dataclass(frozen=True)
class Film:
    """What an export is made of."""

    title: str
    fps: int
    parts: tuple[Part, ...]
    story: str  # as YAML
    folder: Path

    @property
    def recipe(self) -> str:
        """Everything needed to make it again, as JSON for the file's metadata."""
        keys = ("shot", "global_caption", "caption", "seed", "chunks")
        takes = [part.take for part in self.parts]
        made = {
            "shotstream": version("shotstream"),
            "model": takes[0].model,
            "revision": takes[0].revision,
            "shots": [{key: getattr(take, key) for key in keys} | {"take": take.id} for take in takes],
        }
        return json.dumps(made, ensure_ascii=False)


class Exports:
    """The exports of one session: one at a time, in a thread; told of by `progress` events."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, f"exports of {live.id}")  # its own: pictures must not wait for films
        self._tasks: set[asyncio.Task[None]] = set()
        self._files: dict[str, tuple[Path, str]] = {}  # by job: the file, and what to call it
        self._ended = False

    @property
    def busy(self) -> bool:
        return bool(self._tasks)

    def start(self, wish: Export) -> str:
        """Begin an export; returns its job. Raises CommandError or LimitReached."""
        limit = self._live.studio.limits.exports_queued
        if len(self._tasks) >= limit:
            raise LimitReached("exports_queued", limit, "wait until one is done")
        places, job = self._chosen(wish), secrets.token_hex(8)
        task = asyncio.create_task(self._run(job, wish, places))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return job

    def file(self, job: str) -> tuple[Path, str]:
        """The file of a finished export, and a name for it. Raises Unknown."""
        if job not in self._files:
            raise Unknown(f"export {job} is not there; it may not be done, or too old")
        return self._files[job]

    async def close(self) -> None:
        """End at the next frame what is being written, and drop the files."""
        self._ended = True
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._thread.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return self._live.folder.path / "exports"

    def _chosen(self, wish: Export) -> list[tuple[int, str, Take]]:
        """Number, caption and take of the made shots that are wished for. Raises CommandError if there is none."""
        project = self._live.project
        count = len(project.places)
        if not count:
            raise CommandError("format", "there is nothing to export yet; cut a shot")
        first, last = wish.range or (1, count)
        if not 1 <= first <= last <= count:
            raise CommandError("range", f"must lie between 1 and {count}, first to last")
        places = [
            (number, place.shot.caption, project.takes[place.take])
            for number, place in enumerate(project.places, 1)
            if place.take and first <= number <= last
        ]
        if not places and wish.format not in ("yaml", "zip"):
            raise CommandError("range", "no shot there is made yet; wait until one is done")
        return places

    async def _film(self, places: list[tuple[int, str, Take]]) -> Film:
        live = self._live
        parts = [Part(number, caption, take, await live.video(take.id)) for number, caption, take in places]
        story = live.project.story()
        return Film(story.title, live.fps, tuple(parts), story.dump(), live.folder.path)

    async def _run(self, job: str, wish: Export, places: list[tuple[int, str, Take]]) -> None:
        loop, path = asyncio.get_running_loop(), self._folder / f"{job}.{wish.format}"
        began, told, frames = time.monotonic(), 0.0, sum(take.frames for _, _, take in places)

        def on_frame(done: int) -> None:
            nonlocal told
            if self._ended:
                raise VideoError("the session was closed")
            if time.monotonic() - told > 0.25:
                told = time.monotonic()
                share = done / frames
                left = round((told - began) * (1 - share) / share, 1) if share else None
                loop.call_soon_threadsafe(lambda: self._tell(job, "exporting", share, left))

        self._tell(job, "waiting", 0.0, None)
        async with self._turn:
            try:
                film = await self._film(places)
                await loop.run_in_executor(self._thread, _write, path, wish, film, on_frame)
            except (VideoError, StoryError, Unknown, NotReady, OSError) as error:
                self._tell(job, "failed", 1.0, None, message=str(error))
                return
        self._files[job] = path, f"{self._live.id}.{wish.format}"
        while len(self._files) > KEPT:
            old, _ = self._files.pop(next(iter(self._files)))
            old.unlink(missing_ok=True)
        self._tell(job, "done", 1.0, 0.0)

    def _tell(self, job: str, phase: str, progress: float, eta_s: float | None, **more: Any) -> None:
        self._live.publish(type="progress", job=job, phase=phase, progress=round(progress, 3), eta_s=eta_s, **more)


def _write(path: Path, wish: Export, film: Film, on_frame: OnFrame) -> None:
    path.parent.mkdir(exist_ok=True)
    match wish.format:
        case "yaml":
            path.write_text(film.story, encoding="utf-8")
        case "zip":
            _zip(path, film.folder)
        case "png":
            _sheet(path, film, on_frame)
        case "mp4" if _alike(film):
            _join(path, film, wish.chapters, on_frame)
        case _:
            _encode(path, film, wish.chapters, on_frame)


def _frames(film: Film, on_frame: OnFrame) -> Iterator[tuple[Part, int, Any]]:
    """Every frame of the film, with its part and its number in that."""
    done = 0
    for part in film.parts:
        for number, frame in enumerate(read_video(part.video)):
            yield part, number, frame
            done += 1
            on_frame(done)


def _sheet(path: Path, film: Film, on_frame: OnFrame) -> None:
    sheet = ContactSheet(film.title)
    for part, number, frame in _frames(film, on_frame):
        if not number:
            sheet.begin_shot(part.caption, part.take.frames)
        sheet.write(frame[None])
    sheet.save(path)


def _encode(path: Path, film: Film, chapters: bool, on_frame: OnFrame) -> None:
    frames = _frames(film, on_frame)
    first = next(frames)
    height, width = first[2].shape[:2]
    with VideoWriter(
        path, film.fps, (width, height), title=film.title, comment=film.recipe, chapters=chapters
    ) as video:
        for part, number, frame in chain([first], frames):
            if not number:
                video.begin_shot(part.title)
            video.write(frame[None])


def _alike(film: Film) -> bool:
    """Whether the takes can follow each other in one file as they are: the same codec, told the same way."""
    found = set()
    for part in film.parts:
        with av.open(str(part.video)) as container:
            codec = container.streams.video[0].codec_context
            found.add((codec.name, codec.width, codec.height, bytes(codec.extradata or b"")))
    return len(found) == 1


def _join(path: Path, film: Film, chapters: bool, on_frame: OnFrame) -> None:
    """The takes one after the other as they were seen, not encoded again; each begins with a key frame."""
    temporary, unit, start = path.with_suffix(".part"), Fraction(1, film.fps), 0
    marks: list[Any] = []
    with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as output:
        output.metadata.update({"title": film.title, "comment": film.recipe})
        stream = None
        for part in film.parts:
            with av.open(str(part.video)) as container:
                source = container.streams.video[0]
                stream = stream or output.add_stream_from_template(source)
                count = 0
                for packet in container.demux(source):
                    if packet.size == 0:
                        continue
                    packet.stream, packet.time_base = stream, unit
                    packet.pts = packet.dts = start + count
                    packet.duration = 1
                    output.mux(packet)
                    count += 1
                    on_frame(start + count)
            marks.append(
                {
                    "id": part.number,
                    "start": start,
                    "end": start + count,
                    "time_base": unit,
                    "metadata": {"title": part.title},
                }
            )
            start += count
        if chapters:
            output.set_chapters(marks)
    temporary.replace(path)


def _zip(path: Path, folder: Path) -> None:
    """The whole project, to be unpacked elsewhere and opened there. Its files are compressed already."""
    temporary = path.with_suffix(".part")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for file in _files(folder):
            archive.write(file, Path(folder.name) / file.relative_to(folder))
    temporary.replace(path)


def _files(folder: Path) -> Iterable[Path]:
    kept = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return (path for path in kept if path.name != "lock" and "exports" not in path.relative_to(folder).parts)
