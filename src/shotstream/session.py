"""A directing session: shots are queued by `cut` and come out of `stream` chunk by chunk while they are generated.

    session = Session(load("storybook"), seed=7)
    session.cut("a wide shot of a green bear in a crown walking in the meadow")
    for chunk in session.stream():
        show(chunk.frames)

What was made can be directed, too: edit or redo a shot, pin a frame that a later one shall see, branch, undo. With a
project folder all of it is kept, and a session that was killed goes on exactly where it was:

    with Session(load("storybook"), Story.from_file("lantern.yaml"), project="lantern") as session:
        for chunk in session.stream():
            show(chunk.frames)
        session.redo("enter")
        session.export("lantern.mp4")

Words and edits are `shotstream.project`'s, latents `shotstream.take`'s; a session lets them work together, and says
what happens through `on_event`.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from shotstream.folder import Folder, ProjectError
from shotstream.memory.plan import MemoryPolicy
from shotstream.pipeline import Pipeline
from shotstream.project import Project, Request, Take
from shotstream.story import Story
from shotstream.take import (
    Chunk,
    FolderShelf,
    Maker,
    MemoryShelf,
    Shelf,
    Shot,
    candidates,
    model_of,
    to_uint8,
)
from shotstream.video import ContactSheet, VideoWriter, display_scale

__all__ = ["Chunk", "Session", "Shot", "candidates", "to_uint8"]

P = ParamSpec("P")
R = TypeVar("R")


def _command(method: Callable[Concatenate[Project, P], R]) -> Callable[Concatenate[Session, P], R]:
    """A command of `Project` as one of `Session`: safe beside a running stream, kept, and told of."""

    def run(self: Session, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._changing():
            return method(self.project, *args, **kwargs)

    run.__name__, run.__doc__ = method.__name__, method.__doc__
    return run


@dataclass
class _Making:
    """The take under way."""

    request: Request
    chunks: Generator[Chunk, str | None, None]
    latents: list[Tensor] = field(default_factory=list)  # f c h w, of each chunk
    frames: int = 0
    timings: dict[str, float] = field(default_factory=dict)
    prompt: str | None = None  # to send with the next chunk
    steered: list[tuple[int, str]] = field(default_factory=list)


class Session:
    """A story being made on one model. Same seed, words, lengths and pins: the same latents, always.

    story: shots to begin with. project: a folder to keep everything in, or one that was opened to be read; if it holds
    a project, that goes on, with `story` as its head if one is given. seed: instead of the story's; without story and
    project, the seed of every shot that has none of its own. policy: instead of the model's memory policy, by name or
    as an object.
    Commands may be given from another thread while `stream` runs, and never wait longer than a chunk.
    Raises ProjectError for a folder that cannot be used, CommandError for pins the story cannot have.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        story: Story | None = None,
        project: str | Path | Folder | None = None,
        seed: int | None = None,
        policy: str | MemoryPolicy | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.on_event: Callable[[dict[str, Any]], None] | None = None
        model, story = model_of(pipeline), story.reseeded(seed) if story and seed is not None else story
        self.folder = Folder(project) if isinstance(project, str | Path) else project
        if self.folder and self.folder.there:
            with _closed_on_error(self.folder):
                self.project = self.folder.load(model, policy)
        else:
            name = self.folder.path.resolve().name if self.folder else ""
            self.project = Project(model, story, id=name, seed=seed or 0, policy=policy)
        self.seed = self.project.base.seed
        self._own_seeds = story is not None or project is not None
        self._maker = Maker(pipeline, policy)
        self._shelf: Shelf = FolderShelf(self.folder.path / "takes") if self.folder else MemoryShelf()
        self._making: _Making | None = None
        self._made: tuple[Request, str] | None = None  # the newest take and its request, until something follows
        self._newest_stream = object()
        self._lock = threading.RLock()
        self._told: dict[str, Any] = {}  # the document as it was told of last
        self._events = 0
        if self.folder and story:
            with _closed_on_error(self.folder), self._changing():
                self.project.retell(story)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Keep what was made of the shot under way, and let others open the project. Closing twice is fine."""
        with self._lock:
            self._cut_off()
            if self.folder:
                self.folder.close()

    # Commands

    def cut(
        self,
        caption: str,
        *,
        global_caption: str | None = None,
        seed: int | None = None,
        chunks: int | None = None,
        id: str | None = None,
        at: int | None = None,
        pins: Sequence[str] = (),
    ) -> Shot:
        """Queue a new shot, after the last one or as number `at` (from 1). Returns it as it will be made.

        global_caption: holds from this shot on. chunks: the model's by default. seed: derived from the story's and the
        shot's id by default; in a session without story and project, the session's. pins: frames of earlier shots that
        it shall see, such as "enter@0".
        """
        seed = self.seed if seed is None and not self._own_seeds else seed
        with self._changing():
            id = self.project.cut(
                caption, id=id, chunks=chunks, seed=seed, at=at, global_caption=global_caption, pins=pins
            )
            return self._planned(self.project.index(id))

    edit = _command(Project.edit)
    move = _command(Project.move)
    delete = _command(Project.delete)
    redo = _command(Project.redo)
    regenerate = _command(Project.regenerate)
    set_title = _command(Project.set_title)
    set_global = _command(Project.set_global)
    pin = _command(Project.pin)
    unpin = _command(Project.unpin)
    branch = _command(Project.branch)
    checkout = _command(Project.checkout)
    rename_branch = _command(Project.rename_branch)
    undo = _command(Project.undo)
    redo_edit = _command(Project.redo_edit)
    play = _command(Project.play)
    pause = _command(Project.pause)
    stop = _command(Project.stop)

    def steer(self, caption: str) -> None:
        """Experimental: the running shot reads another caption from its next chunk on. No model was trained for it."""
        with self._changing():
            prompt = self.project.steered(caption)
            if self._making:
                self._making.prompt = prompt

    @torch.no_grad()
    def adopt(self, frames: Tensor, caption: str, *, global_caption: str | None = None) -> None:
        """Take `frames` (`t c h w` in [-1, 1], 4k+1 of them) as the next finished shot, as if it had been generated.

        Raises ValueError while shots are queued: the past cannot be put after the future.
        """
        if self.queue:
            raise ValueError("adopt a clip before the next shot is queued, or stream the queue first")
        with self._changing():
            id = self.project.cut(caption, global_caption=global_caption)
            fingerprint = hashlib.sha256(frames.contiguous().cpu().numpy().tobytes()).hexdigest()
            take = self.project.adopted(id, len(frames), fingerprint)
            latents = self.pipeline.vae.encode(frames[None])[0]
            self._keep(take, latents, self._maker.stills(take.number, frames))
            self.project.finished(take)

    # What comes out

    def stream(self) -> Generator[Chunk, None, None]:
        """Make the planned shots in order, yielding each chunk as soon as it is decoded; ends when none is left.

        Ends early when paused, at a chunk; streaming again after `play` goes on there. May be closed at any chunk: the
        shot begun is then made again, from its beginning and to the same bits, by the next stream.
        """
        newest = self._newest_stream = object()
        try:
            while (chunk := self._next()) is not None:
                yield chunk
        except GeneratorExit:
            with self._lock:
                if self._newest_stream is newest:  # an older one, forgotten, may be closed at any time
                    self._cut_off()
            raise

    async def astream(self) -> AsyncIterator[Chunk]:
        """The same for an event loop: chunks are made in another thread."""
        with closing(self.stream()) as stream:
            while (chunk := await asyncio.to_thread(next, stream, None)) is not None:
                yield chunk

    def tell(self, first: int = 1, last: int | None = None) -> Generator[Chunk, None, None]:
        """The head's shots number `first` to `last`: finished takes are decoded again, all others made.

        What an earlier shot still lacks is made, and yielded, before.
        """
        with closing(self.stream()) as stream:
            for index in range(min(last or len(self.project.places), len(self.project.places))):
                if take := self.project.places[index].take:
                    if index + 1 >= first:
                        yield from self.replay(take)
                else:
                    for chunk in stream:
                        yield chunk
                        if chunk.is_last:
                            break

    def replay(self, take: str) -> Iterator[Chunk]:
        """A finished take as it came out of `stream`. Raises ProjectError if its latents are gone."""
        record, latents = self.project.takes[take], self._shelf.latents(take)
        pieces = latents.split(self._maker.policy.chunk)
        shot = Shot(record.number, record.shot, record.caption, record.global_caption, record.seed, record.chunks)
        for index, frames in enumerate(self._maker.decode(latents)):
            yield Chunk(
                frames=to_uint8(frames),
                latents=pieces[index],
                shot=shot,
                index=index,
                chunks=len(pieces),
                is_last=index + 1 == len(pieces),
                timings={},
                take=take,
            )

    def export(
        self,
        path: str | Path,
        *,
        chapters: bool = True,
        shots: tuple[int, int] | None = None,
        branch: str | None = None,
        scale: int | None = None,
    ) -> int:
        """Write the finished shots of a branch (the head), or those numbered `shots[0]` to `shots[1]`, as a video.

        Returns how many there are. Raises VideoError, ProjectError, CommandError for a branch that is not there,
        ValueError if no shot of them is finished.
        """
        config, title = self.pipeline.config, self.project.base.title
        size = (config.width, config.height)
        takes = self._finished(branch, shots)
        fps, scale = self.project.base.fps or config.fps, scale or display_scale(size)
        with VideoWriter(path, fps, size, scale, title=title, chapters=chapters) as video:
            for take in takes:
                video.begin_shot(chapter(take.number + 1, take.caption))
                for chunk in self.replay(take.id):
                    video.write(chunk.frames)
                video.end_shot()
        return len(takes)

    def contact_sheet(
        self, path: str | Path, *, shots: tuple[int, int] | None = None, branch: str | None = None
    ) -> None:
        """Write a picture of the same shots, a row each. Raises as `export` does."""
        sheet = ContactSheet(self.project.base.title)
        for take in self._finished(branch, shots):
            sheet.begin_shot(take.caption, take.frames)
            for chunk in self.replay(take.id):
                sheet.write(chunk.frames)
        sheet.save(path)

    def memory(self, shot: str) -> dict[str, Any]:
        """The frames that condition a shot, with their pictures (uint8 [h w 3]; None while a shot is not made).

        {"shot", "frames": [{"shot", "take", "frame", "pinned", "picture"}], "forgotten": [shots it sees nothing of],
        "next": {"frames", "forgotten"}, the same of its next take, by the pins it has now}
        """
        with self._lock:
            told = self.project.memory(shot)
        for frame in told["frames"] + told["next"]["frames"]:
            frame["picture"] = self._picture(frame["take"], frame["frame"]) if frame["take"] else None
        return told

    def document(self) -> dict[str, Any]:
        """Everything a view shows: `Project.document`."""
        with self._lock:
            return self.project.document()

    @property
    def queue(self) -> list[Shot]:
        """The head's shots that are still to be made."""
        with self._lock:
            return [self._planned(i) for i, place in enumerate(self.project.places) if place.take is None]

    @property
    def cuts(self) -> int:
        """How many shots the head has."""
        return len(self.project.places)

    # Inside

    def _planned(self, index: int) -> Shot:
        place = self.project.places[index]
        told = self.project.told(place)
        chunks = told.length_at(0, self.pipeline.config).chunks
        return Shot(index, place.shot.id, told.expanded(0), told.global_at(0), told.seed_at(0), chunks)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """The project changes: nobody else may look, then it is kept and told of."""
        with self._lock:
            yield
            self._changed()

    def _changed(self, events: list[dict[str, Any]] | None = None) -> None:
        try:
            if self.folder:
                self.folder.save(self.project)
        finally:
            self._tell(events)

    def _tell(self, events: list[dict[str, Any]] | None = None) -> None:
        if self.on_event is None:
            return
        document = self.project.document()
        changed = {key: value for key, value in document.items() if key not in self._told or self._told[key] != value}
        self._told = document
        for event in [*(events or []), *([{"type": "document", **changed}] if changed else [])]:
            self._events += 1
            self.on_event({"n": self._events, "rev": self.project.revision, **event})

    def _next(self) -> Chunk | None:
        """The next chunk, unless there is nothing to make now."""
        making = self._going()
        if making is None:
            self._look_ahead()
            return None
        self._made = None
        prompt, making.prompt = making.prompt, None
        try:
            if prompt is None:
                chunk = next(making.chunks)
            else:
                making.steered.append((len(making.latents), prompt))
                chunk = making.chunks.send(prompt)
            with self._lock:
                self._arrived(making, chunk)
        except Exception as error:
            with self._lock:
                self._making = None
                with suppress(OSError):  # of writing the project: what failed first is raised
                    self._changed(self.project.failed(str(error) or type(error).__name__))
            raise
        except BaseException:  # interrupted: the take will be made again
            with self._lock:
                self._making = None
                self.project.stopped()
            raise
        return chunk

    def _going(self) -> _Making | None:
        """The take under way, or the next one, begun."""
        with self._lock:
            if self._making and not self.project.wanted(self._making.request.take):
                self._cut_off()
            if self._making:
                return self._making if self.project.playing else None
            request = self.project.next_shot()
            if request is None:
                return None
            self._making = _Making(request, self._maker.make(request, self._shelf))
            self._tell(self.project.started(request))
            return self._making

    def _arrived(self, making: _Making, chunk: Chunk) -> None:
        making.latents.append(chunk.latents)
        making.frames += len(chunk.frames)
        for name, seconds in chunk.timings.items():
            making.timings[name] = making.timings.get(name, 0.0) + seconds
        milliseconds = {name: round(1000 * seconds, 1) for name, seconds in chunk.timings.items()}
        fps = round(len(chunk.frames) / sum(chunk.timings.values()), 2)
        events = self.project.chunk(
            chunk.index, len(chunk.frames), milliseconds["denoise"], decode_ms=milliseconds["decode"], fps=fps
        )
        if not chunk.is_last:
            with suppress(OSError):  # without room for it, nor for the whole take, which will say so
                self._shelf.hold(self._taken(making, chunks=len(making.latents)), torch.cat(making.latents))
            self._tell(events)
            return
        take = self._taken(making)
        self._keep(take, torch.cat(making.latents), dict(chunk.stills))
        self._making, self._made = None, (making.request, take.id)
        self._changed(events + self.project.finished(take))

    def _look_ahead(self) -> None:
        """Nothing is to be made: let what the next shot will remember be computed before its words come."""
        made, self._made = self._made, None
        if made:
            with suppress(ProjectError):  # of a take that has gone; the next shot says so
                self._maker.prepare(*made, self._shelf)

    def _taken(self, making: _Making, chunks: int | None = None) -> Take:
        device = str(self.pipeline.dit.device)
        request = making.request
        return request.done(making.timings, device, chunks=chunks, frames=making.frames, steered=making.steered)

    def _keep(self, take: Take, latents: Tensor, stills: dict[int, Tensor]) -> None:
        self._shelf.keep(take.id, latents, stills)
        if self.folder:
            self.folder.keep(take)

    def _cut_off(self) -> None:
        """Give up the take under way; what there is of it is kept, to look at."""
        making, self._making = self._making, None
        if making is None:
            return
        making.chunks.close()
        take = None
        with suppress(OSError):  # there may be no room for it
            if making.latents:
                take = self._taken(making, chunks=len(making.latents))
                self._keep(take, torch.cat(making.latents), {})
            self._changed(self.project.stopped(take))

    def _finished(self, branch: str | None, shots: tuple[int, int] | None) -> list[Take]:
        line = self.project.line(branch)
        first, last = shots or (1, len(line))
        takes = [self.project.takes[take] for take in line[first - 1 : last] if take]
        if not takes:
            raise ValueError("none of these shots is finished; stream the session first")
        return takes

    def _picture(self, take: str, frame: int) -> np.ndarray:
        return to_uint8(self._maker.picture(self._shelf, take, frame)[None])[0]


def chapter(number: int, caption: str) -> str:
    """The title of a shot's chapter."""
    return " ".join(f"{number}. {caption}".split())[:120]


@contextmanager
def _closed_on_error(folder: Folder) -> Iterator[None]:
    try:
        yield
    except BaseException:
        folder.close()
        raise
