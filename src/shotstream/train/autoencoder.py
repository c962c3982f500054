"""The storybook decoder: pictures from half-whitened patch latents (the encoder is fitted, not trained).

    shotstream train stage autoencoder --preset storybook --out runs
    shotstream train stage tiny-decoder --preset storybook --out runs       fast mode's, a quarter of the arithmetic

Stories are rendered as they are needed. A little noise on the latents makes the decoder forgiving towards a diffusion
model's latents, which are never exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shotstream.checkpoints import read_tensors
from shotstream.config import Config
from shotstream.data.batch import WHOLE, Share
from shotstream.data.storybook import to_frames
from shotstream.fast import LINEAR
from shotstream.models.patch_vae import STRIDE, PatchVAE
from shotstream.storybook.draw import render_shot
from shotstream.storybook.world import sample_world
from shotstream.train import checkpoint
from shotstream.train.draws import Draws
from shotstream.train.network import Network
from shotstream.train.processes import averaged
from shotstream.train.run import Job, RunConfig


@dataclass(frozen=True)
class AutoencoderConfig:
    """What is special to this recipe."""

    noise: float = 0.12  # largest deviation of the noise on the latents
    first_seed: int = 50_000_000  # of the stories rendered, disjoint from the diffusion model's
    moving: float = 0.0  # share of shots that are asked to show somebody small who moves: they blur first
    held_out: int = 12  # shots on which the PSNR is measured
    edges: float = 1.0  # weight of the error of neighbouring pixels' differences: outlines
    cast_weight: float = 3.0  # extra weight of pixels that the cast covers in any of a latent frame's four pictures
    tiny: bool = False  # the decoder of fast mode (`PatchVAEConfig.tiny`), for the same latents


@dataclass(frozen=True)
class Clips:
    """Rendered shots: frames `b f c h w` in [-1, 1], and the pixels that the cast covers, bool `b f h w`."""

    frames: Tensor
    mask: Tensor

    def to(self, device: str) -> Clips:
        return Clips(self.frames.to(device), self.mask.to(device))


def batch(rng: np.random.Generator, shots: int, first_seed: int, share: Share = WHOLE, moving: float = 0.0) -> Clips:
    """This share of `shots` freshly rendered shots; `moving` as in `AutoencoderConfig`."""
    drawn = [(first_seed + int(rng.integers(10_000_000)), rng.random(), rng.random()) for _ in range(shots)]
    frames, masks = [], []
    for seed, place, kind in share.of(drawn):
        while True:
            world = sample_world(seed)
            suits = [i for i, script in enumerate(world.shots) if kind >= moving or script.is_small_motion]
            if suits:
                break
            seed += 1
        pixels, mask = render_shot(world, suits[int(place * len(suits))])
        frames.append(to_frames(pixels))
        masks.append(torch.from_numpy(mask))
    return Clips(torch.stack(frames), torch.stack(masks))


def groups(frames: Tensor) -> Tensor:
    """`b 4k+1 ...` -> `b*(k+1) 4 ...`: the pictures of each latent frame; the first stands still for four."""
    still = frames[:, :1].expand(-1, STRIDE - 1, *frames.shape[2:])
    return torch.cat((still, frames), dim=1).unflatten(1, (-1, STRIDE)).flatten(0, 1)


def loss(vae: PatchVAE, clips: Clips, draws: Draws, config: AutoencoderConfig) -> Tensor:
    """Absolute error of pixels and of their differences along rows and columns, as weighted means.

    Where the cast passes, a blurred picture has a ghost of it in all four: there the error weighs more in each.
    """
    latents = vae.encode(clips.frames)
    level = draws.uniform(len(latents), 1, 1, 1, 1).to(latents) * config.noise
    latents = latents + level * draws.noise(tuple(latents.shape)).to(latents)
    before = torch.cat((latents[:, :1], latents[:, :-1]), dim=1)
    error = vae.draw(latents.flatten(0, 1), before.flatten(0, 1)) - groups(clips.frames)
    passes = groups(clips.mask).any(1)[:, None, None]  # n 1 1 h w
    weight = 1 + config.cast_weight * passes.float()
    value = _mean(error, weight)
    for axis in (-1, -2):
        pairs = weight.narrow(axis, 1, weight.shape[axis] - 1)
        value = value + config.edges * _mean(error.diff(dim=axis), pairs)
    return value


def _mean(error: Tensor, weight: Tensor) -> Tensor:
    """Of the absolute error `n t c h w`, with weights `n 1 1 h w`; over the samples of all processes."""
    return (error.abs().mean((1, 2), keepdim=True) * weight).sum() / averaged(weight.sum())


def psnr(vae: PatchVAE, frames: Tensor) -> float:
    """Of the whole round trip, dB."""
    with torch.no_grad():
        back, _ = vae.decode(vae.encode(frames))
    return float(10 * torch.log10(4 / (back.clamp(-1, 1) - frames).square().mean()))


def begin(vae: PatchVAE, path: Path) -> PatchVAE:
    """Start from the decoder of a model file or of a stage's folder, where `vae` has layers of the same name and shape;
    the rest stay fresh. Raises ValueError if already the first layer is of another shape.
    """
    mine = vae.state_dict()
    if path.suffix == ".safetensors":
        given = {n.removeprefix("vae."): t for n, t in read_tensors(path).items() if n.startswith("vae.")}
    else:
        given = checkpoint.averaged_weights(path)
    fits = {n: t.float() for n, t in given.items() if n in mine and t.shape == mine[n].shape and n not in LINEAR}
    if "enter.weight" not in fits:
        raise ValueError(f"{path}: its decoder's first layer is not that of {vae.config}")
    vae.load_state_dict(fits, strict=False)
    return vae


def train(model: Config, cfg: AutoencoderConfig, runs: RunConfig, masters: PatchVAE) -> Network[PatchVAE]:
    """Train the decoder of `masters`, whose linear part is fitted; `runs.batch` counts shots."""
    held_out = batch(np.random.default_rng(1), cfg.held_out, cfg.first_seed + 20_000_000).to(runs.device).frames
    trained = Network(masters, runs)
    job = Job(runs, {"network": trained}, model=model, recipe=cfg)
    for draws in job.steps():
        for part in draws.parts(runs.accumulate):
            clips = batch(part.rng, runs.batch, cfg.first_seed, part.share, cfg.moving).to(runs.device)
            value = loss(trained.compute, clips, part, cfg)
            (value / runs.accumulate).backward()
            job.tell(loss=value)
        job.tell(norm=trained.step(job.scale))
        if (job.step + 1) % runs.log_every == 0 or job.step + 1 == runs.steps:
            job.tell(psnr=psnr(trained.ema, held_out))
    return trained
