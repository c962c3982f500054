"""The published model at full size, with random weights: is it finite, is bfloat16 sound, what does it take?

    python -m benchmarks.full_shape --out benchmarks/results/full_shape.json          # one GPU, minutes
    python -m benchmarks.full_shape --device cpu --shots 2 --chunks 2 --set dit.layers=1 --set text.layers=1 \\
        --set text.vocabulary=256 --set height=64 --set width=96                      # a rehearsal: real widths, a CPU

Weights are random and nowhere zero, also in the head; speed and memory do not depend on their values. Three steps, each
written to the result as soon as it is done:

1. build      DiT, VAE and umT5 in the type of the release; what they take, beside what `footprint` estimates
2. story      shots from caption to uint8 frames: all finite? seconds, frames per second, peak memory
3. exactness  the second chunk after a context: through the memory in bfloat16 (ours), in masked passes over everything
              in bfloat16 (naive), and those passes in float32 (the oracle). Ours may be at most 1.2 times as far from
              the oracle as the naive one (class E1), in one pass and after all steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shotstream import checkpoints, footprint
from shotstream.bench.machine import machine
from shotstream.config import Config, UMT5Config, WanVAEConfig, override
from shotstream.memory.policies import DualBuffer
from shotstream.models.attention import block_causal
from shotstream.models.dit import DiT
from shotstream.models.rope import rotation
from shotstream.models.umt5 import UMT5
from shotstream.models.vae import VAE
from shotstream.pipeline import Pipeline
from shotstream.releases import RELEASES
from shotstream.rollout import Prompts, Roll, SeededNoise, denoise_chunk, new_memory
from shotstream.session import Session

LIMIT = 1.2  # of class E1


def random_state(
    shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, device: str, seed: int
) -> dict[str, Tensor]:
    """Weights under which signals keep their size: matrices by fan-in, norms about one, biases and modulation small."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        if name.endswith("bias"):
            return 0.02 * noise
        if name.endswith("modulation"):
            return 0.1 * noise
        if len(shape) >= 2 and "gamma" not in name:
            return noise * (shape[0] / math.prod(shape)) ** 0.5
        return 1 + 0.1 * noise

    return {name: draw(name, shape).to(dtype) for name, shape in shapes.items()}


def words(text: str) -> list[int]:
    """A stand-in for the tokeniser, which is not random: a number for every word, and the closing token."""
    return [3 + sum(word.encode()) % 50 for word in text.split()] + [1]


class Randomly:
    """A text encoder with random weights."""

    def __init__(self, config: UMT5Config, dtype: torch.dtype, device: str) -> None:
        self.encoder = UMT5(config, random_state(checkpoints.umt5_network(config).shapes, dtype, device, 2), words)
        self.length, self.dim = config.length, config.dim

    def encode(self, texts: list[str]) -> Tensor:
        return self.encoder.encode(texts)

    def warnings(self, text: str) -> list[str]:
        return []


def build(config: Config, device: str) -> Pipeline:
    """The model with random weights."""
    dtype = getattr(torch, config.dtype)
    assert isinstance(config.vae, WanVAEConfig) and isinstance(config.text, UMT5Config)
    with torch.device("meta"):
        dit, vae = DiT(config.dit), VAE(checkpoints.vae_sizes(config.vae))
    for seed, (network, known) in enumerate(
        ((dit, checkpoints.dit_network(config.dit)), (vae, checkpoints.vae_network(config.vae)))
    ):
        network.load_state_dict(random_state(known.shapes, dtype, device, seed), assign=True)
        network.requires_grad_(False).eval().to(device)
    return Pipeline(config, dit, vae, Randomly(config.text, dtype, device), "random")


def story(pipeline: Pipeline, shots: int, chunks: int) -> dict[str, Any]:
    """A story through the session, with everything it takes."""
    session = Session(pipeline, seed=1)
    for i in range(shots):
        caption = f"{('Wide', 'Medium', 'Close')[i % 3]} shot number {i + 1}, the woman looks out of the window."
        session.cut(caption, global_caption="A woman in a yellow raincoat waits in a hallway. " * 12, chunks=chunks)
    frames, finite, ends = 0, True, list[float]()
    started = time.perf_counter()
    for chunk in session.stream():
        finite &= bool(chunk.latents.isfinite().all())
        _synchronize(pipeline)
        ends.append(time.perf_counter() - started)
        frames += len(chunk.frames)
        print(f"{ends[-1]:8.2f} s  shot {chunk.shot.index + 1}, chunk {chunk.index + 1} of {chunk.chunks}", flush=True)
    first_shot = ends[chunks - 1]
    later = pipeline.config.shot_frames(chunks) * (shots - 1)
    return {
        "shots": shots,
        "chunks": chunks,
        "frames": frames,
        "finite": finite,
        "seconds": round(ends[-1], 3),
        "first_frames_s": round(ends[0], 3),
        "fps_after_the_first_shot": round(later / (ends[-1] - first_shot), 3) if shots > 1 else None,
    }


def _synchronize(pipeline: Pipeline) -> None:
    if pipeline.dit.device.type == "cuda":
        torch.cuda.synchronize()


@torch.no_grad()
def exactness(pipeline: Pipeline) -> dict[str, Any]:
    """Distances from the float32 oracle, for one pass (the x0 of the noisiest step) and for the finished chunk."""
    config, dit = pipeline.config, pipeline.dit
    context = torch.randn(1, CONTEXT, *config.latent_shape, generator=torch.Generator().manual_seed(4)).to(dit.device)
    states = pipeline.text.encode(["the first shot", "the second shot"])
    wide = _widened(dit)
    result: dict[str, Any] = {}
    for name, exit_step in (("one_pass", 0), ("finished_chunk", None)):
        first, ours = streamed(pipeline, context, states, exit_step)
        past = torch.cat([context, first.to(context.dtype)], dim=1)
        naive, exact = (masked(network, config, past, states, exit_step) for network in (dit, wide))
        errors = [float((x0.float() - exact).std() / exact.std()) for x0 in (ours, naive)]
        result[name] = {"ours": errors[0], "naive": errors[1], "ratio": round(errors[0] / errors[1], 4)}
        print(f"{name}: {result[name]}", flush=True)
    return result | {"limit": LIMIT, "passed": all(part["ratio"] <= LIMIT for part in result.values())}


CONTEXT, SHOT, CHUNK = 6, 1, 1  # the second chunk of the second shot


def streamed(pipeline: Pipeline, context: Tensor, states: Tensor, exit_step: int | None) -> list[Tensor]:
    """The first two chunks of a shot, through the memory: prefill, chunk, commit, chunk."""
    config, dit = pipeline.config, pipeline.dit
    shape = config.latent_shape
    roll = Roll(dit, config.policy, config.schedule, new_memory(dit, shape), Prompts(dit), shape)
    roll.memory.shots = (config.shot_frames(),) * SHOT
    for number in (0, SHOT):
        roll.prompts.add(number, states[number : number + 1])
    return list(roll.shot(SHOT, CHUNK + 1, NOISE, lambda frames: context, exit_step=exit_step))


def masked(dit: DiT, config: Config, past: Tensor, states: Tensor, exit_step: int | None) -> Tensor:
    """The second chunk without a memory: [context, first chunk, second chunk] in one masked pass per step."""
    policy, (_, height, width) = config.policy, config.latent_shape
    assert isinstance(policy, DualBuffer) and policy.budget == CONTEXT
    size, device = config.chunk, dit.device
    flags = [0] * CONTEXT + [SHOT] * 2 * size
    grid = height // config.dit.patch, width // config.dit.patch
    table = tuple((float(i), policy.phase(flag)) for i, flag in enumerate(flags))
    places = rotation(table, *grid, config.dit.head_dim, device, dit.dtype)
    mask = block_causal(CONTEXT, 2, size, math.prod(grid))
    text = dit.read(states, torch.tensor([flags], device=device))

    def forward(x: Tensor, timestep: float) -> Tensor:
        timesteps = torch.zeros(1, len(flags), device=device)
        timesteps[:, -size:] = timestep
        return dit(torch.cat([past.to(x.dtype), x], dim=1), timesteps, text, places, mask=mask)[:, -size:]

    def draw(step: int) -> Tensor:
        narrow = NOISE.draw(CHUNK, step, (1, size, *config.latent_shape)).to(device, getattr(torch, config.dtype))
        return narrow.to(dit.dtype)  # the oracle starts from the very same numbers

    return denoise_chunk(forward, draw, config.schedule, exit_step)


NOISE = SeededNoise(3, SHOT)


def _widened(dit: DiT) -> DiT:
    """The same weights in float32."""
    with torch.device("meta"):
        wide = DiT(dit.config)
    wide.load_state_dict({name: value.float() for name, value in dit.state_dict().items()}, assign=True)
    return wide.requires_grad_(False).eval()


def peak(device: torch.device) -> dict[str, float]:
    """The most memory that was held so far, in GB."""
    found = {"peak_gb": round(footprint.peak_memory(str(device)) / 1e9, 3)}
    if device.type == "cuda":
        found["reserved_gb"] = round(torch.cuda.max_memory_reserved(device) / 1e9, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--chunks", type=int, help="per shot; default: the model's")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="change the configuration")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    config = override(RELEASES["shotstream"].config, given.set)
    device = torch.device(given.device)
    result: dict[str, Any] = {
        "weights": "random",
        "machine": machine(device),
        "config": dataclasses.asdict(config),
        "estimate_gb": {name: round(count / 1e9, 3) for name, count in vars(footprint.estimate(config)).items()},
    }

    def tell_so_far(**found: Any) -> None:
        result.update(found)
        if given.out:
            given.out.parent.mkdir(parents=True, exist_ok=True)
            given.out.write_text(json.dumps(result, indent=1) + "\n")

    started = time.perf_counter()
    pipeline = build(config, given.device)
    tell_so_far(build={"seconds": round(time.perf_counter() - started, 2), **peak(device)})
    tell_so_far(story=story(pipeline, given.shots, given.chunks or config.chunks) | peak(device))
    tell_so_far(exactness=exactness(pipeline) | peak(device))
    print(json.dumps({name: result[name] for name in ("estimate_gb", "build", "story", "exactness")}, indent=1))
    if not (result["story"]["finite"] and result["exactness"]["passed"]):
        sys.exit("full_shape: not finite, or further from float32 than class E1 allows")


if __name__ == "__main__":
    main()
