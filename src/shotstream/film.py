"""A story becoming a video file: laid out first, then made shot by shot. The command line and Python both end here.

    summary = generate("lantern.yaml", "lantern.mp4", sheet="lantern.png")

is, step by step,

    film = plan(Story.from_file("lantern.yaml"), "storybook")      # lengths, seeds, what each shot remembers
    print(*film.warnings(), sep="\\n")
    summary = film.make("lantern.mp4", "lantern.png")
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Unpack

import torch

from shotstream import fast
from shotstream.folder import ProjectError
from shotstream.footprint import peak_memory
from shotstream.memory.plan import MemoryPolicy
from shotstream.memory.policies import named, rehearse
from shotstream.pipeline import Loading, Pipeline, load
from shotstream.project import CommandError, Project
from shotstream.session import Chunk, Session, chapter
from shotstream.story import Story, StoryError
from shotstream.take import model_of
from shotstream.video import ContactSheet, VideoWriter, check_outputs, display_scale


class DeviceError(ValueError):
    """There is no such device here, or this torch cannot use it. One line: which, why, what to do."""


@dataclass(frozen=True)
class Planned:
    """A shot as it will be made. `remembers`: the frames of earlier shots that it sees, as `id@frame`."""

    number: int
    id: str
    caption: str
    global_caption: str
    seed: int
    chunks: int
    frames: int
    remembers: tuple[str, ...]


OnChunk = Callable[[Planned, Chunk, float], None]
"""Told of each chunk: the shot, the chunk, and the seconds since generating began."""


@dataclass(frozen=True)
class Summary:
    """A finished video. `seconds` and `fps` are of generating, `video_seconds` of playing."""

    output: str
    sheet: str | None
    model: str
    revision: str
    seed: int
    shots: int
    frames: int
    seconds: float
    fps: float
    first_frame_s: float
    load_s: float
    video_seconds: float
    memory_gb: float  # the most that was held: of the GPU's memory if it computes, else by the process
    fast: tuple[str, ...] = ()  # what was approximated


def generate(
    story: Story | str | Path,
    output: str | Path,
    model: str | Path | Pipeline = "storybook",
    *,
    seed: int | None = None,
    sheet: str | Path | None = None,
    scale: int | None = None,
    device: str = "auto",
    policy: str | MemoryPolicy | None = None,
    project: str | Path | None = None,
    resume: bool = False,
    shots: tuple[int, int] | None = None,
    **loading: Unpack[Loading],
) -> Summary:
    """Make a video of a story: the same file that `shotstream generate` makes of the same arguments.

    story: a story, or the path of a story file. output: .mp4, .webm or .gif. model: a name, a model file, or a
    loaded model. seed: instead of the story's. sheet: also write a contact sheet. scale: enlarge the frames, by
    default so that they fill a player. device: of a model that is not loaded yet; "auto" takes a GPU if there is one.
    policy: instead of the model's memory policy, by name (`memory.policies.POLICIES`) or as an object.
    project, resume, shots: see `Film.make`. loading: see `pipeline.Loading`.
    What a writer should know is said by `warnings.warn`.
    Raises StoryError, VideoError, ModelError, DeviceError or PolicyError; see also `Film.make`.
    """
    name = "story" if isinstance(story, Story) else str(story)
    story = story if isinstance(story, Story) else Story.from_file(story)
    check_outputs(output, sheet)
    film = plan(story if seed is None else story.reseeded(seed), model, device, name, policy, **loading)
    for warning in film.warnings():
        warnings.warn(f"{name}: {warning}", stacklevel=2)
    return film.make(output, sheet, scale, project=project, resume=resume, shots=shots)


def plan(
    story: Story,
    model: str | Path | Pipeline = "storybook",
    device: str = "auto",
    name: str = "story",
    policy: str | MemoryPolicy | None = None,
    **loading: Unpack[Loading],
) -> Film:
    """Load the model, unless it is one already, and lay out every shot for it.

    name: how to call the story in messages. Raises StoryError for what cannot be made; ModelError, DeviceError,
    PolicyError.
    """
    if isinstance(policy, str):
        named(policy)  # before the model takes its time
    started = time.perf_counter()
    pipeline = model if isinstance(model, Pipeline) else load(model, find_device(device), **loading)
    load_s = time.perf_counter() - started
    config, shots = pipeline.config, list[Planned]()
    if story.size and story.size != (config.width, config.height):
        made = f"{config.name} makes [{config.width}, {config.height}]"
        raise StoryError(f"{name}: size: {made}, not {list(story.size)}; remove the key")
    try:
        project = Project(model_of(pipeline), story, policy=policy)
    except (CommandError, StoryError) as error:
        raise StoryError(f"{name}: {error}") from None
    for i, shot in enumerate(story.shots):
        length = story.length_at(i, config)
        shots.append(
            Planned(
                number=i + 1,
                id=shot.id,
                caption=story.expanded(i),
                global_caption=story.global_at(i),
                seed=story.seed_at(i),
                chunks=length.chunks,
                frames=length.frames,
                remembers=tuple(f"{still.shot}@{still.frame}" for still in project.context(i)),
            )
        )
    try:
        rehearse(project.policy, [shot.chunks for shot in shots])
    except ValueError as error:  # the policy's limit
        raise StoryError(f"{name}: {error}") from None
    return Film(story, pipeline, tuple(shots), load_s, policy)


@dataclass(frozen=True)
class Film:
    """A story laid out for a model, ready to be made. `load_s`: seconds it took to load the model.

    `policy`: instead of the model's.
    """

    story: Story
    pipeline: Pipeline
    shots: tuple[Planned, ...]
    load_s: float
    policy: str | MemoryPolicy | None = None

    @property
    def fps(self) -> int:
        """Frames per second of playing."""
        return self.story.fps or self.pipeline.config.fps

    @property
    def prompts(self) -> list[str]:
        """What the model reads for each shot: read, and maybe cut, as one text."""
        return [self.pipeline.prompt(s.global_caption, i, s.caption) for i, s in enumerate(self.shots)]

    def warnings(self) -> Iterator[str]:
        """What a writer should know before waiting: fast mode, unused keys, unknown words, rounded lengths."""
        yield from fast.notes(self.pipeline.fast, self.pipeline.dit.device)
        if self.story.negative:
            yield "negative: is not read, for this model works without guidance"
        said: set[str] = set()
        for i, shot in enumerate(self.shots):
            where = f"shot {shot.number} ({shot.id})"
            found = self.pipeline.text.warnings(self.prompts[i])
            yield from (f"{where}: {text}" for text in found if text not in said)
            said.update(found)
            if note := self.story.length_at(i, self.pipeline.config).note:
                yield f"{where}: {note}, for shots are made of whole chunks"

    def make(
        self,
        output: str | Path,
        sheet: str | Path | None = None,
        scale: int | None = None,
        on_chunk: OnChunk = lambda shot, chunk, seconds: None,
        *,
        project: str | Path | None = None,
        resume: bool = False,
        shots: tuple[int, int] | None = None,
    ) -> Summary:
        """Generate into the output file, and into the contact sheet's if there is one.

        on_chunk: called with each chunk when it is in the file; what it raises ends the film.
        project: a folder that keeps every shot when it is made; with `resume` it may hold some already, and those are
        not made again. shots: numbers of the first and the last to write; earlier ones are only made if they must be.
        Whatever ends it early, Ctrl-C too: the finished shots become the file, and a note of the exception tells
        which they are. Raises VideoError, ProjectError.
        """
        config, pages = self.pipeline.config, ContactSheet(self.story.title)
        size = (config.width, config.height)
        scale = scale or display_scale(size)
        first, last = shots or (1, len(self.shots))
        started, times = time.perf_counter(), list[float]()
        with (
            self._session(project, resume) as session,
            VideoWriter(output, self.fps, size, scale, title=self.story.title, comment=self.recipe()) as video,
            closing(session.tell(first, last)) as told,
        ):
            self.pipeline.text.encode(self.prompts)  # all at once: a large text encoder may then leave
            for chunk in told:
                times.append(time.perf_counter() - started)
                shot = self.shots[chunk.shot.index]
                if shot.number >= first:
                    if chunk.index == 0:
                        video.begin_shot(chapter(shot.number, shot.caption))
                        pages.begin_shot(shot.caption, shot.frames)
                    video.write(chunk.frames)
                    pages.write(chunk.frames)
                    if chunk.is_last:
                        video.end_shot()
                on_chunk(shot, chunk, times[-1])
        if sheet:
            pages.save(sheet)
        return Summary(
            output=str(output),
            sheet=str(sheet) if sheet else None,
            model=config.name,
            revision=self.pipeline.revision,
            seed=self.story.seed,
            shots=video.shots,
            frames=video.frames,
            seconds=round(times[-1], 3),
            fps=round(video.frames / times[-1], 2),
            first_frame_s=round(times[0], 3),
            load_s=round(self.load_s, 3),
            video_seconds=round(video.frames / self.fps, 3),
            memory_gb=round(peak_memory(str(self.pipeline.dit.device)) / 1e9, 3),
            fast=self.pipeline.fast.names,
        )

    def recipe(self) -> str:
        """Everything needed to make the video again, as JSON for its metadata."""
        keys = ("id", "global_caption", "caption", "seed", "chunks")
        made = {
            "shotstream": version("shotstream"),
            "model": self.pipeline.config.name,
            "revision": self.pipeline.revision,
            **({"fast": self.pipeline.fast.names} if self.pipeline.fast else {}),
            **({} if self.policy is None else {"policy": str(self.policy)}),
            "seed": self.story.seed,
            "shots": [{key: asdict(shot)[key] for key in keys} for shot in self.shots],
        }
        return json.dumps(made, ensure_ascii=False)

    def _session(self, project: str | Path | None, resume: bool) -> Session:
        """Every shot planned, or found in the project."""
        if project is not None and not resume and (Path(project) / "project.json").exists():
            raise ProjectError(f"{project}: holds a project already; resume it (--resume), or choose another folder")
        session = Session(self.pipeline, self.story, project, policy=self.policy)
        session.play()  # it may have been paused when it was left
        return session


def find_device(name: str) -> str:
    """A device that computes; "auto" is a GPU if there is one. Raises DeviceError."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # no such device, or not in this build of torch
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise DeviceError(f"device {name!r}: {reason}; use cpu or auto") from None
    return name
