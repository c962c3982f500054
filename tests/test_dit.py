"""The DiT: the released numbers through the real memory, the parameter names, and diffusers' numbers."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import fill, uniform
from torch import Tensor

from shotstream.config import PRESETS, DiTConfig
from shotstream.memory.plan import Call, Frame
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.memory.store import BoundMemory, FrameStore
from shotstream.models.attention import BlockCausal, attention, block_causal
from shotstream.models.dit import DiT, Text, diffusers_names, velocity_from_x0
from shotstream.models.rope import places, rotation
from shotstream.rollout import Prompts

GOLDEN = np.load(Path(__file__).parent / "golden" / "dit.npz")
CONFIG = DiTConfig(dim=256, ffn_dim=512, heads=2, layers=2, text_dim=32, freq_dim=256)
GRID = (2, 3)  # tokens of a latent frame of 4 x 6
TIMESTEPS = (1000.0, 957.9287719726562, 888.888916015625, 737.588623046875)
POLICY = DualBuffer(limit=None)
FINISHED = (81, 81)  # pictures of the finished shots: context flags 0, 0, 0, 1, 1, 1 and target flag 2


def latents(key: int, frames: int) -> Tensor:
    """A golden input, which has channels before latent frames, in our order."""
    return uniform(key, (1, 16, frames, 4, 6)).transpose(1, 2)


CONTEXT, NOISY, CLEAN = latents(1001, 6), latents(1002, 9), latents(1003, 9)
STATES = uniform(1000, (3, 16, 32))


def difference(ours: Tensor, name: str) -> float:
    golden = GOLDEN[name]
    golden = golden.swapaxes(1, 2) if golden.ndim == 5 else golden
    assert ours.shape == golden.shape
    return float(np.abs(ours.double().numpy() - golden).max())


def make(dtype: torch.dtype = torch.float64) -> DiT:
    dit = DiT(CONFIG)
    fill(dit)
    return dit.to(dtype).requires_grad_(False)


@pytest.fixture(scope="module")
def dit() -> DiT:
    return make()


# -- without a memory: teacher, critic, causal initialisation


def one_pass(dit, latents, timesteps, flags, index, mask=None, turn=1 / 6):
    """All latent frames at once, at positions 0, 1, ...; `flags` give the phases, `index` the prompts."""
    phase = DualBuffer(turn=turn).phase
    where = places(range(latents.shape[1]), [phase(flag) for flag in flags])
    table = rotation(where, *GRID, dit.config.head_dim, dit.device, dit.dtype)
    text = dit.read(STATES, torch.tensor([index]))
    return dit(latents.to(dit.dtype), torch.tensor([timesteps]), text, table, mask=mask)


FLAGS = [0, 0, 0, 1, 1, 1] + [2] * 9


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 2e-6), (torch.float32, 5e-5)])
def test_teacher(dtype, tolerance):
    dit = make(dtype)
    sequence = torch.cat((CONTEXT, NOISY), dim=1)
    velocity = one_pass(dit, sequence, [500.0] * 15, FLAGS, FLAGS)
    assert difference(velocity, "teacher_velocity_t500") < tolerance


def test_teacher_with_one_prompt(dit):
    sequence = torch.cat((CONTEXT, NOISY), dim=1)
    velocity = one_pass(dit, sequence, [500.0] * 15, FLAGS, [0] * 15)
    assert difference(velocity, "teacher_velocity_one_prompt") < 2e-6


def test_teacher_without_phase_is_plain_wan(dit):
    velocity = one_pass(dit, NOISY, [500.0] * 9, [2] * 9, [0] * 9, turn=0)
    assert difference(velocity, "teacher_velocity_no_phase") < 2e-6


@pytest.mark.parametrize("context", [0, 2])
def test_blocks_look_where_a_dense_mask_would_let_them(context):
    mask = block_causal(context, 3, 3, 2)
    tags = torch.tensor([0] * context + [1] * 3 + [2] * 3 + [3] * 3).repeat_interleave(2)
    q, k, v = (torch.randn(2, len(tags), 2, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    dense = attention(q, k, v, tags[:, None] >= tags[None, :])
    assert torch.allclose(attention(q, k, v, mask), dense, atol=1e-6)
    assert not torch.allclose(attention(q, k, v), dense, atol=1e-2)
    assert mask.after(context * 2) == block_causal(0, 3, 3, 2) == BlockCausal((6, 12, 18))


def test_block_causal_pass(dit):
    mask = block_causal(6, 3, 3, GRID[0] * GRID[1])
    timesteps = [0.0] * 6 + [TIMESTEPS[0]] * 3 + [TIMESTEPS[1]] * 3 + [0.0] * 3
    sequence = torch.cat((CONTEXT, NOISY), dim=1)
    velocity = one_pass(dit, sequence, timesteps, FLAGS, FLAGS, mask=mask)
    assert difference(velocity, "block_causal_velocity") < 2e-6


# -- with the memory: student


@dataclass
class Stream:
    """The student on the real policy, store and prompts, one call at a time."""

    dit: DiT
    store: FrameStore = field(default_factory=lambda: FrameStore(CONFIG.layers, *GRID))
    memory: tuple[Frame, ...] = ()

    def bind(self, kind: str, new: tuple[Frame, ...], write: bool) -> BoundMemory:
        return self.store.bind(POLICY.plan(Call(kind, self.memory, new)), new, write)

    def call(self, kind: str, new: tuple[Frame, ...], latents: Tensor, timestep: float) -> Tensor:
        bound = self.bind(kind, new, write=kind != "denoise")
        prompts = Prompts(self.dit)
        for number in {frame.prompt for frame in new}:
            prompts.add(number, STATES[number : number + 1])
        table = bound.rotation(bound.plan.queries, CONFIG.head_dim, self.dit.patch_embedding.weight)
        timesteps = torch.full((1, len(new)), timestep)
        text = prompts.text([frame.prompt for frame in new])
        return self.dit(latents.to(self.dit.dtype), timesteps, text, table, bound)

    def cut(self, shots: tuple[int, ...], context: Tensor) -> Tensor:
        """Start a shot after finished ones; the velocity of the prefill."""
        boundary = POLICY.boundary(self.memory, chunk(0, len(shots)), True, shots)
        self.memory = boundary.memory
        velocity = self.call("prefill", boundary.prefill, context, 0.0)
        self.memory = boundary.prefill
        return velocity

    def commit(self, new: tuple[Frame, ...], latents: Tensor) -> Tensor:
        velocity = self.call("commit", new, latents, 0.0)
        self.memory = POLICY.settle(self.memory, new).memory
        return velocity

    def stored(self, layer: int) -> tuple[Tensor, Tensor]:
        """Everything a next chunk would read of the store, keys rotated."""
        own = torch.zeros(1, 3 * GRID[0] * GRID[1], CONFIG.heads, CONFIG.head_dim, dtype=self.dit.dtype)
        k, v = self.bind("denoise", chunk(3, 2), write=False).extend(layer, own, own)
        return k[:, : -own.shape[1]], v[:, : -own.shape[1]]


def chunk(number: int, shot: int) -> tuple[Frame, ...]:
    frames = range(3 * number, 3 * number + 3)
    return tuple(Frame(100 + offset, shot, offset, prompt=shot) for offset in frames)


@pytest.mark.parametrize(
    ("dtype", "velocity_tolerance", "memory_tolerance"),
    [(torch.float64, 2e-6, 5e-6), (torch.float32, 5e-5, 5e-5)],
)
def test_a_shot_of_three_chunks(dtype, velocity_tolerance, memory_tolerance):
    stream = Stream(make(dtype))
    assert difference(stream.cut(FINISHED, CONTEXT), "prefill_velocity") < velocity_tolerance
    assert difference(stream.stored(0)[0], "context_keys_layer0") < memory_tolerance
    assert difference(stream.stored(1)[1], "context_values_layer1") < memory_tolerance
    for number in range(3):
        new, part = chunk(number, 2), slice(3 * number, 3 * number + 3)
        noisy = stream.call("denoise", new, NOISY[:, part], TIMESTEPS[number])
        assert difference(noisy, f"chunk{number}_velocity_step{number}") < velocity_tolerance
        commit = stream.commit(new, CLEAN[:, part])
        assert difference(commit, f"chunk{number}_velocity_commit") < velocity_tolerance
    local = stream.stored(1)[0][:, 6 * GRID[0] * GRID[1] :]
    assert difference(local, "local_keys_layer1") < memory_tolerance


def test_the_first_shot_reads_zero_context_and_has_flag_one(dit):
    stream = Stream(dit)
    stream.cut((), torch.zeros_like(CONTEXT))
    velocity = stream.call("denoise", chunk(0, 0), NOISY[:, :3], TIMESTEPS[0])
    assert difference(velocity, "first_shot_chunk0_velocity_step0") < 2e-6


# -- parameters


def expected_names(layers: int) -> set[str]:
    """Wan's names (method.md 4.3)."""
    linears = [
        "patch_embedding",
        *("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
        *("time_projection.1", "head.head"),
    ]
    names = {"head.modulation"}
    for i in range(layers):
        for kind in ("self_attn", "cross_attn"):
            linears += [f"blocks.{i}.{kind}.{part}" for part in "qkvo"]
            names |= {f"blocks.{i}.{kind}.norm_{part}.weight" for part in "qk"}
        linears += [f"blocks.{i}.{part}" for part in ("norm3", "ffn.0", "ffn.2")]
        names.add(f"blocks.{i}.modulation")
    return names | {f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")}


def test_the_parameters_of_wan_1_3b():
    with torch.device("meta"):
        state = DiT(PRESETS["wan-1.3b"].dit).state_dict()
    assert len(state) == 825
    assert set(state) == expected_names(30)
    assert sum(value.numel() for value in state.values()) == 1_418_996_800
    assert state["patch_embedding.weight"].shape == (1536, 16, 1, 2, 2)
    assert state["time_projection.1.weight"].shape == (9216, 1536)
    assert state["blocks.29.ffn.0.weight"].shape == (8960, 1536)
    assert state["head.head.weight"].shape == (64, 1536)


# -- diffusers


def test_parity_with_diffusers(dit):
    """Plain Wan with diffusers' own random weights, one prompt and timestep a sample."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=64,
        text_dim=32,
        freq_dim=256,
        ffn_dim=192,
        num_layers=3,
    ).requires_grad_(False)
    names = diffusers_names(3)
    weights = {name: value for name, value in theirs.state_dict().items() if "rope" not in name}
    assert set(names.values()) == set(weights)
    for j, name in enumerate(sorted(weights)):  # norms and biases differ from 1 and 0
        weights[name].copy_(weights[name] + 0.05 * uniform(5000 + j, weights[name].shape))
    ours = DiT(DiTConfig(dim=128, ffn_dim=192, heads=2, layers=3, text_dim=32)).requires_grad_(False)
    ours.load_state_dict({name: weights[other] for name, other in names.items()}, strict=True)

    x, states = uniform(1, (2, 3, 16, 4, 6)).float(), uniform(2, (2, 16, 32)).float()
    timesteps = torch.tensor([957.92877, 500.0])
    expected = theirs(x.transpose(1, 2), timesteps, states, return_dict=False)[0].transpose(1, 2)
    table = rotation(places(range(3), [0.0] * 3), 2, 3, 64, x.device, x.dtype)
    text = ours.read(states, torch.tensor([[0] * 3, [1] * 3]))
    velocity = ours(x, timesteps[:, None].expand(2, 3), text, table)
    assert expected.std() > 0.1
    assert torch.allclose(velocity, expected, atol=2e-5)


def test_diffusers_names_at_full_size():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, text_dim=4096, ffn_dim=8960, num_layers=30
        )
        ours = DiT(PRESETS["wan-1.3b"].dit).state_dict()
    shapes = {name: value.shape for name, value in theirs.named_parameters()}
    names = diffusers_names(30)
    assert set(names) == set(ours)
    assert {other: ours[name].shape for name, other in names.items()} == shapes


# -- attention


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_softmax_attention(masked):
    """Also where a row may look at nothing: its value is not read, but must be a number."""
    q, k, v = (uniform(key, (2, length, 3, 16)) for key, length in ((1, 6), (2, 9), (3, 9)))
    mask = torch.rand(2, 1, 6, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    mask[1, 0, 2] = False
    scores = torch.einsum("blnd,bsnd->bnls", q, k) / 4
    if masked:
        scores = scores.masked_fill(~mask, -1e30)
    plain = torch.einsum("bnls,bsnd->blnd", scores.softmax(-1), v)
    ours = attention(q, k, v, mask if masked else None)
    assert ours.isfinite().all()
    readable = mask.any(-1)[:, 0] if masked else torch.ones(2, 6, dtype=torch.bool)
    assert torch.allclose(ours[readable], plain[readable], atol=1e-14)


# -- what the network promises beside numbers


def test_kept_text_is_the_text_read_again(dit):
    """Prompts projected one by one are the prompts projected together: they may be kept across shots."""
    together = dit.read(STATES, torch.tensor([[0, 2]]))
    prompts = Prompts(dit)
    for number in (2, 0):
        prompts.add(number, STATES[number : number + 1])
    kept = prompts.text([0, 2])
    for layer in range(CONFIG.layers):
        for ours, whole in ((kept.keys, together.keys), (kept.values, together.values)):
            assert torch.allclose(ours[layer][kept.index[0]], whole[layer][[0, 2]], atol=1e-14)


def test_one_prompt_for_all_takes_the_short_way_to_the_same_numbers(dit):
    """A single prompt is attended by all frames at once; the general way gives the same."""
    single = dit.read(STATES[:1], torch.zeros(1, 3, dtype=torch.long))
    twice = Text(
        tuple(torch.cat((k, k)) for k in single.keys),
        tuple(torch.cat((v, v)) for v in single.values),
        torch.tensor([[0, 1, 0]]),
    )
    table = rotation(places(range(3), [0.0] * 3), *GRID, CONFIG.head_dim, dit.device, dit.dtype)
    timesteps = torch.full((1, 3), 500.0)
    short, general = (dit(NOISY[:, :3], timesteps, text, table) for text in (single, twice))
    assert torch.allclose(short, general, atol=1e-13)


def test_samples_of_a_batch_are_independent(dit):
    table = rotation(places(range(3), [0.0] * 3), *GRID, CONFIG.head_dim, dit.device, dit.dtype)
    x = torch.cat((NOISY[:, :3], CLEAN[:, :3]))
    timesteps = torch.tensor([[1000.0] * 3, [500.0, 0.0, 250.0]])
    index = torch.tensor([[0, 1, 1], [2, 2, 0]])
    both = dit(x, timesteps, dit.read(STATES, index), table)
    for i in range(2):
        alone = dit(x[i : i + 1], timesteps[i : i + 1], dit.read(STATES, index[i : i + 1]), table)
        assert torch.allclose(both[i : i + 1], alone, atol=1e-13)


def test_a_wrong_number_of_timesteps_is_refused(dit):
    table = rotation(places(range(3), [0.0] * 3), *GRID, CONFIG.head_dim, dit.device, dit.dtype)
    text = dit.read(STATES, torch.zeros(1, 3, dtype=torch.long))
    with pytest.raises(AssertionError, match=r"timesteps \(1, 1\) for 1 x 3 frames"):
        dit(NOISY[:, :3], torch.tensor([[500.0]]), text, table)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_level_gives_the_bits_of_its_timesteps(dtype):
    """What a noise level tells the network may be computed once and kept (class E0)."""
    dit = make(dtype)
    table = rotation(places(range(3), [0.0] * 3), *GRID, CONFIG.head_dim, dit.device, dit.dtype)
    text = dit.read(STATES, torch.zeros(1, 3, dtype=torch.long))
    timesteps, other = torch.tensor([[957.9, 0.0, 500.0]]), torch.tensor([[957.9, 0.0, 501.0]])
    x, level = NOISY[:, :3].to(dtype), dit.level(timesteps)
    assert torch.equal(dit(x, level, text, table), dit(x, timesteps, text, table))
    assert not torch.equal(dit(x, level, text, table), dit(x, other, text, table))


def test_a_silent_pass_leaves_the_same_in_memory_and_computes_less(dit):
    """Nobody reads the velocity of a prefill: its last block ends with keys and values (class E0)."""
    stores, answered = [], []
    hook = dit.blocks[-1].ffn.register_forward_hook(lambda *_: answered.append(True))
    table = rotation(places(range(3), [0.0] * 3), *GRID, CONFIG.head_dim, dit.device, dit.dtype)
    text, new = dit.read(STATES, torch.zeros(1, 3, dtype=torch.long)), chunk(0, 0)
    for silent in (False, True):
        store = FrameStore(CONFIG.layers, *GRID)
        bound = store.bind(POLICY.plan(Call("commit", (), new)), new, write=True, silent=silent)
        velocity = dit(CLEAN[:, :3], torch.zeros(1, 3), text, table, bound)
        assert velocity.shape[1] == (0 if silent else 3)
        stores.append(store)
    hook.remove()
    assert answered == [True]
    for frame in new:
        for loud, quiet in zip(*(store.kept[frame] for store in stores), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(loud, quiet, strict=True))


def test_an_x0_head_gives_the_velocity_of_its_clean_estimate():
    x0, noise = CLEAN[:, :3], NOISY[:, :3]
    sigma = torch.tensor([[1.0, 0.5, 0.1]]).double()
    spread = sigma[:, :, None, None, None]
    velocity = velocity_from_x0((1 - spread) * x0 + spread * noise, x0, 1000 * sigma)
    assert torch.allclose(velocity, noise - x0, atol=1e-12)
    assert velocity_from_x0(x0.bfloat16(), x0.bfloat16(), 0 * sigma).isfinite().all()
