"""The workers of one server, one per device. Every take goes to the ready worker with the least to do.

A take depends on nothing but its request and the project's folder, so it does not matter which worker makes it. One
that dies is told of and started again, a little later each time, and given up if it never gets ready.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from shotstream.config import Fast
from shotstream.project import Model
from shotstream.server.worker import (
    Failed,
    Gone,
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
    Worker,
)

if TYPE_CHECKING:
    from shotstream.server.live import Live

RESTARTS = 5  # of a worker that never gets ready


class Listener(Protocol):
    """Who is told of the workers, on the event loop."""

    def on_phase(self) -> None: ...
    def on_readiness(self) -> None: ...
    def on_lost(self, message: str, remedy: str) -> None: ...


@dataclass(eq=False)
class Station:
    """A worker, and what it is doing."""

    worker: Worker
    device: str
    phase: Phase = field(default_factory=lambda: Phase("starting", 0.0))
    since: float = field(default_factory=time.monotonic)  # of the present attempt to get ready
    ready: bool = False
    starts: int = 1  # since it was ready last
    trouble: str = ""  # why it is given up


class Pool:
    """The workers. devices: one worker each. `hear` of the keepers is called in their threads, the rest on the loop."""

    def __init__(
        self,
        model: str,
        devices: Sequence[str],
        threads: int | None,
        policy: str | None,
        fast: Fast,
        in_process: bool,
    ) -> None:
        self.model: Model | None = None  # once a worker has loaded it
        self.restarts = 0
        self._jobs: dict[str, tuple[Station, Live]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._stations: list[Station] = []
        for number, device in enumerate(devices):
            hear = partial(self._hear, number)
            self._stations.append(Station(Worker(model, device, threads, policy, fast, in_process, hear), device))

    def start(self, listener: Listener) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        for station in self._stations:
            station.worker.start()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*(asyncio.to_thread(station.worker.close) for station in self._stations))

    @property
    def ready(self) -> bool:
        """Whether any worker is."""
        return any(station.ready for station in self._stations)

    @property
    def trouble(self) -> str:
        """Why nothing can ever be made, if so."""
        return self._stations[0].trouble if all(station.trouble for station in self._stations) else ""

    @property
    def devices(self) -> list[str]:
        return [station.device for station in self._stations]

    def phase(self) -> dict[str, Any]:
        """How far getting ready is: of the worker that is furthest."""
        best = max(self._stations, key=lambda station: (station.ready, station.phase.progress))
        phase, waited = best.phase, time.monotonic() - best.since
        known = 0.2 < phase.progress < 1
        left = round(waited * (1 - phase.progress) / phase.progress, 1) if known else None
        return {"phase": phase.phase, "progress": phase.progress, "eta_s": 0.0 if best.ready else left}

    # Orders

    def make(self, live: Live, order: Make | Replay) -> None:
        """Give a job to the worker with the fewest; its news go to the recorder of `live`."""
        busy = [station for station, _ in self._jobs.values()]
        station = min((s for s in self._stations if s.ready), key=busy.count)
        self._jobs[order.job] = station, live
        station.worker.order(order)

    def order(self, order: Pause | Resume | Stop | Steer) -> None:
        """To the worker of this job; void if the job has ended."""
        if order.job in self._jobs:
            self._jobs[order.job][0].worker.order(order)

    def forget(self, job: str) -> None:
        """The job has ended."""
        self._jobs.pop(job, None)

    # News

    def _hear(self, number: int, news: News) -> None:
        """In the thread that reads the pipe. News of a job go to its recorder, in order."""
        match news:
            case Made() | Whole() | Replayed() | Stopped() | Failed():
                if job := self._jobs.get(news.job):
                    job[1].recorder.take_in(news)
            case _:
                self._loop.call_soon_threadsafe(self._learn, self._stations[number], news)

    def _learn(self, station: Station, news: News) -> None:
        match news:
            case Phase():
                station.phase = news
                self._listener.on_phase()
            case Ready():
                self.model, station.device = news.model, news.device
                station.phase, station.ready, station.starts = Phase("ready", 1.0), True, 0
                self._listener.on_readiness()
            case NoModel():
                station.trouble, station.phase = news.message, Phase("failed", 0.0)
                self._listener.on_readiness()
            case Gone():
                self._lost(station, news)

    def _lost(self, station: Station, gone: Gone) -> None:
        """A worker has ended unasked: tell everybody concerned, and start another."""
        station.ready, station.phase, station.since = False, Phase("restarting", 0.0), time.monotonic()
        for live in {live for at, live in self._jobs.values() if at is station}:
            live.recorder.take_in(gone)
        self._jobs = {job: (at, live) for job, (at, live) in self._jobs.items() if at is not station}
        if station.starts >= RESTARTS:
            station.trouble = (
                f"the worker ended {RESTARTS} times with code {gone.code} before it was ready; see the log"
            )
        else:
            self.restarts += 1
            task = self._loop.create_task(self._restart(station))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        message = "the worker was killed, perhaps for want of memory" if gone.code == -9 else "the worker ended"
        self._listener.on_lost(message, "it is started again, and the shot under way is made once more")
        self._listener.on_readiness()

    async def _restart(self, station: Station) -> None:
        await asyncio.sleep(0.2 * 2**station.starts)
        station.starts += 1
        station.worker.start()
