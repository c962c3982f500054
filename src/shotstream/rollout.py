"""The few-step sampler and the rollout: the only place in the project where latents are generated.

The interactive session, both distillation stages, the evaluation and the benchmark all call `Roll.shot`, so that
"inference is what was trained" holds by construction. Which frames a call reads is the policy's decision
(`memory/plan.py`); this file carries decisions out, for every system in `memory/policies`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shotstream.flow import add_noise, to_x0
from shotstream.memory.plan import Boundary, Call, Change, Frame, Kind, MemoryPolicy
from shotstream.memory.schedule import NoiseSchedule
from shotstream.memory.store import FrameStore, SettledStore
from shotstream.models.dit import DiT, Level, Text

Stills = Callable[[tuple[Frame, ...]], Tensor]
"""The clean latents `b f c h w` of context frames, one still each (zero where the offset is -1)."""


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


class Levels:
    """What the network is told of its noise levels: few-step sampling visits the same few in every chunk."""

    def __init__(self, dit: DiT) -> None:
        self.dit = dit
        self.known: dict[tuple[float, torch.Size], Level] = {}

    def at(self, timestep: float, shape: torch.Size) -> Level:
        """All frames of a call, `shape` = [b f], at this timestep."""
        if (timestep, shape) not in self.known:
            everywhere = torch.full((), timestep, dtype=torch.float32, device=self.dit.device).expand(shape)
            self.known[timestep, shape] = replace(self.dit.level(everywhere), everywhere=timestep)
        return self.known[timestep, shape]


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


@dataclass(frozen=True)
class Finished:
    """A finished chunk whose keys and values are not in the store yet: the next chunk asks for them, a cut may not."""

    frames: tuple[Frame, ...]
    latents: Tensor  # b f c h w
    text: Text


@dataclass
class Memory:
    """What a stream remembers between chunks and shots: which frames, in order, and their keys and values."""

    store: FrameStore
    frames: tuple[Frame, ...] = ()
    count: int = 0  # latent frames begun so far: the next frame's index
    shots: tuple[int, ...] = ()  # pictures of each finished shot; whoever decodes them says so
    newest: Finished | None = None
    recent: Tensor | None = None  # the last output latents `b f c h w`, as many as the policy wants to pass once more

    def fork(self) -> Memory:
        """Another memory with the same past: to go on twice from here, or to begin a shot again that was interrupted.

        Costs nothing by itself, for tensors are never changed in place; what only the fork remembers stays alive.
        """
        return replace(self, store=self.store.fork())


def new_memory(dit: DiT, latent_shape: tuple[int, int, int], policy: MemoryPolicy | None = None) -> Memory:
    """An empty memory for latents of this shape (c, h, w), as small as `policy`, if it is known, allows."""
    patch = dit.config.patch
    store = SettledStore if policy and policy.settled else FrameStore
    return Memory(store(dit.config.layers, latent_shape[1] // patch, latent_shape[2] // patch))


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
    levels: Levels | None = None  # of a network that does not learn: kept from call to call
    prompt: int = 0  # what chunks that enter now read
    steered: bool = False  # whether that text is new: no chunk has entered with it
    entered: int = 0  # chunks of the running shot that have entered; in joint windows more than have left
    ahead: tuple[Frame, ...] | None = None  # first frames of a shot whose cut has been made already

    def shot(
        self,
        shot: int,
        chunks: int,
        noise: Noise,
        context: Stills,
        batch: int = 1,
        exit_step: int | None = None,
    ) -> Iterator[Tensor]:
        """Generate a shot chunk by chunk: yields clean latents `b f c h w`. It opens with the text of number `shot`.

        A chunk is handed out before it is committed; the last one is committed only if the next shot reads it.
        `exit_step`: see `denoise_chunk`. Raises ValueError past the policy's limit.
        """
        draw = partial(self._draw, noise, (batch, self.policy.chunk, *self.latent_shape))
        if self.schedule.joint:
            assert exit_step is None, "joint windows are not for training"
            yield from self._jointly(shot, chunks, draw, context)
            return
        for chunk in range(chunks):
            new = self._enter(shot, chunk, context)
            self._fit(new)
            if chunk == 0 and self.policy.window is None:
                self.memory.store.room = len(self.memory.frames) + chunks * len(new)
            x0 = denoise_chunk(self._forward("denoise", new), partial(draw, chunk), self.schedule, exit_step)
            self._leave(new, x0)
            yield x0

    def _jointly(self, shot: int, chunks: int, draw: Callable[[int, int], Tensor], context: Stills) -> Iterator[Tensor]:
        """The same with a window of chunks in each call, at rising noise levels; the oldest leaves it finished."""
        sigmas, timesteps = (
            torch.tensor(numbers, device=self.dit.device)
            for numbers in (self.schedule.sigmas(), self.schedule.timesteps())
        )
        window: dict[int, tuple[tuple[Frame, ...], Tensor]] = {}  # chunk -> its frames, its noisy latents
        for step in self.schedule.windows(chunks):
            if step.levels[-1] == 0:
                chunk = step.chunks[-1]
                window[chunk] = self._enter(shot, chunk, context), draw(chunk, 0)
            frames, noisy = zip(*window.values(), strict=True)
            self._fit(frames[0])
            levels = torch.tensor(step.levels, device=self.dit.device).repeat_interleave(self.policy.chunk)
            with torch.no_grad():
                x = torch.cat(noisy, dim=1)
                velocity = self._forward("denoise", tuple(chain(*frames)))(x, timesteps[levels])
                clean = to_x0(x, velocity, sigmas[levels][None]).split(self.policy.chunk, dim=1)
            for chunk, level, new, x0 in zip(step.chunks, step.levels, frames, clean, strict=True):
                if level + 1 < len(sigmas):
                    window[chunk] = new, add_noise(x0, draw(chunk, level + 1), sigmas[level + 1])
            if step.levels[0] + 1 == len(sigmas):
                del window[step.chunks[0]]
                self._leave(frames[0], clean[0])
                yield clean[0]

    def prepare(self, shot: int, context: Stills) -> bool:
        """Make the cut to shot number `shot` now; its text may be added later, for the same latents.

        False, and nothing is done, if what the cut computes reads that text.
        """
        self._open(shot)
        new = self._frames(shot, 0)
        if any(frame.prompt == shot for frame in self._boundary(new, cut=True).prefill):
            return False
        if new != self.ahead:
            self._turn(new, True, context)
            self.ahead = new
        return True

    def steer(self, number: int, states: Tensor) -> int:
        """From the next chunk on the running shot reads this text: `states` [b s d], under a number no shot has.

        Returns which chunk that is. One past the shot's last: too late, and the next shot opens with its own text.
        """
        self.prompts.add(number, states)
        self.prompt, self.steered = number, True
        return self.entered

    @torch.no_grad()
    def replay(self, shot: int, latents: Tensor, context: Stills, steered: Mapping[int, int] | None = None) -> None:
        """Remember a finished shot, given its clean latents `b f c h w`, exactly as if it had just been generated.

        `steered`: chunk -> number of the text read from there on. Prompts are known and `memory.shots` is kept by the
        caller, as for `shot`. One call per chunk; none if the policy carries nothing over a cut.
        """
        size = self.policy.chunk
        if latents.shape[1] % size:
            raise ValueError(f"{latents.shape[1]} latent frames are no whole chunks of {size}; give the whole shot")
        latents = latents.to(self.dit.device, self.dit.dtype)
        if not self.policy.carries:
            self._open(shot)
            self.memory.count += latents.shape[1]
            self._record(latents)
            return
        for chunk, x0 in enumerate(latents.split(size, dim=1)):
            if steered and chunk in steered:
                self.prompt, self.steered = steered[chunk], True
            new = self._enter(shot, chunk, context)
            self._fit(new)
            self._leave(new, x0)

    # A chunk enters, after the cut or the new text that falls on it; room is made for it; it leaves finished; and it
    # is committed when the next one wants to read it.

    def _enter(self, shot: int, chunk: int, context: Stills) -> tuple[Frame, ...]:
        """The frames of a chunk that begins."""
        if cut := chunk == 0:
            self._open(shot)
        event, self.steered = cut or self.steered, False
        new = self._frames(shot, chunk)
        if event and new != self.ahead:
            self._turn(new, cut, context)
        self.ahead = None
        self.memory.count += len(new)
        self.entered = chunk + 1
        return new

    def _frames(self, shot: int, chunk: int) -> tuple[Frame, ...]:
        start, offset = self.memory.count, chunk * self.policy.chunk
        return tuple(Frame(start + i, shot, offset + i, self.prompt) for i in range(self.policy.chunk))

    def _open(self, shot: int) -> None:
        """A shot begins with its own text; where shots are independent, each is a stream of its own."""
        self.prompt = shot
        if self.policy.restart:
            self.memory.count = 0

    def _turn(self, new: tuple[Frame, ...], cut: bool, context: Stills) -> None:
        """A cut or a new text: the policy says what is still remembered, and what must be computed first."""
        memory, newest = self.memory, self.memory.newest
        boundary = self._boundary(new, cut)
        if newest and not set(newest.frames).isdisjoint(boundary.memory):
            self._commit()
        memory.newest = None
        self._remember(boundary.memory)
        if boundary.prefill:
            latents = self._clean(boundary.prefill, new[0].index, context)
            with torch.no_grad():
                self._forward("prefill", boundary.prefill, write=True)(latents, 0.0)
            self._remember(boundary.memory + boundary.prefill[len(boundary.memory) :])

    def _boundary(self, new: tuple[Frame, ...], cut: bool) -> Boundary:
        memory, newest = self.memory, self.memory.newest
        before = self.policy.settle(memory.frames, newest.frames).memory if newest else memory.frames
        return self.policy.boundary(before, new, cut, memory.shots)

    def _clean(self, frames: tuple[Frame, ...], now: int, context: Stills) -> Tensor:
        """Clean latents `b f c h w` of frames to compute before frame `now`: stills, and outputs of this stream."""
        stills = tuple(frame for frame in frames if frame.role == "context")
        given = iter(context(stills).to(self.dit.device, self.dit.dtype).unbind(1) if stills else ())

        def latent(frame: Frame) -> Tensor:
            if frame.role == "context":
                return next(given)
            assert self.memory.recent is not None, "a policy that passes outputs once more has a history"
            return self.memory.recent[:, frame.index - now]

        return torch.stack([latent(frame) for frame in frames], dim=1)

    def _fit(self, new: tuple[Frame, ...]) -> None:
        """Make room for a chunk, once all before it is committed."""
        self._commit()
        self._apply(self.policy.fit(self.memory.frames, new))

    def _leave(self, new: tuple[Frame, ...], x0: Tensor) -> None:
        """A chunk is finished. Its text stays with it: the caller may forget prompts that no frame to come reads."""
        self._record(x0.detach())
        self.memory.newest = Finished(new, x0.detach(), self.prompts.text([frame.prompt for frame in new]))

    def _record(self, latents: Tensor) -> None:
        """Keep the last outputs, as many as the policy may want to pass through the network once more."""
        if self.policy.history:
            recent = () if self.memory.recent is None else (self.memory.recent,)
            self.memory.recent = torch.cat((*recent, latents), dim=1)[:, -self.policy.history :]

    def _commit(self) -> None:
        """The newest chunk's keys and values, at timestep 0, join the store, and its frames the memory."""
        newest = self.memory.newest
        if newest is None:
            return
        self.memory.store.forget(newest.frames)  # a commit that was interrupted is made again
        with torch.no_grad():
            self._forward("commit", newest.frames, newest.text, write=True)(newest.latents, 0.0)
        self.memory.newest = None
        self._apply(self.policy.settle(self.memory.frames, newest.frames))

    def _apply(self, change: Change) -> None:
        for into, other, keep in change.blend:
            self.memory.store.blend(into, other, keep)
        self._remember(change.memory)

    def _remember(self, frames: tuple[Frame, ...]) -> None:
        self.memory.frames = frames
        self.memory.store.retain(frames, self.policy.archive)

    def _draw(self, noise: Noise, shape: tuple[int, ...], chunk: int, step: int) -> Tensor:
        drawn = noise.draw(chunk, step, shape)
        if self.dit.device.type == "cuda":  # the GPU fetches it from page-locked memory, and nobody waits
            drawn = drawn.pin_memory()
        return drawn.to(self.dit.device, non_blocking=True).to(self.dit.dtype)

    def _forward(
        self, kind: Kind, new: tuple[Frame, ...], text: Text | None = None, write: bool = False
    ) -> Callable[[Tensor, float | Tensor], Tensor]:
        """One network call as its plan has it, ready to be repeated for every step of a chunk.

        It takes latents `b f c h w` and their timesteps, one for all or float32 [f], and gives the velocity.
        """
        plan = self.policy.plan(Call(kind, self.memory.frames, new))
        bound = self.memory.store.bind(plan, new, write, silent=write)
        text = text or self.prompts.text([frame.prompt for frame in new])
        where = bound.rotation(plan.queries, self.dit.config.head_dim, self.dit.patch_embedding.weight)

        def forward(x: Tensor, timestep: float | Tensor) -> Tensor:
            shape = x.shape[:2]
            if isinstance(timestep, Tensor):
                return self.dit(x, timestep.expand(shape), text, where, bound)
            level: Tensor | Level
            if self.levels:
                level = self.levels.at(timestep, shape)
            else:
                level = torch.full((), timestep, dtype=torch.float32, device=x.device).expand(shape)
            return self.dit(x, level, text, where, bound)

        return forward
