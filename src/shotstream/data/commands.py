"""`shotstream data ...`: clips from video files, checked and encoded for training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shotstream.errors import FAILED, MISSING, USAGE, Failure, one_line_errors

if TYPE_CHECKING:
    from shotstream.data.clips import Clip

data_app = typer.Typer(help="Prepare clips from video files for training.", no_args_is_help=True)

Table = Annotated[Path, typer.Argument(metavar="TABLE", help="Clips: .jsonl, or the reference's .csv.")]
Videos = Annotated[
    Path | None, typer.Option(help="Folder that paths of videos begin at.", show_default="that of the table")
]
Threshold = Annotated[float, typer.Option(min=0, max=1, help="How sure TransNet V2 must be of a cut.")]


@data_app.command("check")
def check(table: Table, videos: Videos = None, threshold: Threshold = 0.5) -> None:
    """Open every video of a table and name every row that cannot be trained on. Exit code 1 if there is one."""
    from shotstream.progress import counted

    with one_line_errors():
        clips, bad = _read(table, videos, threshold)
        for line in bad:
            print(line)
        shots = sum(len(clip.shots) for clip in clips)
        print(f"{table}: {counted(len(clips), 'clip')} with {counted(shots, 'shot')} ready, {len(bad)} bad")
        if bad:
            raise typer.Exit(FAILED)


@data_app.command("cache-latents")
def cache_latents(
    table: Table,
    out: Annotated[Path, typer.Option(help="Folder of the shards.")],
    model: Annotated[str, typer.Option(help="Whose autoencoder and text encoder.")] = "wan-1.3b",
    null: Annotated[
        str | None, typer.Option(help="Null text of guidance.", show_default="at Wan size its negative prompt")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    videos: Videos = None,
    threshold: Threshold = 0.5,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out instead of stopping.")] = False,
) -> None:
    """Encode clips once, into shards of 16 that training reads. Shards that exist are kept; `torchrun` shares them."""
    from shotstream.data.clips import BadRow
    from shotstream.data.latents import NEGATIVE, write_latents
    from shotstream.film import DeviceError, find_device
    from shotstream.pipeline import ModelError, load
    from shotstream.train import processes

    with one_line_errors():
        clips, bad = _read(table, videos, threshold)
        if bad and not skip_bad:
            raise Failure(f"{bad[0]} ({len(bad)} bad in all; see `shotstream data check`, or --skip-bad)", FAILED)
        if not clips:
            raise Failure(f"{table}: no clip to encode", USAGE)
        try:
            pipeline = load(model, find_device(device))
        except ModelError as error:
            raise Failure(str(error), MISSING) from None
        except DeviceError as error:
            raise Failure(str(error), USAGE) from None
        nothing = null if null is not None else NEGATIVE if pipeline.config.text.dim == 4096 else ""
        try:
            write_latents(out, clips, pipeline, nothing, processes.start(device))
        except BadRow as error:
            raise Failure(str(error), FAILED) from None
        print(f"{out}: {len(clips)} clips")


def _read(table: Path, videos: Path | None, threshold: float) -> tuple[list[Clip], list[str]]:
    """The clips of a table, and what is wrong with its other rows."""
    from shotstream.data.clips import BadRow, checked, rows

    clips, bad = [], []
    try:
        for where, row in rows(table):
            try:
                if isinstance(row, BadRow):
                    raise row
                clips.append(checked(where, row, videos or table.parent, threshold))
            except BadRow as error:
                bad.append(str(error))
    except BadRow as error:
        raise Failure(str(error), USAGE) from None
    except UnicodeDecodeError as error:
        raise Failure(f"{table}: not UTF-8 text ({error.reason} at byte {error.start})", USAGE) from None
    return clips, bad
