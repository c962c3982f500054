"""The frame store: keys and values per layer and latent frame, un-rotated; the only object that holds them.

A policy decides (`plan.py`), the store moves tensors. Keys are rotated when they are first read at a place, into one
buffer per layer that attention reads as it is; what the next call reads at the same place is there already. So a chunk
of a growing shot writes its own keys and values behind those of the past, and nothing else is moved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import takewhile

import torch
from torch import Tensor

from shotstream.memory.plan import Frame, Place, Plan
from shotstream.models.rope import Rotation, rotate, rotation


@dataclass
class FrameStore:
    """Keys and values of latent frames: `kept[frame][layer]` = (k, v), each [b l n d]."""

    layers: int
    height: int  # of the token grid of one latent frame
    width: int
    kept: dict[Frame, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    desk: list[Rows] = field(default_factory=list)  # per layer; holds nothing that is not kept
    room: int = 0  # latent frames to make room for at once

    def fork(self) -> FrameStore:
        """Another store that keeps the same; no tensor is copied, for none that is kept is ever changed in place."""
        return replace(self, kept=dict(self.kept), desk=[])

    def retain(self, frames: Iterable[Frame], archive: int = 0) -> None:
        """Forget all frames but these, and the stream's first `archive` ones."""
        frames = set(frames)
        self.kept = {
            frame: kv
            for frame, kv in self.kept.items()
            if frame in frames or (frame.role == "local" and 0 <= frame.index < archive)
        }
        self._clear()

    def forget(self, frames: Iterable[Frame]) -> None:
        """Drop these frames, if they are here."""
        for frame in frames:
            self.kept.pop(frame, None)
        self._clear()

    def _clear(self, changed: Frame | None = None) -> None:
        """Only what is kept may be read again: a frame can be forgotten, made anew and have the same name."""
        for rows in self.desk:
            rows.clear(lambda place: place.frame in self.kept and place.frame != changed)

    def original(self, frame: Frame) -> Frame:
        """Whose keys and values are read for this frame: its own, or those of the stored frame it names as source."""
        if frame.source is None:
            return frame
        return next(own for own in self.kept if own.role == "local" and own.index == frame.source)

    def blend(self, into: Frame, other: Frame, keep: float) -> None:
        """`into := keep * into + (1 - keep) * other`, on un-rotated keys and values of all layers."""
        self.kept[into] = [
            (torch.lerp(k2, k1, keep), torch.lerp(v2, v1, keep))
            for (k1, v1), (k2, v2) in zip(self.kept[into], self.kept[other], strict=True)
        ]
        self._clear(changed=into)

    def bind(self, plan: Plan, new: tuple[Frame, ...], write: bool = False) -> BoundMemory:
        """The memory as one call sees it; with `write` the call's own keys and values join the store."""
        return BoundMemory(self, plan, new, write)

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for layers in self.kept.values() for kv in layers for t in kv)


class Rows:
    """What attention reads in one layer: keys rotated to their places and values, [b rows n d], filled in place."""

    def __init__(self) -> None:
        self.places: tuple[Place, ...] = ()  # of the first rows; what lies behind them is nobody's
        self.k = self.v = torch.empty(0)

    def clear(self, good: Callable[[Place], bool]) -> None:
        """Forget everything from the first place on that is not good any more."""
        self.places = tuple(takewhile(good, self.places))

    def reserve(self, rows: int, like: Tensor) -> None:
        """Room for `rows` tokens like these; what is here stays."""
        batch, _, heads, dim = like.shape
        fits = self.k.ndim == 4 and self.k.shape[0] == batch and self.k.dtype == like.dtype
        if fits and self.k.shape[1] >= rows:
            return
        old, self.k, self.v = (self.k, self.v), *(like.new_empty(batch, rows, heads, dim) for _ in range(2))
        if fits:
            for before, after in zip(old, (self.k, self.v), strict=True):
                after[:, : before.shape[1]] = before
        else:
            self.places = ()


class BoundMemory:
    """A store bound to a plan: what attention layers see (`models.dit.Memory`). Reusable for every step of a chunk."""

    def __init__(self, store: FrameStore, plan: Plan, new: tuple[Frame, ...], write: bool) -> None:
        self.store, self.plan, self.new, self.write = store, plan, new, write
        own = set(new)
        stored = [place for place in plan.keys if place.frame not in own]
        ours = [place for place in plan.keys if place.frame in own]
        assert plan.keys == (*stored, *ours), "keys of the call come after stored keys"
        self.stored = tuple(stored)
        self.own = tuple(new.index(place.frame) for place in ours)
        self.own_places = tuple(ours)

    def rotation(self, places: Iterable[Place], head_dim: int, like: Tensor) -> Rotation:
        """Rotation tables of `places` for this store's token grid."""
        key = tuple((float(p.pos), float(p.phase)) for p in places)
        return rotation(key, self.store.height, self.store.width, head_dim, like.device, like.dtype)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rotated to the plan's places) and values: stored frames in plan order, then this call's own.

        They are views of a buffer that the next call overwrites; with gradients, tensors of their own.
        """
        tokens = self.store.height * self.store.width
        if self.write:
            self._keep(layer, k, v, tokens)
        if len(self.own) != len(self.new):  # some frames of the call are queries only
            k, v = (torch.cat([t[:, i * tokens : (i + 1) * tokens] for i in self.own], dim=1) for t in (k, v))
        k = rotate(k, self.rotation(self.own_places, k.shape[-1], k))
        if not self.store.desk:
            self.store.desk = [Rows() for _ in range(self.store.layers)]
        rows, past = self.store.desk[layer], len(self.stored) * tokens
        end = past + k.shape[1]
        rows.reserve(max(end, self.store.room * tokens), k)
        if rows.places != self.stored:
            self._lay_out(layer, rows, tokens)
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return torch.cat((rows.k[:, :past], k), dim=1), torch.cat((rows.v[:, :past], v), dim=1)
        rows.k[:, past:end], rows.v[:, past:end] = k, v
        if self.write:
            rows.places = self.stored + self.own_places
        return rows.k[:, :end], rows.v[:, :end]

    def _keep(self, layer: int, k: Tensor, v: Tensor, tokens: int) -> None:
        # Queries-only frames of a prefill keep their old keys and values: only the call's own keys are written.
        for i in self.own:
            entry = self.store.kept.setdefault(self.new[i], [])
            assert len(entry) == layer, f"{self.new[i]} is written twice"
            entry.append((k[:, i * tokens : (i + 1) * tokens], v[:, i * tokens : (i + 1) * tokens]))

    def _lay_out(self, layer: int, rows: Rows, tokens: int) -> None:
        """Make the stored places the first rows: what is there stays, what follows is rotated to its place."""
        there = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(rows.places, self.stored, strict=False)))
        for index, place in enumerate(self.stored[there:], start=there):
            here = slice(index * tokens, (index + 1) * tokens)
            if place.frame.role == "empty":
                rows.k[:, here], rows.v[:, here] = 0, 0
                continue
            k, v = self.store.kept[self.store.original(place.frame)][layer]
            rows.k[:, here] = rotate(k, self.rotation((place,), k.shape[-1], k))
            rows.v[:, here] = v
        rows.places = self.stored
