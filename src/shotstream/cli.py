"""The command line: `shotstream generate`, `shotstream story ...`, `shotstream doctor`.

Exit codes: 0 ok, 1 failed, 2 usage or invalid story, 3 missing model or extra, 4 out of memory, 130 interrupted.
Torch is imported only by the commands that compute, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

if TYPE_CHECKING:
    from shotstream.config import Config
    from shotstream.pipeline import Pipeline
    from shotstream.session import Chunk
    from shotstream.story import Length, Story
    from shotstream.video import VideoWriter

app = typer.Typer(
    help="Direct video while it is being made.", no_args_is_help=True, pretty_exceptions_enable=False
)
story_app = typer.Typer(help="Write, check and convert story files.", no_args_is_help=True)
app.add_typer(story_app, name="story")

FAILED, USAGE, MISSING, OUT_OF_MEMORY, INTERRUPTED = 1, 2, 3, 4, 130


class Failure(Exception):
    """A command that ends early: one line for people, and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def main() -> None:
    """The console command."""
    app()


@contextlib.contextmanager
def _one_line_errors(json_events: bool = False) -> Iterator[None]:
    """What can go wrong for a user becomes one line on stderr (and an event); a defect keeps its traceback."""
    from shotstream.story import StoryError
    from shotstream.video import VideoError

    try:
        yield
        return
    except StoryError as error:
        message, code = str(error), USAGE
    except VideoError as error:
        message, code = str(error), FAILED
    except Failure as error:
        message, code = str(error), error.code
    except KeyboardInterrupt:
        message, code = "interrupted", INTERRUPTED
    if json_events:
        _event("error", message=message, code=code)
    print(f"shotstream: {message}", file=sys.stderr)
    raise typer.Exit(code)


def _event(name: str, **fields: Any) -> None:
    print(json.dumps({"event": name, **fields}, ensure_ascii=False), flush=True)


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        print(f"shotstream {version('shotstream')}")
        raise typer.Exit


# generate


@app.command()
def generate(
    story: Annotated[Path, typer.Argument(help="Story file: .yaml, .json or .txt.")],
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Video: .mp4, .webm or .gif. [default: STORY's name, .mp4]"),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A built-in model's name, or a folder with weights.")
    ] = "storybook",
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="Instead of the story's seed.")
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Also write a contact sheet: .png, .jpg or .webp.")
    ] = None,
    scale: Annotated[
        int | None, typer.Option(min=1, max=8, help="Enlarge frames; small ones are by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ..., or auto.")] = "auto",
    json_events: Annotated[bool, typer.Option("--json", help="Print events as JSON lines.")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="Check everything and print the plan; make no video.")
    ] = False,
) -> None:
    """Make a video of a story, streaming it to a file shot by shot."""
    from shotstream.story import Story

    with _one_line_errors(json_events):
        tale = Story.from_file(story)
        if seed is not None:
            tale = tale.model_copy(update={"seed": seed})
        output = output or Path(f"{story.stem}.mp4")
        _check_outputs(output, sheet)
        started = time.perf_counter()
        pipeline = _load(model, device)
        load_s = time.perf_counter() - started
        plan = _plan(tale, pipeline.config, str(story))
        report = _report(json_events)
        for warning in _warnings(tale, pipeline, plan):
            report.warning(warning)
        report.start(tale, pipeline.config, plan, dry_run)
        if not dry_run:
            take = _make(tale, pipeline, plan, output, sheet, scale, report)
            report.summary({**take, "load_s": round(load_s, 3), "model": model, "seed": tale.seed})


@dataclass(frozen=True)
class Planned:
    """A shot as it will be made. `remembers`: frames of earlier shots it will see, as `id@frame`."""

    number: int
    id: str
    caption: str
    global_caption: str
    seed: int
    length: Length
    remembers: tuple[str, ...]


def _plan(story: Story, config: Config, name: str) -> list[Planned]:
    """Every shot with its length, seed and context. Raises Failure for what this model cannot do."""
    from shotstream.memory.policies.dual_buffer import context_picks

    if story.size and story.size != (config.width, config.height):
        wanted = f"[{config.width}, {config.height}]"
        raise Failure(f"{name}: size: {config.name} makes {wanted}, not {list(story.size)}; remove it", USAGE)
    plan: list[Planned] = []
    for i, shot in enumerate(story.shots):
        for field in ("memory", "loras"):
            if shot.model_dump(exclude_defaults=True).get(field):
                where = f"{name}: shot {i + 1} ({shot.id}): {field}"
                raise Failure(f"{where}: cannot be used by `generate` yet; remove it", USAGE)
        picks = context_picks([p.length.frames for p in plan], config.policy.budget, config.policy.remainder)
        plan.append(
            Planned(
                i + 1,
                shot.id,
                story.expanded(i),
                story.global_at(i),
                story.seed_at(i),
                story.length_at(i, config),
                tuple(f"{plan[past].id}@{frame}" for past, frame in picks),
            )
        )
    return plan


def _warnings(story: Story, pipeline: Pipeline, plan: list[Planned]) -> list[str]:
    """What a writer should know before waiting: words the model does not know, rounded lengths, unused keys."""
    warnings = []
    if story.negative:
        warnings.append("negative: this model works without guidance and does not read it")
    said = ""
    for shot in plan:
        where = f"shot {shot.number} ({shot.id})"
        if shot.global_caption != said:
            said = shot.global_caption
            warnings += [f"{where}: global_caption: {text}" for text in pipeline.text.warnings(said)]
        warnings += [f"{where}: caption: {text}" for text in pipeline.text.warnings(shot.caption)]
        if shot.length.note:
            warnings.append(f"{where}: {shot.length.note}: shots are made of whole chunks")
    return warnings


def _check_outputs(output: Path, sheet: Path | None) -> None:
    from shotstream.video import SHEET_KINDS, VideoError, check_output

    try:
        check_output(output)
        if sheet:
            check_output(sheet, SHEET_KINDS)
    except VideoError as error:
        raise Failure(str(error), USAGE) from None


def _load(model: str, device: str) -> Pipeline:
    import torch

    from shotstream.pipeline import ModelError, load

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return load(model, device=device)
    except ModelError as error:
        raise Failure(str(error), MISSING) from None


def _make(
    story: Story,
    pipeline: Pipeline,
    plan: list[Planned],
    output: Path,
    sheet_path: Path | None,
    scale: int | None,
    report: Report,
) -> dict[str, Any]:
    """Generate into the output file; the summary's fields."""
    from shotstream.session import Session
    from shotstream.video import ContactSheet, VideoWriter, display_scale

    config = pipeline.config
    size, fps = (config.width, config.height), story.fps or config.fps
    sheet = ContactSheet(story.title)
    video = VideoWriter(
        output,
        fps,
        size,
        scale or display_scale(size),
        title=story.title,
        comment=_comment(story, config, plan),
    )
    started, first_frame_s = time.perf_counter(), 0.0
    with _kept_when_stopped(video), video, report, _stop_after_chunk() as stop:
        session = Session(pipeline, seed=story.seed)
        for shot in plan:
            session.cut(
                shot.caption,
                global_caption=shot.global_caption,
                seed=shot.seed,
                chunks=shot.length.chunks,
                id=shot.id,
            )
        for chunk in session.stream():
            first_frame_s = first_frame_s or time.perf_counter() - started
            shot = plan[chunk.shot.index]
            if chunk.index == 0:
                video.begin_shot(f"{shot.number}. {shot.caption}"[:120])
                sheet.begin_shot(shot.caption, shot.length.frames)
            video.write(chunk.frames)
            sheet.write(chunk.frames)
            if chunk.is_last:
                video.end_shot()
            report.chunk(shot, chunk, time.perf_counter() - started)
            if stop:
                raise KeyboardInterrupt
    seconds = time.perf_counter() - started
    if sheet_path:
        sheet.save(sheet_path)
    return {
        "output": str(output),
        "sheet": str(sheet_path) if sheet_path else None,
        "shots": video.shots,
        "frames": video.frames,
        "seconds": round(seconds, 3),
        "fps": round(video.frames / seconds, 2),
        "first_frame_s": round(first_frame_s, 3),
        "video_seconds": round(video.frames / fps, 3),
    }


def _comment(story: Story, config: Config, plan: list[Planned]) -> str:
    """How the video was made, as JSON for its metadata."""
    shots = [
        {
            "id": shot.id,
            "global_caption": shot.global_caption,
            "caption": shot.caption,
            "seed": shot.seed,
            "chunks": shot.length.chunks,
        }
        for shot in plan
    ]
    made = {"shotstream": version("shotstream"), "model": config.name, "seed": story.seed, "shots": shots}
    return json.dumps(made, ensure_ascii=False)


@contextlib.contextmanager
def _kept_when_stopped(video: VideoWriter) -> Iterator[None]:
    """Say which shots are in the file when generating ends early."""
    import torch

    try:
        yield
    except KeyboardInterrupt:
        raise Failure(f"interrupted; {_kept(video)}", INTERRUPTED) from None
    except (MemoryError, torch.OutOfMemoryError) as error:
        remedy = "use fewer chunks per shot, or a smaller model"
        raise Failure(f"out of memory; {remedy}; {_kept(video)}", OUT_OF_MEMORY) from error


def _kept(video: VideoWriter) -> str:
    if not video.shots:
        return "no shot was finished, so nothing was written"
    shots = "the finished shot is" if video.shots == 1 else f"the {video.shots} finished shots are"
    return f"{shots} in {video.path} ({video.frames} frames)"


@contextlib.contextmanager
def _stop_after_chunk() -> Iterator[list[int]]:
    """Ctrl-C asks to stop (the list is then not empty) instead of tearing a chunk; a second one stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)
        print("stopping after this chunk; press Ctrl-C again to stop at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


# Progress: a bar on a terminal, lines in a pipe, JSON lines for programs


class Report(Protocol):
    """Tells how generating goes. A context while chunks arrive."""

    def warning(self, text: str) -> None: ...
    def start(self, story: Story, config: Config, plan: list[Planned], dry_run: bool) -> None: ...
    def chunk(self, shot: Planned, chunk: Chunk, seconds: float) -> None: ...
    def summary(self, fields: dict[str, Any]) -> None: ...
    def __enter__(self) -> object: ...
    def __exit__(self, *error: object) -> None: ...


def _report(json_events: bool) -> Report:
    if json_events:
        return JsonReport()
    return BarReport() if sys.stdout.isatty() else LineReport()


class JsonReport(contextlib.AbstractContextManager["JsonReport"]):
    """One JSON object per line: start, warning, chunk, summary, error."""

    def warning(self, text: str) -> None:
        _event("warning", message=text)

    def start(self, story: Story, config: Config, plan: list[Planned], dry_run: bool) -> None:
        shots = [
            {
                "shot": shot.number,
                "id": shot.id,
                "seed": shot.seed,
                "chunks": shot.length.chunks,
                "frames": shot.length.frames,
                "remembers": shot.remembers,
            }
            for shot in plan
        ]
        _event(
            "plan" if dry_run else "start", title=story.title, model=config.name, seed=story.seed, shots=shots
        )

    def chunk(self, shot: Planned, chunk: Chunk, seconds: float) -> None:
        _event(
            "chunk",
            shot=shot.number,
            id=shot.id,
            chunk=chunk.index + 1,
            chunks=shot.length.chunks,
            frames=len(chunk.frames),
            is_last=chunk.is_last,
            seconds=round(seconds, 3),
            timings={name: round(value, 4) for name, value in chunk.timings.items()},
        )

    def summary(self, fields: dict[str, Any]) -> None:
        _event("summary", **fields)

    def __exit__(self, *error: object) -> None:
        pass


class LineReport(contextlib.AbstractContextManager["LineReport"]):
    """Plain lines."""

    def warning(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr)

    def start(self, story: Story, config: Config, plan: list[Planned], dry_run: bool) -> None:
        frames, fps = sum(shot.length.frames for shot in plan), story.fps or config.fps
        print(
            f"{story.title or 'untitled'}: {len(plan)} shots, {frames} frames, {frames / fps:.1f} s at {fps} fps, "
            f"model {config.name}, seed {story.seed}",
            flush=True,
        )
        for shot in plan if dry_run else ():
            print(f"  {shot.number} {shot.id}: {shot.length.frames} frames, seed {shot.seed}")
            print(f"    {shot.caption}")
            print(f"    remembers {' '.join(shot.remembers) or 'nothing'}")

    def chunk(self, shot: Planned, chunk: Chunk, seconds: float) -> None:
        print(
            f"shot {shot.number} ({shot.id}), chunk {chunk.index + 1} of {shot.length.chunks}: {seconds:.2f} s",
            flush=True,
        )

    def summary(self, fields: dict[str, Any]) -> None:
        print(
            f"{fields['output']}: {fields['frames']} frames in {fields['seconds']:.1f} s ({fields['fps']:.1f} fps), "
            f"first after {fields['first_frame_s']:.2f} s"
        )
        if fields["sheet"]:
            print(f"{fields['sheet']}: contact sheet")

    def __exit__(self, *error: object) -> None:
        pass


class BarReport(LineReport):
    """A progress bar instead of a line per chunk."""

    def start(self, story: Story, config: Config, plan: list[Planned], dry_run: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        super().start(story, config, plan, dry_run)
        self._shots = len(plan)
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        )
        self._task = self._bar.add_task("starting", total=sum(shot.length.frames for shot in plan))

    def chunk(self, shot: Planned, chunk: Chunk, seconds: float) -> None:
        done = f"shot {shot.number} of {self._shots} ({shot.id})"
        self._bar.update(self._task, advance=len(chunk.frames), description=done)

    def __enter__(self) -> BarReport:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


# story

_NEW = """\
# A story: shots that follow each other, told to the model one caption at a time.
# Name looks once ("a green bear in a crown"); after that "the bear" is enough.
shotstream: 1
title: My story
global_caption: A story about a bear and a frog.
seed: 7
shots:
  - id: start
    caption: A wide shot of a green bear in a crown walking in the forest at sunset.
  - caption: "A close-up: the bear waves in the snow at night."
  - caption: A medium shot of a blue frog in a top hat jumping on the beach by day.
"""

StoryFile = Annotated[Path, typer.Argument(metavar="STORY", help="Story file: .yaml, .json or .txt.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")]


@story_app.command("check")
def story_check(
    stories: Annotated[list[Path], typer.Argument(metavar="STORY...")],
    model: Annotated[str | None, typer.Option(help="Also say which words this model does not know.")] = None,
) -> None:
    """Say whether stories are valid, and what is wrong if not."""
    from shotstream.story import Story

    with _one_line_errors():
        pipeline = _load(model, "cpu") if model else None
        for path in stories:
            story = Story.from_file(path)
            for warning in (
                _warnings(story, pipeline, _plan(story, pipeline.config, str(path))) if pipeline else ()
            ):
                print(f"warning: {path}: {warning}", file=sys.stderr)
            print(f"{path}: ok, {len(story.shots)} shot{'s' if len(story.shots) > 1 else ''}")


@story_app.command("show")
def story_show(
    path: StoryFile,
    model: Annotated[str, typer.Option(help="Whose lengths to show.")] = "storybook",
) -> None:
    """Print a story as the model will read it: captions written out, lengths, seeds."""
    from shotstream.config import PRESETS
    from shotstream.story import Story

    with _one_line_errors():
        if model not in PRESETS:
            raise Failure(f"unknown model {model!r}; use one of {', '.join(PRESETS)}", MISSING)
        story, said = Story.from_file(path), ""
        print(f"{story.title or path}: {len(story.shots)} shots, seed {story.seed}")
        for i, shot in enumerate(story.shots):
            length = story.length_at(i, PRESETS[model])
            if story.global_at(i) != said:
                said = story.global_at(i)
                print(f"\n{said}")
            print(f"\n{i + 1} {shot.id}: {length.frames} frames, seed {story.seed_at(i)}")
            print(f"  {story.expanded(i)}")


@story_app.command("new")
def story_new(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Where to. [default: print it]")
    ] = None,
    force: Force = False,
) -> None:
    """Write a small story to start from."""
    with _one_line_errors():
        _write(output, _NEW, force)


@story_app.command("convert")
def story_convert(
    path: StoryFile,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help=".yaml (ours) or .json (ShotStream's release). [default: print ours]"
        ),
    ] = None,
    force: Force = False,
) -> None:
    """Rewrite a story file in another format; says what the format cannot hold."""
    from shotstream.formats import lost_in_reference, to_reference
    from shotstream.story import Story

    with _one_line_errors():
        story = Story.from_file(path)
        kind = output.suffix.lower() if output else ".yaml"
        if kind in (".yaml", ".yml"):
            text = story.dump()
        elif kind == ".json":
            text = json.dumps(to_reference(story), ensure_ascii=False, indent=2) + "\n"
            if lost := lost_in_reference(story):
                print(f"warning: {output}: the format cannot hold {', '.join(lost)}", file=sys.stderr)
        else:
            raise Failure(f"{output}: unknown kind of story {kind!r}; use .yaml or .json", USAGE)
        _write(output, text, force)


def _write(path: Path | None, text: str, force: bool) -> None:
    if path is None:
        print(text, end="")
        return
    if path.exists() and not force:
        raise Failure(f"{path}: is there already; --force replaces it", USAGE)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}; check the path and its permissions", FAILED) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    print(path)


# doctor


@app.command()
def doctor() -> None:
    """Say what is here and what is missing. Fails (3) if `generate` would not work."""
    import platform

    import av
    import torch

    with _one_line_errors():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        print(
            f"shotstream {version('shotstream')}, Python {platform.python_version()}, {platform.platform()}"
        )
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {memory:.0f} GiB memory")
        print(f"GPU: {', '.join(devices) or 'none (the storybook model needs none)'}")
        codecs = {name: name in av.codecs_available for name in ("libx264", "libvpx-vp9", "gif")}
        print(
            f"video: av {version('av')}, "
            + ", ".join(f"{n} {'ok' if ok else 'MISSING'}" for n, ok in codecs.items())
        )
        print(f"extra 'wan': {_extra('transformers', 'wan')}")
        _load("storybook", "cpu")
        print("model storybook: ok")
        if not all(codecs.values()):
            raise Failure(
                "an encoder is missing; reinstall PyAV from its wheel: pip install --force-reinstall av",
                MISSING,
            )


def _extra(package: str, extra: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"not installed; pip install 'shotstream[{extra}]'"
