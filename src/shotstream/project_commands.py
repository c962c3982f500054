"""Commands on project folders: `shotstream export`, and what `shotstream generate --project` shares with it."""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from shotstream.errors import FAILED, USAGE, Failure, one_line_errors

Resume = Annotated[bool, typer.Option("--resume", help="Go on with the project; what is made is not made again.")]
Shots = Annotated[str | None, typer.Option(metavar="A-B", help="Write only these shots, such as 2-4 or 3.")]


def export(
    project: Annotated[Path, typer.Argument(metavar="PROJECT", help="A project's folder.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Video: .mp4, .webm or .gif. Or .png: a contact sheet. Or .yaml.")
    ],
    branch: Annotated[str | None, typer.Option(metavar="NAME", help="A branch.", show_default="the head")] = None,
    chapters: Annotated[bool, typer.Option(help="A chapter per shot.")] = True,
    shots: Annotated[str | None, typer.Option("--range", metavar="A-B", help="Only these shots, such as 2-4.")] = None,
    scale: Annotated[int | None, typer.Option(min=1, max=8, help="Enlarge.", show_default="to fill a player")] = None,
    model: Annotated[str | None, typer.Option(help="What it was made with.", show_default="as it says")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ... or auto: a GPU if there is one.")] = "auto",
) -> None:
    """Write the finished shots of a project as a video. It may be open elsewhere meanwhile."""
    from shotstream.film import DeviceError, find_device
    from shotstream.folder import Folder, ProjectError, write
    from shotstream.pipeline import ModelError, load
    from shotstream.project import CommandError
    from shotstream.session import Session
    from shotstream.video import SHEET_KINDS, VIDEO_KINDS, VideoError, check_output

    with one_line_errors():
        try:
            check_output(output, (*VIDEO_KINDS, *SHEET_KINDS, ".yaml"))
        except VideoError as error:
            raise Failure(str(error), USAGE) from None
        try:
            folder = Folder(project, write=False)
            made_with, _ = folder.model()
            session = Session(load(model or made_with, find_device(device)), project=folder)
            chosen, kind = span(shots, "range", len(session.project.line(branch))), output.suffix.lower()
            if kind == ".yaml":
                write(output, session.project.story(branch).dump().encode())
            elif kind in SHEET_KINDS:
                session.contact_sheet(output, shots=chosen, branch=branch)
            else:
                session.export(output, chapters=chapters, shots=chosen, branch=branch, scale=scale)
        except ModelError as error:
            raise Failure(str(error), error.exit_code) from None
        except (CommandError, DeviceError) as error:
            raise Failure(str(error), USAGE) from None
        except (ProjectError, ValueError) as error:
            raise Failure(str(error), FAILED) from None
        print(output)


@contextlib.contextmanager
def resumable(story: Path, project: Path | None) -> Iterator[None]:
    """What a project's folder refuses becomes one line; who interrupts is told how to go on."""
    from shotstream.folder import ProjectError

    try:
        yield
    except ProjectError as error:
        raise Failure(str(error), FAILED) from None
    except KeyboardInterrupt as error:
        if project:
            command = shlex.join(("shotstream", "generate", str(story), "--project", str(project), "--resume"))
            error.add_note(f"go on with: {command}")
        raise


def span(text: str | None, option: str, count: int) -> tuple[int, int] | None:
    """The first and the last of the shots 1 to `count` that "2-4", "3", "2-" or "-4" mean. Raises Failure."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d*)(-?)(\d*)", text)
    if match and (match[1] or match[3]):
        first, last = int(match[1] or 1), int(match[3] or count) if match[2] else int(match[1])
        if 1 <= first <= last <= count:
            return first, last
    raise Failure(f"--{option}: {text!r} is no range of the {count} shots, such as 2-4 or 3", USAGE)
