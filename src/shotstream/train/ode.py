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
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shotstream.config import Config
from shotstream.data.batch import Batch, Kind, Source
from shotstream.flow import TIMESTEPS, add_noise, euler_sigmas, guide, to_x0
from shotstream.models.attention import BlockCausal
from shotstream.models.dit import Text
from shotstream.models.rope import Rotation
from shotstream.train import processes
from shotstream.train.draws import Draws, seed_everything
from shotstream.train.model import Model, after
from shotstream.train.network import Network, frozen, network
from shotstream.train.run import Job, RunConfig, Sheet
from shotstream.train.teacher import drop_text, trajectory


@dataclass(frozen=True)
class ODEConfig:
    """What is special to this recipe."""

    source: Literal["pairs", "data", "guided"] = "pairs"  # pairs: the teacher's trajectories
    pairs: str = ""  # folder of pairs
    first_shots: float = 0.25  # share of batches without context
    euler_steps: int = 12  # of the teacher; a multiple of the student's number of steps
    guidance: float = 2.0
    drop_text: float = 0.0  # share of samples without text (released: 0.1)


def states_of(model: Model, batch: Batch, config: Config, cfg: ODEConfig) -> Tensor:
    """The teacher's way from noise to the target, at the student's levels and at the end: `b levels+1 f c h w`.

    Raises ValueError if its steps do not visit those levels.
    """
    sigmas, levels = euler_sigmas(cfg.euler_steps, config.schedule.shift), torch.tensor(config.schedule.sigmas())
    wanted = [int((sigmas - level).abs().argmin()) for level in levels]
    if not torch.allclose(sigmas[wanted].float(), levels, atol=1e-3):
        told = ", ".join(f"{float(level):.3f}" for level in levels)
        raise ValueError(f"euler_steps={cfg.euler_steps}: the teacher must visit the student's levels {told}")
    states = trajectory(model, batch, sigmas, cfg.guidance)
    return torch.stack([x for i, x in enumerate(states) if i in (*wanted, len(sigmas) - 1)], dim=1)


def write_pairs(
    out: Path, model: Model, stories: Source, config: Config, cfg: ODEConfig, shards: int, size: int, seed: int = 0
) -> None:
    """Write `shards` files of `size` pairs; those that exist are kept, so several processes and restarts add up.

    Processes that `torchrun` started take turns: each makes every n-th file.
    """
    out.mkdir(parents=True, exist_ok=True)
    share = processes.share()
    for number in range(share.rank, shards, share.processes):
        path = out / f"pairs-{number:05d}.safetensors"
        if path.exists():
            continue
        rng = seed_everything(seed * 1_000_000 + number)
        kind: Kind = "shot" if rng.random() < cfg.first_shots else "next"
        batch = stories.batch(rng, size, kind).to(model.dit.device)
        states = states_of(model, batch, config, cfg)
        tensors = batch.tensors() | {
            "latents": batch.latents[:, : batch.context].bfloat16(),
            "states": states.bfloat16(),
        }
        unfinished = path.with_suffix(f".{os.getpid()}")
        metadata = {"zeros": str(batch.zeros)}
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, unfinished, metadata)
        os.replace(unfinished, path)
        print(f"{path.name}: {number + 1} of {shards}", flush=True)
    processes.meet()


class Pairs:
    """The pairs in a folder. The samples of a batch have one shape, so files are told apart by it."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("pairs-*.safetensors"))
        if not self.paths:
            raise FileNotFoundError(f"{folder}: no pairs; write them with `shotstream train stage pairs`")
        shapes = [_shapes(path) for path in self.paths]
        self.shapes = [shape for _, shape in shapes]
        self.size = min(count for count, _ in shapes)  # pairs per file

    def batch(self, draws: Draws, size: int) -> tuple[Batch, Tensor]:
        """About `size` pairs, whole files of them; this process's share."""
        shape = self.shapes[int(draws.rng.integers(len(self.paths)))]
        alike = [path for path, s in zip(self.paths, self.shapes, strict=True) if s == shape]
        files = [alike[i] for i in draws.rng.integers(len(alike), size=max(1, size // self.size))]
        rows = draws.share.of([(n, row) for n in range(len(files)) for row in range(self.size)])
        parts = [read_pairs(files[n], [row for m, row in rows if m == n]) for n in sorted({n for n, _ in rows})]
        return joined([batch for batch, _ in parts]), torch.cat([states for _, states in parts])


def _shapes(path: Path) -> tuple[int, tuple[int, int]]:
    """Pairs in a file, and latent frames of each: of the context, and of the target."""
    with safe_open(path, "pt") as file:
        count, context = file.get_slice("latents").get_shape()[:2]
        return count, (context, file.get_slice("states").get_shape()[2])


def read_pairs(path: Path, rows: list[int] | None = None) -> tuple[Batch, Tensor]:
    """Pairs of a file (default: all): the batch (its target latents are the trajectory's end) and the states."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        zeros = (file.metadata() or {}).get("zeros") == "True"
    words = tensors.pop("words")
    if rows is not None:
        tensors = {name: tensor[rows] for name, tensor in tensors.items()}
    states, context = tensors.pop("states").float(), tensors.pop("latents").float()
    latents = torch.cat((context, states[:, -1]), dim=1)
    return Batch(latents=latents, context=context.shape[1], words=words, zeros=zeros, **tensors), states


def joined(batches: list[Batch]) -> Batch:
    """One batch of several that have the same shapes."""
    firsts = [0, *accumulate(len(batch.words) for batch in batches)]
    moved = [replace(b, index=b.index + first) for b, first in zip(batches, firsts, strict=False)]
    together = {name: torch.cat([b.tensors()[name] for b in moved]) for name in moved[0].tensors()}
    return replace(moved[0], **together)  # type: ignore[arg-type]


def noised(batch: Batch, sigmas: tuple[float, ...], draws: Draws) -> Tensor:
    """States made of data: the target plus one draw of noise at each level, `b levels+1 f c h w`."""
    clean = batch.target
    noise = draws.noise(tuple(clean.shape))
    return torch.stack([*(add_noise(clean, noise, torch.tensor(s)) for s in sigmas), clean], dim=1)


def data(
    cfg: ODEConfig, draws: Draws, stories: Source, pairs: Pairs | None, config: Config, size: int
) -> tuple[Batch, Tensor]:
    """What the student is shown in one step: samples and their states."""
    if pairs:
        return pairs.batch(draws, size)
    kind: Kind = "shot" if draws.rng.random() < cfg.first_shots else "next"
    batch = stories.batch(draws.rng, size, kind, share=draws.share)
    return batch, noised(batch, config.schedule.sigmas(), draws)


@dataclass(frozen=True)
class Task:
    """What the student is shown: the whole sequence, each chunk at a level of its own, behind the block-causal mask."""

    x: Tensor  # b f c h w: clean context, then chunks
    sigmas: Tensor  # b f
    text: Text
    places: Rotation
    mask: BlockCausal
    clean: Tensor  # the target's clean end

    def x0(self, model: Model, text: Text | None = None) -> Tensor:
        """The clean estimate of the target by `model`."""
        velocity = model.dit(self.x, self.sigmas * TIMESTEPS, text or self.text, self.places, mask=self.mask)
        return to_x0(self.x, velocity, self.sigmas)[:, -self.clean.shape[1] :]


def task(model: Model, batch: Batch, states: Tensor, draws: Draws, words: Tensor | None = None) -> Task:
    """Draw a level per chunk, uniform and independent; the last level is clean."""
    config, context, target = model.config, batch.context, states[:, -1]
    count, frames = target.shape[:2]
    levels = torch.tensor((*config.schedule.sigmas(), 0.0), device=target.device)
    level = draws.integers(len(levels), count, frames // config.chunk).to(target.device)
    level = level.repeat_interleave(config.chunk, dim=1)
    x = states[torch.arange(count)[:, None].to(level), level, torch.arange(frames)[None].to(level)]
    x = torch.cat((batch.latents[:, :context], x), dim=1)
    text = model.read(batch.words if words is None else words, batch.index)
    mask = model.mask(context, x)
    return Task(x, after(context, levels[level]), text, model.places(batch), mask, target)


@torch.no_grad()
def guided(teacher: Model, batch: Batch, task: Task, guidance: float) -> Tensor:
    """What the teacher answers to the same task with guidance: the student learns to answer so in one pass."""
    text = teacher.read(batch.words, batch.index)
    null = teacher.read(teacher.null(batch.words), torch.zeros_like(batch.index))
    return guide(task.x0(teacher, text), task.x0(teacher, null), guidance)


def loss(model: Model, task: Task, target: Tensor) -> Tensor:
    """Mean squared error of x0 where there is noise."""
    error = (task.x0(model) - target).square().mean((2, 3, 4))
    noisy = (task.sigmas[:, -target.shape[1] :] > 0).float()
    return (error * noisy).sum() / processes.averaged(noisy.sum()).clamp(min=1)


def train(
    model: Config, cfg: ODEConfig, runs: RunConfig, stories: Source, masters: Model, sheet: Sheet | None = None
) -> Network[Model]:
    """Train until `runs.steps`; resumes from `runs.out`."""
    masters.text.requires_grad_(False)  # trained with the teacher; frozen from here on
    teacher = copy.deepcopy(masters) if cfg.source == "guided" else None
    trained = network(masters, runs)
    teacher = frozen(teacher, runs) if teacher else None
    pairs = Pairs(Path(cfg.pairs)) if cfg.source == "pairs" else None
    job = Job(runs, {"network": trained}, sheet, model=model, recipe=cfg)
    for draws in job.steps():
        for part in draws.parts(runs.accumulate):
            batch, states = data(cfg, part, stories, pairs, model, runs.batch)
            batch, states = batch.to(runs.device), states.to(runs.device)
            words = drop_text(part, trained.compute, batch.words, batch.index, cfg.drop_text)
            shown = task(trained.compute, batch, states, part, words)
            target = guided(teacher, batch, shown, cfg.guidance) if teacher else shown.clean
            value = loss(trained.compute, shown, target)
            (value / runs.accumulate).backward()
            job.tell(loss=value)
        job.tell(norm=trained.step(job.scale))
    return trained
