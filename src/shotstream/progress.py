"""How generating is told: a bar on a terminal, lines in a pipe, JSON lines for programs. No torch."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from rich.progress import Progress

    from shotstream.film import Film, Planned, Summary
    from shotstream.session import Chunk


class Report(Protocol):
    """What `generate` tells. A context while chunks arrive."""

    def warning(self, text: str) -> None: ...
    def plan(self, film: Film) -> None: ...
    def chunk(self, shot: Planned, chunk: Chunk, seconds: float) -> None: ...
    def summary(self, summary: Summary) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...


def report(json_events: bool, rehearsal: bool) -> Report:
    """The report for this place. rehearsal: nothing but the plan will follow, so tell all of it."""
    if json_events:
        return JsonReport()
    if rehearsal:
        return PlanReport()
    return BarReport() if sys.stdout.isatty() else LineReport()


def event(name: str, **fields: Any) -> None:
    """One JSON line, in ASCII: whatever the terminal's encoding, it can be read back."""
    print(json.dumps({"event": name, **fields}), flush=True)


class JsonReport:
    """One JSON object per line: warning, plan, chunk, summary (and error, from the command)."""

    def warning(self, text: str) -> None:
        event("warning", message=text)

    def plan(self, film: Film) -> None:
        event(
            "plan",
            title=film.story.title,
            model=film.pipeline.config.name,
            video_fps=film.fps,
            seed=film.story.seed,
            shots=[asdict(shot) for shot in film.shots],
        )

    def chunk(self, shot: Planned, chunk: Chunk, seconds: float) -> None:
        event(
            "chunk",
            shot=shot.number,
            id=shot.id,
            chunk=chunk.index + 1,
            chunks=chunk.chunks,
            is_last=chunk.is_last,
            frames=len(chunk.frames),
            seconds=round(seconds, 3),
            timings={name: round(value, 4) for name, value in chunk.timings.items()},
        )

    def summary(self, summary: Summary) -> None:
        event("summary", **asdict(summary))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class LineReport:
    """Plain lines."""

    def warning(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def plan(self, film: Film) -> None:
        frames, title = sum(shot.frames for shot in film.shots), film.story.title or "untitled"
        length = f"{frames} frames, {frames / film.fps:.1f} s at {film.fps} fps"
        model = f"model {film.pipeline.config.name}, seed {film.story.seed}"
        print(f"{title}: {counted(len(film.shots), 'shot')}, {length}, {model}", flush=True)

    def chunk(self, shot: Planned, chunk: Chunk, seconds: float) -> None:
        place = f"shot {shot.number} ({shot.id}), chunk {chunk.index + 1} of {chunk.chunks}"
        print(f"{seconds:7.2f} s  {place}", flush=True)

    def summary(self, summary: Summary) -> None:
        speed = f"{summary.fps:.1f} fps, first after {summary.first_frame_s:.2f} s"
        took = f"{summary.seconds:.1f} s ({speed}) and {summary.memory_gb:.1f} GB of memory"
        print(f"{summary.output}: {summary.frames} frames in {took}")
        if summary.sheet:
            print(f"{summary.sheet}: contact sheet")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class PlanReport(LineReport):
    """A rehearsal: every shot, its length, seed and what it will see of the past."""

    def plan(self, film: Film) -> None:
        super().plan(film)
        for shot in film.shots:
            length = f"{shot.frames} frames ({counted(shot.chunks, 'chunk')})"
            print(f"{shot.number} {shot.id}: {length}, seed {shot.seed}")
            print(f"    {shot.caption}")
            print(f"    remembers {' '.join(shot.remembers) or 'nothing'}")


class BarReport(LineReport):
    """A progress bar instead of a line per chunk."""

    _bar: Progress

    def plan(self, film: Film) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        super().plan(film)
        text = TextColumn("{task.description}", markup=False)
        self._bar = Progress(text, BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._task = self._bar.add_task("starting", total=sum(shot.frames for shot in film.shots))
        self._shots = len(film.shots)

    def chunk(self, shot: Planned, chunk: Chunk, seconds: float) -> None:
        place = f"shot {shot.number} of {self._shots} ({shot.id})"
        self._bar.update(self._task, advance=len(chunk.frames), description=place)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def counted(number: int, noun: str) -> str:
    """ "1 shot", "2 shots"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
