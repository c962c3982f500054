"""Every system runs: what attention really reads is what the golden plans say, and a past can be put back."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_weights import sharpen, uniform
from torch import Tensor
from typer.testing import CliRunner

from shotstream.cli import app
from shotstream.config import PRESETS, DiTConfig
from shotstream.film import plan
from shotstream.flow import add_noise, to_x0
from shotstream.memory.plan import Frame, MemoryPolicy, Place, Plan, Slots
from shotstream.memory.policies import POLICIES, choose
from shotstream.memory.policies.causvid import CausVid
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.memory.policies.infinity_rope import InfinityRope
from shotstream.memory.policies.longlive import LongLive
from shotstream.memory.policies.reward_forcing import RewardForcing
from shotstream.memory.policies.rolling_forcing import RollingForcing
from shotstream.memory.policies.systems import rehearse, scaled
from shotstream.memory.schedule import SCHEDULES, NoiseSchedule
from shotstream.memory.store import BoundMemory, FrameStore
from shotstream.models.dit import DiT, Text
from shotstream.models.rope import Rotation, angles, rotation
from shotstream.pipeline import Pipeline, load
from shotstream.rollout import Prompts, Roll, SeededNoise, new_memory
from shotstream.session import Session
from shotstream.story import Story, StoryError

GOLDEN = {s["name"]: s for s in json.loads((Path(__file__).parent / "golden/plans.json").read_text())["settings"]}
SETTINGS: dict[str, MemoryPolicy] = {
    "unbounded": MemoryPolicy(),
    "window21": POLICIES["self-forcing-window"],
    "longlive-global-sink": LongLive(),
    "longlive-no-global-sink": LongLive(global_sink=False),
    "infinity-rope-early-flush": InfinityRope(),
    **{name: POLICIES[name] for name in POLICIES if name in GOLDEN},
    **{name: POLICIES["shotstream"] for name in GOLDEN if name.startswith("shotstream")},
}

# -- what is really read, without a network


class Scribe:
    """In place of a DiT: it writes down what attention is given, and keeps latents and texts readable.

    Frame i denoises to latents of value i. Its values are (latent, text, 1, 0) and its keys point along the first
    channel of each rotary pair, so that content and place can be read off whatever comes back from the store.
    """

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.config = DiTConfig(dim=4, heads=1, layers=1, channels=1, patch=1)
        self.dtype, self.device = torch.float64, torch.device("cpu")
        self.patch_embedding = torch.nn.Linear(1, 1, dtype=self.dtype)
        self.schedule = schedule
        self.calls: list[dict[str, Any]] = []

    def read(self, states: Tensor, index: Tensor) -> Text:
        return Text((states,), (states,), index)

    def __call__(self, x: Tensor, timesteps: Tensor, text: Text, places: Rotation, memory: BoundMemory) -> Tensor:
        latents, times = x.flatten(), timesteps[0].tolist()
        texts = text.keys[0][text.index[0], 0, 0]
        v = torch.stack((latents, texts, torch.ones_like(texts), torch.zeros_like(texts)), dim=-1)[None, :, None]
        k = (1 + latents / 1000)[None, :, None, None] * torch.tensor([1.0, 0, 1, 0], dtype=self.dtype)
        keys, values = memory.extend(0, k, v)
        self.calls.append(
            {
                "times": times,
                "frames": [frame.index for frame in memory.new],
                "queries": torch.stack(places, dim=-1),
                "text": texts.tolist(),
                "keys": keys[0, :, 0].clone(),  # what is read is overwritten by the next call
                "values": values[0, :, 0].clone(),
                "own": len(memory.own),
            }
        )
        if not any(times):
            return torch.zeros_like(x)
        levels = [self.schedule.timesteps().index(time) for time in times]
        sigma = torch.tensor(self.schedule.sigmas(), dtype=self.dtype)[levels]
        x0 = torch.tensor([float(frame.index) for frame in memory.new], dtype=self.dtype)
        return ((latents - x0) / sigma).view_as(x)


def states(text: int) -> Tensor:
    return torch.full((1, 1, 1), float(text), dtype=torch.float64)


def stills(frames: Sequence[Frame]) -> Tensor:
    return torch.tensor([1000.0 + frame.index for frame in frames]).view(1, -1, 1, 1, 1)


def executed(policy: MemoryPolicy, setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The network calls of a roll through a golden setting, one for all steps of a chunk."""
    schedule = SCHEDULES["rolling-forcing" if setting["joint"] else "self-forcing"]
    scribe = Scribe(schedule)
    finished = tuple(setting.get("finished_shots", []))
    roll = Roll(scribe, policy, schedule, new_memory(scribe, (1, 1, 1)), Prompts(scribe), (1, 1, 1))  # type: ignore[arg-type]
    roll.memory.shots = finished
    for text in range(len(finished)):
        roll.prompts.add(text, states(text))
    events = {event["chunk"]: event["kind"] for event in setting["events"]}
    cuts = [0, *(chunk for chunk, kind in events.items() if kind == "cut"), setting["chunks"]]
    text = len(finished)
    for shot, (begin, end) in enumerate(pairwise(cuts), start=len(finished)):
        text += begin in events
        roll.prompts.add(shot, states(text))
        chunks = roll.shot(shot, end - begin, SeededNoise(0, shot), stills)
        for chunk, latents in enumerate(chunks, start=begin):
            number = policy.chunk * (chunk - begin if policy.restart else chunk)
            assert latents.flatten().round().tolist() == list(range(number, number + policy.chunk))
            if events.get(chunk + 1) == "switch":
                text += 1
                roll.steer(100 + text, states(text))
        roll.memory.shots += (4 * policy.chunk * (end - begin) - 3,)
    if setting["joint"]:
        return scribe.calls
    return [call for call in scribe.calls if call["times"][0] in (0, 1000)]


def wanted(calls: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Golden calls, but for commits that nobody reads: the last, and those computed again right away."""
    for call, following in pairwise((*calls, {"call": "end"})):
        if call["call"] != "commit" or following["call"] not in ("end", "prefill"):
            yield call


def turned(places: Sequence[Sequence[float]]) -> Tensor:
    """cos and sin of the Scribe's two rotary pairs at (position, phase): [n 2 2]."""
    position, phase = torch.tensor(places, dtype=torch.float64).unbind(-1)
    angle = angles(position, phase, 1, 1, 4)
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


@pytest.mark.parametrize("name", GOLDEN)
def test_what_is_read_is_what_the_golden_plans_say(name):
    """Contents, texts, places and order of all keys and queries, and what was blended into them."""
    calls, golden = executed(SETTINGS[name], GOLDEN[name]), list(wanted(GOLDEN[name]["calls"]))
    assert len(calls) == len(golden)
    latent: dict[int, float] = {}  # what a stored frame's latent has become by blending
    for call, expected in zip(calls, golden, strict=True):
        for into, other, keep in expected.get("blend", []):
            latent[into] = keep * latent.get(into, into) + (1 - keep) * latent.get(other, other)
        assert any(call["times"]) == (expected["call"] == "denoise")
        assert call["text"] == expected["text"]
        places = torch.tensor([key[2:4] for key in expected["keys"]], dtype=torch.float64)
        assert torch.allclose(call["queries"], turned(expected["queries"]), atol=1e-6)
        assert len(call["keys"]) == len(places)
        rows = zip(call["keys"], call["values"], turned(places.tolist()), expected["keys"], strict=True)
        for key, value, angle, (kind, number, _, _, text) in rows:
            if kind == "empty":
                assert not key.any() and not value.any()
                continue
            assert value[1:].tolist() == [text, 1, 0]
            if kind == "mem":
                assert float(value[0]) == pytest.approx(latent.get(number, number), abs=1e-6)
            elif kind == "ctx":
                assert float(value[0]) == 1000 + number
            length = 1 + value[0] / 1000
            assert torch.allclose(key, length * angle.flatten(), atol=1e-6)
        if expected["call"] == "prefill" and "frames" in expected:
            assert call["frames"] == expected["frames"]
            assert call["own"] == len(call["frames"]) - expected["kept"]


def test_every_golden_setting_is_executed():
    assert SETTINGS.keys() == GOLDEN.keys()


def test_causvid_begins_with_the_end_of_the_rollout_before():
    """One picture encoded alone and the last two latents as they were, at the three places before the new ones."""
    setting = {"joint": False, "events": [{"chunk": 7, "kind": "cut"}], "chunks": 9}
    calls = executed(CausVid(), setting)
    start, first, _, second = calls[-4:]
    assert start["values"][:, 0].tolist() == [1000 - 3, 19, 20]
    assert start["text"] == [1, 1, 1]
    assert torch.allclose(start["queries"], turned([[-3, 0], [-2, 0], [-1, 0]]))
    assert torch.allclose(first["queries"], turned([[i, 0] for i in range(3)]))
    assert second["values"][:6, 0].tolist() == pytest.approx([1000 - 3, 19, 20, 0, 1, 2])


# -- with a network

CONFIG = DiTConfig(dim=64, ffn_dim=128, heads=2, layers=2, text_dim=16, freq_dim=32, channels=4)
SHAPE = (4, 4, 6)  # c h w of a latent frame; height and width differ
GRID = (2, 3)
STEPS = NoiseSchedule(steps=(1000, 500))
JOINT = replace(STEPS, steps=(1000, 740, 260), joint=True)
BATCH = 2


@dataclass(frozen=True)
class Small:
    """What `choose` asks of a model: here shots of two chunks."""

    policy: MemoryPolicy = field(default_factory=lambda: DualBuffer(limit=None))
    schedule: NoiseSchedule = STEPS
    chunk: int = 3
    chunks: int = 2


@pytest.fixture(scope="module")
def dit() -> DiT:
    dit = DiT(CONFIG)
    sharpen(dit)
    return dit.requires_grad_(False)


def words(number: int) -> Tensor:
    """Text of a prompt: each sample of the batch has its own."""
    return uniform(100 + number, (BATCH, 5, 16))


def pictures(frames: Sequence[Frame]) -> Tensor:
    """Stills: a function of shot and picture; zero where there is none."""
    return torch.stack(
        [uniform(1000 + 100 * f.shot + f.offset, (BATCH, *SHAPE)) * (f.offset >= 0) for f in frames], dim=1
    )


def new_roll(dit: DiT, policy: MemoryPolicy, schedule: NoiseSchedule = STEPS) -> Roll:
    return Roll(dit, policy, schedule, new_memory(dit, SHAPE), Prompts(dit), SHAPE)


def make(roll: Roll, shot: int, chunks: int = 2, steered: dict[int, int] | None = None, until: int = -1) -> Tensor:
    """A shot's latents; `steered`: new texts by how many chunks are out; `until`: close the stream after that chunk."""
    return recorded(roll, shot, chunks, steered, until)[0]


def recorded(
    roll: Roll, shot: int, chunks: int, steered: dict[int, int] | None, until: int = -1
) -> tuple[Tensor, dict[int, int]]:
    """The same, and the new texts by the chunk that read them first."""
    roll.prompts.add(shot, words(shot))
    read: dict[int, int] = {}
    latents = []
    stream = roll.shot(shot, chunks, SeededNoise(5, shot), pictures, BATCH)
    for chunk, x0 in enumerate(stream):
        latents.append(x0)
        if steered and chunk + 1 in steered:
            number = steered[chunk + 1]
            read[roll.steer(number, words(number))] = number
        if chunk == until:
            stream.close()
            return torch.cat(latents, dim=1), read
    finish(roll, chunks)
    return torch.cat(latents, dim=1), read


def finish(roll: Roll, chunks: int) -> None:
    roll.memory.shots += (4 * roll.policy.chunk * chunks - 3,)


# Chunks of each shot, and new texts by how many of them are out.
STORY: list[tuple[int, dict[int, int]]] = [(2, {}), (4, {1: 50}), (2, {}), (3, {2: 51})]


def tell(roll: Roll, shots: Sequence[int] = range(len(STORY))) -> list[Tensor]:
    return [make(roll, shot, *STORY[shot]) for shot in shots]


def rolls(dit: DiT, name: str) -> Roll:
    return new_roll(dit, *choose(name, Small()))


CHOICES: dict[str, str | MemoryPolicy] = {
    **{name: name for name in POLICIES},
    "rolling-forcing, its memory kept": RollingForcing(window=9, budget=9),
    "longlive, its sink renewed": LongLive(window=9, history=9, global_sink=False),
    "longlive, its window wider than what is computed again": LongLive(window=15, history=9),
    "infinity-rope, as in the paper": InfinityRope(compat="paper"),
    "one endless take": MemoryPolicy(limit=None),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_a_past_put_back_is_the_past_itself(dit, choice):
    """From stored latents alone: the same memory, and to the last bit the same continuation."""
    lived, back = (new_roll(dit, *choose(CHOICES[choice], Small())) for _ in range(2))
    for shot, (chunks, steered) in enumerate(STORY[:3]):
        latents, read = recorded(lived, shot, chunks, steered)
        for number in (shot, *read.values()):
            back.prompts.add(number, words(number))
        back.replay(shot, latents, pictures, read)
        finish(back, chunks)
    assert torch.equal(tell(back, [3])[0], tell(lived, [3])[0])
    ours, theirs = lived.memory, back.memory
    assert (ours.frames, ours.count, ours.shots) == (theirs.frames, theirs.count, theirs.shots)
    assert ours.store.kept.keys() == theirs.store.kept.keys()
    for frame, layers in ours.store.kept.items():
        for mine, other in zip(layers, theirs.store.kept[frame], strict=True):
            assert all(map(torch.equal, mine, other))


@pytest.mark.parametrize("name", POLICIES)
def test_a_shot_begun_again_on_a_fork_is_the_same_shot(dit, name):
    """Whatever became of the memory it was forked from: a shot interrupted in any chunk, or told otherwise."""
    told = tell(rolls(dit, name))
    roll = rolls(dit, name)
    tell(roll, range(3))
    for until in (0, 1, 2):
        before = roll.memory.fork()
        make(roll, 3, 3, {1: 70}, until=until)
        roll.memory = before
    assert torch.equal(tell(roll, [3])[0], told[3])


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_call_that_failed_leaves_nothing_behind(dit, name, call):
    """Interrupted inside the network at the cut, which can be made again at once, or after it, with a fork."""
    told = tell(rolls(dit, name), range(3))
    roll = rolls(dit, name)
    tell(roll, range(2))
    before, seen = roll.memory.fork(), []

    def interrupt(*_: object) -> None:
        seen.append(None)
        if len(seen) == call:
            raise KeyboardInterrupt

    hook = dit.blocks[1].self_attn.k.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(roll, 2)
    hook.remove()
    if call > 1:
        roll.memory = before
    assert torch.equal(tell(roll, [2])[0], told[2])


@pytest.mark.parametrize("name", POLICIES)
def test_texts_are_read_and_the_past_matters_where_it_may(dit, name):
    """What the laws above compare does move: with the text of a shot, with a new text, and with the shot before."""
    told = tell(rolls(dit, name), range(2))
    roll = rolls(dit, name)
    first = make(roll, 0)
    assert (make(roll, 1, 4) - told[1])[:, :3].abs().max() == 0  # not before the new text
    assert (make(rolls(dit, name), 0, 2) - first).abs().max() == 0
    roll = rolls(dit, name)
    make(roll, 0)
    assert (make(roll, 1, 4) - told[1])[:, 3:].abs().max() > 1e-2
    roll = rolls(dit, name)
    roll.replay(0, put(roll, first), pictures)
    finish(roll, 2)
    changed = (make(roll, 1, *STORY[1]) - told[1]).abs().max()
    depends = roll.policy.carries and not isinstance(roll.policy, DualBuffer)  # else: on decoded pictures alone
    assert (changed > 1e-2) == (depends or isinstance(roll.policy, CausVid))


def put(roll: Roll, latents: Tensor) -> Tensor:
    roll.prompts.add(0, words(0))
    return latents.flip(-1)


@pytest.mark.parametrize("name", POLICIES)
def test_memory_is_bounded(dit, name):
    """After the first shots the store never grows."""
    policy, schedule = choose(name, Small(schedule=NoiseSchedule(steps=(1000,))))
    roll = new_roll(dit, policy, schedule)
    sizes = []
    for shot in range(12):
        make(roll, shot, 2, {1: 100 + shot})
        roll.prompts.retain(set(range(shot - 5, shot + 1)))  # as far back as a context reaches
        sizes.append((roll.memory.store.bytes, len(roll.memory.frames), len(roll.memory.store.kept)))
    assert sizes[4:] == [sizes[4]] * 8
    latent = 2 * 2 * BATCH * 6 * 64 * 8  # layers, k and v, samples, tokens, width, float64
    most = max(policy.window or 0, 6 + 6) + policy.archive
    assert sizes[-1][0] <= most * latent


# -- blends, sources, recomputed pasts


def test_one_take_over_texts_and_cuts_is_one_block_causal_pass(dit):
    """Without a window, positions in the stream: every chunk, from one masked pass over all that is clean."""
    roll = new_roll(dit, MemoryPolicy(limit=None))
    calls: list[tuple[Tensor, float, Tensor]] = []
    hook = dit.register_forward_hook(lambda _, given, out: calls.append((given[0], float(given[1][0, 0]), out)))
    clean = torch.cat(tell(roll, range(2)), dim=1).split(3, dim=1)
    hook.remove()
    prompts = [0, 0, 1, 50, 50, 50]
    noisy = [call for call in calls if call[1] == 500.0 or call[1] == pytest.approx(833.333, abs=1e-3)]
    assert len(noisy) == len(clean) == 6
    numbers = sorted(set(prompts))
    index = torch.tensor([[numbers.index(p) * BATCH + b for p in prompts * 2 for _ in range(3)] for b in range(BATCH)])
    text = dit.read(torch.cat([words(number) for number in numbers]), index)
    tags = [(kind, chunk) for kind in ("clean", "noisy") for chunk in range(6) for _ in range(3 * 6)]
    mask = torch.tensor([[b[1] <= a[1] if a[0] == b[0] == "clean" else (b[0] == "clean" and b[1] < a[1]) or a == b
                          for b in tags] for a in tags])  # fmt: skip
    where = rotation(tuple((float(i), 0.0) for i in range(18)) * 2, *GRID, 32, dit.device, dit.dtype)
    times = torch.tensor([0.0] * 18 + [noisy[0][1]] * 18).expand(BATCH, -1)
    velocity = dit(torch.cat([*clean, *(call[0] for call in noisy)], dim=1), times, text, where, mask=mask)
    for call, expected in zip(noisy, velocity[:, 18:].split(3, dim=1), strict=True):
        assert torch.allclose(call[2], expected, atol=1e-10)


def memory_of(dit: DiT, latents: Tensor, frames: tuple[Frame, ...], text: Text) -> FrameStore:
    """A fresh store, filled by one pass in which these frames all see each other."""
    store = FrameStore(CONFIG.layers, *GRID)
    everything = tuple(Place(frame, frame.index) for frame in frames)
    bound = store.bind(Plan(everything, everything), frames, write=True)
    where = bound.rotation(everything, 32, dit.patch_embedding.weight)
    dit(latents, torch.zeros(BATCH, len(frames)), text, where, bound)
    return store


def test_after_a_new_text_longlive_remembers_what_a_fresh_memory_would(dit):
    """The last latents with the new text, seen all by all: nothing of the old text is left but the kept sink."""
    for chunks, first in ((2, 0), (6, 6)):  # before and after the sink is out of reach
        roll = new_roll(dit, LongLive(window=12, global_sink=False))
        latents = make(roll, 0, chunks + 1, {chunks: 50})
        frames = tuple(Frame(i, 0, i, 50) for i in range(first, 3 * chunks))
        index = torch.arange(BATCH)[:, None].expand(-1, len(frames))
        fresh = memory_of(dit, latents[:, first : 3 * chunks], frames, dit.read(words(50), index))
        kept = [frame for frame in roll.memory.frames if frame in fresh.kept]
        assert len(kept) == min(3 * chunks, 9)  # the chunk itself is not committed; three were forgotten for it
        for frame in kept:
            for mine, other in zip(roll.memory.store.kept[frame], fresh.kept[frame], strict=True):
                assert all(map(torch.equal, mine, other))
        assert all(frame.prompt == 50 for frame in roll.memory.frames)


def snapshots(roll: Roll, chunks: int) -> list[tuple[tuple[Frame, ...], dict[Frame, list[tuple[Tensor, Tensor]]]]]:
    """What is remembered when each chunk is handed out."""
    roll.prompts.add(0, words(0))
    seen = []
    for _ in roll.shot(0, chunks, SeededNoise(5, 0), pictures, BATCH):
        seen.append((roll.memory.frames, dict(roll.memory.store.kept)))
    return seen


def test_reward_forcing_folds_what_it_forgets_into_its_sink(dit):
    """sink_i := ema sink_i + (1 - ema) forgotten_i, on keys and values of every layer, at each eviction."""
    seen = snapshots(new_roll(dit, RewardForcing(ema=0.75)), 6)
    folded = 0
    for (before, kept), (after, now) in pairwise(seen):
        forgotten = [frame for frame in before if frame not in after]
        for i, gone in enumerate(forgotten):
            sink = after[i]
            folded += 1
            for layer in range(CONFIG.layers):
                for part in range(2):
                    expected = 0.75 * kept[sink][layer][part] + 0.25 * kept[gone][layer][part]
                    assert torch.allclose(now[sink][layer][part], expected, atol=1e-14)
                    assert not torch.equal(now[sink][layer][part], kept[sink][layer][part])
    assert folded == 9


def test_rolling_sink_reads_the_beginning_from_its_archive(dit):
    """What a replayed frame reads is, to the last bit, the first frames' keys (at its own place) and values."""
    policy = scaled(POLICIES["rolling-sink"], 3, 4)  # window 12, archive 9
    roll = new_roll(dit, policy)
    seen = snapshots(roll, 9)
    original = seen[4][1]  # the first nine frames, as they were written
    assert {frame.index for frame in seen[-1][1]} >= set(range(9))
    replayed = [frame for frame in roll.memory.frames if frame.source is not None]
    assert [(frame.index, frame.source) for frame in replayed] == [(i, policy.replayed(i)) for i in range(15, 21)]
    new = tuple(Frame(27 + i, 0, 27 + i) for i in range(3))
    places = tuple(Place(frame, frame.index) for frame in (*roll.memory.frames, *new))
    bound = roll.memory.store.bind(Plan(places[-3:], places), new)
    own = torch.zeros(BATCH, 18, 2, 32).double()
    keys, values = (read.clone() for read in bound.extend(1, own, own))  # the next call overwrites it
    for i, frame in enumerate(replayed):
        source = Frame(frame.source, 0, frame.source)
        here = slice(6 * i, 6 * i + 6)
        assert torch.equal(values[:, here], original[source][1][1])
        alone = roll.memory.store.bind(Plan((), (Place(source, frame.index), *places[-3:])), new)
        assert torch.equal(keys[:, here], alone.extend(1, own, own)[0][:, :6])


def test_an_empty_frame_has_zero_keys_and_values_and_still_takes_part(dit):
    """Softmax gives it weight: three empty frames are not the same as none."""
    empty = tuple(Frame(i, role="empty") for i in range(2))
    new = tuple(Frame(3 + i) for i in range(3))
    places = tuple(Place(frame, i) for i, frame in enumerate((*empty, *new)))
    bound = FrameStore(CONFIG.layers, *GRID).bind(Plan(places[2:], places), new)
    own = uniform(7, (BATCH, 18, 2, 32))
    keys, values = bound.extend(0, own, own)
    assert keys.shape[1] == 5 * 6 and not keys[:, :12].any() and not values[:, :12].any()
    assert torch.equal(values[:, 12:], own)
    released, paper = (
        make(new_roll(dit, InfinityRope(compat=compat)), 0, 2, {1: 50}) for compat in ("released", "paper")
    )
    assert (released - paper)[:, 3:].abs().max() > 1e-2


# -- joint windows


def test_a_joint_window_of_one_chunk_is_the_plain_sampler(dit):
    policy = RollingForcing(restart=True)
    for schedule in (STEPS, SCHEDULES["rolling-forcing"]):
        joint, plain = (new_roll(dit, policy, replace(schedule, joint=joint)) for joint in (True, False))
        for shot in range(2):
            assert torch.equal(make(joint, shot, 1), make(plain, shot, 1))


def test_joint_windows_by_hand(dit):
    """Two chunks, three levels: the diagonal calls one by one, the last with the finished chunk as clean context."""
    made = make(new_roll(dit, RollingForcing(), JOINT), 0)
    noise, sigmas, times = SeededNoise(5, 0), JOINT.sigmas(), JOINT.timesteps()

    def draw(chunk: int, level: int) -> Tensor:
        return noise.draw(chunk, level, (BATCH, 3, *SHAPE)).double()

    def clean(parts: Sequence[tuple[Tensor, int]], first: int, past: Tensor | None = None) -> list[Tensor]:
        """x0 of noisy chunks (latents, level) that sit at `first`, behind a clean chunk that does not see them."""
        count = 3 * len(parts)
        levels = torch.tensor([level for _, level in parts]).repeat_interleave(3)
        x = torch.cat([part for part, _ in parts], dim=1)
        given = x if past is None else torch.cat((past, x), dim=1)
        lead = given.shape[1] - count
        timesteps = torch.tensor([0.0] * lead + [times[level] for level in levels]).expand(BATCH, -1)
        places = tuple((float(first - lead + i), 0.0) for i in range(lead + count))
        index = torch.arange(BATCH)[:, None].expand(-1, lead + count)
        mask = torch.ones(6 * (lead + count), 6 * (lead + count), dtype=torch.bool)
        mask[: 6 * lead, 6 * lead :] = False
        table = rotation(places, *GRID, 32, dit.device, dit.dtype)
        velocity = dit(given, timesteps, dit.read(words(0), index), table, mask=mask)[:, lead:]
        return list(to_x0(x, velocity, torch.tensor(sigmas)[levels][None]).split(3, dim=1))

    def again(x0: Tensor, chunk: int, level: int) -> Tensor:
        return add_noise(x0, draw(chunk, level), torch.tensor(sigmas[level]))

    (a,) = clean([(draw(0, 0), 0)], 0)
    a, b = clean([(again(a, 0, 1), 1), (draw(1, 0), 0)], 0)
    a, b = clean([(again(a, 0, 2), 2), (again(b, 1, 1), 1)], 0)
    (b,) = clean([(again(b, 1, 2), 2)], 3, past=a)
    assert torch.allclose(made, torch.cat((a, b), dim=1), atol=1e-10)


def test_joint_windows_change_what_is_made_and_carry_texts(dit):
    policy = RollingForcing(restart=True)
    joint, plain = (make(new_roll(dit, policy, replace(JOINT, joint=joint)), 0, 4) for joint in (True, False))
    assert (joint - plain).abs().max() > 1e-2
    steered = make(new_roll(dit, policy, JOINT), 0, 4, {1: 50})
    # the first chunk left when two more were under way, so the new text falls on the fourth alone
    assert torch.equal(steered[:, :3], joint[:, :3])
    assert (steered - joint)[:, 9:].abs().max() > 1e-2


# -- systems by name


def test_on_the_published_model_systems_are_as_published():
    wan = PRESETS["wan-1.3b"]
    for name, published in POLICIES.items():
        policy, schedule = choose(name, wan)
        if name != "pinned-sink":
            assert policy == published
        assert schedule == replace(wan.schedule, joint=name == "rolling-forcing")
    assert choose(None, wan) == (wan.policy, wan.schedule)


def test_windows_shrink_with_the_shot():
    sizes = {name: (p.window, p.sink, p.archive, p.history) for name in POLICIES for p in [choose(name, Small())[0]]}
    assert sizes == {
        "shotstream": (None, 0, 0, 0),
        "self-forcing": (None, 0, 0, 0),
        "self-forcing-window": (6, 0, 0, 0),
        "causvid": (None, 0, 0, 2),
        "longlive": (9, 3, 0, 9),
        "longlive-infinity": (9, 3, 0, 9),
        "infinite-forcing": (7, 1, 0, 0),
        "reward-forcing": (9, 3, 0, 0),
        "infinity-rope": (6, 1, 0, 0),
        "rolling-sink": (9, 0, 6, 0),
        "rolling-forcing": (9, 3, 0, 0),
        "pinned-sink": (9, 3, 0, 0),
    }
    assert scaled(POLICIES["pinned-sink"], 3, 7) == replace(POLICIES["pinned-sink"], chunk=3, window=12, sink=3)
    assert scaled(Slots(window=9, sink=1), 3, 70) == Slots(window=9, sink=1)  # never longer than published


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 7, 20])
def test_every_system_fits_every_model(chunk, chunks):
    for name in POLICIES:
        model = Small(DualBuffer(chunk=chunk), chunk=chunk, chunks=chunks)
        policy, _ = choose(name, model)
        assert policy.chunk == chunk
        rehearse(policy, [min(chunks, 21 // chunk - 1)] * 3)


def test_the_models_own_policy_is_meant_by_its_system():
    model = Small()
    assert choose("shotstream", model)[0] is choose(None, model)[0] is model.policy
    assert choose("shotstream", Small(MemoryPolicy()))[0] == DualBuffer()
    assert choose(mine := Slots(window=8), model)[0] is mine


def test_unknown_names_and_foreign_chunks_are_one_line():
    with pytest.raises(
        ValueError, match=r"^unknown policy 'longlve'; did you mean 'longlive'\? known: shotstream, .*$"
    ):
        choose("longlve", Small())
    with pytest.raises(ValueError, match=r"^unknown policy 'xyz'; known: shotstream, .*$"):
        choose("xyz", Small())
    with pytest.raises(ValueError, match=r"^PinnedSink\(chunk=8\): the model makes 3 latent frames at a time; give "):
        choose(POLICIES["pinned-sink"], Small())


def test_a_limit_is_met_before_the_wait(dit):
    policy, _ = choose("self-forcing", Small())
    rehearse(policy, [7, 7, 7])
    with pytest.raises(
        ValueError, match=r"^shot 2: MemoryPolicy stops at 21 latent frames.* make shots shorter"
    ) as ours:
        rehearse(policy, [7, 8, 7])
    roll = new_roll(dit, policy)
    make(roll, 0, 7)
    with pytest.raises(ValueError) as theirs:
        make(roll, 1, 8)
    assert str(ours.value) == f"shot 2: {theirs.value}"
    with pytest.raises(ValueError, match="shot 3"):
        rehearse(MemoryPolicy(), [3, 3, 3])
    rehearse(DualBuffer(limit=None), [1000] * 512)


# -- sessions and films


def story_of(session: Session, lengths: Sequence[int] = (3, 3, 2), forget: bool = False) -> list[Tensor]:
    """Three shots, together longer than the windows, with a new text inside the second; latents by shot.

    With `forget` the maker loses what it remembers at each cut, and must put it back from the takes.
    """
    latents: dict[int, list[Tensor]] = {}
    for caption, chunks in zip(("a green bear in the forest", "the bear at night", "a red frog"), lengths, strict=True):
        session.cut(caption, chunks=chunks)
        for chunk in session.stream():
            assert torch.isfinite(chunk.latents).all()
            latents.setdefault(chunk.shot.index, []).append(chunk.latents)
            if chunk.shot.index == 1 and chunk.index == 0:
                session.steer("the bear jumping in the snow")
        if forget:
            session._maker._open = None
    return [torch.cat(parts) for parts in latents.values()]


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    pipeline = load("tiny")
    return replace(pipeline, config=replace(pipeline.config, schedule=STEPS))


@pytest.fixture(scope="module")
def told(tiny) -> dict[str, list[Tensor]]:
    return {name: story_of(Session(tiny, seed=3, policy=name)) for name in POLICIES}


@pytest.mark.parametrize("name", POLICIES)
def test_a_session_that_must_remember_again_tells_the_same_story(tiny, told, name):
    assert [len(latents) for latents in told[name]] == [9, 9, 6]
    again = story_of(Session(tiny, seed=3, policy=name), forget=True)
    assert all(map(torch.equal, told[name], again))


def test_policies_tell_different_stories(told):
    last = [latents[-1] for latents in told.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(last) for b in last[:i])
    assert torch.equal(told["longlive"][0], told["longlive-infinity"][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_the_storybook_model_runs_on_every_system(storybook, name):
    """The model in the package, over cuts, a new text and more than the windows hold; its latents stay latents."""
    shots = story_of(Session(storybook, seed=3, policy=name), lengths=(2, 2, 1))
    spread = [float(latents.std()) for latents in shots]
    assert [len(latents) for latents in shots] == [6, 6, 3] and all(0.5 < value < 1.5 for value in spread), spread


@pytest.fixture(scope="module")
def storybook() -> Pipeline:
    return load("storybook")


def test_a_film_is_made_as_another_system_would(tmp_path, tiny):
    told = Story.model_validate({"shotstream": 1, "shots": [{"caption": "a bear"}, {"caption": "a frog", "chunks": 3}]})
    film = plan(told, tiny, policy="self-forcing")
    assert [shot.remembers for shot in film.shots] == [(), ()]
    assert plan(told, tiny, policy="causvid").shots[1].remembers == ("s1@12",)
    film.make(tmp_path / "film.mp4")
    assert json.loads(film.recipe())["policy"] == "self-forcing"
    assert "policy" not in json.loads(plan(told, tiny).recipe())
    long = Story.model_validate({"shotstream": 1, "shots": [{"caption": "a bear", "chunks": 8}]})
    with pytest.raises(StoryError, match=r"^story: shot 1: .* stops at 21 latent frames"):
        plan(long, tiny, policy="self-forcing")
    plan(long, tiny, policy="self-forcing-window")


def test_an_unknown_policy_is_one_line_and_no_model_is_loaded(tmp_path):
    path = tmp_path / "story.yaml"
    path.write_text("shotstream: 1\nshots:\n- caption: a bear\n")
    result = CliRunner().invoke(app, ["generate", str(path), "--policy", "longlve", "--model", "no/model"])
    assert result.exit_code == 2
    assert result.stderr.startswith("shotstream: unknown policy 'longlve'; did you mean 'longlive'? known: ")
    assert result.stderr.count("\n") == 1
    result = CliRunner().invoke(app, ["generate", str(path), "--policy", "longlive", "--model", "tiny", "--dry-run"])
    assert result.exit_code == 0, result.output
