"""The next-shot teacher: flow matching on [clean context | noisy target] (paper 3.1, method.md 13.1).

    shotstream train stage next --preset storybook --out runs

One recipe, three kinds of batches, trained one after the other from scratch: single pictures ("image"), single shots
("shot"), shots with the context of earlier ones ("next"). Starting from a text-to-video base, only "next" is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from shotstream.config import Config
from shotstream.data.storybook import Batch, Stories
from shotstream.flow import TIMESTEPS, add_noise, euler_sigmas, guide, spread
from shotstream.models.attention import block_causal_mask
from shotstream.models.dit import DiT, Text
from shotstream.models.rope import Rotation, angles, tables
from shotstream.models.text import Words
from shotstream.train import run
from shotstream.train.run import Log, Network, RunConfig, learning_scale

PHASE = 1 / 6  # radian per shot
CHUNK = 3  # latent frames


@dataclass(frozen=True)
class TeacherConfig:
    """What is special to this recipe."""

    kind: str = "next"  # "image", "shot" or "next"
    first_shots: float = 0.25  # share of "next" batches without context: first shots, and dropped context
    drop_text: float = 0.1
    compile: bool = False  # torch.compile each block: faster after a minute
    sigma_mean: float = 0.6  # sigma = sigmoid(normal(mean, deviation))
    sigma_deviation: float = 1.1
    sigma_floor: float = 0.3  # below it an x0 head is not asked for ever finer detail: weight (sigma / floor)^2
    cast_weight: float = 2.0  # extra loss weight of latent cells that the cast covers
    causal: float = 0.0  # share of batches behind the student's block-causal mask: a head start for `train.ode`


class Model(nn.Module):
    """DiT and text encoder, trained together."""

    def __init__(self, dit: DiT, text: Words) -> None:
        super().__init__()
        self.dit = dit
        self.text = text

    def read(self, words: Tensor, index: Tensor) -> Text:
        return self.dit.read(self.text(words), index)


def places(dit: DiT, positions: Tensor, flags: Tensor, shape: torch.Size) -> Rotation:
    """Rotation tables of a batch whose samples sit at different phases: positions and flags [b f]."""
    height, width = (n // dit.config.patch for n in shape[-2:])
    angle = angles(positions, flags * PHASE, height, width, dit.config.head_dim)
    return tables(angle, dit.device, dit.dtype)


def shot_sigmas(rng: np.random.Generator, count: int, frames: int, config: TeacherConfig) -> Tensor:
    """One noise level per sample: [b f]."""
    normal = rng.normal(config.sigma_mean, config.sigma_deviation, size=count)
    return torch.sigmoid(torch.tensor(normal, dtype=torch.float32))[:, None].repeat(1, frames)


def chunk_sigmas(rng: np.random.Generator, count: int, frames: int, config: TeacherConfig) -> Tensor:
    """A noise level per chunk, [b f]; in half of the samples every chunk but the last is clean, as in a rollout."""
    normal = rng.normal(config.sigma_mean, config.sigma_deviation, size=(count, frames // CHUNK))
    sigmas = torch.sigmoid(torch.tensor(normal, dtype=torch.float32))
    sigmas[torch.from_numpy(rng.random(count) < 0.5), :-1] = 0
    return sigmas.repeat_interleave(CHUNK, dim=1)


def student_mask(context: int, frames: int, size: torch.Size, dit: DiT) -> Tensor:
    """The block-causal mask of the student over [context | target chunks], for latents of this height and width."""
    tags = [0] * context + [1 + i // CHUNK for i in range(frames)]
    return block_causal_mask(tags, (size[0] // dit.config.patch) * (size[1] // dit.config.patch), dit.device)


def drop_text(rng: np.random.Generator, words: Tensor, index: Tensor, share: float) -> Tensor:
    """Empty all prompts of a sample with probability `share`."""
    words = words.clone()
    for row in index[torch.from_numpy(rng.random(len(index)) < share).to(index.device)]:
        words[row.unique()] = 0
    return words


def loss(model: Model, batch: Batch, rng: np.random.Generator, config: TeacherConfig) -> Tensor:
    """Mean squared error of the target's velocity; the context stays clean, at timestep 0."""
    dit, context = model.dit, batch.context
    clean = batch.latents
    causal = rng.random() < config.causal
    draw = chunk_sigmas if causal else shot_sigmas
    sigma = draw(rng, len(clean), clean.shape[1] - context, config).to(clean.device)
    sigmas = torch.cat((torch.zeros(len(clean), context, device=clean.device), sigma), dim=1)
    noise = torch.randn_like(clean)
    noisy = add_noise(clean, noise, sigmas)
    text = model.read(drop_text(rng, batch.words, batch.index, config.drop_text), batch.index)
    where = places(dit, batch.positions, batch.flags, clean.shape)
    mask = student_mask(context, sigma.shape[1], clean.shape[-2:], dit) if causal else None
    velocity = dit(noisy, sigmas * TIMESTEPS, text, where, mask=mask)
    error = (velocity - (noise - clean))[:, context:].float().square().mean(2)
    weight = 1 + config.cast_weight * (batch.coverage > 0)
    fine = (sigma / config.sigma_floor).clamp(max=1).square()[:, :, None, None]
    return (error * weight * fine).sum() / (weight * (fine > 0)).sum()


def train(
    model: Config,
    cfg: TeacherConfig,
    runs: RunConfig,
    stories: Stories,
    masters: Model,
    sheet: run.Sheet | None = None,
) -> Network[Model]:
    """Train until `runs.steps`; resumes from `runs.out` if it holds a checkpoint."""
    rank, _ = run.start_processes()
    out = Path(runs.out)
    rng = run.seed_everything(runs.seed, rank)
    log = Log(out, enabled=rank == 0)
    network = Network(masters, runs)
    step = 0
    if state := run.resume(out / "checkpoint.pt"):
        network.load_state_dict(state["network"])
        run.restore_random_state(rng, state["random"], rank)
        step = state["step"]
    run.write_config(out, model=model, recipe=cfg, run=runs)
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # one per block and kind of batch
        for block in network.compute.dit.layers():
            block.compile(dynamic=False)
    pace = run.Pace(runs)
    while step < runs.steps:
        kind = cfg.kind
        if kind == "next" and rng.random() < cfg.first_shots:
            kind = "shot"
        batch = stories.batch(rng, runs.batch, kind).to(runs.device)
        value = loss(network.compute, batch, rng, cfg)
        value.backward()
        norm = network.step(learning_scale(step, runs))
        step += 1
        pace.add(value.item(), f"loss_{kind}")
        if step % runs.log_every == 0:
            log.write(step=step, norm=norm, **pace.read(step))
        if rank == 0 and sheet and step % runs.sheet_every == 0:
            sheet(network.ema, step)
        if rank == 0 and (pace.save_due() or step == runs.steps):
            run.save(
                out / "checkpoint.pt",
                {"network": network.state_dict(), "random": run.random_state(rng), "step": step},
            )
    return network


@torch.no_grad()
def trajectory(model: Model, batch: Batch, sigmas: Tensor, guidance: float) -> Iterator[Tensor]:
    """The target latents of `batch` at each of `sigmas`, noise first: Euler steps with guidance, the context clean."""
    dit, context = model.dit, batch.context
    where = places(dit, batch.positions, batch.flags, batch.latents.shape)
    text = model.read(batch.words, batch.index)
    null = model.read(torch.zeros_like(batch.words[:1]), torch.zeros_like(batch.index))
    x = torch.cat((batch.latents[:, :context], torch.randn_like(batch.latents[:, context:])), dim=1)
    yield x[:, context:]
    for sigma, following in pairwise(sigmas):
        timesteps = torch.full(x.shape[:2], float(sigma) * TIMESTEPS, device=x.device)
        timesteps[:, :context] = 0
        velocity = guide(dit(x, timesteps, text, where), dit(x, timesteps, null, where), guidance).float()
        move = spread((following - sigma).to(x.device).expand(x.shape[:2]).clone(), x)
        move[:, :context] = 0
        x = x + move * velocity
        yield x[:, context:]


def sample(model: Model, batch: Batch, steps: int = 25, shift: float = 3.0, guidance: float = 2.0) -> Tensor:
    """The target latents of `batch`, from noise: the end of a trajectory."""
    *_, end = trajectory(model, batch, euler_sigmas(steps, shift), guidance)
    return end
