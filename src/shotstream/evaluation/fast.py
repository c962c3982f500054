"""What fast mode gains and what it loses, beside the exact model, from the same words and the same noise.

    shotstream eval fast --out runs/fast        every part of it, with the judge
    shotstream bench --fast                     what was asked for, without

Likeness is of whole stories: every shot is made from the ones before it, so what one loses the next may lose again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from shotstream.bench.machine import machine
from shotstream.bench.measurement import captions
from shotstream.bench.probe import Clock
from shotstream.bench.report import named
from shotstream.config import Fast
from shotstream.evaluation.generators import generators
from shotstream.evaluation.storybook import Progress, Row, study
from shotstream.pipeline import Pipeline
from shotstream.session import Session, to_uint8
from shotstream.storybook.world import World
from shotstream.take import Maker

Frames = NDArray[np.uint8]

EXACT = "exact"
WAYS = {" + ".join(way.names): way for way in (Fast(fp8=True), Fast(decoder=True), Fast(fp8=True, decoder=True))}
"""Everything that can be asked for, by name."""

RECONSTRUCTED = "autoencoder, "
"""Begins the rows that show the true stories, encoded and decoded again."""

JUDGED = ("named", "free")
"""Does a shot show what its text says; is what no text says as it first appeared (`evaluation/measures.py`)?"""

STORIES, SHOTS = 2, 10  # whose pictures are compared
WINDOW = 8  # pixels, per side, of the windows that SSIM compares


def psnr(ours: Frames, theirs: Frames) -> float:
    """Peak signal to noise of uint8 pictures, dB; 100 for the same ones."""
    error = np.square(ours.astype(np.float32) - theirs).mean()
    return min(100.0, float(10 * np.log10(255**2 / max(error, 1e-9))))


def ssim(ours: Frames, theirs: Frames) -> float:
    """Structural similarity of uint8 [f h w 3], in grey and over uniform windows (Wang et al. 2004): 1 for the same."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, WINDOW, stride=WINDOW // 2)

    a, b = (torch.from_numpy(frames).float().mean(-1)[:, None] / 255 for frames in (ours, theirs))
    mean_a, mean_b = mean(a), mean(b)
    both = mean(a * b) - mean_a * mean_b
    spread = mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2
    light = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    return float((light * (2 * both + 9e-4) / (spread + 9e-4)).mean())


def likeness(exact: Pipeline, fast: Pipeline, stories: int, shots: int) -> dict[str, Any]:
    """How like the exact model's stories the fast ones are. "drawn": its latents, drawn by the fast decoder."""
    errors, same, drawn = np.zeros((stories, shots)), [], []
    for story in range(stories):
        for shot, (one, other) in enumerate(zip(tell(exact, shots, story), tell(fast, shots, story), strict=True)):
            errors[story, shot] = np.square(one[0].astype(np.float32) - other[0]).mean()
            same.append(ssim(one[0], other[0]))
            if fast.fast.decoder:
                drawn.append(psnr(one[0], to_uint8(torch.cat([*Maker(fast).decode(one[1])]))))
    return {
        "psnr": _decibels(errors),
        "psnr_by_shot": [_decibels(of_shot) for of_shot in errors.T],
        "ssim": round(float(np.mean(same)), 4),
        **({"drawn_psnr": round(float(np.mean(drawn)), 2)} if drawn else {}),
    }


def _decibels(errors: NDArray[np.float64]) -> float:
    """Of mean squared errors of uint8 pictures."""
    return round(min(100.0, float(10 * np.log10(255**2 / max(errors.mean(), 1e-9)))), 2)


def tell(pipeline: Pipeline, shots: int, seed: int) -> Iterator[tuple[Frames, Tensor]]:
    """The frames and latents of every shot of a story."""
    session = Session(pipeline, seed=seed)
    for caption in captions(shots):
        session.cut(caption)
    frames, latents = list[Frames](), list[Tensor]()
    for chunk in session.stream():
        frames.append(chunk.frames)
        latents.append(chunk.latents)
        if chunk.is_last:
            yield np.concatenate(frames), torch.cat(latents)
            frames, latents = [], []


def times(exact: Pipeline, fast: Pipeline, clock: Clock, shots: int = 4, rounds: int = 3) -> dict[str, float]:
    """Seconds per shot of both, told in turns (A-B-B-A) after a warm shot; of every shot the fastest telling counts."""
    both = (exact, fast)
    for pipeline in both:
        _shots(pipeline, clock, 2)
    found: dict[str, list[list[float]]] = {EXACT: [], "fast": []}
    for _ in range(rounds):
        for name, pipeline in (*zip(found, both, strict=True), *zip(reversed(found), reversed(both), strict=True)):
            found[name].append(_shots(pipeline, clock, shots))
    ours, theirs = (float(np.mean(np.min(found[name], axis=0)[1:])) for name in ("fast", EXACT))
    frames = exact.config.shot_frames()
    return {
        "of_exact": round(ours / theirs, 3),
        "shot_s": round(ours, 4),
        "exact_shot_s": round(theirs, 4),
        "fps": round(frames / ours, 2),
        "exact_fps": round(frames / theirs, 2),
    }


def _shots(pipeline: Pipeline, clock: Clock, shots: int) -> list[float]:
    """Seconds of every shot of a story."""
    ends = [clock.settled()]
    for _ in tell(pipeline, shots, 0):
        ends.append(clock.settled())
    return [end - begin for begin, end in pairwise(ends)]


def clock_of(device: torch.device) -> Clock:
    """A GPU's own events; on one CPU thread the time that was computed, which other programs do not falsify."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return Clock(device, "cpu" if alone else "wall")


def compare(exact: Pipeline, fast: Pipeline, stories: int = 2, shots: int = 4) -> dict[str, Any]:
    """What is approximate, how fast that is, and what it loses."""
    clock = clock_of(exact.dit.device)
    return {
        "approximate": list(fast.fast.names),
        "time": times(exact, fast, clock),
        "likeness": likeness(exact, fast, stories, shots),
    }


def judged(
    exact: Pipeline, ways: Mapping[str, Pipeline], worlds: Sequence[World], out: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """How well stories of the storybook world are told, exactly and each fast way, by measure, with 95 % intervals.

    Also how well true stories survive the autoencoder, with its own decoder and with the tiny one. Kept in `out` as
    they come (`evaluation/storybook.study`).
    """
    rows: dict[str, Row] = {}
    for name, pipeline in {EXACT: exact, **ways}.items():
        of_model = generators(pipeline)
        rows[name] = of_model["model"]
        if name in (EXACT, *Fast(decoder=True).names):
            rows[RECONSTRUCTED + name] = of_model["autoencoder"]
    models = {name: pipeline.revision for name, pipeline in {EXACT: exact, **ways}.items()}
    report = study(rows, worlds, out, progress=progress, models=models)
    told: dict[str, dict[str, Any]] = {}
    for row in rows:
        base = RECONSTRUCTED + EXACT if row.startswith(RECONSTRUCTED) else EXACT
        told[row] = {name: _interval(report.interval(row, "overall", name)) for name in JUDGED}
        if row != base:
            told[row] |= {f"{name}_lost": _interval(report.difference(base, row, "overall", name)) for name in JUDGED}
    return told


def _interval(interval: Any) -> list[float]:
    """Value, low, high."""
    return [round(float(number), 3) for number in (interval.value, interval.low, interval.high)]


def measure(
    exact: Pipeline,
    ways: Mapping[str, Pipeline],
    out: Path,
    worlds: Sequence[World] = (),
    progress: Progress = lambda row, done, total: None,
) -> dict[str, Any]:
    """Everything about every way, as plain values. `worlds`: the stories that the judge reads; none, no judge."""
    clock = clock_of(exact.dit.device)
    found = {
        name: {
            "approximate": list(pipeline.fast.names),
            "revision": pipeline.revision,
            "time": times(exact, pipeline, clock),
            "likeness": likeness(exact, pipeline, STORIES, SHOTS),
        }
        for name, pipeline in ways.items()
    }
    return {
        "model": exact.config.name,
        "revision": exact.revision,
        "machine": machine(exact.dit.device),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "judged_stories": [world.seed for world in worlds],
        "ways": found,
        "judge": judged(exact, ways, worlds, out, progress) if worlds else {},
    }


# As text


def table(result: Mapping[str, Any]) -> str:
    """Every way's speed with its loss beside it."""
    told = result["judge"]
    lines = [
        "| | time of exact | frames/s | PSNR, dB | SSIM | PSNR of shots 1, last | text is seen | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = next(iter(result["ways"].values()))["time"]
    lines.append(_line(EXACT, "1", f"{first['exact_fps']}", "-", "-", "-", *_answers(told.get(EXACT))))
    for name, way in result["ways"].items():
        like, by_shot = way["likeness"], way["likeness"]["psnr_by_shot"]
        speed = f"{way['time']['of_exact']:.2f}", f"{way['time']['fps']}"
        ends = f"{by_shot[0]}, {by_shot[-1]}"
        what = named(way["approximate"], result["machine"])
        lines.append(_line(what, *speed, f"{like['psnr']}", f"{like['ssim']:.3f}", ends, *_answers(told.get(name))))
    for row, answers in told.items():
        if row.startswith(RECONSTRUCTED):
            lines.append(_line(row, "", "", "", "", "", *_answers(answers)))
    place = result["machine"].get("gpu") or f"{result['machine']['cpu']}, {result['machine']['threads']} thread"
    origin = f"{result['model']} ({result['revision']}); {place}; commit {result['machine']['commit'] or 'unknown'}"
    stories = f"; judged on {len(result['judged_stories'])} stories, 95 % intervals" if told else ""
    return "\n".join([*lines, "", origin + stories])


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _answers(answers: Mapping[str, Sequence[float]] | None) -> list[str]:
    if answers is None:
        return ["-"] * len(JUDGED)
    return ["{:.2f} [{:.2f}, {:.2f}]".format(*answers[name]) for name in JUDGED]
