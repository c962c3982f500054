"""The command line: `shotstream generate`, `shotstream story ...`, `shotstream doctor`.

Exit codes: 0 ok, 1 failed, 2 usage or invalid story, 3 missing model or extra, 4 out of memory,
130 interrupted.
Torch is imported only by the commands that compute, so that `--help` answers at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shotstream.bench.commands import bench
from shotstream.data.commands import data_app
from shotstream.doctor import advising, doctor
from shotstream.errors import FAILED, MISSING, USAGE, Failure, one_line_errors
from shotstream.evaluation.commands import eval_app
from shotstream.model_commands import models_app
from shotstream.options import AllFast, Fp8, TinyDecoder
from shotstream.project_commands import Resume, Shots, export, resumable, span
from shotstream.server.commands import serve
from shotstream.train.commands import ablate, train_app

if TYPE_CHECKING:
    from shotstream.film import Film, OnChunk, Planned
    from shotstream.pipeline import Loading, Pipeline
    from shotstream.session import Chunk
    from shotstream.story import Story

app = typer.Typer(
    help="Turn a written story into a multi-shot video, shot by shot.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
story_app = typer.Typer(help="Write, check and convert story files.", no_args_is_help=True)
app.add_typer(story_app, name="story")
app.add_typer(train_app, name="train")
app.command("ablate")(ablate)
app.add_typer(data_app, name="data")
app.add_typer(eval_app, name="eval")
app.add_typer(models_app, name="models")
app.command()(doctor)
app.command()(bench)
app.command()(export)
app.command()(serve)


def main() -> None:
    """The console command."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a caption that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    app()


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        print(f"shotstream {version('shotstream')}")
        raise typer.Exit


# generate

StoryFile = Annotated[Path, typer.Argument(metavar="STORY", readable=False, help="Story: .yaml, .json or .txt.")]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Video: .mp4, .webm or .gif.", show_default="the story's name, .mp4"),
]
Model = Annotated[
    str, typer.Option(help="storybook, a published model (`shotstream models list`), or a file or folder of one.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Use instead of the story's seed.")]
Sheet = Annotated[Path | None, typer.Option(help="Also write a contact sheet: .png, .jpg or .webp.")]
Scale = Annotated[
    int | None,
    typer.Option(min=1, max=8, help="Enlarge the frames.", show_default="small frames fill a player"),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, ... or auto: a GPU if there is one.")]
Policy = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What shots remember, as another system has it: self-forcing, longlive, infinity-rope, ...",
        show_default="the model's own",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        help="reference: float32; fast: bfloat16.", show_default="as the model was released, see docs/method.md"
    ),
]
TextDevice = Annotated[
    str | None, typer.Option(help="Where a published model's text encoder computes.", show_default="the device")
]
Offload = Annotated[
    bool, typer.Option("--offload", help="Text encoder and VAE leave the device when they are not at work.")
]
ReleaseName = Annotated[
    str | None, typer.Option(help="Published system that a local checkpoint is of.", show_default="shotstream")
]
Lora = Annotated[Path | None, typer.Option(help="LoRA to merge into a published model.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=VALUE", help="Change the model's configuration: height=240, chunks=5, ..."),
]


@app.command()
def generate(
    story: StoryFile,
    output: Output = None,
    model: Model = "storybook",
    seed: Seed = None,
    sheet: Sheet = None,
    scale: Scale = None,
    device: Device = "auto",
    policy: Policy = None,
    precision: Precision = None,
    text_device: TextDevice = None,
    offload: Offload = False,
    set_: Set = None,
    release: ReleaseName = None,
    lora: Lora = None,
    fast: AllFast = False,
    fp8: Fp8 = False,
    tiny_decoder: TinyDecoder = False,
    project: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep every finished shot there.")] = None,
    resume: Resume = False,
    shots: Shots = None,
    json_events: Annotated[bool, typer.Option("--json", help="Print events as JSON lines.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, print the plan, stop.")] = False,
) -> None:
    """Make a video of a story; it grows shot by shot while the story is told."""
    from shotstream.config import Fast
    from shotstream.progress import report
    from shotstream.story import Story

    with one_line_errors(json_events):
        tale = Story.from_file(story)
        if seed is not None:
            tale = tale.reseeded(seed)
        output = output or Path(f"{story.stem}.mp4")
        _check_outputs(output, sheet)
        chosen = span(shots, "shots", len(tale.shots))
        if resume and project is None:
            raise Failure("--resume: of which project? add --project DIR", USAGE)
        loading: Loading = {"precision": _precision(precision), "text_device": text_device, "offload": offload}
        loading |= {"overrides": set_ or (), "release": release, "lora": lora}
        loading["fast"] = Fast.chosen(fast, fp8, tiny_decoder)
        film = _plan(tale, model, device, str(story), loading, policy)
        told = report(json_events, dry_run)
        for warning in film.warnings():
            told.warning(warning)
        told.plan(film)
        if dry_run:
            return
        with (
            advising(film.pipeline.config, device),
            _stopping_between_chunks(told.chunk) as tell,
            told,
            resumable(story, project),
        ):
            summary = film.make(output, sheet, scale, tell, project=project, resume=resume, shots=chosen)
        told.summary(summary)


def _check_outputs(output: Path, sheet: Path | None) -> None:
    from shotstream.video import VideoError, check_outputs

    try:
        check_outputs(output, sheet)
    except VideoError as error:
        raise Failure(str(error), USAGE) from None


def _precision(name: str | None) -> Literal["reference", "fast"] | None:
    match name:
        case None | "reference" | "fast":
            return name
    raise Failure(f"unknown precision {name!r}; use reference or fast", USAGE)


def _plan(
    story: Story,
    model: str | Pipeline,
    device: str,
    name: str,
    loading: Loading | None = None,
    policy: str | None = None,
) -> Film:
    from shotstream.film import DeviceError, plan
    from shotstream.memory.policies import PolicyError
    from shotstream.pipeline import ModelError

    try:
        return plan(story, model, device, name, policy, **(loading or {}))
    except ModelError as error:
        raise Failure(str(error), error.exit_code) from None
    except (DeviceError, PolicyError) as error:
        raise Failure(str(error), USAGE) from None


@contextlib.contextmanager
def _stopping_between_chunks(tell: OnChunk) -> Iterator[OnChunk]:
    """Ctrl-C (or SIGTERM) raises KeyboardInterrupt after the chunk under way, a second one at once."""
    asked: list[int] = []

    def ask(number: int, frame: object) -> None:
        asked.append(number)
        signal.signal(number, before[number])
        print("stopping after this chunk; Ctrl-C again stops at once", file=sys.stderr, flush=True)

    def tell_and_stop(shot: Planned, chunk: Chunk, seconds: float) -> None:
        tell(shot, chunk, seconds)
        if asked:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, ask) for number in (int(signal.SIGINT), int(signal.SIGTERM))}
    try:
        yield tell_and_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    stories: Annotated[list[Path], typer.Argument(metavar="STORY", readable=False, help="Story files.")],
    model: Annotated[str | None, typer.Option(help="Also check the words against this model's.")] = None,
) -> None:
    """Say whether stories are valid, and if not, what to do."""
    from shotstream.progress import counted
    from shotstream.story import Story

    with one_line_errors():
        reader: str | Pipeline | None = model
        for path in stories:
            story = Story.from_file(path)
            if reader:
                film = _plan(story, reader, "cpu", str(path))
                reader = film.pipeline  # loaded once
                for warning in film.warnings():
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
        reason = f"{error.strerror}; check the path, its permissions and the space there"
        raise Failure(f"{path}: {reason}", FAILED) from None
    print(path)
