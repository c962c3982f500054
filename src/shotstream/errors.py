"""What a command says when it cannot go on: one line for people, an event for programs, and an exit code.

0 ok, 1 failed, 2 usage or invalid story, 3 missing model or extra, 4 out of memory, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import typer

FAILED, USAGE, MISSING, OUT_OF_MEMORY, INTERRUPTED = 1, 2, 3, 4, 130


class Failure(Exception):
    """A command that ends early: one line for people, and an exit code."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def one_line_errors(json_events: bool = False) -> Iterator[None]:
    """What a user can get wrong becomes one line on stderr (and an event); a defect keeps its traceback."""
    from shotstream.progress import event
    from shotstream.story import StoryError

    try:
        yield
        sys.stdout.flush()
    except (Failure, StoryError, KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
        message, code = _explained(error)
        if not message:
            raise
        message = "; ".join((message, *getattr(error, "__notes__", ())))  # such as what was kept of a video
        _drop_what_cannot_be_printed()
        print(f"shotstream: {message}", file=sys.stderr)
        if json_events:
            event("error", message=message, code=code)
        raise typer.Exit(code) from None


def _explained(error: BaseException) -> tuple[str, int]:
    """The line and the exit code of an error; no line for a defect of ours."""
    from shotstream.story import StoryError
    from shotstream.video import VideoError

    match error:
        case Failure():
            return str(error), error.code
        case StoryError():
            return str(error), USAGE
        case VideoError():
            return str(error), FAILED
        case BrokenPipeError():
            return "nobody reads the output any more", FAILED
        case OSError():
            where = f"{error.filename}: " if error.filename else ""
            return f"{where}{error.strerror}; check the path, its permissions and the space there", FAILED
        case KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case Exception() if is_out_of_memory(error):
            return "out of memory; use fewer chunks per shot, or a smaller model", OUT_OF_MEMORY
    return "", FAILED


def _drop_what_cannot_be_printed() -> None:
    """Without its reader, or on a full disk, Python would try again when it ends, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_out_of_memory(error: Exception) -> bool:
    """Torch raises its own error on a GPU, and on a CPU a RuntimeError that only its text tells apart."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
