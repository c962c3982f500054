"""The storybook decoder: pictures from half-whitened patch latents (the encoder is fitted, not trained).

    shotstream train stage autoencoder --preset storybook --out runs

Stories are rendered as they are needed. A little noise on the latents makes the decoder forgiving towards a diffusion
model's latents, which are never exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shotstream.config import Config
from shotstream.data.storybook import to_frames
from shotstream.models.patch_vae import STRIDE, PatchVAE
from shotstream.storybook.draw import render_shot
from shotstream.storybook.world import sample_world
from shotstream.train import run
from shotstream.train.run import Log, Network, Pace, RunConfig, learning_scale


@dataclass(frozen=True)
class AutoencoderConfig:
    """What is special to this recipe."""

    noise: float = 0.12  # largest deviation of the noise on the latents
    first_seed: int = 50_000_000  # of the stories rendered, disjoint from the diffusion model's
    edges: float = 1.0  # weight of the error of neighbouring pixels' differences: outlines


def batch(rng: np.random.Generator, shots: int, first_seed: int) -> Tensor:
    """Frames `b f c h w` of freshly rendered shots."""
    clips = []
    for _ in range(shots):
        world = sample_world(first_seed + int(rng.integers(10_000_000)))
        clips.append(to_frames(render_shot(world, int(rng.integers(len(world.shots))))[0]))
    return torch.stack(clips)


def loss(vae: PatchVAE, frames: Tensor, config: AutoencoderConfig) -> Tensor:
    """Absolute error of pixels and of their differences along rows and columns."""
    latents = vae.encode(frames)
    latents = latents + torch.rand(len(latents), 1, 1, 1, 1) * config.noise * torch.randn_like(latents)
    before = torch.cat((latents[:, :1], latents[:, :-1]), dim=1)
    drawn = vae.draw(latents.flatten(0, 1), before.flatten(0, 1))
    still = frames[:, :1].expand(-1, STRIDE - 1, -1, -1, -1)
    target = torch.cat((still, frames), dim=1).unflatten(1, (-1, STRIDE)).flatten(0, 1)
    value = F.l1_loss(drawn, target)
    for axis in (-1, -2):
        value = value + config.edges * F.l1_loss(drawn.diff(dim=axis), target.diff(dim=axis))
    return value


def psnr(vae: PatchVAE, frames: Tensor) -> float:
    """Of the whole round trip, dB."""
    with torch.no_grad():
        back, _ = vae.decode(vae.encode(frames))
    return float(10 * torch.log10(4 / (back.clamp(-1, 1) - frames).square().mean()))


def train(model: Config, cfg: AutoencoderConfig, runs: RunConfig, masters: PatchVAE) -> Network[PatchVAE]:
    """Train the decoder of `masters`, whose linear part is fitted; `runs.batch` counts shots."""
    out = Path(runs.out)
    rng = run.seed_everything(runs.seed)
    log = Log(out)
    held_out = batch(np.random.default_rng(1), 12, cfg.first_seed + 20_000_000)
    network = Network(masters, runs)
    step = 0
    if state := run.resume(out / "checkpoint.pt"):
        network.load_state_dict(state["network"])
        run.restore_random_state(rng, state["random"])
        step = state["step"]
    run.write_config(out, model=model, recipe=cfg, run=runs)
    pace = Pace(runs)
    while step < runs.steps:
        value = loss(network.compute, batch(rng, runs.batch, cfg.first_seed), cfg)
        value.backward()
        network.step(learning_scale(step, runs))
        step += 1
        pace.add(value.item())
        if step % runs.log_every == 0:
            log.write(step=step, psnr=psnr(network.ema, held_out), **pace.read(step))
        if pace.save_due() or step == runs.steps:
            run.save(
                out / "checkpoint.pt",
                {"network": network.state_dict(), "random": run.random_state(rng), "step": step},
            )
    return network
