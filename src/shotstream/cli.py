"""The command line: `shotstream generate`, `shotstream story ...`, `shotstream doctor`.

Exit codes: 0 ok, 1 failed, 2 usage or invalid story, 3 missing model or extra, 4 out of memory,
130 interrupted.
Torch is imported only by the commands that compute, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shotstream.errors import (
    FAILED,
    INTERRUPTED,
    MISSING,
    OUT_OF_MEMORY,
    USAGE,
    Failure,
    is_out_of_memory,
    one_line_errors,
)
from shotstream.evaluation.commands import eval_app
from shotstream.train.commands import train_app

if TYPE_CHECKING:
    from shotstream.config import Config
    from shotstream.pipeline import Pipeline
    from shotstream.progress import Planned, Report, Summary
    from shotstream.story import Story
    from shotstream.video import VideoWriter

app = typer.Typer(
    help="Direct video while it is being made.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
story_app = typer.Typer(help="Write, check and convert story files.", no_args_is_help=True)
app.add_typer(story_app, name="story")
app.add_typer(train_app, name="train")
app.add_typer(eval_app, name="eval")

def main() -> None:
    """The console command."""
    app()


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        print(f"shotstream {version('shotstream')}")
        raise typer.Exit


# generate

StoryFile = Annotated[Path, typer.Argument(metavar="STORY", help="Story file: .yaml, .json or .txt.")]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Video: .mp4, .webm or .gif.", show_default="the story's name, .mp4"),
]
Model = Annotated[str, typer.Option(help="Name of a built-in model, or path of a model file.")]
Seed = Annotated[
    int | None, typer.Option(min=0, max=2**63 - 1, metavar="N", help="Use instead of the story's seed.")
]
Sheet = Annotated[Path | None, typer.Option(help="Also write a contact sheet: .png, .jpg or .webp.")]
Scale = Annotated[
    int | None,
    typer.Option(min=1, max=8, help="Enlarge the frames.", show_default="small frames fill a player"),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, ... or auto: a GPU if there is one.")]


@app.command()
def generate(
    story: StoryFile,
    output: Output = None,
    model: Model = "storybook",
    seed: Seed = None,
    sheet: Sheet = None,
    scale: Scale = None,
    device: Device = "auto",
    json_events: Annotated[bool, typer.Option("--json", help="Print events as JSON lines.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, print the plan, stop.")] = False,
) -> None:
    """Make a video of a story; it grows shot by shot while the story is told."""
    from shotstream.progress import report
    from shotstream.story import Story

    with one_line_errors(json_events):
        tale = Story.from_file(story)
        if seed is not None:
            tale = tale.model_copy(update={"seed": seed})
        output = output or Path(f"{story.stem}.mp4")
        _check_outputs(output, sheet)
        pipeline, load_s = _timed_load(model, device)
        shots = plan(tale, pipeline.config, str(story))
        told = report(json_events, dry_run)
        for warning in warnings(tale, pipeline, shots):
            told.warning(warning)
        told.plan(tale.title, pipeline.config.name, tale.fps or pipeline.config.fps, tale.seed, shots)
        if not dry_run:
            told.summary(_make(tale, pipeline, shots, output, sheet, scale, told, load_s))


def plan(story: Story, config: Config, name: str) -> list[Planned]:
    """Every shot with its length, seed and context. Raises Failure for what cannot be done."""
    from shotstream.progress import Planned

    if story.size and story.size != (config.width, config.height):
        made = f"{config.name} makes [{config.width}, {config.height}]"
        raise Failure(f"{name}: size: {made}, not {list(story.size)}; remove the key", USAGE)
    shots: list[Planned] = []
    for i, shot in enumerate(story.shots):
        if unused := [key for key in ("memory", "loras") if shot.model_dump(exclude_defaults=True).get(key)]:
            where = f"{name}: shot {i + 1} ({shot.id}): {unused[0]}"
            raise Failure(f"{where}: cannot be used by `generate` yet; remove the key", USAGE)
        context = config.policy.boundary((), (), True, [past.frames for past in shots]).prefill
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
                remembers=tuple(
                    f"{shots[past.shot].id}@{past.offset}" for past in context if past.offset >= 0
                ),
            )
        )
    return shots


def warnings(story: Story, pipeline: Pipeline, shots: Sequence[Planned]) -> Iterator[str]:
    """What a writer should know before waiting: words the model cannot read, rounded lengths, unused keys."""
    if story.negative:
        yield "negative: is not read, for this model works without guidance"
    said = ""
    for i, shot in enumerate(shots):
        where = f"shot {shot.number} ({shot.id})"
        if shot.global_caption != said:
            said = shot.global_caption
            yield from (f"{where}: global_caption: {text}" for text in pipeline.text.warnings(said))
        yield from (f"{where}: caption: {text}" for text in pipeline.text.warnings(shot.caption))
        if note := story.length_at(i, pipeline.config).note:
            yield f"{where}: {note}, for shots are made of whole chunks"


def _check_outputs(output: Path, sheet: Path | None) -> None:
    from shotstream.video import SHEET_KINDS, VideoError, check_output

    try:
        check_output(output)
        if sheet:
            check_output(sheet, SHEET_KINDS)
    except VideoError as error:
        raise Failure(str(error), USAGE) from None


def _timed_load(model: str, device: str) -> tuple[Pipeline, float]:
    """The model, and the seconds it took to load."""
    import torch

    from shotstream.pipeline import ModelError, load

    started = time.perf_counter()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or this torch was built without it
        raise Failure(f"device {device!r}: {str(error).splitlines()[0]}; use cpu or auto", USAGE) from None
    try:
        return load(model, device=device), time.perf_counter() - started
    except ModelError as error:
        raise Failure(str(error), MISSING) from None


def _make(
    story: Story,
    pipeline: Pipeline,
    shots: Sequence[Planned],
    output: Path,
    sheet_path: Path | None,
    scale: int | None,
    told: Report,
    load_s: float,
) -> Summary:
    """Generate into the output file, and the sheet's if there is one."""
    from shotstream.progress import Summary
    from shotstream.session import Session
    from shotstream.video import ContactSheet, VideoWriter, display_scale

    config = pipeline.config
    size, fps = (config.width, config.height), story.fps or config.fps
    sheet = ContactSheet(story.title)
    made = _how_made(story, pipeline, shots)
    video = VideoWriter(output, fps, size, scale or display_scale(size), title=story.title, comment=made)
    started, first_frame_s, seconds = time.perf_counter(), 0.0, 0.0
    with _tell_what_is_kept(video), _stop_after_chunk() as stop, video, told:
        session = Session(pipeline, seed=story.seed)
        for shot in shots:
            words = {"caption": shot.caption, "global_caption": shot.global_caption}
            session.cut(**words, seed=shot.seed, chunks=shot.chunks, id=shot.id)
        for chunk in session.stream():
            seconds = time.perf_counter() - started
            first_frame_s = first_frame_s or seconds
            shot = shots[chunk.shot.index]
            if chunk.index == 0:
                video.begin_shot(f"{shot.number}. {shot.caption}"[:120])
                sheet.begin_shot(shot.caption, shot.frames)
            video.write(chunk.frames)
            sheet.write(chunk.frames)
            if chunk.is_last:
                video.end_shot()
            told.chunk(shot, chunk, seconds)
            if stop:
                raise KeyboardInterrupt
    if sheet_path:
        sheet.save(sheet_path)
    return Summary(
        output=str(output),
        sheet=str(sheet_path) if sheet_path else None,
        model=config.name,
        revision=pipeline.revision,
        seed=story.seed,
        shots=video.shots,
        frames=video.frames,
        seconds=round(seconds, 3),
        fps=round(video.frames / seconds, 2),
        first_frame_s=round(first_frame_s, 3),
        load_s=round(load_s, 3),
        video_seconds=round(video.frames / fps, 3),
    )


def _how_made(story: Story, pipeline: Pipeline, shots: Sequence[Planned]) -> str:
    """Everything needed to make the video again, as JSON for its metadata."""
    keys = ("id", "global_caption", "caption", "seed", "chunks")
    made = {
        "shotstream": version("shotstream"),
        "model": pipeline.config.name,
        "revision": pipeline.revision,
        "seed": story.seed,
        "shots": [{key: getattr(shot, key) for key in keys} for shot in shots],
    }
    return json.dumps(made, ensure_ascii=False)


@contextlib.contextmanager
def _tell_what_is_kept(video: VideoWriter) -> Iterator[None]:
    """When generating ends early, say which shots are in the file."""
    try:
        yield
    except KeyboardInterrupt:
        raise Failure(f"interrupted; {_kept(video)}", INTERRUPTED) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "out of memory; use fewer chunks per shot or a smaller model"
        raise Failure(f"{remedy}; {_kept(video)}", OUT_OF_MEMORY) from None


def _kept(video: VideoWriter) -> str:
    if not video.shots:
        return "no shot was finished, so nothing was written"
    shots = "the finished shot is" if video.shots == 1 else f"the {video.shots} finished shots are"
    return f"{shots} in {video.path} ({video.frames} frames)"


@contextlib.contextmanager
def _stop_after_chunk() -> Iterator[list[int]]:
    """Ctrl-C fills the list, and the chunk under way is finished first; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(signal.SIGINT, before)
        print("stopping after this chunk; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


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

StoryOutput = Annotated[
    Path | None, typer.Option("-o", "--output", help="File to write.", show_default="print the story")
]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if there is one.")]


@story_app.command("check")
def story_check(
    stories: Annotated[list[Path], typer.Argument(metavar="STORY...", help="Story files.")],
    model: Annotated[str | None, typer.Option(help="Also check the words against this model's.")] = None,
) -> None:
    """Say whether stories are valid, and if not, what to do."""
    from shotstream.progress import counted
    from shotstream.story import Story

    with one_line_errors():
        pipeline = _timed_load(model, "cpu")[0] if model else None
        for path in stories:
            story = Story.from_file(path)
            if pipeline:
                for warning in warnings(story, pipeline, plan(story, pipeline.config, str(path))):
                    print(f"warning: {path}: {warning}", file=sys.stderr)
            print(f"{path}: ok, {counted(len(story.shots), 'shot')}")


@story_app.command("show")
def story_show(
    path: StoryFile, model: Annotated[str, typer.Option(help="Whose lengths to show.")] = "storybook"
) -> None:
    """Print a story as a model reads it: captions written out, with lengths and seeds."""
    from shotstream.config import PRESETS
    from shotstream.progress import counted
    from shotstream.story import Story

    with one_line_errors():
        if model not in PRESETS:
            raise Failure(f"unknown model {model!r}; use one of {', '.join(PRESETS)}", MISSING)
        story, said = Story.from_file(path), ""
        print(f"{story.title or path}: {counted(len(story.shots), 'shot')}, seed {story.seed}")
        for i, shot in enumerate(story.shots):
            if story.global_at(i) != said:
                said = story.global_at(i)
                print(f"\n{said}")
            length = story.length_at(i, PRESETS[model])
            print(f"\n{i + 1} {shot.id}: {length.frames} frames, seed {story.seed_at(i)}")
            print(f"  {story.expanded(i)}")


@story_app.command("new")
def story_new(output: StoryOutput = None, force: Force = False) -> None:
    """Write a small story to start from."""
    with one_line_errors():
        _write(output, _NEW, force)


@story_app.command("convert")
def story_convert(path: StoryFile, output: StoryOutput = None, force: Force = False) -> None:
    """Rewrite a story as .yaml (ours) or .json (the ShotStream release's); says what is lost."""
    from shotstream.formats import lost_in_reference, to_reference
    from shotstream.story import Story

    with one_line_errors():
        story = Story.from_file(path)
        kind = output.suffix.lower() if output else ".yaml"
        if kind in (".yaml", ".yml"):
            text = story.dump()
        elif kind == ".json":
            text = json.dumps(to_reference(story), ensure_ascii=False, indent=2) + "\n"
            if lost := lost_in_reference(story):
                print(f"warning: {output}: cannot hold {', '.join(lost)}", file=sys.stderr)
        else:
            raise Failure(f"{output}: unknown kind of story {kind!r}; use .yaml or .json", USAGE)
        _write(output, text, force)


def _write(path: Path | None, text: str, force: bool) -> None:
    """Write a whole file or none; without a path, print."""
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
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Failure(f"{path}: {error.strerror}; check the path and its permissions", FAILED) from None
    print(path)


# doctor


@app.command()
def doctor() -> None:
    """Say what is here and what is missing. Exit code 3 if `generate` would not work."""
    import platform

    import av
    import torch

    with one_line_errors():
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        missing = [name for name in ("libx264", "libvpx-vp9", "gif") if name not in av.codecs_available]
        print(
            f"shotstream  {version('shotstream')}, Python {platform.python_version()} on {platform.machine()}"
        )
        print(f"torch       {torch.__version__}, {torch.get_num_threads()} threads, {memory:.0f} GiB memory")
        print(f"GPU         {', '.join(gpus) or 'none; the storybook model needs none'}")
        print(
            f"video       av {version('av')}, "
            + (f"without {', '.join(missing)}" if missing else "all encoders")
        )
        print(f"extra wan   {_installed('transformers', 'wan')}")
        pipeline, load_s = _timed_load("storybook", "cpu")
        print(f"storybook   revision {pipeline.revision[:12]}, loaded in {load_s:.1f} s")
        if missing:
            raise Failure(
                "encoders are missing; install PyAV's own wheel: pip install --force-reinstall av", MISSING
            )


def _installed(package: str, extra: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"not installed; pip install 'shotstream[{extra}]'"
