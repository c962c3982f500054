"""The rows of the storybook study: what is judged, from a perfect answer down to a model without its memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shotstream.evaluation.storybook import Generate, ground_truth
from shotstream.pipeline import Pipeline
from shotstream.session import Session, to_uint8
from shotstream.storybook.captions import Captions, captions
from shotstream.storybook.draw import render
from shotstream.storybook.world import World

Shots = list[NDArray[np.uint8]]


def generators(pipeline: Pipeline, worlds: Sequence[World]) -> dict[str, Generate]:
    """Row name -> how it makes a story."""
    others = dict(zip((world.seed for world in worlds), [*worlds[1:], worlds[0]], strict=True))

    def autoencoder(world: World, told: Captions, seed: int) -> Shots:
        """The truth, encoded and decoded: the ceiling of anything made of latents."""
        shots = []
        for rendered in render(world):
            with torch.no_grad():
                frames, _ = pipeline.vae.decode(pipeline.vae.encode(floats(rendered.frames)[None]))
            shots.append(to_uint8(frames[0].clamp(-1, 1)))
        return shots

    def model(world: World, told: Captions, seed: int) -> Shots:
        """The model, living with its own past."""
        session = Session(pipeline, seed)
        for caption in told.shots:
            session.cut(caption, global_caption=told.global_caption)
        return collect(session)

    def without_memory(world: World, told: Captions, seed: int) -> Shots:
        """Every shot as if it were the first of its story: text alone."""
        return [_one(Session(pipeline, seed + 1000 * i), told, i) for i in range(len(told.shots))]

    def true_history(world: World, told: Captions, seed: int) -> Shots:
        """Every shot after the true shots before it (teacher-forced)."""
        return _continued(world, told, seed)

    def other_memory(world: World, told: Captions, seed: int) -> Shots:
        """Every shot after another story's shots: what it then shows comes from memory, not from text."""
        return _continued(others[world.seed], told, seed)

    def _continued(history: World, told: Captions, seed: int) -> Shots:
        past = [floats(rendered.frames) for rendered in render(history)]
        words = captions(history)
        shots = []
        for i in range(len(told.shots)):
            session = Session(pipeline, seed + 1000 * i)
            for frames, caption in list(zip(past, words.shots, strict=True))[:i]:
                session.adopt(frames, caption, global_caption=words.global_caption)
            shots.append(_one(session, told, i))
        return shots

    return {
        "ground truth": ground_truth,
        "autoencoder": autoencoder,
        "model": model,
        "without memory": without_memory,
        "other memory": other_memory,
        "true history": true_history,
    }


def floats(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [f h w 3] -> `f c h w` in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def collect(session: Session) -> Shots:
    """The shots that come out of a session, whole."""
    shots: dict[int, list[NDArray[np.uint8]]] = {}
    for chunk in session.stream():
        shots.setdefault(chunk.shot.index, []).append(chunk.frames)
    return [np.concatenate(chunks) for chunks in shots.values()]


def _one(session: Session, told: Captions, shot: int) -> NDArray[np.uint8]:
    session.cut(told.shots[shot], global_caption=told.global_caption)
    return collect(session)[0]
