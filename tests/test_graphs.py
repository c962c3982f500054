"""Recorded passes: what is repeated on fixed buffers is what the network would have computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shotstream.graphs import Recorder, accelerate, record_passes
from shotstream.pipeline import Pipeline, load
from shotstream.session import Session

CAPTIONS = ("a wide shot of a bear in the forest", "a close-up of a red cat", "a bear waves", "a frog in the city")
CHUNKS = 3


class Tape:
    """Stands in for a GPU's graphs: repeats recorded work, which therefore sees the recorded buffers alone."""

    def __init__(self) -> None:
        self.recorded = self.played = 0

    def __call__(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        made = work().clone()

        def replay() -> Tensor:
            self.played += 1
            return made.copy_(work())

        return replay


def told(pipeline: Pipeline, *captions: str) -> list[Tensor]:
    session = Session(pipeline, seed=5)
    for caption in captions:
        session.cut(caption, chunks=CHUNKS)
    return [chunk.latents for chunk in session.stream()]


@pytest.fixture(scope="module")
def plain() -> list[Tensor]:
    return told(load("tiny"), *CAPTIONS)


def recorded() -> tuple[Pipeline, Recorder, Tape]:
    pipeline, tape = load("tiny"), Tape()
    return pipeline, record_passes(pipeline.dit, tape), tape


def test_a_recorded_story_is_the_same_to_the_last_bit(plain):
    pipeline, recorder, tape = recorded()
    assert all(torch.equal(a, b) for a, b in zip(told(pipeline, *CAPTIONS), plain, strict=True))
    steps = len(pipeline.config.schedule.steps)
    assert len(recorder.graphs) == CHUNKS * steps - 1  # of shots with a context, but the pass that makes room
    assert tape.played > CHUNKS * steps
    told(pipeline, *CAPTIONS)
    before, played = tape.recorded, tape.played
    assert all(torch.equal(a, b) for a, b in zip(told(pipeline, *CAPTIONS), plain, strict=True))
    assert tape.recorded == before  # nothing new in a story's second telling
    passes = len(CAPTIONS) * CHUNKS * steps
    assert tape.played - played == passes - len(CAPTIONS)  # the first pass of a shot makes room


def test_two_stories_at_once_do_not_share_a_desk(plain):
    pipeline, _, _ = recorded()
    stories = []
    for _ in range(2):
        session = Session(pipeline, seed=5)
        for caption in CAPTIONS[:2]:
            session.cut(caption, chunks=CHUNKS)
        stories.append(session.stream())
    for one, other, expected in zip(*stories, plain[: 2 * CHUNKS], strict=True):
        assert torch.equal(one.latents, expected) and torch.equal(other.latents, expected)


def test_hooks_are_called_for_repeated_passes_too():
    pipeline, _, _ = recorded()
    calls = []
    pipeline.dit.register_forward_hook(lambda dit, inputs, output: calls.append(output.shape))
    told(pipeline, CAPTIONS[0])
    steps = len(pipeline.config.schedule.steps)
    assert len(calls) == CHUNKS * steps + CHUNKS - 1 + 1  # commits, and what is read ahead


def test_networks_that_learn_are_not_recorded():
    pipeline, recorder, tape = recorded()
    dit = pipeline.dit
    with torch.enable_grad():
        told(pipeline, CAPTIONS[0])  # a session never learns
        assert tape.recorded
        recorder.graphs.clear()
        latents = torch.randn(1, 3, *pipeline.config.latent_shape)
        text = dit.read(pipeline.text.encode([CAPTIONS[0]]), torch.zeros(1, 3, dtype=torch.long))
        where = tuple(torch.ones(3 * 6, dit.config.head_dim // 2) for _ in range(2))
        dit(latents, torch.full((1, 3), 500.0), text, where)
    assert not recorder.graphs


def test_without_a_gpu_the_switch_does_nothing():
    pipeline = load("tiny")
    assert "forward" not in vars(accelerate(pipeline.dit))
    assert not any("ask" in vars(block) for block in pipeline.dit.layers())
