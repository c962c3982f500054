"""Causal initialisation: the teacher's network learns to work chunk by chunk (paper 3.2, method.md 13.2 and 13.3).

    shotstream train stage pairs --preset storybook --out runs
    shotstream train stage ode --preset storybook --out runs

A pair is the teacher's trajectory from noise to a shot, kept at the student's noise levels. The student sees the whole
sequence at once behind a block-causal mask, each chunk at a level of its own, and regresses the clean end.
With `source="data"` the states are data plus noise: no teacher is sampled, at the price of means for answers. With
`source="guided"` the answers are the teacher's with guidance, behind the same mask: worth it when the
teacher has met that mask (`TeacherConfig.causal`) and its trajectories are still rough.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shotstream.config import Config
from shotstream.data.storybook import Batch, Stories
from shotstream.flow import TIMESTEPS, add_noise, euler_sigmas, guide, to_x0
from shotstream.models.dit import Text
from shotstream.models.rope import Rotation
from shotstream.train import run
from shotstream.train.run import Log, Network, Pace, RunConfig, learning_scale
from shotstream.train.teacher import Model, places, student_mask, trajectory


@dataclass(frozen=True)
class ODEConfig:
    """What is special to this recipe."""

    source: str = "pairs"  # "pairs" (the teacher's trajectories), "data" or "guided"
    pairs: str = ""  # folder of pairs
    first_shots: float = 0.25  # share of batches without context
    euler_steps: int = 12  # of the teacher; a multiple of the student's number of steps
    guidance: float = 2.0


def states_of(model: Model, batch: Batch, config: Config, cfg: ODEConfig) -> Tensor:
    """The teacher's way from noise to the target, at the student's levels and at the end: `b levels+1 f c h w`."""
    sigmas = euler_sigmas(cfg.euler_steps, config.schedule.shift)
    wanted = [int((sigmas - s).abs().argmin()) for s in config.schedule.sigmas()]
    states = trajectory(model, batch, sigmas, cfg.guidance)
    return torch.stack([x for i, x in enumerate(states) if i in (*wanted, len(sigmas) - 1)], dim=1)


def write_pairs(
    out: Path, model: Model, stories: Stories, config: Config, cfg: ODEConfig, shards: int, size: int, seed: int = 0
) -> None:
    """Write `shards` files of `size` pairs; those that exist are kept, so several processes and restarts add up."""
    out.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        path = out / f"pairs-{number:05d}.safetensors"
        if path.exists():
            continue
        rng = run.seed_everything(seed * 1_000_000 + number)
        kind = "shot" if rng.random() < cfg.first_shots else "next"
        batch = stories.batch(rng, size, kind).to(model.dit.device)
        states = states_of(model, batch, config, cfg)
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name != "context"}
        tensors |= {
            "latents": batch.latents[:, : batch.context].bfloat16(),
            "states": states.bfloat16(),
        }
        unfinished = path.with_suffix(f".{os.getpid()}")
        save_file({name: t.contiguous() for name, t in tensors.items()}, unfinished)
        os.replace(unfinished, path)


def read_pairs(path: Path) -> tuple[Batch, Tensor]:
    """A shard: the batch (its target latents are the trajectory's end) and the states."""
    tensors = load_file(path)
    states = tensors.pop("states").float()
    context = tensors["latents"].float()
    latents = torch.cat((context, states[:, -1]), dim=1)
    del tensors["latents"]
    return Batch(latents=latents, context=context.shape[1], **tensors), states


def noised(batch: Batch, sigmas: tuple[float, ...]) -> Tensor:
    """States made of data: the target plus one draw of noise at each level, `b levels+1 f c h w`."""
    clean = batch.latents[:, batch.context :]
    noise = torch.randn_like(clean)
    return torch.stack([*(add_noise(clean, noise, torch.tensor(s)) for s in sigmas), clean], dim=1)


@dataclass(frozen=True)
class Task:
    """What the student is shown: the whole sequence, each chunk at a level of its own, behind the block-causal mask."""

    x: Tensor  # b f c h w: clean context, then chunks
    sigmas: Tensor  # b f
    text: Text
    places: Rotation
    mask: Tensor
    clean: Tensor  # the target's clean end

    def x0(self, model: Model, text: Text | None = None) -> Tensor:
        """The clean estimate of the target by `model`."""
        velocity = model.dit(self.x, self.sigmas * TIMESTEPS, text or self.text, self.places, mask=self.mask)
        return to_x0(self.x, velocity, self.sigmas)[:, -self.clean.shape[1] :]


def task(model: Model, batch: Batch, states: Tensor, config: Config, rng: np.random.Generator) -> Task:
    """Draw a level per chunk, uniform and independent; the last level is clean."""
    context, target = batch.context, states[:, -1]
    count, frames = target.shape[:2]
    levels = torch.tensor((*config.schedule.sigmas(), 0.0), device=target.device)
    level = torch.from_numpy(rng.integers(len(levels), size=(count, frames // config.chunk))).to(target.device)
    level = level.repeat_interleave(config.chunk, dim=1)
    x = states[torch.arange(count)[:, None].to(level), level, torch.arange(frames)[None].to(level)]
    x = torch.cat((batch.latents[:, :context], x), dim=1)
    sigmas = torch.cat((torch.zeros(count, context, device=level.device), levels[level]), dim=1)
    where = places(model.dit, batch.positions, batch.flags, x.shape)
    mask = student_mask(context, frames, x.shape[-2:], model.dit)
    return Task(x, sigmas, model.read(batch.words, batch.index), where, mask, target)


@torch.no_grad()
def guided(teacher: Model, batch: Batch, task: Task, guidance: float) -> Tensor:
    """What the teacher answers to the same task with guidance: the student learns to answer so in one pass."""
    text = teacher.read(batch.words, batch.index)
    null = teacher.read(torch.zeros_like(batch.words[:1]), torch.zeros_like(batch.index))
    return guide(task.x0(teacher, text), task.x0(teacher, null), guidance)


def loss(model: Model, task: Task, target: Tensor) -> Tensor:
    """Mean squared error of x0 where there is noise."""
    error = (task.x0(model) - target).square().mean((2, 3, 4))
    noisy = (task.sigmas[:, -target.shape[1] :] > 0).float()
    return (error * noisy).sum() / noisy.sum().clamp(min=1)


def train(
    model: Config,
    cfg: ODEConfig,
    runs: RunConfig,
    stories: Stories,
    masters: Model,
    sheet: run.Sheet | None = None,
) -> Network[Model]:
    """Train until `runs.steps`; resumes from `runs.out`."""
    rank, _ = run.start_processes()
    out = Path(runs.out)
    rng = run.seed_everything(runs.seed, rank)
    log = Log(out, enabled=rank == 0)
    masters.text.requires_grad_(False)  # trained with the teacher; frozen from here on
    network = Network(masters, runs)
    teacher = copy.deepcopy(masters)
    shards = sorted(Path(cfg.pairs).glob("pairs-*.safetensors")) if cfg.source == "pairs" else []
    if cfg.source == "pairs" and not shards:
        raise FileNotFoundError(f"{cfg.pairs}: no pairs; write them with `shotstream train stage pairs`")
    step = 0
    if state := run.resume(out / "checkpoint.pt"):
        network.load_state_dict(state["network"])
        run.restore_random_state(rng, state["random"], rank)
        step = state["step"]
    run.write_config(out, model=model, recipe=cfg, run=runs)
    pace = Pace(runs)
    while step < runs.steps:
        if shards:
            batch, states = read_pairs(shards[int(rng.integers(len(shards)))])
        else:
            kind = "shot" if rng.random() < cfg.first_shots else "next"
            batch = stories.batch(rng, runs.batch, kind)
            states = noised(batch, model.schedule.sigmas())
        batch, states = batch.to(runs.device), states.to(runs.device)
        shown = task(network.compute, batch, states, model, rng)
        target = guided(teacher, batch, shown, cfg.guidance) if cfg.source == "guided" else shown.clean
        value = loss(network.compute, shown, target)
        value.backward()
        norm = network.step(learning_scale(step, runs))
        step += 1
        pace.add(value.item())
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
