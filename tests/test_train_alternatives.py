"""Laws of the paper's alternatives: each changes what it names, works in every stage it is for, and can be judged."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_training import CONFIG, settings, write_stories
from torch import Tensor
from typer.testing import CliRunner

from shotstream.config import override
from shotstream.data.batch import Batch, ContextRule
from shotstream.data.storybook import Stories
from shotstream.flow import TIMESTEPS
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.models.dit import DiT
from shotstream.pipeline import load
from shotstream.train import ablation, dmd, lora, teacher
from shotstream.train.autoencoder import AutoencoderConfig
from shotstream.train.commands import train_app
from shotstream.train.dmd import DMDConfig, FreshNoise, rollout
from shotstream.train.draws import Draws
from shotstream.train.dry_run import NoiseStories, dry_run, memory, shrunk
from shotstream.train.model import Model, Options, dual_buffer
from shotstream.train.network import Network
from shotstream.train.ode import ODEConfig, noised
from shotstream.train.ode import task as ode_task
from shotstream.train.recipe import RECIPES, DataConfig, Recipe, Stage
from shotstream.train.run import RunConfig
from shotstream.train.teacher import TeacherConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stories(tmp_path_factory.mktemp("stories"))


def made(options: Options, seed: int = 0) -> Model:
    """A model of these options whose every parameter matters."""
    config = options.applied(CONFIG)
    torch.manual_seed(seed)
    model = Model(options.dit(config), load("tiny").text, config, options)
    for parameter in model.dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return model


def stories(folder: Path, options: Options) -> Stories:
    return Stories(folder, load("tiny").text, rule=ContextRule.of(dual_buffer(options.applied(CONFIG))))


def answer(model: Model, batch: Batch) -> Tensor:
    """The network's velocity of the target."""
    levels = torch.full(batch.target.shape[:2], 0.5)
    text = model.read(batch.words, batch.index)
    velocity = model.dit(batch.latents, model.timesteps(levels, batch.context), text, model.places(batch))
    return velocity[:, batch.context :]


ALL = ["context=first", "context=first-last", "captions=target", "inject=channel", "shots=none", "shots=embedding"]


@pytest.mark.parametrize("assignment", ALL)
def test_every_alternative_trains_in_the_stages_it_is_for(folder: Path, tmp_path: Path, assignment: str) -> None:
    options = override(Options(), [assignment])
    config, data = options.applied(CONFIG), stories(folder, options)
    network = teacher.train(config, TeacherConfig(causal=0.5), settings(tmp_path / "t", steps=3), data, made(options))
    start = made(options)
    moved = {n for n, p in network.masters.named_parameters() if not torch.equal(p, dict(start.named_parameters())[n])}
    assert {"dit.beside.weight", "dit.opening"} & dict(start.named_parameters()).keys() <= moved
    draws = Draws(0)
    batch = data.batch(draws.rng, 2, "next", history=2)
    if options.inject == "channel":
        with pytest.raises(ValueError, match="for teachers"):
            rollout(start, batch, FreshNoise(draws), 0)
        return
    runs, vae = settings(tmp_path / "d", steps=2), load("tiny").vae
    dmd.train(config, DMDConfig("own"), runs, data, start, made(options, 1), vae)
    shown = ode_task(start, batch, noised(batch, config.schedule.sigmas(), draws), draws)
    assert shown.x0(start).shape == batch.target.shape


@pytest.mark.parametrize("assignment", [a for a in ALL if a != "inject=channel"])
def test_the_rollout_is_the_block_causal_pass(folder: Path, assignment: str) -> None:
    """A student with memory and the masked pass of causal initialisation agree, whatever the alternative."""
    options = override(Options(), [assignment])
    model, data = made(options), stories(folder, options)
    batch = data.batch(Draws(0).rng, 2, "next", history=2)
    noise = FreshNoise(Draws(1))
    with torch.no_grad():
        x = rollout(model, batch, noise, 0)  # one step from pure noise
        chunk, context = CONFIG.chunk, batch.context
        text, where = model.read(batch.words, batch.index), model.places(batch)
        for number, before in enumerate((noise.drawn[0, 0], x[:, :chunk])):
            # the chunk at full noise; the first one as it was when this chunk saw it
            seen = torch.cat((batch.latents[:, :context], before, noise.drawn[1, 0]), dim=1)
            levels = torch.tensor([0.0] * context + [1.0 - number] * chunk + [1.0] * chunk).expand(2, -1)
            velocity = model.dit(seen, levels * TIMESTEPS, text, where, mask=model.mask(context, seen))
            mine = slice(context + number * chunk, context + (number + 1) * chunk)
            expected = (seen - velocity)[:, mine]
            assert torch.allclose(x[:, number * chunk : (number + 1) * chunk], expected, atol=2e-3)


def test_context_in_channels_is_seen(folder: Path) -> None:
    options = Options(inject="channel")
    model, batch = made(options), stories(folder, options).batch(Draws(0).rng, 2, "next", history=1)
    other = dataclasses.replace(batch, latents=torch.cat((batch.latents[:, :6].flip(1), batch.target), dim=1))
    with torch.no_grad():
        assert not torch.allclose(answer(model, batch), answer(model, other), atol=1e-2)
        plain = DiT(CONFIG.dit)
        plain.load_state_dict({n: p for n, p in model.dit.state_dict().items() if n != "beside.weight"})
        model.dit.beside.weight.zero_()
        alone = dataclasses.replace(
            batch,
            latents=batch.target,
            context=0,
            positions=batch.positions[:, 6:],
            flags=batch.flags[:, 6:],
            index=batch.index[:, 6:],
        )
        same = Model(plain, load("tiny").text, CONFIG)
        assert torch.allclose(answer(model, batch), answer(same, alone), atol=1e-4)


def test_captions_and_phase(folder: Path) -> None:
    options = (Options(captions="own"), Options(captions="target"))
    own, target = (stories(folder, o).batch(Draws(0).rng, 2, "next", history=2) for o in options)
    assert len(own.index[0].unique()) == 3 and len(target.index[0].unique()) == 1
    with torch.no_grad():
        for option, tells_apart in ((Options(shots="phase"), True), (Options(shots="none"), False)):
            model = made(option)
            later = dataclasses.replace(own, flags=own.flags + torch.tensor([0] * 6 + [1] * 6))
            assert torch.equal(answer(model, own), answer(model, later)) != tells_apart


def test_attention_only_tunes_self_attention(folder: Path, tmp_path: Path) -> None:
    start = made(Options())
    network = teacher.train(
        CONFIG,
        TeacherConfig(tune="attention"),
        settings(tmp_path, steps=2),
        stories(folder, Options()),
        made(Options()),
    )
    before = dict(start.named_parameters())
    for name, parameter in network.masters.named_parameters():
        assert torch.equal(parameter, before[name]) == ("self_attn" not in name), name
    with pytest.raises(ValueError, match="use all or attention"):
        start.tune("everything")


def test_options_change_the_policy_only_where_they_must() -> None:
    assert type(dual_buffer(Options().applied(CONFIG))) is DualBuffer
    assert dual_buffer(Options(shots="none").applied(CONFIG)).turn == 0
    assert ContextRule.of(dual_buffer(Options(context="first").applied(CONFIG))).frames == "first"


# The table


def tiny_recipe() -> Recipe:
    """The smoke recipe with less of everything."""
    smoke = RECIPES["storybook-smoke"]
    stages = tuple(
        dataclasses.replace(stage, task=DataConfig(5, 4)) if isinstance(stage.task, DataConfig) else _short(stage)
        for stage in smoke.stages
    )
    return dataclasses.replace(smoke, stages=stages)


def _short(stage: Stage) -> Stage:
    runs = dataclasses.replace(stage.runs, steps=2, batch=2, log_every=1, sheet_every=100)
    task = dataclasses.replace(stage.task, source="data") if isinstance(stage.task, ODEConfig) else stage.task
    if isinstance(task, AutoencoderConfig):
        task, runs = dataclasses.replace(task, held_out=1), dataclasses.replace(runs, batch=1)
    return dataclasses.replace(stage, runs=runs, task=task)


def test_a_budget_is_set_for_one_stage_or_for_all() -> None:
    recipe = RECIPES["storybook-smoke"].overridden(["next.runs.steps=7", "runs.batch=3"])
    assert recipe.stage("next").runs.steps == 7 != recipe.stage("ode").runs.steps
    assert {stage.runs.batch for stage in recipe.stages} == {3}
    with pytest.raises(ValueError, match="stps"):
        recipe.overridden(["next.runs.stps=7"])


@pytest.mark.slow
def test_the_table_is_made_and_goes_on(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    rows = ("first frame", "stage 2 only")
    path = ablation.ablate(recipe, tmp_path, rows=rows, stories=2, seeds=(0,))
    result = json.loads(path.with_suffix(".json").read_text())["rows"]
    assert result.keys() == {ablation.TEACHER, ablation.STUDENT, *rows}
    assert all(f"| {name} |" in path.read_text() for name in result)
    chosen = result["first frame"]["compared_with"], result["stage 2 only"]["compared_with"]
    assert chosen == (ablation.TEACHER, ablation.STUDENT)
    assert result[ablation.TEACHER]["overall.named"]["difference"]["value"] == 0
    assert result["first frame"]["overall.named"]["value"]["count"] > 0
    # Equal budgets, shared stages, and nothing is done twice.
    config = json.loads((ablation.folder(tmp_path, "stage 2 only") / "stage2" / "config.json").read_text())
    assert config["run"]["steps"] == 4
    assert (ablation.folder(tmp_path, "stage 2 only") / "ode").is_symlink()
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/*/checkpoint.pt")}
    again = ablation.ablate(recipe, tmp_path, rows=rows, stories=2, seeds=(0,))
    assert again.exists() and times == {p: p.stat().st_mtime_ns for p in times}
    with pytest.raises(ValueError, match="unknown row 'nothing'"):
        ablation.ablate(recipe, tmp_path, rows=["nothing"])


# The dry run


def test_two_steps_of_every_stage_at_given_shapes() -> None:
    wan = RECIPES["wan-1.3b"]
    small = dataclasses.replace(wan.config.dit, dim=48, ffn_dim=64, heads=2, text_dim=32, layers=3)
    config = shrunk(dataclasses.replace(wan.config, dit=small), 2, 32, 48, 2)
    done = dry_run(wan, config, "cpu", 1, lambda step: None)
    assert [step.stage for step in done] == ["next", "ode", "stage1", "stage2"]
    teacher_learns, all_learns, _, adapters = (step.trained for step in done)
    assert all_learns == sum(p.numel() for p in DiT(config.dit).parameters())
    assert teacher_learns < 0.5 * all_learns and adapters == lora.size(config.dit, 256)


def test_the_memory_plan_counts_what_is_held() -> None:
    wan = RECIPES["wan-1.3b"]
    stages = {stage.name: stage for stage in wan.stages}
    one, eight = (memory(stages["ode"], wan.config, shards) for shards in (1, 8))
    # master, average, gradient and two moments of 1.419 billion numbers in float32
    assert one.states == 1_418_996_800 * 4 * 5 and eight.states == one.states // 8
    assert eight.gathered == one.gathered and eight.activations == one.activations
    assert memory(stages["next"], wan.config, 1).states < one.states
    assert memory(stages["ode"], wan.config, 1, batch=2).activations == 2 * one.activations


def test_noise_has_the_shapes_of_stories() -> None:
    batch = NoiseStories(CONFIG).batch(Draws(0).rng, 2, "next", history=2)
    assert batch.latents.shape == (2, 12, *CONFIG.latent_shape) and batch.finished == 2


def test_the_plan_is_printed_without_training() -> None:
    done = CliRunner().invoke(train_app, ["dry-run", "--preset", "wan-1.3b", "--plan"])
    assert done.exit_code == 0 and "30 layers, 480 x 832, 27 x 1560 tokens" in done.stdout
    assert done.stdout.count("plan ") == 4


def test_timesteps_are_never_cast(folder: Path) -> None:
    """bf16 networks see 957.93, not 956: the noise level of a step is exact."""
    options = Options()
    network = Network(made(options), RunConfig(dtype="bfloat16", optimizer="adamw"))
    batch = stories(folder, options).batch(Draws(0).rng, 2, "next", history=2)
    seen: list[Tensor] = []
    network.compute.dit.register_forward_pre_hook(lambda dit, inputs: seen.append(inputs[1]))
    with torch.no_grad():
        rollout(network.compute, batch, FreshNoise(Draws(0)), None)
    steps = {float(t) for timesteps in seen for t in timesteps.unique()}
    assert steps == {0.0, *CONFIG.schedule.timesteps()} and all(t.dtype == torch.float32 for t in seen)
