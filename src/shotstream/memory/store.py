"""The frame store: keys and values per layer and latent frame; the only object that holds them.

A policy decides (`plan.py`), the store moves tensors. Keys are rotated when they are first read at a place, into one
buffer per layer that attention reads as it is; what the next call reads at the same place is there already. So a chunk
of a growing shot writes its own keys and values behind those of the past, and nothing else is moved.

`FrameStore` keeps every frame un-rotated beside that buffer: policies may move, blend and copy frames. `SettledStore`
has the buffer alone, half the memory, for policies whose frames stay at their places (`MemoryPolicy.settled`).
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

    @property
    def tokens(self) -> int:
        """Of one latent frame."""
        return self.height * self.width

    def span(self, index: int) -> slice:
        """The rows of the frame number `index` on the desk."""
        return slice(index * self.tokens, (index + 1) * self.tokens)

    def rotation(self, places: Iterable[Place], head_dim: int, like: Tensor) -> Rotation:
        """Rotation tables of `places` for this store's token grid."""
        key = tuple((float(p.pos), float(p.phase)) for p in places)
        return rotation(key, self.height, self.width, head_dim, like.device, like.dtype)

    def fork(self) -> FrameStore:
        """Another store that keeps the same; no tensor is copied, for none that is kept is ever changed in place."""
        return replace(self, kept=dict(self.kept), desk=[])

    def keep(self, frame: Frame, layer: int, k: Tensor, v: Tensor) -> None:
        """Remember a frame's un-rotated keys and values of a layer, which come in order."""
        entry = self.kept.setdefault(frame, [])
        assert len(entry) == layer, f"{frame} is written twice"
        entry.append((k, v))

    def lay_out(self, layer: int, stored: tuple[Place, ...]) -> None:
        """Make the stored places the first rows: what is there stays, what follows is rotated to its place."""
        rows = self.desk[layer]
        there = _common(rows.places, stored)
        for index, place in enumerate(stored[there:], start=there):
            here = self.span(index)
            if place.frame.role == "empty":
                rows.k[:, here], rows.v[:, here] = 0, 0
                continue
            k, v = self.kept[self.original(place.frame)][layer]
            rows.k[:, here] = rotate(k, self.rotation((place,), k.shape[-1], k))
            rows.v[:, here] = v
        rows.places = stored

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

    def bind(self, plan: Plan, new: tuple[Frame, ...], write: bool = False, silent: bool = False) -> BoundMemory:
        """The memory as one call sees it; with `write` the call's own keys and values join the store.

        `silent`: nobody reads what the call answers.
        """
        return BoundMemory(self, plan, new, write, silent)

    @property
    def bytes(self) -> int:
        """Of what is kept; the desk takes as much again."""
        return sum(t.nbytes for layers in self.kept.values() for kv in layers for t in kv)


@dataclass
class SettledStore(FrameStore):
    """Keys and values once: the desk is all there is, and `kept` only names the frames on it.

    For policies that read every remembered frame in every call, always at the same place and in the same order.
    """

    def fork(self) -> SettledStore:
        """Another store that keeps the same, in buffers of its own."""
        return replace(self, kept=dict(self.kept), desk=[rows.copy() for rows in self.desk])

    def _clear(self, changed: Frame | None = None) -> None:
        """Rows of forgotten frames stay where they are until the next call lays out without them."""

    def blend(self, into: Frame, other: Frame, keep: float) -> None:
        raise AssertionError("a policy that blends is not settled")

    def keep(self, frame: Frame, layer: int, k: Tensor, v: Tensor) -> None:
        self.kept.setdefault(frame, [])

    def lay_out(self, layer: int, stored: tuple[Place, ...]) -> None:
        """Close the gaps that forgotten frames left; rows only ever move forwards."""
        rows = self.desk[layer]
        there = _common(rows.places, stored)
        assert set(stored) <= set(rows.places), "a frame has moved: its policy is not settled"
        before = [rows.places.index(place) for place in stored[there:]]
        assert before == sorted(before), "frames changed their order: their policy is not settled"
        rows.places = stored[:there]  # whoever is interrupted here has lost the rest
        for index, old in enumerate(before, start=there):
            for t in (rows.k, rows.v):
                t[:, self.span(index)] = t[:, self.span(old)]
        rows.places = stored

    @property
    def bytes(self) -> int:
        """Of the desk, with the room on it."""
        return sum(t.nbytes for rows in self.desk for t in (rows.k, rows.v))


def _common(places: tuple[Place, ...], others: tuple[Place, ...]) -> int:
    """How many places both begin with."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(places, others, strict=False)))


class Rows:
    """What attention reads in one layer: keys rotated to their places and values, [b rows n d], filled in place."""

    def __init__(self) -> None:
        self.places: tuple[Place, ...] = ()  # of the first rows; what lies behind them is nobody's
        self.k = self.v = torch.empty(0)

    def copy(self) -> Rows:
        """The same in buffers of its own."""
        other = Rows()
        other.places, other.k, other.v = self.places, self.k.clone(), self.v.clone()
        return other

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

    def __init__(
        self, store: FrameStore, plan: Plan, new: tuple[Frame, ...], write: bool, silent: bool = False
    ) -> None:
        self.store, self.plan, self.new, self.write, self.silent = store, plan, new, write, silent
        own = set(new)
        stored = [place for place in plan.keys if place.frame not in own]
        ours = [place for place in plan.keys if place.frame in own]
        assert plan.keys == (*stored, *ours), "keys of the call come after stored keys"
        self.stored = tuple(stored)
        self.own = tuple(new.index(place.frame) for place in ours)
        self.own_places = tuple(ours)
        self.own_table: Rotation | None = None  # found by the first layer, for all

    def rotation(self, places: Iterable[Place], head_dim: int, like: Tensor) -> Rotation:
        """Rotation tables of `places` for this store's token grid."""
        return self.store.rotation(places, head_dim, like)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (rotated to the plan's places) and values: stored frames in plan order, then this call's own.

        They are views of a buffer that the next call overwrites; with gradients, tensors of their own.
        """
        store, tokens = self.store, self.store.tokens
        if self.write:  # of a prefill's frames that only ask, the old keys and values stay
            for i in self.own:
                store.keep(self.new[i], layer, k[:, store.span(i)], v[:, store.span(i)])
        if len(self.own) != len(self.new):  # some frames of the call are queries only
            k, v = (torch.cat([t[:, store.span(i)] for i in self.own], dim=1) for t in (k, v))
        self.own_table = self.own_table or self.rotation(self.own_places, k.shape[-1], k)
        k = rotate(k, self.own_table)
        if not store.desk:
            store.desk = [Rows() for _ in range(store.layers)]
        rows, past = store.desk[layer], len(self.stored) * tokens
        end = past + k.shape[1]
        rows.reserve(max(end, store.room * tokens), k)
        if rows.places is not self.stored:  # by identity first: a step finds what the step before it laid out
            if rows.places != self.stored:
                store.lay_out(layer, self.stored)
            rows.places = self.stored
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            return torch.cat((rows.k[:, :past], k), dim=1), torch.cat((rows.v[:, :past], v), dim=1)
        rows.k[:, past:end], rows.v[:, past:end] = k, v
        if self.write:
            rows.places = self.stored + self.own_places
        return rows.k[:, :end], rows.v[:, :end]
