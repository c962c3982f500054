"""One session while it is served: its project, its recorder, its viewers, and whoever listens to its events.

Everything here happens on the event loop. What takes time happens elsewhere: making shots in the worker's process,
encoding and writing files in the recorder's thread.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shotstream.folder import Folder, ProjectError
from shotstream.project import CommandError, Project, Request, Take
from shotstream.server import worker
from shotstream.server.events import Event, Events
from shotstream.server.exports import Exports
from shotstream.server.limits import TokenBucket
from shotstream.server.media import Broadcast, Encoder, MotionJpeg, Viewer
from shotstream.server.protocol import AnyCommand, Steer
from shotstream.server.recorder import Recorder
from shotstream.server.refusals import Conflict, LimitReached, NotReady, Unknown

if TYPE_CHECKING:
    from shotstream.server.studio import Studio

TRIES = 2  # for a take whose worker died
CHUNK_SECONDS = 60.0  # a chunk under way is waited for, but no longer


class Live:
    """A session being served."""

    def __init__(self, studio: Studio, project: Project, folder: Folder) -> None:
        self.studio = studio
        self.project = project
        self.folder = folder
        self.touched = time.monotonic()
        self.events = Events(studio.limits.events_kept, self._whole)
        self.exports = Exports(self)
        self._told = project.document()
        self._told_at = self._telling = 0.0  # when it was told, and how long that took
        self._bucket = TokenBucket(studio.limits.commands_per_second, studio.limits.command_burst)
        self._crashes: Counter[str] = Counter()  # of the worker, by take
        self._jobs = 0
        self._job: str | None = None  # of the running take
        self._ordered: type[worker.Pause | worker.Resume | worker.Stop] | None = None  # told last of it
        self._begun = 0.0  # when it began; 0 once its first fragment is out
        self._quiet = asyncio.Event()  # nothing is being made
        self._quiet.set()
        self._closing = False
        self._replays: dict[str, tuple[str, asyncio.Future[str | None]]] = {}  # by take: job, and what is wrong
        encoder = self._encoder(studio.codec)
        self.broadcasts = {studio.codec: Broadcast(encoder, self.fps)}
        self.recorder = Recorder(self, encoder)
        self.recorder.start()

    @property
    def id(self) -> str:
        return self.project.id

    @property
    def fps(self) -> int:
        return self.project.base.fps or self.project.model.config.fps

    @property
    def idle(self) -> bool:
        """Whether nobody would notice if it were put away."""
        watched = self.events.listened or any(b.viewers for b in self.broadcasts.values())
        return not watched and not self.busy and not self.exports.busy

    @property
    def busy(self) -> bool:
        return self.project.running is not None or self.project.next_shot() is not None

    def document(self) -> dict[str, Any]:
        """The whole document."""
        self.touched = time.monotonic()
        return self.project.document()

    # Commands

    async def command(self, command: AnyCommand) -> dict[str, Any]:
        """Carry out a command; it is on the disk when this returns. What it asks for may happen later.

        Raises CommandError, Conflict or LimitReached if nothing was changed; ProjectError if it could not be written.
        """
        self.touched = time.monotonic()
        if not self._bucket.take():
            rate = self.studio.limits.commands_per_second
            raise LimitReached("commands_per_second", rate, "wait a moment")
        if command.if_revision not in (None, self.project.revision):
            raise Conflict(self.project.revision)
        self._check_limits(command.op)
        words = command.model_dump(exclude={"op", "if_revision"}, exclude_none=True)
        if isinstance(command, Steer):
            self._steer(command.caption)
        else:
            getattr(self.project, command.op)(**words)  # `op` is one of a fixed set: see protocol.py
        answer = {"revision": self.project.revision, "command": f"c{self.project.revision}"}
        saved = self.save()
        self.advance()
        await asyncio.wrap_future(saved)
        return answer

    def _check_limits(self, op: str) -> None:
        limits = self.studio.limits
        if op not in ("cut", "redo", "regenerate", "edit"):
            return
        waiting = sum(place.take is None for place in self.project.places)
        if op == "cut" and waiting >= limits.queued_shots:
            raise LimitReached("queued_shots", limits.queued_shots, "wait until some are made")
        if self.recorder.kept_bytes >= limits.project_bytes:
            raise LimitReached("project_bytes", limits.project_bytes, "export it, and start a new project")

    def _steer(self, caption: str) -> None:
        if not self.studio.experimental:
            raise CommandError("op", "steer is experimental; start the server with --experimental to try it")
        prompt = self.project.steered(caption)
        assert self._job
        self.studio.pool.order(worker.Steer(self._job, prompt))

    def advance(self) -> None:
        """Bring the worker into line with the project, and everybody up to date."""
        project = self.project
        if project.running is None:
            request = project.next_shot() if self.studio.pool.ready and not self._closing else None
            if request:
                self._begin(request)
        elif not project.wanted(project.running.request.take):
            self._order(worker.Stop)
        elif not project.playing:
            self._order(worker.Pause)
        elif self._ordered is worker.Pause:
            self._order(worker.Resume)
        self.tell()

    def _begin(self, request: Request) -> None:
        self._jobs += 1
        self._job, self._ordered, self._begun = f"{self.id}/{self._jobs}", None, time.monotonic()
        self._quiet.clear()
        self.recorder.begin(request)
        self.studio.pool.make(self, worker.Make(self._job, request, self.folder.path))
        self._publish(self.project.started(request))

    def _order(self, order: type[worker.Pause | worker.Resume | worker.Stop]) -> None:
        if self._job and order is not self._ordered and self._ordered is not worker.Stop:
            self._ordered = order
            self.studio.pool.order(order(self._job))

    def save(self) -> Future[None]:
        """Let the recorder write the project as it is now."""
        return self.recorder.save(self.project)

    # News of the running take, from the recorder: everything before it is encoded and kept

    def on_fragment(self, broadcast: Broadcast, data: bytes) -> None:
        metrics = self.studio.metrics
        metrics.viewer_drops.inc(broadcast.send(data))
        metrics.fragment_bytes.inc(len(data))
        if self._begun:
            metrics.first_frame.observe(time.monotonic() - self._begun)
            self._begun = 0.0

    def on_chunk(self, made: worker.Made, encode: float) -> None:
        metrics, seconds, frames = self.studio.metrics, made.denoise + made.decode + encode, len(made.frames)
        metrics.chunk.observe(made.denoise)
        metrics.decode.observe(made.decode)
        metrics.encode.observe(encode)
        metrics.frames.inc(frames)
        metrics.device_memory.set(made.memory_bytes)
        left = sum(shot["chunks"] for shot in self._told["shots"] if shot["take"] is None)
        events = self.project.chunk(
            made.index,
            frames,
            compute_ms=_ms(made.denoise),
            decode_ms=_ms(made.decode),
            encode_ms=_ms(encode),
            fps=round(frames / seconds, 1),
            queue_s=round(left * self.project.chunk_seconds, 2),
        )
        for event in events:
            if event["type"] == "applied":
                metrics.prompt_to_frame.observe(event["prompt_to_frame_ms"] / 1000)
        self._publish(events)
        if time.monotonic() - self._told_at > 10 * self._telling:  # of a long story, not with every chunk
            self.tell()

    def on_whole(self, take: Take) -> None:
        self._ended("done", self.project.finished(take))

    def on_stopped(self, take: Take | None) -> None:
        self._ended("stopped", self.project.stopped(take))

    def on_failed(self, news: worker.Failed) -> None:
        self._ended("failed", self.project.failed(f"{news.message}; {news.remedy}"))
        self.error(news.code, news.message, news.remedy)

    def on_gone(self, news: worker.Gone) -> None:
        """The worker died while it made our take: once more, and then no more."""
        assert self.project.running
        take = self.project.running.request.take
        self._crashes[take] += 1
        if self._crashes[take] < TRIES:
            self._ended("lost", self.project.stopped())
        else:
            del self._crashes[take]
            message = f"the worker ended with code {news.code} each time this shot was made"
            self._ended("failed", self.project.failed(f"{message}; see the server's log, or change the shot"))

    def on_unwritable(self, error: ProjectError) -> None:
        """The folder cannot be written: nothing more is made until somebody says `play`."""
        if self._job:
            self._order(worker.Stop)
            self._ended("failed", self.project.failed(str(error)), save=False)
        self.project.playing = False
        reason, _, remedy = str(error).rpartition("; ")
        self.error("disk", reason, f"{remedy}; then play")
        self.tell()

    def on_recorder_end(self) -> None:
        """Its thread ended, and not because it was told to: a defect of ours."""
        self.project.trouble = "recording failed; see the server's log and start it again"
        self.error("internal", self.project.trouble, "everything finished is kept")
        self.tell()

    def _ended(self, outcome: str, events: list[Event], save: bool = True) -> None:
        """The running take has ended, in whatever way."""
        self.studio.pool.forget(self._job or "")
        self._job = None
        self._quiet.set()
        self.studio.metrics.shots.labels(outcome).inc()
        self._publish(events)
        if save:
            self.save()
        self.advance()

    def on_readiness(self) -> None:
        """A worker is ready, or none is any more."""
        pool, was = self.studio.pool, self.project.loading
        self.project.trouble = pool.trouble
        self.project.loading = not pool.ready and not pool.trouble
        if was != self.project.loading:
            self.publish(type="stalled" if self.project.loading else "resumed")
        self.advance()

    # Telling

    def error(self, code: str, message: str, remedy: str) -> None:
        self._publish([{"type": "error", "code": code, "message": message, "remedy": remedy}])

    def publish(self, **event: Any) -> None:
        self._publish([event])

    def tell(self) -> None:
        """Publish what has changed in the document; of the takes, the new ones."""
        began = time.monotonic()
        now = self.project.document()
        changed = {key: value for key, value in now.items() if value != self._told[key]}
        if "takes" in changed:
            old = self._told["takes"]
            changed["takes"] = {id: take for id, take in now["takes"].items() if old.get(id) != take}
        self._told = now
        if changed:
            self._publish([{"type": "document", **changed}])
        self._told_at = time.monotonic()
        self._telling = self._told_at - began

    def _publish(self, events: list[Event]) -> None:
        for event in events:
            self.events.publish({"rev": self.project.revision, **event})

    def _whole(self) -> Event:
        return {"rev": self.project.revision, "type": "document", **self.project.document()}

    # Pictures and files

    def broadcast(self, codec: str) -> Broadcast:
        """The broadcast of this codec, begun if need be. Raises LimitReached if there are too many viewers."""
        limit = self.studio.limits.viewers
        if sum(len(b.viewers) for b in self.broadcasts.values()) >= limit:
            raise LimitReached("viewers", limit, "close another window of this session")
        if codec not in self.broadcasts:
            size = (self.project.model.config.width, self.project.model.config.height)
            source = MotionJpeg(size, self.studio.scale(size)) if codec == "mjpeg" else self._encoder(codec)
            self.broadcasts[codec] = Broadcast(source, self.fps)
        return self.broadcasts[codec]

    def join(self, broadcast: Broadcast) -> Viewer:
        self.touched = time.monotonic()
        self.studio.metrics.viewers.inc()
        return broadcast.join(self.studio.limits.viewer_queue_bytes)

    def leave(self, broadcast: Broadcast, viewer: Viewer) -> None:
        self.studio.metrics.viewers.dec()
        broadcast.leave(viewer)
        if not broadcast.viewers and broadcast.source is not self.recorder.encoder:
            self.broadcasts = {codec: other for codec, other in self.broadcasts.items() if other is not broadcast}

    async def video(self, take: str) -> Path:
        """The file of a take; written first if it was made where no server ran. Raises Unknown or NotReady."""
        path = self._known(take) / "video.mp4"
        if not path.is_file():
            await self._replayed(take)
        return path

    async def thumb(self, take: str) -> Path:
        """A small picture of a take."""
        return (await self.video(take)).with_name("thumb.jpg")

    def _known(self, take: str) -> Path:
        if take not in self.project.takes:
            raise Unknown(f"there is no take {take[:64]!r}")
        return self.folder.take(take)

    async def _replayed(self, take: str) -> None:
        """Have the video of a take written; whoever else asks for it waits for the same."""
        if not self.studio.pool.ready:
            raise NotReady("the model is not ready; try again soon")
        if take not in self._replays:
            self._jobs += 1
            job = f"{self.id}/{self._jobs}"
            self._replays[take] = job, asyncio.get_running_loop().create_future()
            self.recorder.replay(job, take, self._encoder(self.studio.codec))
            self.studio.pool.make(self, worker.Replay(job, take, self.folder.path))
        done, _ = await asyncio.wait({self._replays[take][1]}, timeout=self.studio.limits.wait_seconds)
        if not done:
            raise NotReady(f"take {take} is still being decoded; try again soon")
        if trouble := done.pop().result():
            raise Unknown(f"take {take} cannot be shown: {trouble}")

    def on_replayed(self, take: str, trouble: str | None) -> None:
        """Its video is there now, or cannot be."""
        self.studio.pool.forget(self._replays[take][0])
        self._replays.pop(take)[1].set_result(trouble)

    def _encoder(self, codec: str) -> Encoder:
        size = (self.project.model.config.width, self.project.model.config.height)
        return Encoder(codec, size, self.fps, self.studio.scale(size))

    # Ending

    async def close(self) -> None:
        """Cut the running shot off, keeping what there is of it; write everything, and say goodbye."""
        self._closing = True
        if self._job:
            self._order(worker.Stop)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._quiet.wait(), CHUNK_SECONDS)
        self.save()
        await asyncio.to_thread(self.recorder.close)
        for take in [*self._replays]:
            self.on_replayed(take, "the session was closed")
        await self.exports.close()
        self.events.close()
        for broadcast in self.broadcasts.values():
            broadcast.close()
        self.folder.close()


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 1)
