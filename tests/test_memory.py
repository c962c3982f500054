"""The store and the rollout: chunk by chunk with memory is one block-causal pass, and the sampler's laws."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from golden_weights import sharpen, uniform
from torch import Tensor

from shotstream.config import DiTConfig
from shotstream.flow import add_noise, to_x0
from shotstream.memory.plan import Call, Frame, MemoryPolicy, Place, Plan, Slots
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.memory.schedule import SCHEDULES, NoiseSchedule
from shotstream.memory.store import FrameStore
from shotstream.models.dit import DiT
from shotstream.models.rope import angles, places, rotate, rotation, tables
from shotstream.rollout import Noise, Prompts, Roll, SeededNoise, denoise_chunk, new_memory

CONFIG = DiTConfig(dim=64, ffn_dim=128, heads=2, layers=2, text_dim=16, freq_dim=32, channels=4)
SHAPE = (4, 4, 6)  # c h w of a latent frame; height and width differ
GRID = (2, 3)
TOKENS = 6
STEPS = NoiseSchedule(steps=(1000, 740, 260), shift=8.0)
BATCH = 2


STORYBOOK = replace(CONFIG, prediction="x0", absolute=True)


def random_network(config: DiTConfig) -> DiT:
    """Random weights with which attention is far from uniform, so that a wrong key or place is seen."""
    dit = DiT(config)
    sharpen(dit)
    return dit.requires_grad_(False)


@pytest.fixture(scope="module")
def dit() -> DiT:
    return random_network(CONFIG)


def text_states(prompt: int) -> Tensor:
    """Text of a prompt: each sample of the batch has its own."""
    return uniform(100 + prompt, (BATCH, 5, 16))


def context_latents(frames: Sequence[Frame]) -> Tensor:
    """Stills as the session would hand them over: a function of (shot, picture); zero where there is none."""
    stills = [
        torch.zeros(BATCH, *SHAPE).double()
        if frame.offset < 0
        else uniform(1000 + 100 * frame.shot + frame.offset, (BATCH, *SHAPE))
        for frame in frames
    ]
    return torch.stack(stills, dim=1)


def make_roll(dit: DiT, policy: MemoryPolicy, shots: tuple[int, ...] = ()) -> Roll:
    prompts = Prompts(dit)
    for prompt in range(len(shots) + 1):
        prompts.add(prompt, text_states(prompt))
    memory = new_memory(dit, SHAPE)
    memory.shots = shots
    return Roll(dit, policy, STEPS, memory, prompts, SHAPE)


def roll_shot(roll: Roll, chunks: int, seed: int = 0, **options: int) -> list[Tensor]:
    shot = len(roll.memory.shots)
    return list(roll.shot(shot, chunks, SeededNoise(seed, shot), context_latents, BATCH, **options))


@dataclass
class Recorder:
    """Writes down every call of a network: its latents, timestep and velocity."""

    calls: list[tuple[Tensor, float, Tensor]] = field(default_factory=list)

    def __call__(self, dit: DiT, inputs: tuple[Tensor, ...], velocity: Tensor) -> None:
        self.calls.append((inputs[0], float(inputs[1][0, 0]), velocity))


def recorded(dit: DiT, make: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[tuple[Tensor, float, Tensor]]]:
    recorder = Recorder()
    hook = dit.register_forward_hook(recorder)
    try:
        return make(), recorder.calls
    finally:
        hook.remove()


# -- law 1: with memory = without


def one_pass(
    dit: DiT,
    parts: Sequence[Tensor],
    timesteps: Sequence[float],
    tags: Sequence[tuple[str, int]],
    spots: Sequence[tuple[list[float], list[float], list[int]]],
    see: Callable[[tuple[str, int], tuple[str, int]], bool],
) -> tuple[Tensor, ...]:
    """Velocities of `parts` in one pass without memory.

    `spots`: positions, phases and prompts of each part's frames; `see(query, key)`: whether a tag may look.
    """
    sizes = [part.shape[1] for part in parts]
    positions, phases, prompts = ([value for spot in spots for value in spot[i]] for i in range(3))
    distinct = sorted(set(prompts))
    rows = torch.tensor([[distinct.index(p) * BATCH + sample for p in prompts] for sample in range(BATCH)])
    text = dit.read(torch.cat([text_states(p) for p in distinct]), rows)
    own = [tag for tag, size in zip(tags, sizes, strict=True) for _ in range(size * TOKENS)]
    mask = torch.tensor([[see(query, key) for key in own] for query in own])
    table = rotation(places(positions, phases), *GRID, CONFIG.head_dim, dit.device, dit.dtype)
    times = torch.cat([torch.full((BATCH, n), t) for n, t in zip(sizes, timesteps, strict=True)], dim=1)
    return dit(torch.cat(list(parts), dim=1), times, text, table, mask=mask).split(sizes, dim=1)


def block_causal(query: tuple[str, int], key: tuple[str, int]) -> bool:
    """Clean chunks see clean chunks up to themselves; a noisy chunk sees earlier clean ones and itself."""
    if key[0] == "clean":
        return key[1] <= query[1] if query[0] == "clean" else key[1] < query[1]
    return query == key


CASES = {
    "third shot": ((9, 21), DualBuffer(limit=None)),
    "fourth shot, uneven": ((81, 9, 21, 33), DualBuffer(limit=None)),
    "first shot, zeros": ((), DualBuffer(limit=None)),
    "first shot, empty": ((), DualBuffer(limit=None, first_shot="empty")),
    "no phase": ((9,), DualBuffer(limit=None, turn=0)),
    "paper's remainder": ((9, 9, 9, 9), DualBuffer(limit=None, remainder="last")),
}


@pytest.mark.parametrize("config", [CONFIG, STORYBOOK], ids=["wan", "storybook"])
@pytest.mark.parametrize("case", CASES)
def test_chunk_by_chunk_with_memory_is_one_block_causal_pass(config, case):
    """Every call of a real rollout, the prefill and the commits too, from one masked pass per noise level."""
    dit = random_network(config)
    shots, policy = CASES[case]
    roll, number, chunks = make_roll(dit, policy, shots), len(shots), 3
    clean, calls = recorded(dit, lambda: roll_shot(roll, chunks))
    picks = policy.boundary((), (), True, shots).prefill

    context_flags = [frame.shot for frame in picks]
    flag = context_flags[-1] + 1 if picks else number
    context = ([float(j) for j in range(len(picks))], [policy.phase(f) for f in context_flags], context_flags)
    phases, prompts = [policy.phase(flag)] * 3, [number] * 3
    local = [([6.0 + 3 * b + i for i in range(3)], phases, prompts) for b in range(chunks)]
    parts, spots, tags = list(clean), list(local), [("clean", b + 1) for b in range(chunks)]
    if picks:
        parts, spots, tags = [context_latents(picks), *parts], [context, *spots], [("clean", 0), *tags]

    per_chunk = len(STEPS.steps) + 1  # each level once, then the commit
    prefill = calls[: 1 if picks else 0]
    calls = calls[len(prefill) :]
    assert len(calls) == per_chunk * chunks - 1  # nobody reads the last commit
    for level, timestep in enumerate(STEPS.timesteps()):
        noisy = [calls[per_chunk * b + level] for b in range(chunks)]
        assert all(call[1] == timestep for call in noisy)
        velocities = one_pass(
            dit,
            [*parts, *(call[0] for call in noisy)],
            [0.0] * len(parts) + [timestep] * chunks,
            [*tags, *(("noisy", b + 1) for b in range(chunks))],
            [*spots, *local],
            block_causal,
        )
        for call, expected in zip(noisy, velocities[len(parts) :], strict=True):
            assert torch.allclose(call[2], expected, atol=1e-10)
    commits = [calls[per_chunk * b + per_chunk - 1] for b in range(chunks - 1)]
    for (latents, timestep, velocity), part in zip([*prefill, *commits], parts, strict=False):
        assert timestep == 0
        assert torch.equal(latents, part)
        assert velocity.shape[1] == 0  # nobody asks for it; its keys and values are what noisy chunks read above


def test_law_1_can_see_a_mistake(dit):
    """The weights of these tests make a wrong place, phase, prompt or forgotten frame visible."""
    policy, shots = DualBuffer(limit=None), (9, 21)
    right = roll_shot(make_roll(dit, policy, shots), 2)[1]

    @dataclass(frozen=True)
    class Mutant(DualBuffer):
        kind: str = ""

        def plan(self, call: Call) -> Plan:
            plan = super().plan(call)
            if self.kind == "position":
                queries = tuple(replace(place, pos=place.pos - 6) for place in plan.queries)
                return Plan(queries, plan.keys)
            if self.kind == "phase":
                keys = tuple(replace(place, phase=0.0) for place in plan.keys)
                return Plan(plan.queries, keys)
            keys = plan.keys if call.kind == "prefill" else plan.keys[1:]
            return Plan(plan.queries, keys)

    for kind in ("position", "phase", "forgotten"):
        mutant = Mutant(limit=None, kind=kind)
        assert (roll_shot(make_roll(dit, mutant, shots), 2)[1] - right).abs().max() > 1e-2, kind
    for change in ({"turn": 0.0}, {"remainder": "last"}, {"first_shot": "empty"}):
        history = () if "first_shot" in change else (9, 21, 9, 9)
        ours, theirs = (roll_shot(make_roll(dit, p, history), 1)[0] for p in (policy, replace(policy, **change)))
        assert (ours - theirs).abs().max() > 1e-2


def test_a_window_forgets_and_slots_follow(dit):
    """A policy with a window and a sink: the last chunk computed by hand from the frames it may read."""
    roll = make_roll(dit, Slots(window=7, sink=1))
    clean, calls = recorded(dit, lambda: roll_shot(roll, 4))
    assert [frame.index for frame in roll.memory.frames] == [0, 6, 7, 8]
    assert set(roll.memory.store.kept) == set(roll.memory.frames)
    assert len(calls) == 4 * (len(STEPS.steps) + 1) - 1
    latents, _, velocity = calls[-1]
    store = roll.memory.store
    k, v = ([store.kept[frame][1][i] for frame in roll.memory.frames] for i in range(2))
    bound = store.bind(roll.policy.plan(Call("denoise", roll.memory.frames, new_frames(9))), new_frames(9))
    own = torch.zeros(BATCH, 18, 2, 32).double()
    keys, values = bound.extend(1, own, own)
    slots = rotation(places(range(4), [0.0] * 4), *GRID, 32, dit.device, dit.dtype)
    assert torch.equal(keys[:, :24], rotate(torch.cat(k, dim=1), slots))
    assert torch.equal(values[:, :24], torch.cat(v, dim=1))
    assert torch.allclose(to_x0(latents, velocity, torch.tensor(STEPS.sigmas()[-1])), clean[-1], atol=1e-14)


def new_frames(first: int, count: int = 3) -> tuple[Frame, ...]:
    return tuple(Frame(first + i, 0, first + i) for i in range(count))


# -- the store


def kv(key: int, frames: int) -> tuple[Tensor, Tensor]:
    return uniform(key, (1, frames * TOKENS, 2, 32)), uniform(key + 1, (1, frames * TOKENS, 2, 32))


def filled_store(frames: tuple[Frame, ...]) -> FrameStore:
    store = FrameStore(2, *GRID)
    plan = MemoryPolicy(limit=None).plan(Call("commit", (), frames))
    bound = store.bind(plan, frames, write=True)
    for layer in range(2):
        bound.extend(layer, *kv(10 * layer, len(frames)))
    return store


def test_what_is_kept_is_not_rotated():
    frames = new_frames(0)
    store = filled_store(frames)
    for layer in range(2):
        k, v = kv(10 * layer, 3)
        for i, frame in enumerate(frames):
            part = slice(i * TOKENS, (i + 1) * TOKENS)
            assert torch.equal(store.kept[frame][layer][0], k[:, part])
            assert torch.equal(store.kept[frame][layer][1], v[:, part])


def test_reading_follows_the_plan_order_and_places():
    """Stored frames come first, in plan order, rotated to where the plan puts them; own frames last."""
    frames, new = new_frames(0), new_frames(3, 1)
    store = filled_store(frames)
    keys = (Place(frames[2], 7, 0.5), Place(frames[0], -1), Place(new[0], 4, 0.25))
    k, v = kv(50, 1)
    bound = store.bind(Plan(keys[2:], keys), new)
    read_k, read_v = bound.extend(1, k, v)
    pieces = [store.kept[frames[2]][1], store.kept[frames[0]][1], (k, v)]
    table = tables(angles(torch.tensor([7.0, -1.0, 4.0]), torch.tensor([0.5, 0.0, 0.25]), *GRID, 32), k.device, k.dtype)
    assert torch.allclose(read_k, rotate(torch.cat([piece[0] for piece in pieces], dim=1), table), atol=1e-15)
    assert torch.equal(read_v, torch.cat([piece[1] for piece in pieces], dim=1))
    assert set(store.kept) == set(frames)  # reading writes nothing


def test_queries_that_are_no_keys_stay_out():
    """In a prefill the first frames may only ask: their own keys are neither read nor written."""
    new = new_frames(0)
    store = FrameStore(2, *GRID)
    asked = tuple(Place(frame, frame.index) for frame in new)
    k, v = kv(60, 3)
    bound = store.bind(Plan(asked, asked[1:]), new, write=True)
    assert bound.extend(0, k, v)[1].shape[1] == 2 * TOKENS
    assert torch.equal(bound.extend(1, k, v)[1], v[:, TOKENS:])
    assert set(store.kept) == set(new[1:])


def test_own_keys_come_last():
    frames, new = new_frames(0), new_frames(3)
    store = filled_store(frames)
    keys = tuple(Place(frame, frame.index) for frame in (*new, *frames))
    with pytest.raises(AssertionError, match="after stored keys"):
        store.bind(Plan(keys[:3], keys), new)


def test_a_frame_is_written_once():
    frames = new_frames(0)
    store = filled_store(frames)
    bound = store.bind(MemoryPolicy().plan(Call("commit", (), frames)), frames, write=True)
    with pytest.raises(AssertionError, match="written twice"):
        bound.extend(0, *kv(0, 3))


def test_retain_forgets_and_bytes_count():
    frames = new_frames(0)
    store = filled_store(frames)
    one = 2 * 2 * TOKENS * 2 * 32 * 8  # layers, k and v, tokens, heads, width, float64
    assert store.bytes == 3 * one
    store.retain(frames[1:])
    assert set(store.kept) == set(frames[1:])
    assert store.bytes == 2 * one


def test_blend_mixes_all_layers():
    frames = new_frames(0)
    store = filled_store(frames)
    before = [[t.clone() for t in pair] for pair in store.kept[frames[0]]]
    other = store.kept[frames[1]]
    store.blend(frames[0], frames[1], keep=0.75)
    for layer in range(2):
        for i in range(2):
            expected = 0.75 * before[layer][i] + 0.25 * other[layer][i]
            assert torch.allclose(store.kept[frames[0]][layer][i], expected, atol=1e-15)
    assert torch.equal(store.kept[frames[1]][0][0], kv(0, 3)[0][:, TOKENS : 2 * TOKENS])


def test_a_common_turn_of_all_places_changes_nothing(dit):
    """Attention is relative: positions and phases may all move together."""

    @dataclass(frozen=True)
    class Moved(DualBuffer):
        def plan(self, call: Call) -> Plan:
            plan = super().plan(call)
            moved = [
                tuple(replace(place, pos=place.pos + 11, phase=place.phase + 0.7) for place in side)
                for side in (plan.queries, plan.keys)
            ]
            return Plan(*moved)

    for a, b in zip(
        roll_shot(make_roll(dit, DualBuffer(limit=None), (9, 9)), 2),
        roll_shot(make_roll(dit, Moved(limit=None), (9, 9)), 2),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-11)


# -- law 4: the sampler


def draws(key: int) -> Callable[[int], Tensor]:
    return lambda step: uniform(key + step, (1, 3, *SHAPE))


@pytest.mark.parametrize("schedule", [STEPS, *(s for s in SCHEDULES.values() if not s.joint)])
def test_an_oracle_velocity_returns_x0(schedule):
    """The oracle knows x0 and the noise drawn last: it errs if a step gets another sigma or another draw."""
    x0, noise, asked = uniform(7, (1, 3, *SHAPE)), draws(20), []

    def oracle(x: Tensor, timestep: float) -> Tensor:
        step = len(asked)
        asked.append(timestep)
        expected = add_noise(x0, noise(step), torch.tensor(schedule.sigmas()[step]))
        assert torch.allclose(x, expected, atol=1e-6)
        return noise(step) - x0

    assert torch.allclose(denoise_chunk(oracle, noise, schedule), x0, atol=1e-6)
    assert asked == list(schedule.timesteps())


def test_an_exit_step_returns_its_own_x0():
    noise, sigmas = draws(20), STEPS.sigmas()

    def forward(x: Tensor, timestep: float) -> Tensor:
        return 0.3 * x + timestep / 1000

    x, expected = noise(0), []
    for step, timestep in enumerate(STEPS.timesteps()):
        expected.append(x - sigmas[step] * forward(x, timestep))
        if step + 1 < len(sigmas):
            x = (1 - sigmas[step + 1]) * expected[-1] + sigmas[step + 1] * noise(step + 1)
    for step, x0 in enumerate(expected):
        assert torch.allclose(denoise_chunk(forward, noise, STEPS, exit_step=step), x0, atol=1e-6)
    assert torch.equal(denoise_chunk(forward, noise, STEPS, exit_step=2), denoise_chunk(forward, noise, STEPS))


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_gradients_flow_through_the_exit_step_alone(exit_step):
    gain = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    first = draws(20)(0).requires_grad_()
    steps = []

    def forward(x: Tensor, timestep: float) -> Tensor:
        steps.append(torch.is_grad_enabled())
        return x * gain[len(steps) - 1]

    x0 = denoise_chunk(forward, lambda i: draws(20)(i) if i else first, STEPS, exit_step=exit_step)
    x0.square().sum().backward()
    assert steps == [step == exit_step for step in range(exit_step + 1)]
    assert [bool(g) for g in gain.grad] == [step == exit_step for step in range(3)]
    assert (first.grad is not None) == (exit_step == 0)


def test_no_gradient_without_asking():
    forward = torch.nn.Linear(6, 6).double()
    with torch.no_grad():
        x0 = denoise_chunk(lambda x, t: forward(x), draws(20), STEPS)
    assert not x0.requires_grad


class Leaves:
    """Noise whose first draw of each chunk asks for its gradient."""

    def __init__(self) -> None:
        self.first: dict[int, Tensor] = {}

    def draw(self, chunk: int, step: int, shape: tuple[int, ...]) -> Tensor:
        noise = uniform(500 + 10 * chunk + step, shape)
        if step == 0:
            noise = self.first[chunk] = noise.requires_grad_()
        return noise


def test_no_gradient_through_committed_chunks(dit):
    roll, noise = make_roll(dit, DualBuffer(limit=None), (9,)), Leaves()
    first, second = roll.shot(1, 2, noise, context_latents, BATCH, exit_step=0)
    assert first.requires_grad
    assert second.requires_grad
    assert not any(t.requires_grad for layers in roll.memory.store.kept.values() for kv in layers for t in kv)
    of_first, of_second = torch.autograd.grad(
        second.square().sum(), [noise.first[0], noise.first[1]], allow_unused=True
    )
    assert of_first is None
    assert of_second.abs().max() > 0


def test_training_rolls_what_inference_rolls(dit):
    """With the last step as exit, gradients on or off: the same latents."""
    policy = DualBuffer(limit=None)
    with torch.no_grad():
        plain = roll_shot(make_roll(dit, policy, (9,)), 2)
    learning = roll_shot(make_roll(dit, policy, (9,)), 2, exit_step=len(STEPS.steps) - 1)
    assert all(torch.equal(a, b) for a, b in zip(plain, learning, strict=True))


# -- noise


def test_noise_is_a_function_of_seed_shot_chunk_and_step():
    shape = (1, 3, *SHAPE)
    here = SeededNoise(seed=5, shot=2).draw(1, 3, shape)
    noise = SeededNoise(seed=5, shot=2)
    noise.draw(0, 0, (7,))  # what was drawn before does not matter
    assert torch.equal(noise.draw(1, 3, shape), here)
    others = [
        SeededNoise(6, 2).draw(1, 3, shape),
        SeededNoise(5, 3).draw(1, 3, shape),
        SeededNoise(5, 2).draw(2, 3, shape),
        SeededNoise(5, 2).draw(1, 2, shape),
        SeededNoise(5, 2).draw(3, 1, shape),
        SeededNoise(2, 5).draw(1, 3, shape),
    ]
    for other in others:
        assert abs(torch.corrcoef(torch.stack((here.flatten(), other.flatten())))[0, 1]) < 0.25
    assert here.dtype == torch.float32


def test_noise_is_normal_and_any_integer_is_a_seed():
    for seed in (0, -1, 2**63, 2**64 + 3):
        drawn = SeededNoise(seed, 0).draw(0, 0, (100, 100))
        assert abs(drawn.mean()) < 0.05
        assert abs(drawn.std() - 1) < 0.05


def test_noise_is_the_same_on_every_machine():
    """Known values: a seed of today gives the same story after an update."""
    known = [-0.2933390140533447, 1.703830599784851, 1.5391918420791626]
    assert SeededNoise(7, 0).draw(0, 0, (3,)).tolist() == pytest.approx(known)


def test_a_roll_asks_for_each_draw_once(dit):
    asked = []

    class Counting:
        def draw(self, chunk: int, step: int, shape: tuple[int, ...]) -> Tensor:
            asked.append((chunk, step))
            return SeededNoise(0, 0).draw(chunk, step, shape)

    noise: Noise = Counting()
    list(make_roll(dit, DualBuffer(limit=None)).shot(0, 2, noise, context_latents, BATCH))
    assert asked == [(chunk, step) for chunk in range(2) for step in range(len(STEPS.steps))]


# -- prompts and memory


def test_prompts_forget_all_but_those_retained(dit):
    prompts = make_roll(dit, DualBuffer(), (9, 9, 9)).prompts
    prompts.retain({1, 3})
    assert set(prompts.known) == {1, 3}
    text = prompts.text([3, 1, 1])
    assert text.index.tolist() == [[2, 0, 0], [3, 1, 1]]  # per prompt one row for each sample
    with pytest.raises(KeyError):
        prompts.text([0])


def test_a_shot_leaves_nothing_of_the_shot_before(dit):
    """At a cut the store holds the new context and nothing else; then it grows by a chunk at a time."""
    roll = make_roll(dit, DualBuffer(limit=None), (9,))
    sizes = []
    for shot in (1, 2):
        stream = roll.shot(shot, 3, SeededNoise(0, shot), context_latents, BATCH)
        for _ in stream:
            sizes.append(len(roll.memory.store.kept))
            assert set(roll.memory.store.kept) == set(roll.memory.frames)
        roll.memory.shots += (33,)
        roll.prompts.add(shot + 1, text_states(shot + 1))
    assert sizes == [6, 9, 12] * 2
    assert roll.memory.count == 18


def test_a_cut_that_failed_half_way_can_be_made_again(dit):
    """An interrupted prefill leaves part of its keys behind; the next cut starts from nothing."""
    roll = make_roll(dit, DualBuffer(limit=None), (9,))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = dit.blocks[1].ffn.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        roll_shot(roll, 1)
    hook.remove()
    assert torch.equal(roll_shot(roll, 1)[0], roll_shot(make_roll(dit, DualBuffer(limit=None), (9,)), 1)[0])


def test_a_shot_past_the_limit_is_refused_by_name(dit):
    roll = make_roll(dit, DualBuffer(limit=6))
    with pytest.raises(ValueError, match="DualBuffer stops at 6 latent frames, and this chunk needs 9"):
        roll_shot(roll, 3)
