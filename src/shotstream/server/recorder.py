"""A session's own thread: it encodes chunks for viewers as they come, and writes what must be kept.

What arrives is handled in order, so whoever is told that a take is whole can already read its files.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from shotstream.folder import ProjectError, write
from shotstream.project import Project, Request, Take
from shotstream.server import worker
from shotstream.server.fmp4 import Sample, Track, movie
from shotstream.server.media import Broadcast, Encoder, jpeg

if TYPE_CHECKING:
    from shotstream.server.live import Live

ROOM = 8  # chunks that may wait; then the worker's news do
THUMB = 320  # pixels wide


@dataclass
class Recording:
    """The take that arrives."""

    request: Request
    start: int  # its first frame on the timeline of the media
    groups: list[tuple[Sample, ...]] = field(default_factory=list)
    encode: float = 0.0  # seconds
    thumb: bytes = b""
    shown: list[Broadcast] = field(default_factory=list)  # whose viewers know that it has begun


@dataclass
class Replayed:
    """A take whose video is written now, long after it was made."""

    take: str
    encoder: Encoder  # its own: the stream of the viewers goes on
    groups: list[tuple[Sample, ...]] = field(default_factory=list)
    thumb: bytes = b""


class Recorder(threading.Thread):
    """Encodes and keeps the takes of one session; `live` is told on its event loop."""

    def __init__(self, live: Live, encoder: Encoder) -> None:
        super().__init__(name=f"recorder of {live.id}", daemon=True)
        self._live = live
        self._loop = asyncio.get_running_loop()
        self.encoder = encoder  # whose samples become the take's file
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(ROOM)
        self._frames = 0  # on the timeline of the media
        self._recording: Recording | None = None
        self._replays: dict[str, Replayed] = {}  # by job
        self._closed = False
        self.kept_bytes = 0  # in the project's folder

    def begin(self, request: Request) -> None:
        """From now on, chunks belong to this request."""
        self._queue.put(lambda: self._begin(request))

    def replay(self, job: str, take: str, encoder: Encoder) -> None:
        """From now on, chunks of this job become the video of `take`."""
        self._queue.put(lambda: self._replays.update({job: Replayed(take, encoder)}))

    def save(self, project: Project) -> Future[None]:
        """Write the project as it is now; the future is done when it is on the disk."""
        frozen = copy(project)
        frozen.restore(project.plan, *project.journal)
        saved: Future[None] = Future()
        self._queue.put(lambda: self._save(frozen, saved))
        return saved

    def take_in(self, news: worker.News) -> None:
        """News of the running take, from the thread that reads the worker's pipe. Waits while too much is waiting."""
        if isinstance(news, worker.Made):
            while self.is_alive() and not self._room.acquire(timeout=1):
                pass
        self._queue.put(lambda: self._handle(news))

    def close(self) -> None:
        """Finish what is waiting, and end."""
        self._queue.put(None)
        self.join()

    def run(self) -> None:
        self.kept_bytes = sum(file.stat().st_size for file in self._live.folder.path.rglob("*") if file.is_file())
        try:
            while (task := self._queue.get()) is not None:
                try:
                    task()
                except ProjectError as error:  # a full disk, say
                    self._end()
                    self._post(self._live.on_unwritable, error)
            self._closed = True
        finally:
            if not self._closed:
                self._post(self._live.on_recorder_end)

    # In the thread

    def _post(self, call: Callable[..., Any], *arguments: Any) -> None:
        self._loop.call_soon_threadsafe(lambda: call(*arguments))

    def _begin(self, request: Request) -> None:
        self._recording = Recording(request, self._frames)

    def _handle(self, news: worker.News) -> None:
        match news:
            case worker.Made():
                self._room.release()
                if replay := self._replays.get(news.job):
                    first = sum(map(len, replay.groups))
                    parts = replay.encoder.encode(news.frames, first, key=not first)
                    replay.groups += [part.samples for part in parts]
                    replay.thumb = replay.thumb or thumb(news.frames[0])
                elif self._recording:
                    self._encode(self._recording, news)
            case worker.Replayed():
                replay = self._replays.pop(news.job)
                self._write(replay.take, replay.encoder.track, replay.groups, replay.thumb)
                self._post(self._live.on_replayed, replay.take, None)
            case worker.Whole() | worker.Stopped():
                self._keep(news.take)
            case worker.Failed() if replay := self._replays.pop(news.job, None):
                self._post(self._live.on_replayed, replay.take, news.message)
            case worker.Failed():
                self._end()
                self._post(self._live.on_failed, news)
            case worker.Gone():
                for replay in self._replays.values():
                    self._post(self._live.on_replayed, replay.take, "the worker ended; try again soon")
                self._replays.clear()
                if self._end():
                    self._post(self._live.on_gone, news)

    def _encode(self, recording: Recording, made: worker.Made) -> None:
        begun = time.perf_counter()
        for broadcast in tuple(self._live.broadcasts.values()):
            if key := broadcast not in recording.shown:
                recording.shown.append(broadcast)
                request, t0 = recording.request, recording.start / broadcast.fps
                told = {"shot": request.shot, "take": request.take, "number": request.number + 1, "t0": t0}
                self._post(lambda b=broadcast, told=told: b.begin_shot(**told))
            for part in broadcast.source.encode(made.frames, self._frames, key):
                self._post(self._live.on_fragment, broadcast, part.data)
                if broadcast.source is self.encoder:
                    recording.groups.append(part.samples)
        encode = time.perf_counter() - begun
        recording.encode += encode
        self._frames += len(made.frames)
        recording.thumb = recording.thumb or thumb(made.frames[0])
        self._post(self._live.on_chunk, made, encode)

    def _end(self) -> Recording | None:
        """Tell viewers that no more of the take will come."""
        recording, self._recording = self._recording, None
        if recording:
            for broadcast in recording.shown:
                request, t1 = recording.request, self._frames / broadcast.fps
                told = {"shot": request.shot, "take": request.take, "t1": t1}
                self._post(lambda b=broadcast, told=told: b.end_shot(**told))
        return recording

    def _keep(self, take: Take | None) -> None:
        """The take is whole, or was cut off: write what there is of it, then tell."""
        recording = self._end()
        if recording is None:
            return
        if take:
            take = replace(take, timings={**take.timings, "encode": round(recording.encode, 4)})
            self._write(take.id, self.encoder.track, recording.groups, recording.thumb)
            self._live.folder.keep(take)
        if take is None or take.partial:
            self._post(self._live.on_stopped, take)
        else:
            self._post(self._live.on_whole, take)

    def _write(self, take: str, track: Track, groups: list[tuple[Sample, ...]], picture: bytes) -> None:
        path = self._live.folder.take(take)
        write(path / "video.mp4", movie(track, groups))
        write(path / "thumb.jpg", picture)
        self.kept_bytes += sum(file.stat().st_size for file in path.iterdir())

    def _save(self, project: Project, saved: Future[None]) -> None:
        try:
            self._live.folder.save(project)
        except ProjectError as error:
            saved.set_exception(error)
            raise
        saved.set_result(None)


def thumb(frame: np.ndarray) -> bytes:
    """A small JPEG of a frame, uint8 `h w 3`."""
    height, width = frame.shape[:2]
    return jpeg(frame, (THUMB, round(height * THUMB / width)))
