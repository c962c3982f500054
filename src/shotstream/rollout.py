"""The few-step sampler and the rollout: the only place in the project where latents are generated.

The interactive session, both distillation stages, the evaluation and the benchmark all call `roll_shot`, so that
"inference is what was trained" holds by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shotstream.flow import add_noise, to_x0
from shotstream.memory.plan import Call, Frame, MemoryPolicy
from shotstream.memory.schedule import NoiseSchedule
from shotstream.memory.store import FrameStore
from shotstream.models.dit import DiT, Text


class Noise(Protocol):
    """Where a shot's random numbers come from. Step 0 is the initial noise, step i what is added after step i - 1."""

    def draw(self, chunk: int, step: int, shape: tuple[int, ...]) -> Tensor: ...


@dataclass(frozen=True)
class SeededNoise:
    """Counter-based noise: a function of (seed, shot, chunk, step) alone, the same on every device.

    Any shot, chunk or step can be remade by itself (Philox 4x64, numpy).
    """

    seed: int
    shot: int

    def draw(self, chunk: int, step: int, shape: tuple[int, ...]) -> Tensor:
        key = np.array([self.seed % 2**64, self.shot], dtype=np.uint64)
        counter = np.array([0, 0, chunk, step], dtype=np.uint64)  # the low words count the numbers drawn
        bits = np.random.Generator(np.random.Philox(key=key, counter=counter))
        return torch.from_numpy(bits.standard_normal(shape, dtype=np.float32))


class Prompts:
    """Cross-attention keys and values by prompt number, projected once and kept as long as they are needed."""

    def __init__(self, dit: DiT) -> None:
        self.dit = dit
        self.known: dict[int, Text] = {}

    def add(self, number: int, states: Tensor) -> None:
        """`states` [b s d]: the prompt with this number, for every sample of the batch."""
        self.known[number] = self.dit.read(states, torch.zeros(len(states), 1, dtype=torch.long, device=states.device))

    def retain(self, numbers: set[int]) -> None:
        """Forget all prompts but these."""
        self.known = {n: text for n, text in self.known.items() if n in numbers}

    def text(self, numbers: Sequence[int]) -> Text:
        """What latent frames with these prompt numbers read."""
        distinct = sorted(set(numbers))
        texts = [self.known[n] for n in distinct]
        batch = len(texts[0].index)
        rows = torch.tensor([distinct.index(n) for n in numbers]) * batch
        index = (rows[None] + torch.arange(batch)[:, None]).to(texts[0].index.device)
        if len(texts) == 1:
            return texts[0].at(index)
        keys = tuple(torch.cat(parts) for parts in zip(*(t.keys for t in texts), strict=True))
        values = tuple(torch.cat(parts) for parts in zip(*(t.values for t in texts), strict=True))
        return Text(keys, values, index)


@dataclass
class Memory:
    """What a stream remembers between chunks and shots: which frames, in order, and their keys and values."""

    store: FrameStore
    frames: tuple[Frame, ...] = ()
    count: int = 0  # latent frames generated so far: the next frame's index
    shots: tuple[int, ...] = field(default=())  # pictures of each finished shot


def new_memory(dit: DiT, latent_shape: tuple[int, int, int]) -> Memory:
    """An empty memory for latents of this shape (c, h, w)."""
    patch = dit.config.patch
    return Memory(FrameStore(dit.config.layers, latent_shape[1] // patch, latent_shape[2] // patch))


def denoise_chunk(
    forward: Callable[[Tensor, float], Tensor],
    noise: Callable[[int], Tensor],
    schedule: NoiseSchedule,
    exit_step: int | None = None,
) -> Tensor:
    """The few-step sampler: from noise to x0 through the levels of `schedule`, re-noising in between.

    `forward(x, timestep)` is the velocity; `noise(i)` the i-th draw. With `exit_step` (training, method.md 13.4) the
    x0 of that step is returned and gradients flow through that step alone.
    """
    sigmas, timesteps = schedule.sigmas(), schedule.timesteps()
    last = len(sigmas) - 1 if exit_step is None else exit_step
    x = noise(0)
    for step in range(last + 1):
        learning = torch.is_grad_enabled() and step == last
        with torch.set_grad_enabled(learning):
            velocity = forward(x, timesteps[step])
            x0 = to_x0(x, velocity, torch.tensor(sigmas[step], dtype=torch.float32))
        if step < last:
            x = add_noise(x0, noise(step + 1), torch.tensor(sigmas[step + 1], dtype=torch.float32))
    return x0


@dataclass
class Roll:
    """One stream of latents: the network, its policy and schedule, and the memory it fills."""

    dit: DiT
    policy: MemoryPolicy
    schedule: NoiseSchedule
    memory: Memory
    prompts: Prompts
    latent_shape: tuple[int, int, int]

    def shot(
        self,
        shot: int,
        chunks: int,
        noise: Noise,
        context: Callable[[tuple[Frame, ...]], Tensor],
        batch: int = 1,
        exit_step: int | None = None,
    ) -> Iterator[Tensor]:
        """Generate a shot chunk by chunk: yields clean latents `b f c h w`.

        `context(frames)`: the clean latents `b f c h w` of context frames, one still each (zero where offset is -1).
        A chunk is handed out before it is committed; the commit of the last one is left to the next cut, which
        never needs it when the policy starts shots with an empty memory.
        """
        size = self.policy.chunk
        for chunk in range(chunks):
            new = tuple(
                Frame(self.memory.count + i, shot, chunk * size + i, prompt=shot) for i in range(size)
            )
            if chunk == 0:
                self._cut(new, context)
            self._remember(self.policy.fit(self.memory.frames, new).memory)
            forward = self._forward("denoise", new)
            shape = (batch, size, *self.latent_shape)
            x0 = denoise_chunk(forward, partial(self._draw, noise, chunk, shape), self.schedule, exit_step)
            self.memory.count += size
            yield x0
            if chunk + 1 < chunks:
                with torch.no_grad():
                    self._forward("commit", new, write=True)(x0.detach(), 0.0)
                self._remember(self.policy.settle(self.memory.frames, new).memory)

    def _draw(self, noise: Noise, chunk: int, shape: tuple[int, ...], step: int) -> Tensor:
        return noise.draw(chunk, step, shape).to(self.dit.device, self.dit.dtype)

    def _cut(self, new: tuple[Frame, ...], context: Callable[[tuple[Frame, ...]], Tensor]) -> None:
        """Start a shot: the policy says what is remembered and what must be computed first (the prefill)."""
        boundary = self.policy.boundary(self.memory.frames, new, True, self.memory.shots)
        self._remember(boundary.memory)
        if boundary.prefill:
            with torch.no_grad():
                latents = context(boundary.prefill).to(self.dit.device, self.dit.dtype)
                self._forward("prefill", boundary.prefill, write=True)(latents, 0.0)
            self._remember(boundary.memory + boundary.prefill[len(boundary.memory) :])

    def _remember(self, frames: tuple[Frame, ...]) -> None:
        self.memory.frames = frames
        self.memory.store.retain(frames)  # also what an interrupted call wrote without being remembered

    def _forward(
        self, kind: str, new: tuple[Frame, ...], write: bool = False
    ) -> Callable[[Tensor, float], Tensor]:
        """One network call as its plan has it, ready to be repeated for every step of a chunk."""
        plan = self.policy.plan(Call(kind, self.memory.frames, new))  # type: ignore[arg-type]
        bound = self.memory.store.bind(plan, new, write)
        text = self.prompts.text([frame.prompt for frame in new])
        where = bound.rotation(plan.queries, self.dit.config.head_dim, self.dit.patch_embedding.weight)

        def forward(x: Tensor, timestep: float) -> Tensor:
            timesteps = torch.full(x.shape[:2], timestep, dtype=torch.float32, device=x.device)
            return self.dit(x, timesteps, text, where, bound)

        return forward


