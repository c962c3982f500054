"""What a command says when it cannot go on: one line for people, an event for programs, and an exit code.

0 ok, 1 failed, 2 usage or invalid story, 3 missing model or extra, 4 out of memory, 130 interrupted.
"""

from __future__ import annotations

import contextlib
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
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message, code = "out of memory; use a smaller model or another --device", OUT_OF_MEMORY
    if json_events:
        event("error", message=message, code=code)
    print(f"shotstream: {message}", file=sys.stderr)
    raise typer.Exit(code)


def is_out_of_memory(error: Exception) -> bool:
    """Torch raises its own error on a GPU, and on a CPU a RuntimeError that only its text tells apart."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
