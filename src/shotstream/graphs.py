"""Denoising passes as CUDA graphs: one launch instead of a thousand, for the same numbers.

A graph repeats work on fixed addresses. So a pass that is repeated finds everything that changes in buffers that stay:
its latents, the prompt's keys and values and the rotation tables are copied there, what the network remembers is moved
there once a shot (`_Desk`), and what it is told of a noise level (`rollout.Levels`) is kept as it came the first time.
There is a graph for each noise level and each number of keys: 28 for the 7 chunks of a published shot.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from shotstream.memory.store import BoundMemory, FrameStore, Rows
from shotstream.models.attention import BlockCausal
from shotstream.models.dit import DiT, Level, Memory, Text, compile_blocks
from shotstream.models.rope import Rotation, rotate
from shotstream.models.vae import VAE, compile_decoder

Replay = Callable[[], Tensor]
Capture = Callable[[Replay], Replay]
"""Records work on fixed buffers. What it gives does it again, and returns the same tensor each time."""


def accelerate(dit: DiT, vae: object = None) -> DiT:
    """The one switch, for networks on a GPU, in place; elsewhere it does nothing.

    The DiT's blocks are compiled and its passes recorded; the decoder is compiled if it is Wan's.
    """
    if dit.device.type == "cuda":
        record_passes(compile_blocks(dit), cuda_graph)
        if isinstance(vae, VAE):
            compile_decoder(vae)
    return dit


def cuda_graph(work: Replay) -> Replay:
    """Record work on the present GPU; all graphs share one pool of memory, for they never run at the same time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are chosen and compiled before anything is recorded
        work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=_pool()):
        made = work()

    def replay() -> Tensor:
        graph.replay()
        return made

    return replay


@cache
def _pool() -> Any:
    return torch.cuda.graph_pool_handle()


def record_passes(dit: DiT, capture: Capture) -> Recorder:
    """Let this network's denoising passes be recorded, in place; hooks on it are called as before."""
    recorder = Recorder(dit, dit.forward, capture)
    dit.forward = recorder  # type: ignore[method-assign]
    return recorder


@dataclass
class _Desk:
    """The rows of a store, in buffers that outlive it. What attention reads there is a `models.dit.Memory`."""

    rows: list[Rows] = field(default_factory=list)
    owner: Callable[[], FrameStore | None] = lambda: None

    def take(self, store: FrameStore) -> bool:
        """Move what the store has laid out to these buffers, unless another store still needs them."""
        owner = self.owner()
        if owner is store and all(own.k is rows.k for own, rows in zip(store.desk, self.rows, strict=True)):
            return True
        if owner is not None and owner is not store:
            return False
        if not self.rows or any(
            own.k.shape[1] > rows.k.shape[1] or own.k.dtype != rows.k.dtype
            for own, rows in zip(store.desk, self.rows, strict=True)
        ):
            self.rows = [rows.copy() for rows in store.desk]
        for own, rows in zip(store.desk, self.rows, strict=True):
            size = own.k.shape[1]
            rows.k[:, :size], rows.v[:, :size] = own.k, own.v
            own.k, own.v = rows.k, rows.v
        self.owner = weakref.ref(store)
        return True


@dataclass(frozen=True)
class _Prefix:
    """The first rows of a desk and a call's own behind them: `BoundMemory.extend` without its questions."""

    rows: list[Rows]
    past: int  # tokens
    places: Rotation
    silent: bool = False

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        rows, end = self.rows[layer], self.past + k.shape[1]
        rows.k[:, self.past : end], rows.v[:, self.past : end] = rotate(k, self.places), v
        return rows.k[:, :end], rows.v[:, :end]


@dataclass
class _Inputs:
    """Buffers of what changes from call to call."""

    x: Tensor
    text: Text
    places: Rotation
    copied: tuple[Text, Rotation]  # what lies in `text` and `places` now

    @staticmethod
    def like(x: Tensor, text: Text, places: Rotation) -> _Inputs:
        cos, sin = places
        own = Text(tuple(k.clone() for k in text.keys), tuple(v.clone() for v in text.values), text.index.clone())
        return _Inputs(x.clone(), own, (cos.clone(), sin.clone()), (text, places))

    def fill(self, x: Tensor, text: Text, places: Rotation) -> None:
        self.x.copy_(x)
        if self.copied[0] is not text:
            for mine, given in zip(self.text.keys + self.text.values, text.keys + text.values, strict=True):
                mine.copy_(given)
        if self.copied[1] is not places:
            for mine, given in zip(self.places, places, strict=True):
                mine.copy_(given)
        self.copied = text, places


@dataclass
class Recorder:
    """In the place of a network's `forward`: repeats what it has recorded, and else does as the network did."""

    dit: DiT
    forward: Callable[..., Tensor]
    capture: Capture
    desk: _Desk = field(default_factory=_Desk)
    graphs: dict[tuple[Any, ...], Replay] = field(default_factory=dict)
    laid: list[Rows] = field(default_factory=list)  # the rows that the graphs read
    inputs: dict[tuple[Any, ...], _Inputs] = field(default_factory=dict)  # by shape

    def __call__(
        self,
        latents: Tensor,
        timesteps: Tensor | Level,
        text: Text,
        places: Rotation,
        memory: Memory | None = None,
        mask: Tensor | BlockCausal | None = None,
    ) -> Tensor:
        """As `DiT.forward`. What a recorded pass returns is overwritten by the next."""
        if mask is not None or not isinstance(timesteps, Level) or not isinstance(memory, BoundMemory):
            return self.forward(latents, timesteps, text, places, memory, mask)
        if not self._fit(timesteps, memory, text):
            return self.forward(latents, timesteps, text, places, memory)
        return self._repeat(latents, timesteps, text, places, memory)

    def _fit(self, level: Level, memory: BoundMemory, text: Text) -> bool:
        """Whether a pass only reads, one prompt and rows that lie ready; the first pass of a chunk lays them out."""
        store, plan = memory.store, memory.plan
        return (
            level.everywhere is not None
            and not (memory.write or torch.is_grad_enabled())
            and len(text.keys[0]) == 1
            and memory.own_places == plan.queries
            and bool(store.desk)
            and all(rows.places == memory.stored for rows in store.desk)
            and all(rows.k.shape[1] >= len(plan.keys) * store.tokens for rows in store.desk)
            and self.desk.take(store)
        )

    def _repeat(self, x: Tensor, level: Level, text: Text, places: Rotation, memory: BoundMemory) -> Tensor:
        shape = (x.shape, x.dtype, text.keys[0].shape)
        if shape not in self.inputs:
            self.inputs[shape] = _Inputs.like(x, text, places)
        inputs = self.inputs[shape]
        inputs.fill(x, text, places)
        past, rows = len(memory.stored) * memory.store.tokens, self.desk.rows
        if rows is not self.laid:  # there was not room enough: what was recorded reads where nothing is any more
            self.graphs, self.laid = {}, rows
        key = (shape, level.everywhere, past)
        if key not in self.graphs:
            desk = _Prefix(rows, past, inputs.places)
            self.graphs[key] = self.capture(
                lambda: self.forward(inputs.x, level, inputs.text, inputs.places, desk)  # keeps them all alive
            )
        return self.graphs[key]()
