"""The benchmark: its arithmetic is what torch counts, its probe what happened, its baseline the same story."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from benchmarks.naive import NaiveSession
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from typer.testing import CliRunner

from shotstream.bench import flops
from shotstream.bench.machine import attention_kernel
from shotstream.bench.measurement import captions, deadlines, growth, held_bytes
from shotstream.bench.prediction import H200, predict
from shotstream.bench.probe import Clock, Probe
from shotstream.cli import app
from shotstream.config import PRESETS, DiTConfig, PatchVAEConfig, WanVAEConfig
from shotstream.models.dit import DiT, compile_blocks
from shotstream.models.patch_vae import PatchVAE
from shotstream.models.rope import rotate, rotation
from shotstream.models.vae import VAE, VAEConfig
from shotstream.pipeline import Pipeline, load
from shotstream.session import Session

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load("tiny")


def cpu_attention(q, k, v, *options, out_shape=None, **more) -> int:
    """What the counter lacks: the CPU's kernel."""
    return sdpa_flop_count(q, k, v)


def counted(work) -> float:
    kernels = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=kernels) as counter:
        work()
    return counter.get_total_flops()


# -- the arithmetic


@pytest.mark.parametrize("absolute", [False, True])
def test_a_pass_does_the_arithmetic_of_the_formula(absolute):
    config = DiTConfig(dim=96, ffn_dim=160, heads=3, layers=2, text_dim=40, freq_dim=32, channels=4, absolute=absolute)
    frames, height, width, past, text = 3, 4, 6, 5, 7
    tokens = height * width // 4

    class Remembered:
        silent = False

        def extend(self, layer, k, v):
            old = k.new_zeros(1, past * tokens, *k.shape[2:])
            return torch.cat((old, k), dim=1), torch.cat((old, v), dim=1)

    dit = DiT(config).requires_grad_(False)
    states, index = torch.randn(1, text, 40), torch.zeros(1, frames, dtype=torch.long)
    assert counted(lambda: dit.read(states, index)) == flops.read_prompt(config, text)
    read = dit.read(states, index)
    where = rotation(((0.0, 0.0),) * frames, 2, 3, config.head_dim, CPU, torch.float32)
    latents, times = torch.randn(1, frames, 4, height, width), torch.full((1, frames), 500.0)
    expected = flops.dit_pass(config, frames, tokens, past + frames, text).total
    assert counted(lambda: dit(latents, times, read, where, Remembered())) == expected


def test_the_wan_decoder_and_encoder_do_the_arithmetic_of_the_formula():
    config = WanVAEConfig(base_dim=8, latent_channels=4)
    with torch.device("meta"):
        vae = VAE(VAEConfig(base_dim=8, latent_channels=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4))
    height, width = 4, 6
    latents = torch.empty(1, 1, 4, height, width, device="meta")
    vae.latent_mean, vae.latent_std = vae.latent_mean.to("meta"), vae.latent_std.to("meta")
    _, state = vae.decode(latents)
    assert counted(lambda: vae.decode(latents)) == flops.decode(config, height, width, first=True)
    assert counted(lambda: vae.decode(latents, state)) == flops.decode(config, height, width, first=False)
    still = torch.empty(1, 3, 8 * height, 8 * width, device="meta")
    assert counted(lambda: vae.context_latents(still)) == flops.encode_still(config, height, width)


def test_the_storybook_decoder_and_encoder_do_the_arithmetic_of_the_formula():
    config = PatchVAEConfig(channels=6, patch=8, widths=(12, 8), blocks=2)
    vae = PatchVAE(config).requires_grad_(False)
    latents = torch.randn(1, 1, 6, 4, 5)
    assert counted(lambda: vae.decode(latents)) == flops.decode(config, 4, 5, first=True)
    still = torch.randn(1, 3, 32, 40)
    assert counted(lambda: vae.context_latents(still)) == flops.encode_still(config, 4, 5)


def test_the_storybook_text_encoder_does_the_arithmetic_of_the_formula(pipeline):
    assert counted(lambda: pipeline.text.encode(["a bear"])) == flops.encode_text(pipeline.config.text)


def test_the_published_size_costs_what_was_derived_by_hand():
    """TFLOP of one pass and one shot at 480 x 832 with full context."""
    wan = PRESETS["wan-1.3b"]
    first, last = (flops.dit_pass(wan.dit, 3, 1560, keys, 512) for keys in (9, 27))
    assert [round(first.total / 1e12, 2), round(last.total / 1e12, 2)] == [24.26, 48.48]
    assert round(last.attention / 1e12, 2) == 36.33
    assert [round(flops.decode(wan.vae, 60, 104, first) / 1e12, 2) for first in (True, False)] == [4.35, 13.55]
    assert round(flops.encode_still(wan.vae, 60, 104) / 1e12, 2) == 2.72
    assert round(flops.shot(wan).total / 1e12) == 1610


def test_predictions_follow_from_the_rates():
    wan = PRESETS["wan-1.3b"]
    made = {rates.name: predict(wan, rates) for rates in H200}
    assert made["all arithmetic at 790"].fps == pytest.approx(39.7, abs=0.1)
    assert made["all arithmetic at 790"].dit_fps == pytest.approx(50.3, abs=0.1)
    assert made["as released"].dit_fps == pytest.approx(16.6, abs=0.1)
    faster = predict(wan, replace(H200[2], attention=2 * H200[2].attention))
    assert faster.shot_s < made["fast path"].shot_s
    saved = flops.shot(wan).attention / 2 + flops.dit_pass(wan.dit, 6, 1560, 6, 512).attention / 2
    assert made["fast path"].shot_s - faster.shot_s == pytest.approx(saved / H200[2].attention / 1e12)


# -- the baseline makes the same story


def naive_story(pipeline: Pipeline, shots: int, chunks: int, **options) -> list[torch.Tensor]:
    session = NaiveSession(pipeline, seed=3, **options)
    return [session.shot(caption, chunks).latents for caption in captions(shots)]


def fast_story(pipeline: Pipeline, shots: int, chunks: int) -> list[torch.Tensor]:
    session = Session(pipeline, seed=3)
    for caption in captions(shots):
        session.cut(caption, chunks=chunks)
    made: list[list[torch.Tensor]] = [[] for _ in range(shots)]
    for chunk in session.stream():
        made[chunk.shot.index].append(chunk.latents)
    return [torch.cat(latents) for latents in made]


def rotate_like_ours(x, table):
    return rotate(x, (table.real.float(), table.imag.float()))


def test_with_the_same_rotation_the_naive_story_is_ours_to_the_last_bit(pipeline):
    """Exactness E0: keys written in place, prompts read once and passes left out change no bit in five shots.

    With AVX2 a product of two rows rounds otherwise than one of many. There only nearly the same can be asked for.
    """
    naive = naive_story(pipeline, 5, 3, rotate=rotate_like_ours)
    fast = fast_story(pipeline, 5, 3)
    same = torch.equal if rows_are_steady() else functools.partial(torch.allclose, rtol=0, atol=2e-5)
    assert all(same(a, b) for a, b in zip(naive, fast, strict=True))
    assert not torch.equal(fast[1], fast[2])


def rows_are_steady() -> bool:
    """Whether the rows of a product do not depend on how many there are."""
    layer, x = torch.nn.Linear(64, 64), torch.randn(96, 64)
    return all(torch.equal(layer(x[:rows]), layer(x)[:rows]) for rows in (2, 3, 6))


def test_ours_is_no_farther_from_the_truth_than_the_naive_story(pipeline):
    """Exactness E1: rotating in float32 costs nothing, against the same network in float64."""
    oracle = replace(pipeline, dit=load("tiny").dit.double())
    truth = naive_story(oracle, 3, 2)
    assert truth[0].dtype == torch.float64
    errors = [
        sum(float((a - b).square().sum()) for a, b in zip(made, truth, strict=True)) ** 0.5
        for made in (fast_story(pipeline, 3, 2), naive_story(pipeline, 3, 2))
    ]
    assert 0 < errors[0] <= 1.2 * errors[1]


def test_the_naive_story_is_not_blind_to_its_context(pipeline):
    """The equality above would say nothing if shots did not read what came before."""
    one, other = (NaiveSession(pipeline, seed=3) for _ in range(2))
    one.shot("a bear", 1)
    other.shot("a cat", 1, seed=9)
    assert not torch.equal(one.shot("a frog", 1).latents, other.shot("a frog", 1).latents)


def test_compiled_blocks_give_the_same_numbers(pipeline):
    """Exactness E1. A compiler gets the rotation in real numbers; tracing alone takes that way too."""
    dit = load("tiny").dit
    where = rotation(((0.0, 0.1), (2.0, 0.2)), 4, 6, dit.config.head_dim, CPU, torch.float32)
    text = dit.read(torch.randn(1, 5, dit.config.text_dim), torch.zeros(1, 2, dtype=torch.long))
    latents, times = torch.randn(1, 2, dit.config.channels, 8, 12), torch.tensor([[900.0, 300.0]])
    with torch.no_grad():
        eager = dit(latents, times, text, where)
        torch._dynamo.reset()
        compiled = compile_blocks(dit, backend="aot_eager")(latents, times, text, where)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
    assert torch.allclose(compiled, eager, atol=1e-5) and eager.std() > 0.1


# -- the probe


def test_the_probe_sees_every_part_once_and_leaves_no_trace(pipeline):
    probe = Probe(pipeline, Clock(CPU))
    session = Session(pipeline)
    for caption in captions(2):
        session.cut(caption, chunks=2)
    methods = set(vars(pipeline.vae)) | set(vars(pipeline.text))
    with probe.watch():
        list(session.stream())
    steps = len(pipeline.config.schedule.steps)
    names = [span.name for span in probe.spans]
    expected = {"text": 2, "prefill": 2, "denoise": 4 * steps, "commit": 2, "decode": 4}
    assert {name: names.count(name) for name in expected} == expected
    assert names.count("encode") >= 6  # a shot may encode more stills than the next one asks for
    assert sorted(probe.by_keys("denoise")) == [3, 6, 9, 12]
    assert all(seconds > 0 for seconds in probe.seconds(*names))
    assert set(vars(pipeline.vae)) | set(vars(pipeline.text)) == methods
    assert not pipeline.dit._forward_hooks and not pipeline.dit._forward_pre_hooks


def test_the_kernel_is_seen():
    q = torch.randn(1, 8, 2, 16)
    assert attention_kernel(q, q, q) == "flash_attention_for_cpu"


def test_held_bytes_counts_a_storage_once():
    before = held_bytes()
    kept = torch.zeros(1000, 1000)
    views = [kept[i:] for i in range(5)]
    assert held_bytes() - before == kept.nbytes
    del kept, views
    assert held_bytes() == before


# -- deadlines and growth


class Ticking(Clock):
    """A clock that takes `step` seconds between two looks."""

    def __init__(self, step: float) -> None:
        super().__init__(CPU)
        self.time, self.step = 0.0, step

    def settled(self) -> float:
        self.time += self.step
        return self.time


def test_a_machine_that_is_fast_enough_is_never_late_and_a_slow_one_is(pipeline):
    lasts = 9 / pipeline.config.fps  # the first chunk of a shot
    fast = deadlines(pipeline, Ticking(0.9 * lasts), 1, chunks=1)
    slow = deadlines(pipeline, Ticking(1.1 * lasts), 1, chunks=1)
    shared = deadlines(pipeline, Ticking(0.9 * lasts), 2, chunks=1)
    assert fast["chunks"] == slow["chunks"] == 3 and shared["chunks"] == 6
    assert fast["late"] == 0
    assert slow["late"] == 2  # all but the first, which sets the time
    assert shared["late"] > 0
    assert 0.8 < fast["load"] <= 1


def test_growth_compares_the_ends_of_a_story(pipeline):
    grown = growth(pipeline, Clock(CPU), shots=17, chunks=1)
    assert grown["memory_ratio"] < 1.05
    assert grown["shot_ms_early"] > 0


# -- the command


def test_bench_prints_a_table_and_writes_its_numbers(tmp_path):
    out = tmp_path / "bench.json"
    options = ["--model", "tiny", "--shots", "1", "--chunks", "1", "--growth", "0", "--device", "cpu"]
    done = CliRunner().invoke(app, ["bench", *options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert result["model"] == "tiny" and result["end_to_end"]["fps"] > 0
    assert f"{result['end_to_end']['fps']} frames/s" in done.output
    stages = result["stages_ms_per_shot"]
    # To the digits that are told: ten thousandths of a second, and of each stage a thousandth of a millisecond.
    rounding = 0.05 + 0.0005 * len(stages)
    assert sum(stages.values()) == pytest.approx(1e3 * result["end_to_end"]["shot_s"], abs=rounding + 1e-6)
    assert stages["rest"] > 0
    assert not list(tmp_path.glob(".*"))


def test_bench_predicts_without_a_model():
    done = CliRunner().invoke(app, ["bench", "--predict"])
    assert done.exit_code == 0
    assert "all arithmetic at 790" in done.output and "39.7" in done.output


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--model", "nobody"], 3, "unknown model"),
        (["--clock", "sun"], 2, "wall or cpu"),
        (["--growth", "3"], 2, "17 or more"),
        (["--device", "nowhere"], 2, "use cpu or auto"),
        (["--model", "tiny", "--shots", "1", "--growth", "0", "--out", "/no/such/folder/x.json"], 1, "/no/such/folder"),
    ],
)
def test_what_bench_cannot_do_is_one_line(options, code, words):
    done = CliRunner().invoke(app, ["bench", "--sessions", "1", *options])
    assert done.exit_code == code, done.output
    assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1
