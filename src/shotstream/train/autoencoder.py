"""The storybook decoder: pictures from half-whitened patch latents (the encoder is fitted, not trained).

    shotstream train stage autoencoder --preset storybook --out runs
    shotstream train stage tiny-decoder --preset storybook --out runs       fast mode's, a quarter of the arithmetic

Stories are rendered as they are needed. A little noise on the latents makes the decoder forgiving towards a diffusion
model's latents, which are never exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from shotstream.config import Config
from shotstream.data.batch import WHOLE, Share
from shotstream.data.storybook import to_frames
from shotstream.models.patch_vae import STRIDE, PatchVAE
from shotstream.storybook.draw import render_shot
from shotstream.storybook.world import sample_world
from shotstream.train.draws import Draws
from shotstream.train.network import Network
from shotstream.train.run import Job, RunConfig


@dataclass(frozen=True)
class AutoencoderConfig:
    """What is special to this recipe."""

    noise: float = 0.12  # largest deviation of the noise on the latents
    first_seed: int = 50_000_000  # of the stories rendered, disjoint from the diffusion model's
    moving: float = 0.0  # share of shots that are asked to show somebody small who moves: they blur first
    held_out: int = 12  # shots on which the PSNR is measured
    edges: float = 1.0  # weight of the error of neighbouring pixels' differences: outlines
    tiny: bool = False  # the decoder of fast mode (`PatchVAEConfig.tiny`), for the same latents


def batch(rng: np.random.Generator, shots: int, first_seed: int, share: Share = WHOLE, moving: float = 0.0) -> Tensor:
    """Frames `b f c h w` of this share of `shots` freshly rendered shots; `moving` as in `AutoencoderConfig`."""
    drawn = [(first_seed + int(rng.integers(10_000_000)), rng.random(), rng.random()) for _ in range(shots)]
    clips = []
    for seed, place, kind in share.of(drawn):
        while True:
            world = sample_world(seed)
            suits = [i for i, script in enumerate(world.shots) if kind >= moving or script.is_small_motion]
            if suits:
                break
            seed += 1
        clips.append(to_frames(render_shot(world, suits[int(place * len(suits))])[0]))
    return torch.stack(clips)


def loss(vae: PatchVAE, frames: Tensor, draws: Draws, config: AutoencoderConfig) -> Tensor:
    """Absolute error of pixels and of their differences along rows and columns."""
    latents = vae.encode(frames)
    level = draws.uniform(len(latents), 1, 1, 1, 1).to(latents) * config.noise
    latents = latents + level * draws.noise(tuple(latents.shape)).to(latents)
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
    held_out = batch(np.random.default_rng(1), cfg.held_out, cfg.first_seed + 20_000_000).to(runs.device)
    trained = Network(masters, runs)
    job = Job(runs, {"network": trained}, model=model, recipe=cfg)
    for draws in job.steps():
        frames = batch(draws.rng, runs.batch, cfg.first_seed, draws.share, cfg.moving).to(runs.device)
        value = loss(trained.compute, frames, draws, cfg)
        value.backward()
        job.tell(loss=value, norm=trained.step(job.scale))
        if (job.step + 1) % runs.log_every == 0:
            job.tell(psnr=psnr(trained.ema, held_out))
    return trained
