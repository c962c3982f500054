"""All sessions of one server, the workers they share, and the folder they are kept in."""

from __future__ import annotations

import asyncio
import os
import re
import time
import unicodedata
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shotstream.config import EXACT, PRESETS, Fast
from shotstream.folder import Folder
from shotstream.project import CommandError, Model, Project
from shotstream.server.limits import Limits
from shotstream.server.live import Live
from shotstream.server.metrics import Metrics
from shotstream.server.pool import Pool
from shotstream.server.refusals import LimitReached, NotReady, Unknown
from shotstream.story import Story, StoryError
from shotstream.video import display_scale

DELETE_SECONDS = 1.0  # a deletion is waited for, but no longer: a chunk may be under way
IDLE_SECONDS = 1800.0  # until a session that nobody watches is put away


def default_home() -> Path:
    """Where sessions are kept: $SHOTSTREAM_HOME, else the user's data folder."""
    if home := os.environ.get("SHOTSTREAM_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "shotstream"


class Studio:
    """What one server holds.

    home: folder of the sessions. model, device: for the workers, one per device ("cuda:0,cuda:1"). codec: of take
    files, and of viewers that play it. threads: of a worker on a CPU. experimental: allow `steer`.
    in_process: the worker is a thread, for tests and notebooks. policy: a system's memory, instead of the model's own.
    fast: what to approximate for speed.
    """

    def __init__(
        self,
        home: Path,
        model: str = "storybook",
        device: str = "auto",
        *,
        codec: str = "h264",
        threads: int | None = None,
        in_process: bool = False,
        experimental: bool = False,
        limits: Limits | None = None,
        policy: str | None = None,
        fast: Fast = EXACT,
    ) -> None:
        self.home = home
        self.policy = policy
        self.codec = codec
        self.experimental = experimental
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.lives: dict[str, Live] = {}
        self.pool = Pool(model, device.split(","), threads, policy, fast, in_process)
        self._served = model
        self.hopeless = asyncio.Event()  # the model cannot be loaded
        self._known = asyncio.Event()  # the model, or that there is none
        self._locks: dict[str, asyncio.Lock] = {}  # of sessions that are opened or put away
        self._expected: dict[str, tuple[Path, Story | None]] = {}  # what the command line named, by id
        self._deleted: dict[str, asyncio.Task[None]] = {}  # sessions that end: nobody is told of them any more
        self._closed = False

    # From the application

    async def start(self) -> None:
        """Start the workers, and go on while they load the model."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.pool.start(self)
        self._sweeper = asyncio.create_task(self._sweep())

    async def close(self) -> None:
        """Put every session away, keeping running shots as far as they are, and end the worker. Twice is fine."""
        if self._closed:
            return
        self._closed = True
        self._sweeper.cancel()
        await asyncio.gather(*(live.close() for live in self.lives.values()), *self._deleted.values())
        self.lives.clear()
        await self.pool.close()

    def phase(self) -> dict[str, Any]:
        """How far getting ready is."""
        return self.pool.phase()

    def info(self) -> dict[str, Any]:
        """What this server is."""
        config = self.pool.model.config if self.pool.model else None
        return {
            "version": version("shotstream"),
            "model": config.name if config else self._served,
            "devices": self.pool.devices,
            "ready": self.pool.ready,
            "experimental": self.experimental,
            "limits": asdict(self.limits),
        }

    def models(self) -> list[dict[str, Any]]:
        """The built-in models and the one that is served."""
        model = self.pool.model
        served = model.config.name if model else self._served
        names = dict.fromkeys((served, *(name for name in ("storybook",) if name != served)))
        configs = {name: PRESETS[name] for name in names if name in PRESETS}
        if model:
            configs[served] = model.config
        return [
            {"name": name, "served": name == served, "fps": config.fps, "size": [config.width, config.height]}
            for name, config in configs.items()
        ]

    def metrics_text(self) -> bytes:
        self.metrics.sessions.set(len(self.lives))
        waiting = (place for live in self.lives.values() for place in live.project.places)
        self.metrics.queue_shots.set(sum(place.take is None for place in waiting))
        return self.metrics.text()

    def scale(self, size: tuple[int, int]) -> int:
        """How often to enlarge live pictures: enough for x264's halved colours to keep small faces. Files get more."""
        return min(2, display_scale(size))

    # Sessions

    def list(self) -> list[dict[str, Any]]:
        """All sessions, open or on disk, the one changed last first."""
        folders = {path.name: (path, None) for path in self.home.iterdir() if is_project(path)} | self._expected
        found = [
            _summary(id, path, story, self.lives.get(id))
            for id, (path, story) in folders.items()
            if id not in self._deleted
        ]
        return sorted(found, key=lambda summary: summary["changed"], reverse=True)

    async def session(self, id: str) -> Live:
        """The session, opened if it is on disk. Raises Unknown, NotReady or LimitReached."""
        if id in self._deleted:
            raise Unknown(f"session {id!r} is deleted")
        if live := self.lives.get(id):
            return live
        path, story = self._expected.get(id, (self.home / id, None))
        if id not in self._expected and not (NAME.fullmatch(id) and is_project(path)):
            raise Unknown(f"there is no session {id[:64]!r}")
        return await self._open(id, path, story)

    async def create(self, story: str | None, name: str | None, seed: int | None, title: str | None) -> Live:
        """A new session, from a story in any format or from nothing; or the one of this name, if it is there.

        Raises StoryError, Unknown, NotReady or LimitReached.
        """
        told = Story.parse(story) if story else None
        if told and seed is not None:
            told = told.reseeded(seed)
        if told and title:
            told = told.model_copy(update={"title": title})
        if name and is_project(self.home / name):
            if told:
                raise CommandError("project", f"there is a project {name!r} already; choose another name")
            return await self.session(name)
        id = name or self._free_name((told.title if told else title) or "untitled")
        return await self._open(id, self.home / id, told, seed, title)

    def expect(self, path: Path, story: Story | None = None) -> str:
        """Serve a project folder that may lie anywhere, with `story` as its head if one is given; returns its id."""
        id = path.name if NAME.fullmatch(path.name) else slug(path.name)
        self._expected[id] = path, story
        return id

    async def delete(self, id: str) -> None:
        """End a session and move its folder to the trash. A folder that lies elsewhere stays.

        It is gone for everybody at once; its folder, when the chunk under way is done.
        """
        live = await self.session(id)
        self._expected.pop(id, None)
        task = self._deleted[id] = asyncio.create_task(self._trash(live))
        task.add_done_callback(lambda _: self._deleted.pop(id))
        done, _ = await asyncio.wait({task}, timeout=DELETE_SECONDS)
        for ended in done:
            ended.result()

    async def _trash(self, live: Live) -> None:
        await self._put_away(live)
        if live.folder.path == self.home / live.id:
            trash = self.home / ".trash"
            trash.mkdir(exist_ok=True)
            live.folder.path.rename(trash / f"{live.id}-{time.time_ns() // 1_000_000}")

    async def _open(
        self, id: str, path: Path, story: Story | None = None, seed: int | None = None, title: str | None = None
    ) -> Live:
        model = await self._loaded()
        async with self._lock(id):
            if live := self.lives.get(id):
                return live
            await self._make_room()
            folder, project = await asyncio.to_thread(_open_folder, path, model, id, story, seed, title, self.policy)
            project.loading = not self.pool.ready
            live = self.lives[id] = Live(self, project, folder)
            live.save()
            live.advance()
            return live

    async def _loaded(self) -> Model:
        """What is known of the model, once it is loaded. Raises NotReady."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._known.wait(), self.limits.wait_seconds)
        if self.pool.model is None:
            now = f"the model is not ready ({self.phase()['phase']}); try again soon"
            raise NotReady(self.pool.trouble or now)
        return self.pool.model

    async def _make_room(self) -> None:
        """Put the session away that was idle longest, if there are too many."""
        limit = self.limits.open_sessions
        if len(self.lives) < limit:
            return
        idle = sorted((live for live in self.lives.values() if live.idle), key=lambda live: live.touched)
        if not idle:
            raise LimitReached("open_sessions", limit, "close a window or wait until a story is made")
        await self._put_away(idle[0])

    async def _put_away(self, live: Live) -> None:
        async with self._lock(live.id):
            if self.lives.pop(live.id, None):
                await live.close()

    def _lock(self, id: str) -> asyncio.Lock:
        return self._locks.setdefault(id, asyncio.Lock())

    async def _sweep(self) -> None:
        """Put away what nobody has touched for long."""
        while True:
            await asyncio.sleep(60)
            old = time.monotonic() - IDLE_SECONDS
            for live in [live for live in self.lives.values() if live.idle and live.touched < old]:
                await self._put_away(live)

    def _free_name(self, title: str) -> str:
        name = slug(title)
        names = (name if i == 1 else f"{name}-{i}" for i in range(1, 10**6))
        return next(n for n in names if n not in self.lives and not (self.home / n).exists())

    # From the workers

    def on_phase(self) -> None:
        for live in self.lives.values():
            live.publish(type="progress", job="model", **self.phase())

    def on_readiness(self) -> None:
        for live in self.lives.values():
            live.on_readiness()
        if self.pool.model or self.pool.trouble:
            self._known.set()
        if self.pool.trouble and self.pool.model is None:
            self.hopeless.set()

    def on_lost(self, message: str, remedy: str) -> None:
        self.metrics.worker_restarts.inc()
        for live in self.lives.values():
            live.error("worker", message, remedy)


NAME = re.compile(r"[\w-]{1,64}")


def is_project(path: Path) -> bool:
    return (path / "project.json").is_file()


def slug(title: str) -> str:
    """A folder's name out of a title: plain letters, digits and dashes."""
    plain = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode().lower()
    return "-".join(re.findall(r"[a-z0-9]+", plain))[:48].strip("-") or "story"


def _summary(id: str, path: Path, story: Story | None, live: Live | None) -> dict[str, Any]:
    """What the list says of a project, without opening it. story: if it is about to get another."""
    if live is None and story is None and (path / "story.yaml").is_file():
        with suppress(StoryError):
            story = Story.from_file(path / "story.yaml")
    changed = (path / "project.json").stat().st_mtime if is_project(path) else time.time()
    title, shots = (story.title, len(story.shots)) if story else ("", 0)
    if live:
        title, shots = live.project.base.title, len(live.project.places)
    return {"id": id, "title": title or id, "shots": shots, "open": live is not None, "changed": changed}


def _open_folder(
    path: Path,
    model: Model,
    id: str,
    story: Story | None,
    seed: int | None,
    title: str | None,
    policy: str | None,
) -> tuple[Folder, Project]:
    """The folder, locked, and the project in it; or a new one. Raises ProjectError."""
    folder = Folder(path)
    try:
        if folder.there:
            project = folder.load(model, policy)
            if story:
                project.retell(story)
            return folder, project
        project = Project(model, story, id=id, seed=7 if seed is None else seed, policy=policy)
        if title and not story:
            project.plan = replace(project.plan, base=project.base.model_copy(update={"title": title}))
        folder.save(project)
    except BaseException:
        folder.close()
        raise
    return folder, project
