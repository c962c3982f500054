"""How fast a model generates, and whether `attention` chooses well on this machine.

    python -m benchmarks.speed --model storybook --shots 8 --threads 2 [--out benchmarks/results/speed.json]

Frames per second count everything from a caption to uint8 frames (text, denoising, commits, decoding), not the video
file. Ratios are taken in one run; machine and commit are written beside the numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shotstream.bench.machine import machine
from shotstream.models.attention import attention
from shotstream.pipeline import load
from shotstream.session import Session


def generation(model: str, shots: int) -> dict[str, float]:
    """Frames per second over `shots` shots, and the time from a loaded model to its first frames."""
    started = time.perf_counter()
    pipeline = load(model)
    loaded = time.perf_counter()
    session = Session(pipeline, seed=1)
    for i in range(shots + 1):
        session.cut(f"a {('wide', 'medium', 'close')[i % 3]} shot of the bear in the meadow")
    ends, frames, denoise, decode = [], 0, 0.0, 0.0
    for chunk in session.stream():
        ends.append(time.perf_counter())
        if chunk.shot.index:  # the first shot warms up
            frames += len(chunk.frames)
            denoise += chunk.timings["denoise"]
            decode += chunk.timings["decode"]
    warm = ends[pipeline.config.chunks - 1]
    fps = frames / (ends[-1] - warm)
    return {
        "fps": round(fps, 2),
        "times_real_time": round(fps / pipeline.config.fps, 2),
        "load_s": round(loaded - started, 3),
        "first_frames_s": round(ends[0] - loaded, 3),
        "denoise_share": round(denoise / (denoise + decode), 3),
    }


def attention_ratio(queries: int, keys: int, batch: int, rounds: int = 7) -> float:
    """Forward and backward: time of `attention` over time of plain matmul, softmax, matmul (A-B-A-B, medians)."""

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v

    q = torch.randn(batch, queries, 3, 64, requires_grad=True)
    k, v = (torch.randn(batch, keys, 3, 64, requires_grad=True) for _ in range(2))
    times: dict[Callable[..., Tensor], list[float]] = {attention: [], plain: []}
    for _ in range(rounds):
        for function, taken in times.items():
            begun = time.perf_counter()
            function(q, k, v).square().sum().backward()
            taken.append(time.perf_counter() - begun)
    return round(float(np.median(times[attention]) / np.median(times[plain])), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="storybook")
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result = {
        "machine": machine(torch.device("cpu")),
        "generation": generation(given.model, given.shots),
        "fused_over_plain_attention": {
            "self, next shot": attention_ratio(288, 288, 32),
            "self, one shot": attention_ratio(144, 144, 32),
            "cross": attention_ratio(24, 24, 384),
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
