"""Our path against the released way of doing it: frames per second, first frame, prompt switch (goals G1).

    python -m benchmarks.ratios --model storybook --chunks 7 --shots 5 [--rounds 3] [--out FILE.json]

Both tell the same story in one process, in turns A-B-B-A, with the same weights and the same attention kernel. On a CPU
the clock counts what this process computed, on one thread, and of every shot the fastest telling stands: other programs
only ever add.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.naive import NaiveSession

from shotstream.bench.machine import machine
from shotstream.bench.measurement import captions
from shotstream.bench.probe import Clock, Probe
from shotstream.pipeline import Pipeline, load
from shotstream.session import Session


@dataclass(frozen=True)
class Times:
    """Seconds of a story."""

    whole: float  # all shots after the first
    first_frame: float  # of the story
    switch: float  # from a caption sent while nothing runs to its first frames; the median over shots

    def over(self, other: Times) -> dict[str, float]:
        """Their time over ours."""
        return {name: round(vars(other)[name] / ours, 3) for name, ours in vars(self).items()}


Telling = list[tuple[float, float]]
"""Per shot: seconds from its caption to its first frames, and to its end."""


def fast(pipeline: Pipeline, clock: Clock, shots: int, chunks: int) -> Telling:
    """A story told by a `Session`."""
    session, told = Session(pipeline, seed=3), Telling()
    for caption in captions(shots):
        begun = clock.settled()
        session.cut(caption, chunks=chunks)
        ends = [clock.settled() - begun for _ in session.stream()]
        told.append((ends[0], clock.settled() - begun))
    return told


def naive(pipeline: Pipeline, clock: Clock, shots: int, chunks: int) -> Telling:
    """The same story told the released way: a shot is seen when all of it is there."""
    session, told = NaiveSession(pipeline, seed=3), Telling()
    for caption in captions(shots):
        begun = clock.settled()
        session.shot(caption, chunks)
        told.append((clock.settled() - begun,) * 2)
    return told


def compare(
    pipeline: Pipeline,
    clock: Clock,
    shots: int,
    chunks: int,
    rounds: int,
    enough: Callable[[Times, Times], bool] = lambda fast, naive: False,
) -> tuple[Times, Times]:
    """Times of both ways, fast then naive, after one warm shot of each; of every shot the fastest telling counts.

    After `rounds` rounds, or as soon as they are `enough`.
    """
    ways = (fast, naive)
    for way in ways:
        way(pipeline, clock, 2, chunks)
    found: dict[Callable[..., Telling], list[Telling]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in (*ways, *ways[::-1]):
            found[way].append(way(pipeline, clock, shots, chunks))
        if enough(_best(found[fast]), _best(found[naive])):
            break
    return _best(found[fast]), _best(found[naive])


def _best(tellings: list[Telling]) -> Times:
    shots = list(zip(*tellings, strict=True))  # all tellings of each shot
    firsts, wholes = ([min(told[part] for told in shot) for shot in shots] for part in range(2))
    return Times(sum(wholes[1:]), firsts[0], median(firsts[1:]))


def stages(pipeline: Pipeline, clock: Clock, chunks: int) -> dict[str, float]:
    """Milliseconds of each stage of our second shot: where to look when a ratio is lost."""
    probe, session = Probe(pipeline, clock), Session(pipeline, seed=3)
    for caption in captions(2):
        session.cut(caption, chunks=chunks)
    with probe.watch():
        for chunk in session.stream():
            if chunk.shot.index == 0 and chunk.is_last:
                probe.spans.clear()
    names = ("text", "encode", "prefill", "denoise", "commit", "decode")
    return {name: round(1e3 * sum(probe.seconds(name)), 2) for name in names}


def measure(pipeline: Pipeline, shots: int, chunks: int, rounds: int) -> dict[str, Any]:
    """Both ways and their ratios, with the machine."""
    device = pipeline.dit.device
    clock = Clock(device, "wall" if device.type == "cuda" else "cpu")
    ours, theirs = compare(pipeline, clock, shots, chunks, rounds)
    frames = (shots - 1) * pipeline.config.shot_frames(chunks)
    return {
        "model": pipeline.config.name,
        "shots": shots,
        "chunks": chunks,
        "machine": machine(device),
        "fast": asdict(ours) | {"fps": round(frames / ours.whole, 2)},
        "naive": asdict(theirs) | {"fps": round(frames / theirs.whole, 2)},
        "naive_over_fast": ours.over(theirs),
        "stages_ms": stages(pipeline, clock, chunks),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="storybook")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=7, help="per shot; 7 as published")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(load(given.model, given.device), given.shots, given.chunks, given.rounds)
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
