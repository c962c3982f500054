"""What runs in the worker's process: the loaded model, and the takes that are being made on it."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor

from shotstream.config import Fast
from shotstream.errors import is_out_of_memory
from shotstream.film import DeviceError, find_device
from shotstream.folder import ProjectError
from shotstream.pipeline import ModelError, Pipeline, load
from shotstream.project import Project, Request, Take
from shotstream.server.worker import (
    End,
    Failed,
    Made,
    Make,
    News,
    NoModel,
    Pause,
    Phase,
    Ready,
    Replay,
    Replayed,
    Resume,
    Steer,
    Stop,
    Stopped,
    Whole,
)
from shotstream.take import Chunk, FolderShelf, Maker, MemoryShelf, model_of, to_uint8

MAKERS = 32  # projects whose texts are remembered


def prepared(
    connection: Connection, model: str, device: str, threads: int | None, policy: str | None, fast: Fast
) -> Desk | None:
    """Load the model and warm it up, saying how far that is; None if that cannot be done, after saying why."""
    began = time.monotonic()
    connection.send(Phase("loading the model", 0.4))
    if threads:
        torch.set_num_threads(threads)
    try:
        device = find_device(device)
        pipeline = load(model, device, fast=fast)
    except (ModelError, DeviceError) as error:
        connection.send(NoModel(str(error)))
        return None
    connection.send(Phase("warming up", 0.7))
    trial = Project(model_of(pipeline), policy=policy)
    trial.cut("a story")
    request = trial.next_shot()
    assert request
    for _ in Maker(pipeline, policy).make(request, MemoryShelf()):
        pass
    connection.send(Ready(trial.model, device, time.monotonic() - began))
    return Desk(connection, pipeline, device, policy)


@dataclass
class Job:
    """A take under way."""

    request: Request
    folder: Path  # of the project
    shelf: FolderShelf
    chunks: Generator[Chunk, str | None, None]
    latents: list[Tensor] = field(default_factory=list)  # f c h w of each chunk
    stills: Mapping[int, Tensor] = field(default_factory=dict)
    frames: int = 0
    seconds: Counter[str] = field(default_factory=Counter)
    steered: list[tuple[int, str]] = field(default_factory=list)  # (chunk, prompt)
    prompt: str = ""  # to steer by, from the next chunk
    waits: bool = False  # paused

    @property
    def whole(self) -> bool:
        return len(self.latents) == self.request.chunks

    def step(self) -> Chunk:
        """Make the next chunk."""
        if self.prompt and self.latents:
            self.steered.append((len(self.latents), self.prompt))
            chunk = self.chunks.send(self.prompt)
            self.prompt = ""
        else:
            chunk = next(self.chunks)
        self.latents.append(chunk.latents)
        self.stills = chunk.stills
        self.frames += len(chunk.frames)
        self.seconds.update(chunk.timings)
        return chunk

    def keep(self, device: str) -> Take | None:
        """Write the latents of what was made, and say what it is; None if nothing was."""
        self.chunks.close()
        if not self.latents:
            return None
        take = self._taken(device)
        self.shelf.keep(take.id, torch.cat(self.latents), self.stills)
        return take

    def hold(self, device: str) -> None:
        """Write what there is so far, unless there is no room: nor will there be for the whole, which will say so."""
        with suppress(OSError):
            self.shelf.hold(self._taken(device), torch.cat(self.latents))

    def _taken(self, device: str) -> Take:
        chunks = None if self.whole else len(self.latents)
        return self.request.done(self.seconds, device, chunks=chunks, frames=self.frames, steered=self.steered)


@dataclass
class Replaying:
    """A take that is decoded again."""

    frames: Iterator[Tensor]  # t c h w of each chunk
    done: int = 0  # chunks
    waits: bool = False

    def step(self, name: str, device: str) -> Made | Replayed:
        """The next chunk, or that there is none."""
        began = time.perf_counter()
        frames = next(self.frames, None)
        if frames is None:
            return Replayed(name)
        self.done += 1
        seconds = time.perf_counter() - began
        return Made(name, self.done - 1, to_uint8(frames), 0.0, seconds, memory_bytes(device))


class Desk:
    """The jobs of a worker, and who makes them: a maker per project, for it remembers the texts read last."""

    def __init__(self, connection: Connection, pipeline: Pipeline, device: str, policy: str | None = None) -> None:
        self.connection = connection
        self.pipeline = pipeline
        self.policy = policy
        self.device = device
        self.jobs: dict[str, Job | Replaying] = {}
        self.makers: dict[Path, Maker] = {}
        self.made: tuple[Job, str] | None = None  # the last take, until something else is to be made

    def serve(self) -> None:
        """Carry out orders, and between them a chunk of each job in turn, until told to end."""
        while True:
            active = any(not job.waits for job in self.jobs.values())
            if not active and not self.connection.poll():
                self.look_ahead()
            while self.connection.poll(0 if active else None):
                order = self.connection.recv()
                if isinstance(order, End):
                    return
                self.obey(order)
                active = True  # or there may be nothing more to wait for
            for name, job in [*self.jobs.items()]:
                if not job.waits:
                    self.step(name, job)

    def look_ahead(self) -> None:
        """Nothing is to be made: let what the next shot will remember be computed before its words come."""
        made, self.made = self.made, None
        if made:
            job, take = made
            with suppress(ProjectError):  # of a take that has gone; the next shot says so
                self._maker(job.folder).prepare(job.request, take, job.shelf)

    def obey(self, order: Make | Replay | Pause | Resume | Stop | Steer) -> None:
        """Take note of an order. Those for a job that has ended are late, and mean nothing."""
        job = self.jobs.get(order.job)
        match order:
            case Make():
                self._telling(order.job, lambda: self._begin(order))
            case Replay():
                self._telling(order.job, lambda: self._begin_replay(order))
            case Stop() if isinstance(job, Job):
                del self.jobs[order.job]
                self._telling(order.job, lambda: Stopped(order.job, job.keep(self.device)))
            case Steer() if isinstance(job, Job):
                job.prompt = order.prompt
            case Pause() | Resume() if job:
                job.waits = isinstance(order, Pause)

    def step(self, name: str, job: Job | Replaying) -> None:
        """The next chunk of a job; after the last one, its end."""
        if isinstance(job, Replaying):
            self._telling(name, lambda: job.step(name, self.device))
            return
        self._telling(name, lambda: self._made(name, job))
        if name in self.jobs and job.whole:
            self._telling(name, lambda: self._whole(name, job))
        elif name in self.jobs:
            job.hold(self.device)

    def _made(self, name: str, job: Job) -> Made:
        chunk = job.step()
        denoise, decode = chunk.timings["denoise"], chunk.timings["decode"]
        return Made(name, chunk.index, chunk.frames, denoise, decode, memory_bytes(self.device))

    def _whole(self, name: str, job: Job) -> Whole:
        take = job.keep(self.device)
        assert take
        self.made = job, take.id
        return Whole(name, take)

    def _begin(self, order: Make) -> None:
        shelf = FolderShelf(order.folder / "takes")
        chunks = self._maker(order.folder).make(order.request, shelf)
        self.jobs[order.job] = Job(order.request, order.folder, shelf, chunks)

    def _begin_replay(self, order: Replay) -> None:
        latents = FolderShelf(order.folder / "takes").latents(order.take)
        self.jobs[order.job] = Replaying(self._maker(order.folder).decode(latents))

    def _maker(self, folder: Path) -> Maker:
        maker = self.makers.pop(folder) if folder in self.makers else Maker(self.pipeline, self.policy)
        if len(self.makers) >= MAKERS:
            del self.makers[next(iter(self.makers))]
        self.makers[folder] = maker
        return maker

    def _telling(self, name: str, task: Callable[[], News | None]) -> None:
        """Send the news that `task` makes, or that the job has failed of something that can be told."""
        try:
            news = task()
        except (MemoryError, RuntimeError, OSError) as error:
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.filename}: {error.strerror}"
                news = Failed(name, "disk", reason, "free some space, or use another disk; then play")
            elif is_out_of_memory(error):
                remedy = "use fewer chunks per shot, close other sessions, or a smaller model"
                news = Failed(name, "out_of_memory", "out of memory", remedy)
            elif isinstance(error, ProjectError):
                news = Failed(name, "failed", *str(error).rsplit("; ", 1))
            else:
                raise
        if news:
            self.connection.send(news)
        if isinstance(news, Whole | Replayed | Failed):
            self.jobs.pop(name, None)


def memory_bytes(device: str) -> int:
    """What this process holds: on its GPU, or at most so far in main memory."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    if sys.platform == "win32":
        return 0  # not told there
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
