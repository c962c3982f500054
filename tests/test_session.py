"""The session: the same story whoever drives it, however it is interrupted, and no memory that grows."""

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from golden_weights import sharp_pipeline
from torch import Tensor

from shotstream.config import PRESETS, PatchVAEConfig
from shotstream.memory.plan import Frame
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.pipeline import Pipeline
from shotstream.rollout import Prompts, Roll, SeededNoise, Stills, new_memory
from shotstream.session import Session, Shot, candidates, to_uint8
from shotstream.take import KEPT, Maker, Shelf

CONFIG = dataclasses.replace(
    PRESETS["tiny"],
    height=32,
    width=48,
    spatial_stride=8,
    vae=PatchVAEConfig(channels=8, patch=8, widths=(8, 8), blocks=1),
)
CAPTIONS = (
    "a wide shot of a green bear in a crown walking in the meadow",
    "a close-up of the bear dancing at night",
    "a red cat jumping on the beach",
    "the bear and the cat in the snow",
)

# The frames that six finished shots or fewer, and more, give as context: shots of 81 frames (released code).
PICKS = {
    1: [(0, 0), (0, 16), (0, 32), (0, 48), (0, 64), (0, 80)],
    2: [(0, 0), (0, 40), (0, 80), (1, 0), (1, 40), (1, 80)],
    3: [(0, 0), (0, 80), (1, 0), (1, 80), (2, 0), (2, 80)],
    4: [(0, 0), (1, 0), (2, 0), (2, 80), (3, 0), (3, 80)],
    5: [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (4, 80)],
    6: [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 0)],
    7: [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (6, 0)],
    8: [(2, 0), (3, 0), (4, 0), (5, 0), (6, 0), (7, 0)],
    9: [(3, 0), (4, 0), (5, 0), (6, 0), (7, 0), (8, 0)],
    10: [(4, 0), (5, 0), (6, 0), (7, 0), (8, 0), (9, 0)],
}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    """A tiny model with random weights under which context, text and places all matter."""
    return sharp_pipeline(CONFIG)


def few_steps(pipeline: Pipeline, **changes: object) -> Pipeline:
    """One step per chunk: for tests that count, not compare."""
    schedule = dataclasses.replace(CONFIG.schedule, steps=(1000,))
    return dataclasses.replace(pipeline, config=dataclasses.replace(CONFIG, schedule=schedule, **changes))


def make_shot(session: Session, caption: str, **options: object) -> Tensor:
    """Cut and generate: the shot's latents, f c h w."""
    session.cut(caption, **options)
    return torch.cat([chunk.latents for chunk in session.stream()])


def tell(session: Session, captions: tuple[str, ...] = CAPTIONS, **options: object) -> list[Tensor]:
    return [make_shot(session, caption, **options) for caption in captions]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def story(pipeline) -> list[Tensor]:
    """The four shots of seed 7."""
    return tell(Session(pipeline, seed=7))


# -- what comes out


def test_chunks_are_handed_out_in_order_with_their_frames(pipeline):
    session = Session(pipeline)
    session.cut(CAPTIONS[0], chunks=3, id="opening")
    session.cut(CAPTIONS[1])
    chunks = list(session.stream())
    assert [(c.shot.id, c.index, c.chunks, c.is_last) for c in chunks] == [
        ("opening", 0, 3, False),
        ("opening", 1, 3, False),
        ("opening", 2, 3, True),
        ("s2", 0, 2, False),
        ("s2", 1, 2, True),
    ]
    assert [len(c.frames) for c in chunks] == [9, 12, 12, 9, 12]
    for chunk in chunks:
        assert chunk.frames.shape[1:] == (32, 48, 3)
        assert chunk.frames.dtype == np.uint8
        assert chunk.latents.shape == (3, 8, 4, 6)
        assert set(chunk.timings) == {"denoise", "decode"}
    assert sum(len(c.frames) for c in chunks[:3]) == CONFIG.shot_frames(3)
    assert not session.queue


def test_frames_are_rounded_to_the_nearest_level():
    levels = torch.tensor([-1.0, 1.0, 0.0, 0.5 / 127.5 - 1 + 1e-4, 0.5 / 127.5 - 1 - 1e-4])
    assert to_uint8(levels.view(1, 1, 1, 5).expand(1, 3, 1, 5))[0, 0, :, 0].tolist() == [0, 255, 128, 1, 0]


def test_a_cut_takes_its_defaults_from_model_and_session(pipeline):
    session = Session(pipeline, seed=3)
    assert session.cut("a cat") == Shot(0, "s1", "a cat", "", 3, CONFIG.chunks)
    assert session.cut("a dog", global_caption="a story", seed=0, chunks=1, id="x") == Shot(
        1, "x", "a dog", "a story", 0, 1
    )
    with pytest.raises(ValueError, match="at least one chunk, not 0"):
        session.cut("a cat", chunks=0)
    assert len(session.queue) == 2


# -- reading ahead


def queued(pipeline: Pipeline, *pins: tuple[str, ...]) -> list[Tensor]:
    """The story of seed 7 made in one go: nothing is ever read ahead."""
    session = Session(pipeline, seed=7)
    for caption, pinned in zip(CAPTIONS, pins or [()] * len(CAPTIONS), strict=False):
        session.cut(caption, pins=pinned)
    chunks = list(session.stream())
    return [torch.cat([c.latents for c in chunks if c.shot.index == i]) for i in range(session.cuts)]


def test_context_is_read_before_the_caption_comes_and_changes_no_bit(pipeline):
    calls: list[str] = []
    session, made = Session(pipeline, seed=7), list[Tensor]()
    hook = pipeline.dit.register_forward_pre_hook(lambda dit, inputs: calls.append(inputs[4].new[0].role))
    try:
        for caption in CAPTIONS[:3]:
            calls.clear()
            session.cut(caption)
            stream = session.stream()
            made.append(torch.cat([next(stream).latents for _ in range(CONFIG.chunks)]))
            assert set(calls) == {"local"}
            assert next(stream, None) is None
            assert calls[-1] == "context"
    finally:
        hook.remove()
    assert equal(made, queued(pipeline)[:3])


def test_what_was_read_ahead_for_another_past_is_not_used(pipeline):
    """A pin, or another first shot, after the context of the third shot was read as the rule has it."""
    session = Session(pipeline, seed=7)
    made = tell(session, CAPTIONS[:2])
    made.append(make_shot(session, CAPTIONS[2], pins=("s1@4",)))
    assert equal(made, queued(pipeline, (), (), ("s1@4",)))
    assert not torch.equal(made[2], queued(pipeline)[2])


# -- law 5: one rollout


def by_hand(pipeline: Pipeline, past: list[Tensor], caption: str, chunks: int, seed: int) -> Tensor:
    """The next shot on a fresh rollout: its context is decoded from the whole shots before, and encoded again."""

    def context(frames: tuple[Frame, ...]) -> Tensor:
        pictures = [pipeline.vae.decode(past[f.shot][None])[0][0, f.offset].clamp(-1, 1) for f in frames]
        return pipeline.vae.context_latents(torch.stack(pictures))[None]

    memory = new_memory(pipeline.dit, CONFIG.latent_shape)
    memory.shots = (CONFIG.shot_frames(chunks),) * len(past)
    roll = Roll(pipeline.dit, CONFIG.policy, CONFIG.schedule, memory, Prompts(pipeline.dit), CONFIG.latent_shape)
    with torch.no_grad():
        for number, words in enumerate((*CAPTIONS[: len(past)], caption)):
            roll.prompts.add(number, pipeline.text.encode([words]))
        return torch.cat(list(roll.shot(len(past), chunks, SeededNoise(seed, len(past)), context)), dim=1)[0]


def test_the_session_rolls_what_the_rollout_rolls(pipeline, story):
    session = Session(pipeline, seed=7)
    for shot, caption in enumerate(CAPTIONS):
        expected = by_hand(pipeline, story[:shot], caption, CONFIG.chunks, 7)
        assert torch.allclose(make_shot(session, caption), expected, atol=1e-4)
        assert torch.allclose(expected, story[shot], atol=1e-4)


def test_context_is_the_decoded_pictures_encoded_one_by_one(pipeline):
    session = Session(pipeline)
    latents = make_shot(session, CAPTIONS[0], chunks=2)
    frames = pipeline.vae.decode(latents[None])[0][0].clamp(-1, 1)
    for number in (0, 8, 20):
        still = session._shelf.still(session.project.places[0].take, number)
        assert torch.allclose(still, pipeline.vae.encode(frames[None, number][None])[0, 0], atol=1e-5)


def record_context(session: Session, monkeypatch) -> list[list[tuple[int, int]]]:
    """Every context a rollout of this session is given from now on, as (shot, picture)."""
    asked, give = [], Maker._context

    def spy(self: Maker, line: Sequence[str], shelf: Shelf) -> Stills:
        context = give(self, line, shelf)

        def recorded(frames: tuple[Frame, ...]) -> Tensor:
            asked.append([(frame.shot, frame.offset) for frame in frames])
            latents = context(frames)
            assert all(latent.any() == (frame.offset >= 0) for latent, frame in zip(latents[0], frames, strict=True))
            return latents

        return recorded

    monkeypatch.setattr(Maker, "_context", spy)
    return asked


def test_the_context_of_ten_shots_is_the_released_one(pipeline, monkeypatch):
    """Shots of 81 frames; every picture asked for must have been kept."""
    session = Session(few_steps(pipeline, chunks=7))
    asked = record_context(session, monkeypatch)
    monkeypatch.setattr(Maker, "picture", None)  # nothing is decoded again
    for shot in range(11):
        make_shot(session, f"a cat and {shot} bears")
    assert asked[:-1] == [PICKS[finished] for finished in range(1, 11)]  # the first shot has none; the last is ahead


def test_released_weights_get_zero_latents_before_the_first_shot(pipeline, monkeypatch):
    session = Session(few_steps(pipeline, policy=DualBuffer(limit=None, first_shot="zeros")))
    asked = record_context(session, monkeypatch)
    latents = make_shot(session, CAPTIONS[0])
    assert asked[0] == [(0, -1)] * 6
    assert not torch.equal(latents, make_shot(Session(few_steps(pipeline)), CAPTIONS[0]))


@pytest.mark.parametrize("lengths", [(9, 21), (33, 9, 81, 21), (9,) * 9, (21, 57, 9, 9, 45, 21, 33)])
@pytest.mark.parametrize("remainder", ["spread", "last"])
def test_every_picture_that_can_be_picked_is_kept(lengths, remainder):
    policy = DualBuffer(remainder=remainder)
    for finished in range(1, len(lengths) + 1):
        for frame in policy.boundary((), (), True, lengths[:finished]).prefill:
            assert frame.offset in candidates(frame.shot, lengths[frame.shot], policy)


# -- law 6: bounded, and nobody disturbs anybody


def tensor_bytes(tensors: list[Tensor]) -> int:
    """Memory really held: of a view, all of what it looks into."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def held(session: Session, roll: Roll) -> dict[str, int]:
    takes, maker = session._shelf.takes.values(), session._maker
    kept = [t for layers in roll.memory.store.kept.values() for kv in layers for t in kv]
    texts = [t for text in (*maker._texts.values(), *roll.prompts.known.values()) for t in (*text.keys, *text.values)]
    return {
        "store": tensor_bytes(kept),
        "frames": len(roll.memory.store.kept),
        "takes": len(takes),
        "latents": tensor_bytes([latents for latents, _ in takes]),
        "stills": tensor_bytes([still for _, stills in takes for still in stills.values()]),
        "texts": tensor_bytes(texts),
    }


def test_memory_is_bounded_over_fifty_shots(pipeline, monkeypatch):
    session = Session(few_steps(pipeline))
    rolls, new_roll = [], Maker._new_roll
    monkeypatch.setattr(Maker, "_new_roll", lambda self, policy: rolls.append(new_roll(self, policy)) or rolls[-1])
    tokens, hook = [], pipeline.dit.register_forward_hook(lambda _, x, y: tokens.append(x[0].shape[1]))
    sizes, work = [], []
    for shot in range(50):
        tokens.clear()
        make_shot(session, CAPTIONS[shot % 4], chunks=2)
        assert len(rolls) == (1 if shot else 2)  # the next shot's, whose context is read ahead
        roll = rolls[-1]
        rolls.clear()
        sizes.append(held(session, roll))
        work.append((list(tokens), len(roll.memory.frames)))
    hook.remove()
    latent = 8 * 4 * 6 * 4
    stills = [len(candidates(shot, 21, pipeline.config.policy)) * latent for shot in range(50)]
    kept = [size.pop("stills") for size in sizes]
    assert kept == [sum(stills[max(0, shot + 1 - KEPT) : shot + 1]) for shot in range(50)]  # and no picture
    assert kept[-1] == KEPT * latent
    steady = sizes[KEPT]
    assert sizes[KEPT:] == [steady] * (50 - KEPT)
    assert all(size[name] <= steady[name] for size in sizes for name in steady)
    assert work[1:] == [work[1]] * 49  # the same calls, reading as many frames, in every shot with a past
    assert steady["takes"] == KEPT
    assert steady["latents"] == KEPT * 6 * latent


def test_two_sessions_on_one_pipeline_do_not_disturb_each_other(pipeline, story):
    ours, theirs = Session(pipeline, seed=7), Session(pipeline, seed=8)
    for mine, other in zip(CAPTIONS, reversed(CAPTIONS), strict=True):
        ours.cut(mine)
        theirs.cut(other)
    got: tuple[list[Tensor], list[Tensor]] = ([], [])
    for a, b in zip(ours.stream(), theirs.stream(), strict=True):
        got[0].append(a.latents)
        got[1].append(b.latents)
    assert torch.equal(torch.cat(got[0]), torch.cat(story))
    assert torch.equal(torch.cat(got[1]), torch.cat(tell(Session(pipeline, seed=8), CAPTIONS[::-1])))


# -- the same story


def test_same_seed_same_bytes(pipeline, story):
    def frames(seed: int) -> bytes:
        session = Session(pipeline, seed=seed)
        session.cut(CAPTIONS[0])
        return b"".join(chunk.frames.tobytes() for chunk in session.stream())

    assert equal(tell(Session(pipeline, seed=7)), story)
    assert frames(7) == frames(7) != frames(8)


def test_the_global_random_state_is_neither_read_nor_moved(pipeline, story):
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    assert equal(tell(Session(pipeline, seed=7), CAPTIONS[:2]), story[:2])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()


def test_every_input_of_a_shot_matters(pipeline, story):
    """The laws above compare latents that seed, caption, length and each finished shot do move."""

    def last(captions: tuple[str, ...] = CAPTIONS, seed: int = 7) -> Tensor:
        return tell(Session(pipeline, seed=seed), captions)[-1]

    assert (last() - story[-1]).abs().max() == 0
    for index in range(4):
        changed = (*CAPTIONS[:index], "a blue duck in the desert", *CAPTIONS[index + 1 :])
        assert (last(changed) - story[-1]).abs().max() > 1e-3, index
    session = Session(pipeline, seed=7)
    tell(session, CAPTIONS[:3])
    assert (make_shot(session, CAPTIONS[3], seed=8) - story[-1]).abs().max() > 1e-1


def test_a_shot_does_not_depend_on_the_next_one(pipeline, story):
    """Later cuts may be queued, or not known yet: all the same."""
    session = Session(pipeline, seed=7)
    for caption in (*CAPTIONS, "a blue duck in the desert"):
        session.cut(caption)
    chunks = [chunk for chunk in session.stream() if chunk.shot.index < 4]
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks]), torch.cat(story))


def test_kept_text_is_the_text_read_again(pipeline, story):
    session = Session(pipeline, seed=7)
    for shot, caption in enumerate(CAPTIONS):
        session._maker._texts.clear()
        assert torch.equal(make_shot(session, caption), story[shot])


def test_cutting_short_leaves_the_beginning_as_it_is(pipeline, story):
    """A shot's length is no input of its chunks."""
    short = make_shot(Session(pipeline, seed=7), CAPTIONS[0], chunks=1)
    assert torch.equal(short, story[0][:3])


# -- interruptions


@pytest.mark.parametrize("after", [1, 2, 3, 4, 6])
def test_a_stream_closed_and_opened_again_tells_the_same_story(pipeline, story, after):
    """The shot begun is made again; one whose last chunk was handed out is not."""
    session = Session(pipeline, seed=7)
    for caption in CAPTIONS:
        session.cut(caption)
    stream = session.stream()
    before = [next(stream) for _ in range(after)]
    stream.close()
    finished = [chunk for chunk in before if chunk.shot.index < after // 2]
    chunks = [*finished, *session.stream()]
    assert [(c.shot.index, c.index) for c in chunks] == [(shot, i) for shot in range(4) for i in range(2)]
    assert torch.equal(torch.cat([chunk.latents for chunk in chunks]), torch.cat(story))
    assert [take.frames for take in session.project.takes.values() if not take.partial] == [21] * 4


@pytest.mark.parametrize("where", ["prefill", "denoise", "commit", "decode"])
def test_an_interrupted_shot_can_be_made_again(pipeline, story, where):
    session = Session(pipeline, seed=7)
    tell(session, CAPTIONS[:2])
    session.cut(CAPTIONS[2])
    call = {"prefill": 1, "denoise": 3, "commit": 6}.get(where)
    seen = []

    def interrupt(*_: object) -> None:
        seen.append(None)
        if len(seen) == call or call is None:
            raise KeyboardInterrupt

    inside: torch.nn.Module = pipeline.vae.enter if call is None else pipeline.dit.blocks[1].ffn
    hook = inside.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(session.stream())
    hook.remove()
    assert torch.equal(torch.cat([chunk.latents for chunk in session.stream()]), story[2])
    assert torch.equal(make_shot(session, CAPTIONS[3]), story[3])


def test_nothing_learns_while_streaming(pipeline):
    """Also when the caller has gradients on, and the weights ask for them."""
    pipeline.dit.requires_grad_(True)
    try:
        session = Session(few_steps(pipeline))
        session.cut(CAPTIONS[0])
        for chunk in session.stream():
            assert not chunk.latents.requires_grad
            assert torch.is_grad_enabled()
    finally:
        pipeline.dit.requires_grad_(False)


def test_what_a_viewer_does_to_a_chunk_does_not_reach_the_next(pipeline, story):
    session = Session(pipeline, seed=7)
    session.cut(CAPTIONS[0])
    session.cut(CAPTIONS[1])
    got = []
    for chunk in session.stream():
        got.append(chunk.latents.clone())
        chunk.frames.fill(0)
    assert torch.equal(torch.cat(got), torch.cat(story[:2]))
