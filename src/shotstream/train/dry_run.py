"""One step of every recipe at the shapes of the real thing, on noise: do shapes, sharding and memory work out?

shotstream train dry-run --preset wan-1.3b --layers 2 --device cuda
torchrun --nproc-per-node 8 --no-python shotstream train dry-run --preset wan-1.3b --device cuda
"""

from __future__ import annotations

import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shotstream.config import Config
from shotstream.data.batch import WHOLE, Batch, ContextRule, Kind, Sample, Share, collate
from shotstream.models.dit import DiT
from shotstream.train import dmd, lora, ode, processes, teacher
from shotstream.train.dmd import DMDConfig
from shotstream.train.model import Model, TextStates, dual_buffer
from shotstream.train.network import trained
from shotstream.train.ode import ODEConfig
from shotstream.train.recipe import Recipe, Stage
from shotstream.train.run import RunConfig
from shotstream.train.teacher import TeacherConfig

GIB = 2**30
LENGTH = 512


class NoiseStories:
    """Stories of five shots made of noise, in the shapes of a configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.rule = ContextRule.of(dual_buffer(config))

    def batch(
        self, rng: np.random.Generator, size: int, kind: Kind, history: int | None = None, share: Share = WHOLE
    ) -> Batch:
        shot = history or int(rng.integers(1, 5))
        return self.gather([(i, shot) for i in range(size)], rng, kind == "next", 1 if kind == "image" else None, share)

    def pick_stories(self, rng: np.random.Generator, size: int, shots: int) -> list[int]:
        return list(range(size))

    def gather(
        self,
        rows: Sequence[tuple[int, int]],
        rng: np.random.Generator,
        context: bool,
        frames: int | None = None,
        share: Share = WHOLE,
    ) -> Batch:
        samples = [self._sample(shot if context else 0, frames) for _, shot in share.of(list(rows))]
        return collate(samples, self.rule, zeros=self.rule.zeros and frames != 1)

    def _sample(self, shots: int, frames: int | None) -> Sample:
        config = self.config
        picks = self.rule.picks([config.shot_frames()] * shots)
        target = torch.randn(frames or config.chunks * config.chunk, *config.latent_shape)
        return Sample(
            stills=[torch.randn(config.latent_shape) for _ in picks],
            shots=[shot for shot, _ in picks],
            target=target,
            shot=shots,
            prompts={shot: torch.randn(LENGTH, config.dit.text_dim) for shot in range(shots + 1)},
            coverage=torch.zeros(len(target), *config.latent_shape[1:]),
        )


class NoiseVAE:
    """Stands for the autoencoder, which shards nothing and is the same at every layer count."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def encode(self, frames: Tensor) -> Tensor:
        raise NotImplementedError("a dry run has no videos")

    def context_latents(self, frames: Tensor) -> Tensor:
        return torch.randn(len(frames), *self.config.latent_shape)

    def decode(self, latents: Tensor, state: None = None) -> tuple[Tensor, None]:
        count = 4 * (latents.shape[1] - 1) + 1
        return torch.zeros(len(latents), count, 3, 1, 1), None


@dataclass(frozen=True)
class Step:
    """What a stage's first steps took."""

    stage: str
    seconds: float
    peak_gib: float
    trained: int  # parameters that learn, of the stage's student


def shrunk(config: Config, layers: int, height: int, width: int, chunks: int) -> Config:
    """The configuration with other sizes; 0 leaves one as it is."""
    return dataclasses.replace(
        config,
        dit=dataclasses.replace(config.dit, layers=layers or config.dit.layers),
        height=height or config.height,
        width=width or config.width,
        chunks=chunks or config.chunks,
    )


def dry_run(recipe: Recipe, config: Config, device: str, batch: int, tell: Callable[[Step], None]) -> list[Step]:
    """Two steps of every stage that trains a DiT, with the settings of `recipe` and the sizes of `config`."""
    share = processes.start(device)
    settings = {"device": device, "batch": batch * share.processes, "steps": 2}
    settings["shard"] = share.processes > 1
    stories, found = NoiseStories(config), []
    for stage in recipe.stages:
        if not trains_a_dit(stage):
            continue
        with tempfile.TemporaryDirectory() as folder:
            runs = dataclasses.replace(stage.runs, out=folder, **settings)  # type: ignore[arg-type]
            _reset_peak(device)
            started = time.time()
            count = _train(stage, recipe, config, runs, stories)
            found.append(Step(stage.name, time.time() - started, _peak(device), count))
            processes.meet()
        if processes.leads():
            tell(found[-1])
    return found


def trains_a_dit(stage: Stage) -> bool:
    return isinstance(stage.task, TeacherConfig | ODEConfig | DMDConfig)


def _train(stage: Stage, recipe: Recipe, config: Config, runs: RunConfig, stories: NoiseStories) -> int:
    """Two steps of a stage; how many parameters of its student learn."""

    def model() -> Model:
        nothing = torch.zeros(LENGTH, config.dit.text_dim)
        return Model(recipe.options.dit(config), TextStates(nothing), config, recipe.options)

    match stage.task:
        case TeacherConfig() as task:
            network = teacher.train(config, task, runs, stories, model())
        case ODEConfig() as task:  # pairs are made before; data in their place have the same shapes
            network = ode.train(config, dataclasses.replace(task, source="data"), runs, stories, model())
        case DMDConfig() as task:  # one step of the student, one of the critic
            fast = dataclasses.replace(task, critic_steps=1, critic_first=0)
            network = dmd.train(config, fast, runs, stories, model(), model(), NoiseVAE(config))
    return sum(p.numel() for p in trained(network.masters))


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> float:
    """The most memory so far: of this GPU since the last reset, or of this process (which never shrinks)."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


@dataclass(frozen=True)
class Memory:
    """What one process holds in a stage, in bytes. Estimates; `dry_run` measures."""

    states: int  # masters, averages, optimiser states and gradients of all networks, and the teacher
    gathered: int  # the block being computed and the next one, in the computing type
    activations: int  # inputs of all blocks, and everything inside one

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations


def memory(stage: Stage, config: Config, shards: int, batch: int = 1) -> Memory:
    """The memory plan of a stage whose networks are spread over `shards` processes, `batch` samples in each."""
    with torch.device("meta"):
        dit = DiT(config.dit)
    total = sum(p.numel() for p in dit.parameters())
    block = sum(p.numel() for p in dit.blocks[0].parameters())
    match stage.task:
        case TeacherConfig(tune="attention"):
            learners, learning, frozen = 1, sum(p.numel() for n, p in dit.named_parameters() if "self_attn" in n), 0
        case DMDConfig(lora=rank) if rank:
            learners, frozen, learning = 2, 1, lora.size(config.dit, rank)
            total += learning
        case DMDConfig():
            learners, learning, frozen = 2, total, 1
        case ODEConfig():
            learners, learning, frozen = 1, total, int(stage.task.source == "guided")
        case _:
            learners, learning, frozen = 1, total, 0
    # master and average of everything; gradient and two moments of what learns; the teacher's float32 shards
    states = learners * (8 * total + 12 * learning) + frozen * 4 * total
    _, height, width = config.latent_shape
    tokens = (dual_buffer(config).budget + config.chunks * config.chunk) * height * width // config.dit.patch**2
    inside = 2 * tokens * (12 * config.dit.dim + 3 * config.dit.ffn_dim)
    activations = batch * (2 * tokens * config.dit.dim * config.dit.layers + inside)
    return Memory(states // shards, 2 * 2 * block, activations)


def text_of(config: Config) -> str:
    """ "30 layers, 480 x 832, 27 x 1560 tokens"."""
    _, height, width = config.latent_shape
    frames = dual_buffer(config).budget + config.chunks * config.chunk
    tokens = height * width // config.dit.patch**2
    return f"{config.dit.layers} layers, {config.height} x {config.width}, {frames} x {tokens} tokens"
