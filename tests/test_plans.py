"""Every policy's plans against the golden plans, driven without a network; the schedule's exact numbers."""

import ast
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shotstream.memory import plan
from shotstream.memory.plan import Call, Change, Frame, MemoryPolicy, Place, Plan, Slots
from shotstream.memory.policies import POLICIES, dual_buffer
from shotstream.memory.policies.causvid import CausVid
from shotstream.memory.policies.dual_buffer import DualBuffer, context_picks
from shotstream.memory.policies.infinity_rope import InfinityRope
from shotstream.memory.policies.longlive import LongLive, LongLiveInfinity
from shotstream.memory.policies.pinned_sink import PinnedSink
from shotstream.memory.policies.reward_forcing import RewardForcing
from shotstream.memory.policies.rolling_forcing import RollingForcing
from shotstream.memory.policies.rolling_sink import RollingSink
from shotstream.memory.schedule import SCHEDULES, NoiseSchedule, Window

GOLDEN = {s["name"]: s for s in json.loads((Path(__file__).parent / "golden/plans.json").read_text())["settings"]}

SETTINGS: dict[str, MemoryPolicy] = {
    "unbounded": MemoryPolicy(),
    "window21": POLICIES["self-forcing-window"],
    "longlive": POLICIES["longlive"],
    "longlive-global-sink": POLICIES["longlive"],
    "longlive-no-global-sink": LongLive(global_sink=False),
    "longlive-infinity": POLICIES["longlive-infinity"],
    "infinite-forcing": POLICIES["infinite-forcing"],
    "reward-forcing": POLICIES["reward-forcing"],
    "infinity-rope": POLICIES["infinity-rope"],
    "infinity-rope-early-flush": POLICIES["infinity-rope"],
    "rolling-sink": POLICIES["rolling-sink"],
    "rolling-forcing": POLICIES["rolling-forcing"],
    "pinned-sink": POLICIES["pinned-sink"],
    "shotstream-shot-1": POLICIES["shotstream"],
    "shotstream-shot-2": POLICIES["shotstream"],
    "shotstream-shot-4": POLICIES["shotstream"],
    "shotstream-shot-5": POLICIES["shotstream"],
}


# --------------------------------------------------------------------------------------- a driver, no network


@dataclass
class Driver:
    """Runs a policy through a schedule as a rollout does, but only writes down the calls."""

    policy: MemoryPolicy
    schedule: NoiseSchedule
    events: dict[int, str] = field(default_factory=dict)  # chunk -> "switch" | "cut"
    shots: list[int] = field(default_factory=list)  # pictures of the shots finished before the stream begins
    start: int = 0  # number of the stream's first latent frame
    memory: tuple[Frame, ...] = ()
    calls: list[dict[str, Any]] = field(default_factory=list)
    blend: list[list[Any]] = field(default_factory=list)

    def run(self, chunks: int) -> list[dict[str, Any]]:
        made: dict[int, tuple[Frame, ...]] = {}
        for number, window in enumerate(self.schedule.windows(chunks)):
            for chunk, level in zip(window.chunks, window.levels, strict=True):
                if level == 0:
                    made[chunk] = self.begin(chunk, made.get(chunk - 1))
            self.apply(self.policy.fit(self.memory, made[window.chunks[0]]))
            assert self.policy.fit(self.memory, made[window.chunks[0]]) == Change(self.memory)
            new = tuple(frame for chunk in window.chunks for frame in made[chunk])
            if self.schedule.joint:
                where = {"window": number, "chunks": list(window.chunks), "levels": list(window.levels)}
                self.log("denoise", new, where)
            elif window.levels[0] == 0:
                self.log("denoise", new, {"chunk": window.chunks[0], "steps": len(self.schedule.steps)})
            else:  # a chunk's denoise steps share one plan, listed once
                shared = self.calls[-1]
                self.log("denoise", new, {k: v for k, v in shared.items() if k in ("chunk", "steps", "blend")})
                assert self.calls.pop() == shared
            if window.levels[0] == len(self.schedule.steps) - 1:
                leaving = window.chunks[0]
                self.log("commit", made[leaving], {"chunk": leaving})
                self.apply(self.policy.settle(self.memory, made[leaving]))
        return self.calls

    def begin(self, chunk: int, before: tuple[Frame, ...] | None) -> tuple[Frame, ...]:
        """The frames of a chunk that enters, after the event that falls on it."""
        event = self.events.get(chunk)
        size = self.policy.chunk
        if before is None:
            first = Frame(self.start, shot=len(self.shots), prompt=len(self.shots))
        else:
            first = replace(before[0], index=before[0].index + size, offset=before[0].offset + size)
            if event is not None:
                first = replace(first, prompt=first.prompt + 1)
            if event == "cut":
                self.shots.append(4 * (first.offset - 1) + 1)
                first = replace(first, shot=first.shot + 1, offset=0)
        new = tuple(replace(first, index=first.index + i, offset=first.offset + i) for i in range(size))
        if before is None or event is not None:
            cut = before is None or event == "cut"
            boundary = self.policy.boundary(self.memory, new, cut, self.shots)
            self.memory = boundary.memory
            if boundary.prefill:
                where: dict[str, Any] = {"chunk": chunk}
                if boundary.prefill[0].role == "context":
                    where["pictures"] = [[f.shot, f.offset] for f in boundary.prefill]
                else:
                    where |= {"frames": [f.index for f in boundary.prefill], "kept": len(self.memory)}
                self.log("prefill", boundary.prefill, where)
                self.memory += boundary.prefill[len(self.memory) :]
        return new

    def apply(self, change: Change) -> None:
        assert len(set(change.memory)) == len(change.memory), "a frame remembered twice"
        self.memory = change.memory
        self.blend += [[into.index, other.index, keep] for into, other, keep in change.blend]

    def log(self, kind: Any, new: tuple[Frame, ...], where: dict[str, Any]) -> None:
        if self.blend:
            where = where | {"blend": self.blend}
            self.blend = []
        plan = self.policy.plan(Call(kind, self.memory, new))
        assert [place.frame for place in plan.queries] == list(new)
        assert {place.frame for place in plan.keys} <= {*self.memory, *new}
        self.calls.append(
            {
                "call": kind,
                **where,
                "queries": [[place.pos, place.phase] for place in plan.queries],
                "text": [frame.prompt for frame in new],
                "keys": [self.key(place, new) for place in plan.keys],
            }
        )

    def key(self, place: Place, new: tuple[Frame, ...]) -> list[Any]:
        frame = place.frame
        if frame in new:
            kind, number = "new", new.index(frame)
        elif frame.role == "empty":
            kind, number = "empty", 0
        elif frame.role == "context":
            kind, number = "ctx", frame.index
        else:
            kind, number = "mem", frame.index if frame.source is None else frame.source
        return [kind, number, place.pos, place.phase, frame.prompt]


def drive(policy: MemoryPolicy, setting: dict[str, Any]) -> list[dict[str, Any]]:
    steps = SCHEDULES["rolling-forcing" if setting["joint"] else "self-forcing"]
    assert (len(steps.steps), policy.chunk) == (setting["steps"], setting["chunk"])
    events = {event["chunk"]: event["kind"] for event in setting["events"]}
    return Driver(policy, steps, events, list(setting.get("finished_shots", []))).run(setting["chunks"])


def same(a: Any, b: Any) -> bool:
    """Equal, but phases to 1e-6 (golden phases are rounded); positions are whole numbers, so exact."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, abs_tol=1e-6, rel_tol=0)
    return bool(a == b)


# ----------------------------------------------------------------------------------------------- golden plans


def test_every_golden_setting_is_covered() -> None:
    assert SETTINGS.keys() == GOLDEN.keys()
    assert sum(len(setting["calls"]) for setting in GOLDEN.values()) == 354


@pytest.mark.parametrize("name", SETTINGS)
def test_golden_plans(name: str) -> None:
    got, expected = drive(SETTINGS[name], GOLDEN[name]), GOLDEN[name]["calls"]
    for mine, golden in zip(got, expected, strict=False):
        assert same(mine, golden), f"{name}:\n  got    {mine}\n  golden {golden}"
    assert len(got) == len(expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_presets_have_the_golden_parameters(name: str) -> None:
    policy = SETTINGS[name]
    for key, value in GOLDEN[name]["params"].items():
        if key == "policy":
            assert type(policy).__name__ == value
        elif key == "capacity":  # Rolling Forcing: what the memory holds, the leaving chunk included
            assert policy.window == value
        elif key == "turn":
            assert (value, policy.turn) == ("1/6 rad", 1 / 6)
        else:
            assert getattr(policy, key) == value


def moved(policy: type[MemoryPolicy], which: Callable[[Call, Place], bool], by: float = 1) -> Callable[..., Plan]:
    """A plan method whose chosen keys sit `by` further on."""
    original = policy.plan

    def plan(self: MemoryPolicy, call: Call) -> Plan:
        right = original(self, call)
        keys = tuple(replace(p, pos=p.pos + by) if which(call, p) else p for p in right.keys)
        return replace(right, keys=keys)

    return plan


def sink_key(call: Call, place: Place) -> bool:
    return call.memory[:1] == (place.frame,)


def one_chunk_late(self: MemoryPolicy, memory: tuple[Frame, ...], new: tuple[Frame, ...]) -> Change:
    over = max(0, len(memory) - (self.window or 0))  # the chunk itself does not count
    return Change(memory[: self.sink] + memory[self.sink + over :])


def block_causal(self: LongLive, call: Call) -> Plan:
    right = MemoryPolicy.plan(self, call)
    return replace(right, keys=right.keys[: -self.chunk]) if call.kind == "prefill" else right


def phase_as_position(self: DualBuffer, call: Call) -> Plan:
    right = DUAL_PLAN(self, call)
    return Plan(*(tuple(Place(p.frame, p.pos + p.phase) for p in side) for side in (right.queries, right.keys)))


def target_text(self: DualBuffer, memory: Any, new: Any, cut: bool, shots: Any) -> Any:
    right = DUAL_BOUNDARY(self, memory, new, cut, shots)
    return replace(right, prefill=tuple(replace(f, prompt=new[0].prompt) for f in right.prefill))


DUAL_PLAN, DUAL_BOUNDARY, DUAL_PHASE = DualBuffer.plan, DualBuffer.boundary, DualBuffer.phase
ROLLING_PLAN, SLOT_PLAN = RollingForcing.plan, Slots.plan

MUTANTS: dict[str, tuple[str, Any, str, Any]] = {
    # what is wrong: setting that must notice, object, attribute, what to put there
    "eviction one chunk late": ("window21", MemoryPolicy, "fit", one_chunk_late),
    "sink position + 1": ("longlive", LongLive, "plan", moved(LongLive, sink_key)),
    "no recomputation": ("longlive-global-sink", LongLive, "boundary", MemoryPolicy.boundary),
    "recomputation block-causal": ("longlive-global-sink", LongLive, "plan", block_causal),
    "slots without slots": ("longlive-infinity", LongLiveInfinity, "plan", MemoryPolicy.plan),
    "slot of the sink + 1": ("infinite-forcing", Slots, "plan", moved(Slots, sink_key)),
    "sink not blended": ("reward-forcing", RewardForcing, "fit", MemoryPolicy.fit),
    "no flush": ("infinity-rope-early-flush", InfinityRope, "boundary", MemoryPolicy.boundary),
    "no jump": ("infinity-rope", InfinityRope, "plan", SLOT_PLAN),
    "replay never turns": ("rolling-sink", RollingSink, "replayed", lambda self, i: i % self.archive),
    "no replay": ("rolling-sink", RollingSink, "settle", MemoryPolicy.settle),
    "rolling sink left at 0..2": ("rolling-forcing", RollingForcing, "plan", MemoryPolicy.plan),
    "commit reads the denoise view": (
        "rolling-forcing",
        RollingForcing,
        "plan",
        lambda self, call: ROLLING_PLAN(self, replace(call, kind="denoise")),
    ),
    "pin forgotten": ("pinned-sink", PinnedSink, "fit", MemoryPolicy.fit),
    "flag off by one": (
        "shotstream-shot-4",
        DualBuffer,
        "phase",
        lambda self, flag: DUAL_PHASE(self, flag + 1),
    ),
    "first shot's flag 0": ("shotstream-shot-1", DualBuffer, "phase", lambda self, flag: 0.0),
    "phase as position": ("shotstream-shot-4", DualBuffer, "plan", phase_as_position),
    "context reads the target's caption": ("shotstream-shot-4", DualBuffer, "boundary", target_text),
    "pictures rounded up": (
        "shotstream-shot-2",
        dual_buffer,
        "evenly_spaced",
        lambda p, count: [math.ceil(i * (p - 2) / max(count - 1, 1)) for i in range(count)],
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, owner, attribute, wrong = MUTANTS[mutant]
    monkeypatch.setattr(owner, attribute, wrong)
    assert not same(drive(SETTINGS[name], GOLDEN[name]), GOLDEN[name]["calls"])


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("shotstream-shot-5", DualBuffer(remainder="last")),
        ("shotstream-shot-5", DualBuffer(budget=5)),
        ("shotstream-shot-5", DualBuffer(turn=0.0)),
        ("shotstream-shot-1", DualBuffer(first_shot="empty")),
        ("longlive-global-sink", LongLive(global_sink=False)),
        ("longlive-no-global-sink", LongLive()),
        ("infinity-rope", InfinityRope(compat="paper")),
        ("infinity-rope-early-flush", InfinityRope(compat="paper")),
        ("rolling-forcing", RollingForcing(window=21)),
        ("rolling-forcing", RollingForcing(budget=24)),
    ],
)
def test_other_options_are_noticed(name: str, wrong: MemoryPolicy) -> None:
    assert not same(drive(wrong, GOLDEN[name]), GOLDEN[name]["calls"])


@pytest.mark.parametrize("name", ["longlive-global-sink", "infinity-rope", "pinned-sink"])
@pytest.mark.parametrize("by", [-1, 1])
def test_an_event_one_chunk_off_is_noticed(name: str, by: int) -> None:
    shifted = GOLDEN[name] | {"events": [e | {"chunk": e["chunk"] + by} for e in GOLDEN[name]["events"]]}
    assert not same(drive(SETTINGS[name], shifted), GOLDEN[name]["calls"])


# ------------------------------------------------------------------------------------------- laws of policies


def stream(policy: MemoryPolicy, chunks: int, events: dict[int, str] | None = None) -> list[dict[str, Any]]:
    return Driver(policy, NoiseSchedule((1000, 500)), events or {}).run(chunks)


def test_window_that_is_never_full_equals_no_window_and_the_sink_is_irrelevant() -> None:
    unbounded = stream(MemoryPolicy(), 7)
    assert stream(MemoryPolicy(window=21), 7) == unbounded
    assert stream(MemoryPolicy(window=21, sink=6), 7) == unbounded
    assert stream(MemoryPolicy(window=18), 7) != unbounded


@pytest.mark.parametrize("name", ["infinite-forcing", "reward-forcing"])
def test_slots_do_not_know_the_stream_number(name: str) -> None:
    early = Driver(POLICIES[name], NoiseSchedule()).run(8)
    late = Driver(POLICIES[name], NoiseSchedule(), start=300).run(8)

    def positions(calls: list[dict[str, Any]]) -> list[Any]:
        return [(call["queries"], [key[2] for key in call["keys"]]) for call in calls]

    assert positions(early) == positions(late)
    assert [call["keys"] for call in early] != [call["keys"] for call in late]


@pytest.mark.parametrize("name", POLICIES)
def test_memory_stays_bounded_over_fifty_shots(name: str) -> None:
    policy = POLICIES[name]
    schedule = SCHEDULES["rolling-forcing" if name == "rolling-forcing" else "self-forcing"]
    sizes = [len(call["keys"]) for call in Driver(policy, schedule, dict.fromkeys(range(6, 300, 6), "cut")).run(300)]
    half = len(sizes) // 2
    assert max(sizes[half:]) == max(sizes[:half]) <= (policy.window or 21 + 6)


def test_past_the_limit_is_refused_in_one_line() -> None:
    stream(MemoryPolicy(), 7)
    with pytest.raises(ValueError, match=r"^MemoryPolicy stops at 21 .* needs 24; .*$"):
        stream(MemoryPolicy(), 8)
    with pytest.raises(ValueError, match="DualBuffer stops at 21 latent frames"):  # context does not count
        stream(DualBuffer(), 8)
    assert stream(DualBuffer(limit=None), 8)[:-2] == stream(DualBuffer(), 7)
    stream(POLICIES["self-forcing"], 12, {6: "cut"})


def test_a_window_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LongLive: a window of 5 .* give window >= 6"):
        LongLive(window=5)
    with pytest.raises(ValueError, match=r"RollingSink: .*new stream"):
        RollingSink(restart=True)


def test_causvid_continues_from_the_overlap() -> None:
    calls = stream(CausVid(), 13, {7: "cut"})
    start = next(call for call in calls if call["call"] == "prefill")
    assert start["pictures"][0] == [0, 72]  # the 9th picture from the end of 81
    assert [pos for pos, _ in start["queries"]] == [18, 19, 20]
    assert start["text"] == [1, 1, 1]
    after = calls[calls.index(start) + 1 :]
    again = [[k[2] for k in call["keys"]] for call in stream(CausVid(), 7) if call["chunk"] > 0]
    # a rollout like the first, 18 latent frames later
    assert [[k[2] - 18 for k in call["keys"]] for call in after] == again
    with pytest.raises(ValueError, match="needs 24"):
        stream(CausVid(), 14, {7: "cut"})
    dropped = stream(CausVid(overlap=0), 8, {7: "cut"})[-1]
    assert [key[:2] for key in dropped["keys"]] == [["new", 0], ["new", 1], ["new", 2]]
    with pytest.raises(ValueError, match="multiple of chunk 3"):
        CausVid(overlap=2)


@pytest.mark.parametrize(("chunk", "first", "kept"), [(1, 0, 0), (4, 0, 0), (5, 3, 3), (9, 15, 3)])
def test_longlive_keeps_its_sink_only_when_it_lies_before_what_is_recomputed(chunk: int, first: int, kept: int) -> None:
    again = next(c for c in stream(LongLive(), 10, {chunk: "switch"}) if c["call"] == "prefill")
    assert again["frames"] == list(range(first, 3 * chunk))
    assert again["kept"] == kept
    assert [key[0] for key in again["keys"]] == ["mem"] * kept + ["new"] * (3 * chunk - first - kept)


def test_infinity_rope_as_in_the_paper() -> None:
    policy = InfinityRope(compat="paper")
    calls = [call for call in stream(policy, 8, {4: "switch", 6: "cut"}) if call["call"] == "denoise"]
    assert [[k[:3] for k in call["keys"]] for call in calls[3:8]] == [
        [["mem", 0, 0], ["mem", 7, 1], ["mem", 8, 2], ["new", 0, 3], ["new", 1, 4], ["new", 2, 5]],
        [["mem", 0, 0], ["mem", 11, 1], ["new", 0, 2], ["new", 1, 3], ["new", 2, 4]],
        [["mem", 0, 0], ["mem", 13, 1], ["mem", 14, 2], ["new", 0, 3], ["new", 1, 4], ["new", 2, 5]],
        [["mem", 0, 0], ["mem", 17, 1], ["new", 0, 2], ["new", 1, 46], ["new", 2, 47]],
        [["mem", 0, 0], ["mem", 19, 1], ["mem", 20, 2], ["new", 0, 3], ["new", 1, 4], ["new", 2, 5]],
    ]


# --------------------------------------------------------------------------------------- ShotStream's context


@pytest.mark.parametrize(
    ("finished", "spread", "last"),
    [
        (1, [[0, 16, 32, 48, 64, 80]], None),
        (2, [[0, 40, 80], [0, 40, 80]], None),
        (3, [[0, 80], [0, 80], [0, 80]], None),
        (4, [[0], [0], [0, 80], [0, 80]], [[0], [0], [0], [0, 40, 80]]),
        (5, [[0], [0], [0], [0], [0, 80]], None),
        (6, [[0]] * 6, None),
        (7, [[]] + [[0]] * 6, [[]] * 6 + [[0, 16, 32, 48, 64, 80]]),
        (9, [[]] * 3 + [[0]] * 6, [[]] * 8 + [[0, 16, 32, 48, 64, 80]]),
    ],
)
def test_context_picks(finished: int, spread: list[list[int]], last: list[list[int]] | None) -> None:
    def flat(per_shot: list[list[int]]) -> tuple[tuple[int, int], ...]:
        return tuple((shot, picture) for shot, pictures in enumerate(per_shot) for picture in pictures)

    assert context_picks([81] * finished, 6, "spread") == flat(spread)
    assert context_picks([81] * finished, 6, "last") == flat(last or spread)


def test_context_picks_round_halves_to_even_and_need_pictures() -> None:
    assert context_picks([6], 3) == ((0, 0), (0, 2), (0, 5))  # 2.5 -> 2
    assert context_picks([8], 3) == ((0, 0), (0, 4), (0, 7))  # 3.5 -> 4
    assert context_picks([1], 3) == ((0, 0),) * 3
    assert context_picks([9, 45, 81], 6) == ((0, 0), (0, 8), (1, 0), (1, 44), (2, 0), (2, 80))
    assert context_picks([]) == ()
    with pytest.raises(ValueError, match="0 pictures"):
        context_picks([0])


def test_phase_is_the_released_float32_product() -> None:
    phases = [DualBuffer().phase(flag) for flag in range(6)]
    expected = [0.0, 0.16666667163, 0.33333334327, 0.5, 0.66666668653, 0.83333337307]
    assert phases == pytest.approx(expected, abs=5e-12)
    assert phases[5] != 5 / 6 and phases[1].hex() == "0x1.5555560000000p-3"
    assert DualBuffer(turn=0.0).phase(5) == 0.0


@pytest.mark.parametrize("finished", [0, 3, 6, 7, 19, 100])
def test_with_a_highest_phase_late_shots_look_like_the_seventh(finished: int) -> None:
    """Only differences of phases are kept, which is all that attention sees."""
    whole, low = shot(DualBuffer(), finished), shot(DualBuffer(highest=6), finished)
    if finished <= 6:
        assert low == whole
        return
    turns = [[round(6 * key[3]) for key in calls[1]["keys"]] for calls in (whole, low)]
    assert turns[1] == [turn - (finished - 6) for turn in turns[0]]
    assert (min(turns[1]), max(turns[1])) == (0, 6)
    assert {q[1] for q in low[1]["queries"]} == {DualBuffer().phase(6)}


def shot(policy: DualBuffer, finished: int) -> list[dict[str, Any]]:
    return Driver(policy, NoiseSchedule(), shots=[81] * finished).run(2)


def test_empty_first_shot_has_no_context_but_the_same_positions() -> None:
    policy = DualBuffer(first_shot="empty")
    calls = shot(policy, 0)
    assert [call["call"] for call in calls] == ["denoise", "commit"] * 2
    assert calls[0]["queries"] == [[6, 0.0], [7, 0.0], [8, 0.0]]
    assert [key[:3] for key in calls[2]["keys"]] == [
        *[["mem", i, 6 + i] for i in range(3)],
        *[["new", i, 9 + i] for i in range(3)],
    ]
    for finished in range(1, 9):  # later shots do not differ
        assert shot(policy, finished) == shot(DualBuffer(), finished)
        assert shot(policy, finished)[1]["queries"][0] == [6, DualBuffer().phase(finished)]


def test_phase_off_and_new_text_inside_a_shot() -> None:
    assert all(q[1] == 0 for call in shot(DualBuffer(turn=0.0), 4) for q in call["queries"])
    calls = Driver(DualBuffer(), NoiseSchedule(), {1: "switch"}, [81]).run(2)
    assert [call["call"] for call in calls] == ["prefill", "denoise", "commit", "denoise", "commit"]
    assert calls[-1]["text"] == [2, 2, 2] and calls[-1]["keys"][6][4] == 1


# ----------------------------------------------------------------------------------------- the noise schedule


def test_timesteps_are_the_released_float32_values() -> None:
    assert [t.hex() for t in SCHEDULES["shotstream"].timesteps()] == [
        float.fromhex(h).hex() for h in ("0x1.f4p+9", "0x1.def6e2p+9", "0x1.bc71c8p+9", "0x1.70cb58p+9")
    ]
    assert SCHEDULES["shotstream"].sigmas() == (1.0, 0.9579287767410278, 0.8888888955116272, 0.73758864402771)
    assert SCHEDULES["self-forcing"].timesteps() == pytest.approx([1000, 937.5, 833.333, 625], abs=5e-4)
    rolling = [1000, 952.381, 882.353, 769.231, 555.556]
    assert SCHEDULES["rolling-forcing"].timesteps() == pytest.approx(rolling, abs=5e-4)
    assert SCHEDULES["causvid"].timesteps() == (1000, 757, 522)
    assert SCHEDULES["causvid"].sigmas() == pytest.approx([1, 0.756757, 0.521739], abs=5e-7)


def test_the_table_is_torch_s_float32_arithmetic() -> None:
    torch = pytest.importorskip("torch")
    for shift in (5.0, 8.0):
        u = torch.linspace(1, 0, 1001)[:-1]
        sigmas = shift * u / (1 + (shift - 1) * u)
        every = NoiseSchedule(tuple(range(1000, 0, -1)), shift)
        assert every.sigmas() == tuple(sigmas.tolist())
        assert every.timesteps() == tuple((1000 * sigmas).tolist())


def test_sequential_windows() -> None:
    assert list(NoiseSchedule((1000, 500)).windows(2)) == [
        Window((0,), (0,)),
        Window((0,), (1,)),
        Window((1,), (0,)),
        Window((1,), (1,)),
    ]


@pytest.mark.parametrize("chunks", [1, 2, 5, 12])
@pytest.mark.parametrize("joint", [False, True])
def test_every_chunk_visits_every_level_once_in_order(chunks: int, joint: bool) -> None:
    depth = 5
    schedule = replace(SCHEDULES["rolling-forcing"], joint=joint)
    windows = list(schedule.windows(chunks))
    assert len(windows) == (chunks + depth - 1 if joint else chunks * depth)
    for chunk in range(chunks):
        visits = [level for w in windows for c, level in zip(w.chunks, w.levels, strict=True) if c == chunk]
        assert visits == list(range(depth))
    left = [w.chunks[0] for w in windows if w.levels[0] == depth - 1]
    assert left == list(range(chunks))
    assert all(b - a == 1 for w in windows for a, b in pairwise(w.chunks))


@pytest.mark.parametrize("steps", [(), (500, 750), (1000, 1000), (1001, 500), (1000, 0)])
def test_bad_steps_are_refused(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must fall strictly"):
        NoiseSchedule(steps)


# -------------------------------------------------------------------------------------------------- the house


FOLDER = Path(plan.__file__).parent


@pytest.mark.parametrize(
    "path", ["plan.py", "schedule.py", *(f"policies/{p.name}" for p in sorted(FOLDER.glob("policies/*.py")))]
)
def test_decisions_need_only_the_standard_library(path: str) -> None:
    allowed = {"collections", "dataclasses", "difflib", "functools", "struct", "typing"}
    for node in ast.walk(ast.parse((FOLDER / path).read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] in allowed or name.startswith("shotstream.memory."), f"{path}: {name}"


def test_policies_are_values() -> None:
    for name, policy in POLICIES.items():
        assert hash(policy) == hash(replace(policy)) and policy == replace(policy), name
