"""The process that owns a device, seen from the web process: what it is told, what it tells, and how it is kept alive.

It turns requests into chunks (`desk.py`) and knows nothing of sessions, viewers or the network.

The web process sends it orders and receives news through a pipe, frames included: a chunk of 12 frames takes 1 ms to
pass at 192x128 and 20 ms at 832x480, against 100 and 750 ms to make; shared memory would save most of that, and
bring buffers that somebody must own when a process is killed.

Several takes can be under way; they are made chunk by chunk in turns. What a take may fail of (memory, a file that is
gone) is told; any other error ends the process, and `Worker`, its keeper, starts another.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from shotstream.config import Fast
from shotstream.project import Model, Request, Take

GRACE = 10.0  # seconds that a worker is given to end

# Orders


@dataclass(frozen=True)
class Make:
    """Make a take. `job` names it in all that follows; `folder`: where the takes it depends on are kept."""

    job: str
    request: Request
    folder: Path


@dataclass(frozen=True)
class Replay:
    """Decode a take again, whose video was never written: it was made where no server ran."""

    job: str
    take: str
    folder: Path


@dataclass(frozen=True)
class Pause:
    """Wait after the chunk under way."""

    job: str


@dataclass(frozen=True)
class Resume:
    job: str


@dataclass(frozen=True)
class Stop:
    """Give the take up after the chunk under way."""

    job: str


@dataclass(frozen=True)
class Steer:
    """Go on with another prompt from the next chunk."""

    job: str
    prompt: str


@dataclass(frozen=True)
class End:
    """Nothing more is wanted: the worker ends."""


Order = Make | Replay | Pause | Resume | Stop | Steer | End

# News


@dataclass(frozen=True)
class Phase:
    """Getting ready: what is being done, and how much of it all is."""

    phase: str
    progress: float


@dataclass(frozen=True)
class Ready:
    """The model is loaded and warm."""

    model: Model
    device: str
    seconds: float


@dataclass(frozen=True)
class Made:
    """A chunk: frames uint8 `f h w 3`, and its seconds."""

    job: str
    index: int
    frames: np.ndarray
    denoise: float
    decode: float
    memory_bytes: int


@dataclass(frozen=True)
class Whole:
    """The take is made, and its latents are in the folder."""

    job: str
    take: Take


@dataclass(frozen=True)
class Replayed:
    """The last chunk of a take that was decoded again was sent."""

    job: str


@dataclass(frozen=True)
class Stopped:
    """The take was given up. take: what there is of it, if a chunk was made."""

    job: str
    take: Take | None


@dataclass(frozen=True)
class Failed:
    """The take cannot be made. code: `out_of_memory` or `failed`."""

    job: str
    code: str
    message: str
    remedy: str


@dataclass(frozen=True)
class NoModel:
    """The model cannot be loaded; the worker has ended, and starting it again would not help."""

    message: str


@dataclass(frozen=True)
class Gone:
    """The worker's process ended unasked; the keeper starts another."""

    code: int | None


News = Phase | Ready | Made | Whole | Replayed | Stopped | Failed | NoModel | Gone


# In the worker's process


def work(connection: Connection, model: str, device: str, threads: int | None, policy: str | None, fast: Fast) -> None:
    """The worker: load the model, then carry out orders until told to end, or until nobody is there any more."""
    with connection, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send(Phase("loading libraries", 0.05))
        from shotstream.server.desk import prepared  # torch: seconds, and only in this process

        desk = prepared(connection, model, device, threads, policy, fast)
        if desk:
            desk.serve()


def _process(
    connection: Connection, model: str, device: str, threads: int | None, policy: str | None, fast: Fast
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which tells us to end
    work(connection, model, device, threads, policy, fast)


# In the web process


class Worker:
    """The keeper of a worker: starts it, hands it orders, and hears its news.

    Both in threads of their own: a worker that is busy with a chunk reads no orders, and a pipe holds few.
    in_process: the worker is a thread, for tests and notebooks.
    """

    def __init__(
        self,
        model: str,
        device: str,
        threads: int | None,
        policy: str | None,
        fast: Fast,
        in_process: bool,
        hear: Callable[[News], None],
    ) -> None:
        self._arguments = (model, device, threads, policy, fast)
        self._in_process = in_process
        self._hear = hear
        self._orders: SimpleQueue[Order | None] = SimpleQueue()  # for the present worker
        self._body: BaseProcess | threading.Thread | None = None
        self._ending = False

    @property
    def pid(self) -> int | None:
        """Of the worker's process; None if it is a thread, or not there."""
        return self._body.pid if isinstance(self._body, BaseProcess) else None

    def start(self) -> None:
        """Start a worker; it says when it is ready."""
        ours, theirs = multiprocessing.Pipe()
        if self._in_process:
            self._body = threading.Thread(target=work, args=(theirs, *self._arguments), name="worker", daemon=True)
            self._body.start()
        else:
            spawn = multiprocessing.get_context("spawn")
            self._body = spawn.Process(target=_process, args=(theirs, *self._arguments), name="worker", daemon=True)
            self._body.start()
            theirs.close()  # or its end would not be noticed
        self._orders = SimpleQueue()  # what was meant for the last worker is void
        threading.Thread(target=_send, args=(ours, self._orders), name="orders", daemon=True).start()
        threading.Thread(target=self._read, args=(ours, self._body, self._orders), name="news", daemon=True).start()

    def order(self, order: Order) -> None:
        """Give an order, without waiting. If the worker has died, the news of that is on its way, and it is void."""
        self._orders.put(order)

    def close(self) -> None:
        """Let the worker end after the chunk under way; kill it if it does not."""
        self._ending = True
        self.order(End())
        if self._body:
            self._body.join(GRACE)
            if isinstance(self._body, BaseProcess) and self._body.is_alive():
                self._body.kill()
                self._body.join()

    def _read(
        self, connection: Connection, body: BaseProcess | threading.Thread, orders: SimpleQueue[Order | None]
    ) -> None:
        hopeless = False
        with contextlib.suppress(EOFError, OSError):
            while True:
                news = connection.recv()
                hopeless = hopeless or isinstance(news, NoModel)
                self._hear(news)
        orders.put(None)
        body.join()
        if not self._ending and not hopeless:
            self._hear(Gone(body.exitcode if isinstance(body, BaseProcess) else None))


def _send(connection: Connection, orders: SimpleQueue[Order | None]) -> None:
    """Send what is ordered, until the worker has gone."""
    with contextlib.suppress(OSError):
        while order := orders.get():
            connection.send(order)
