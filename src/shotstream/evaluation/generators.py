"""The rows of the storybook study: what is judged, from a perfect answer down to a model without its memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shotstream.data.batch import ContextRule, Sample, collate
from shotstream.evaluation.storybook import Row
from shotstream.models.text import Words
from shotstream.pipeline import Pipeline
from shotstream.session import Session, to_uint8
from shotstream.storybook.captions import Captions, captions
from shotstream.storybook.draw import render
from shotstream.storybook.world import World, sample_world
from shotstream.train.model import Model, dual_buffer
from shotstream.train.teacher import sample

Shots = list[NDArray[np.uint8]]

SHOT_STRIDE = 1000
"""Between the noise seeds of shots that are not generated in one session."""

OTHER = 10_000_000
"""Added to a story's seed: another story with as many shots."""


def generators(pipeline: Pipeline, teacher: Pipeline | None = None, steps: int = 25) -> dict[str, Row]:
    """Row name -> how it makes a story; the rows of the teacher only if there is one, sampled in `steps` steps."""
    rows = _anchors() | _of_model(pipeline)
    return rows | _of_teacher(teacher, steps) if teacher else rows


def _anchors() -> dict[str, Row]:
    """What needs no model: the best answer, and answers that some single number would take for good ones."""

    def ground_truth(world: World, told: Captions, seed: int) -> Shots:
        """The story as it is drawn. No story can be read better."""
        return [shot.frames for shot in render(world)]

    def copy_previous(world: World, told: Captions, seed: int) -> Shots:
        """Every shot shows the true shot before it: nothing is forgotten, nothing obeyed."""
        first, *others = ground_truth(world, told, seed)
        return [first, first, *others][: len(world.shots)]

    def random_story(world: World, told: Captions, seed: int) -> Shots:
        """Another story, well drawn."""
        return ground_truth(_another(world), told, seed)

    return {
        "ground truth": Row(ground_truth, noisy=False),
        "copy previous": Row(copy_previous, noisy=False),
        "random story": Row(random_story, noisy=False),
    }


def _of_model(pipeline: Pipeline) -> dict[str, Row]:
    def autoencoder(world: World, told: Captions, seed: int) -> Shots:
        """The truth, encoded and decoded: the ceiling of anything made of latents."""
        shots = []
        for frames in _true_shots(world):
            with torch.no_grad():
                decoded, _ = pipeline.vae.decode(pipeline.vae.encode(frames[None]))
            shots.append(to_uint8(decoded[0].clamp(-1, 1)))
        return shots

    def model(world: World, told: Captions, seed: int) -> Shots:
        """The model, living with its own past."""
        session = Session(pipeline, seed=seed)
        for caption in told.shots:
            session.cut(caption, global_caption=told.global_caption)
        return _collect(session)

    def without_memory(world: World, told: Captions, seed: int) -> Shots:
        """Every shot as if it were the first of its story: text alone."""
        return [_one(Session(pipeline, seed=seed + SHOT_STRIDE * i), told, i) for i in range(len(told.shots))]

    def true_history(world: World, told: Captions, seed: int) -> Shots:
        """Every shot after the true shots before it (teacher-forced)."""
        return continued(world, told, seed)

    def other_memory(world: World, told: Captions, seed: int) -> Shots:
        """Every shot after another story's shots: what it then shows comes from memory, not from text."""
        return continued(_another(world), told, seed)

    def continued(history: World, told: Captions, seed: int) -> Shots:
        past, words, shots = _true_shots(history), captions(history), []
        for i in range(len(told.shots)):
            session = Session(pipeline, seed=seed + SHOT_STRIDE * i)
            for frames, caption in zip(past[:i], words.shots[:i], strict=True):
                session.adopt(frames, caption, global_caption=words.global_caption)
            shots.append(_one(session, told, i))
        return shots

    return {
        "autoencoder": Row(autoencoder, noisy=False),
        "model": Row(model),
        "without memory": Row(without_memory),
        "other memory": Row(other_memory),
        "true history": Row(true_history),
    }


def _of_teacher(teacher: Pipeline, steps: int) -> dict[str, Row]:
    def own_history(world: World, told: Captions, seed: int) -> Shots:
        """The teacher, living with its own past."""
        return story(told, seed, lambda past, made: [*past, made])

    def true_history(world: World, told: Captions, seed: int) -> Shots:
        """The teacher after the true shots before each."""
        true = _true_shots(world)
        return story(told, seed, lambda past, made: true[: len(past) + 1])

    def story(told: Captions, seed: int, remember: Callable[[list[Tensor], Tensor], list[Tensor]]) -> Shots:
        past: list[Tensor] = []
        shots = []
        for _ in told.shots:
            made = next_shot(teacher, told, past, seed, steps)
            past = remember(past, made)
            shots.append(to_uint8(made))
        return shots

    return {"teacher": Row(own_history), "teacher true history": Row(true_history)}


def next_shot(teacher: Pipeline, told: Captions, past: Sequence[Tensor], seed: int, steps: int) -> Tensor:
    """The shot after `past` (frames `f c h w` of each), by the teacher's many guided steps: `f c h w` in [-1, 1]."""
    config, shot = teacher.config, len(past)
    rule = ContextRule.of(dual_buffer(config))
    picks = rule.picks([len(frames) for frames in past])
    frames = config.chunks * config.chunk
    assert isinstance(teacher.text, Words)
    model = Model(teacher.dit, teacher.text, config)
    prompts = {
        i: torch.tensor(teacher.text.ids(teacher.prompt(told.global_caption, i, told.shots[i])))
        for i in range(shot + 1)
    }
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + SHOT_STRIDE * shot)
        empty = Sample(
            stills=[teacher.vae.context_latents(past[i][picture][None])[0] for i, picture in picks],
            shots=[i for i, _ in picks],
            target=torch.zeros(frames, *config.latent_shape),
            shot=shot,
            prompts=prompts,
            coverage=torch.zeros(frames, *config.latent_shape[1:]),
        )
        batch = collate([empty], rule, rule.zeros)
        latents = sample(model, batch, steps, config.schedule.shift)
        decoded, _ = teacher.vae.decode(latents)
    return decoded[0].float().clamp(-1, 1)


def floats(frames: NDArray[np.uint8]) -> Tensor:
    """uint8 [f h w 3] -> `f c h w` in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1


def _true_shots(world: World) -> list[Tensor]:
    return [floats(rendered.frames) for rendered in render(world)]


def _another(world: World) -> World:
    return sample_world(world.seed + OTHER, world.split, len(world.shots))


def _collect(session: Session) -> Shots:
    """The shots that come out of a session, whole."""
    shots: dict[int, list[NDArray[np.uint8]]] = {}
    for chunk in session.stream():
        shots.setdefault(chunk.shot.index, []).append(chunk.frames)
    return [np.concatenate(chunks) for chunks in shots.values()]


def _one(session: Session, told: Captions, shot: int) -> NDArray[np.uint8]:
    session.cut(told.shots[shot], global_caption=told.global_caption)
    return _collect(session)[0]
