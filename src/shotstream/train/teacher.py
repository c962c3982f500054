"""The next-shot teacher: flow matching on [clean context | noisy target] (paper 3.1, method.md 13.1).

    shotstream train stage next --preset storybook --out runs

One recipe, three kinds of batches, trained one after the other from scratch: single pictures ("image"), single shots
("shot"), shots with the context of earlier ones ("next"). Starting from a text-to-video base, only "next" is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from shotstream.config import Config
from shotstream.data.batch import Batch, Kind, Source
from shotstream.flow import TIMESTEPS, add_noise, euler_sigmas, grid_loss_weights, guide, spread, training_grid
from shotstream.train.draws import Draws
from shotstream.train.model import Model, after
from shotstream.train.network import Network, network
from shotstream.train.processes import averaged
from shotstream.train.run import Job, RunConfig, Sheet


@dataclass(frozen=True)
class TeacherConfig:
    """What is special to this recipe."""

    kind: Kind = "next"
    first_shots: float = 0.25  # share of "next" batches without context: first shots, and dropped context
    drop_text: float = 0.1
    tune: Literal["all", "attention"] = "all"  # attention: self-attention alone, as in the paper from a video base
    compile: bool = False  # torch.compile each block: faster after a minute
    levels: Literal["normal", "grid"] = "normal"  # sigmoid(normal(mean, deviation)), or the released grid and weights
    sigma_mean: float = 0.6
    sigma_deviation: float = 1.1
    sigma_floor: float = 0.3  # below it an x0 head is not asked for ever finer detail: weight (sigma / floor)^2
    cast_weight: float = 2.0  # extra loss weight of latent cells that the cast covers
    causal: float = 0.0  # share of batches behind the student's block-causal mask: a head start for `train.ode`


def shot_sigmas(draws: Draws, count: int, frames: int, cfg: TeacherConfig, config: Config) -> tuple[Tensor, Tensor]:
    """One noise level per sample, and the weight of its error: both [b f]."""
    if cfg.levels == "grid":
        grid = training_grid(config.schedule.shift)
        entry = draws.integers(len(grid), count)
        sigma, weight = grid[entry], grid_loss_weights(grid)[entry]
    else:
        sigma = torch.sigmoid(draws.normal(cfg.sigma_mean, cfg.sigma_deviation, count))
        weight = floor_weight(sigma, cfg.sigma_floor)
    return sigma[:, None].repeat(1, frames), weight[:, None].repeat(1, frames)


def chunk_sigmas(draws: Draws, count: int, frames: int, cfg: TeacherConfig, config: Config) -> tuple[Tensor, Tensor]:
    """A noise level per chunk, [b f]; in half of the samples every chunk but the last is clean, as in a rollout."""
    chunk = config.chunk
    sigma = torch.sigmoid(draws.normal(cfg.sigma_mean, cfg.sigma_deviation, count, frames // chunk))
    sigma[draws.uniform(count) < 0.5, :-1] = 0
    sigma = sigma.repeat_interleave(chunk, dim=1)
    return sigma, floor_weight(sigma, cfg.sigma_floor)


def floor_weight(sigma: Tensor, floor: float) -> Tensor:
    """(sigma / floor)^2 below the floor, 1 above it; 0 for what is clean."""
    return (sigma / floor).clamp(max=1).square() if floor else (sigma > 0).float()


def drop_text(draws: Draws, model: Model, words: Tensor, index: Tensor, share: float) -> Tensor:
    """Give a sample with probability `share` the null text for all of its prompts."""
    words = words.clone()
    for row in index[(draws.uniform(len(index)) < share).to(index.device)]:
        words[row.unique()] = model.null(words)[0]
    return words


def loss(model: Model, batch: Batch, draws: Draws, cfg: TeacherConfig) -> Tensor:
    """Mean squared error of the target's velocity; the context stays clean."""
    context, clean = batch.context, batch.latents
    causal = draws.rng.random() < cfg.causal
    levels = chunk_sigmas if causal else shot_sigmas
    sigma, weight = (t.to(clean.device) for t in levels(draws, len(clean), clean.shape[1] - context, cfg, model.config))
    noise = draws.noise(tuple(clean.shape), clean.device)
    noisy = add_noise(clean, noise, after(context, sigma))
    timesteps = after(context, sigma) * TIMESTEPS if causal else model.timesteps(sigma, context)
    text = model.read(drop_text(draws, model, batch.words, batch.index, cfg.drop_text), batch.index)
    mask = model.mask(context, clean) if causal else None
    velocity = model.dit(noisy, timesteps, text, model.places(batch), mask=mask)
    error = (velocity - (noise - clean))[:, context:].float().square().mean(2)
    cast = 1 + cfg.cast_weight * (batch.coverage > 0)
    weight = weight[:, :, None, None]
    told = averaged((cast * (weight > 0)).sum()).clamp(min=1)  # the grid's first level weighs nothing
    return (error * cast * weight).sum() / told


def train(
    model: Config, cfg: TeacherConfig, runs: RunConfig, stories: Source, masters: Model, sheet: Sheet | None = None
) -> Network[Model]:
    """Train until `runs.steps`; resumes from `runs.out` if it holds a checkpoint."""
    masters.tune(cfg.tune)
    trained = network(masters, runs)
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # one per block and kind of batch
        for block in trained.compute.dit.layers():
            block.compile(dynamic=False)
    job = Job(runs, {"network": trained}, sheet, model=model, recipe=cfg)
    for draws in job.steps():
        for part in draws.parts(runs.accumulate):
            kind = cfg.kind
            if kind == "next" and part.rng.random() < cfg.first_shots:
                kind = "shot"
            batch = stories.batch(part.rng, runs.batch, kind, share=part.share).to(runs.device)
            value = loss(trained.compute, batch, part, cfg)
            (value / runs.accumulate).backward()
            job.tell(**{f"loss_{kind}": value})
        job.tell(norm=trained.step(job.scale))
    return trained


@torch.no_grad()
def trajectory(model: Model, batch: Batch, sigmas: Tensor, guidance: float) -> Iterator[Tensor]:
    """The target latents of `batch` at each of `sigmas`, noise first: Euler steps with guidance, the context clean."""
    dit, context = model.dit, batch.context
    where = model.places(batch)
    text = model.read(batch.words, batch.index)
    null = model.read(model.null(batch.words), torch.zeros_like(batch.index))
    x = torch.cat((batch.latents[:, :context], torch.randn_like(batch.latents[:, context:])), dim=1)
    yield x[:, context:]
    for sigma, following in pairwise(sigmas):
        level = torch.full((len(x), x.shape[1] - context), float(sigma), device=x.device)
        timesteps = model.timesteps(level, context)
        velocity = guide(dit(x, timesteps, text, where), dit(x, timesteps, null, where), guidance).float()
        move = spread((following - sigma).to(x.device).expand(x.shape[:2]).clone(), x)
        move[:, :context] = 0
        x = x + move * velocity
        yield x[:, context:]


def sample(model: Model, batch: Batch, steps: int = 25, shift: float = 3.0, guidance: float = 2.0) -> Tensor:
    """The target latents of `batch`, from noise: the end of a trajectory."""
    *_, end = trajectory(model, batch, euler_sigmas(steps, shift), guidance)
    return end
