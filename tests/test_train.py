"""Laws of the recipes: losses fall, stopping changes nothing, the distillation rolls out what inference rolls out."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from shotstream.checkpoints import read_model, write_model
from shotstream.config import PatchVAEConfig
from shotstream.data.batch import ContextRule, Kind, Sample, collate
from shotstream.data.storybook import Stories, fit_vae, write_shards
from shotstream.flow import TIMESTEPS
from shotstream.memory.policies.dual_buffer import context_picks
from shotstream.models.patch_vae import PatchVAE
from shotstream.pipeline import Pipeline, load
from shotstream.rollout import Noise, Roll, Stills
from shotstream.session import Session
from shotstream.storybook.captions import VOCABULARY
from shotstream.storybook.draw import SHOT_FRAMES
from shotstream.train import autoencoder, dmd, ode, run, teacher
from shotstream.train.autoencoder import AutoencoderConfig
from shotstream.train.checkpoint import File
from shotstream.train.dmd import DMDConfig, FreshNoise, rollout
from shotstream.train.draws import Draws
from shotstream.train.model import Model
from shotstream.train.network import Network
from shotstream.train.ode import ODEConfig
from shotstream.train.recipe import RECIPES, fresh, load_weights, run_all, run_stage, source
from shotstream.train.run import RunConfig
from shotstream.train.teacher import TeacherConfig

RECIPE = RECIPES["storybook-smoke"]
CONFIG = dataclasses.replace(
    RECIPE.config, dit=dataclasses.replace(RECIPE.config.dit, dim=32, ffn_dim=64, heads=1, layers=2)
)
TINY = dataclasses.replace(RECIPE, config=CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stories")


@pytest.fixture(scope="module")
def vae() -> PatchVAE:
    torch.manual_seed(0)
    assert isinstance(CONFIG.vae, PatchVAEConfig)
    network = PatchVAE(CONFIG.vae)
    fit_vae(network, 4)
    return network


@pytest.fixture(scope="module")
def stories(folder: Path, vae: PatchVAE) -> Stories:
    write_shards(folder, vae, 6, "train")
    return Stories(folder, fresh(TINY, 0).text)


def settings(out: Path, steps: int, **more: object) -> RunConfig:
    values = {"batch": 3, "lr": 2e-3, "lr_adam": 1e-3, "dtype": "float32", "warmup": 2, "log_every": 1, "save_every": 0}
    return RunConfig(out=str(out), steps=steps, **(values | more))  # type: ignore[arg-type]


def losses(out: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Let the run be interrupted while it logs the step after `steps` (whose checkpoint is not yet written)."""
    written = run.Log.write

    def write(self: run.Log, step: int, **values: object) -> None:
        if step == steps + 1:
            raise KeyboardInterrupt
        written(self, step, **values)

    monkeypatch.setattr(run.Log, "write", write)


def test_where_the_cast_passes_the_decoder_is_asked_for_more(vae: PatchVAE) -> None:
    clips = autoencoder.batch(np.random.default_rng(0), 2, 0)
    assert autoencoder.groups(clips.frames).shape == (12, 4, 3, 128, 192)
    assert torch.equal(autoencoder.groups(clips.frames)[1, 0], clips.frames[0, 1])
    plain, weighted = AutoencoderConfig(noise=0.0, edges=0.0, cast_weight=0.0), AutoencoderConfig(0.0, edges=0.0)
    with torch.no_grad():
        latents = vae.encode(clips.frames)
        before = torch.cat((latents[:, :1], latents[:, :-1]), dim=1)
        drawn = vae.draw(latents.flatten(0, 1), before.flatten(0, 1))
        error = (drawn - autoencoder.groups(clips.frames)).abs().mean((1, 2))
        values = [float(autoencoder.loss(vae, clips, Draws(0), cfg)) for cfg in (plain, weighted)]
    passes = autoencoder.groups(clips.mask).any(1)
    weight = 1 + weighted.cast_weight * passes
    assert values[0] == pytest.approx(float(error.mean()), rel=1e-3)
    assert values[1] == pytest.approx(float((error * weight).sum() / weight.sum()), rel=1e-3)
    assert values[1] > 1.2 * values[0]  # what moves is what is wrong


def test_a_decoder_begins_as_another_one_where_they_are_alike(tmp_path: Path, vae: PatchVAE) -> None:
    given = copy.deepcopy(vae).requires_grad_(False)
    for parameter in given.parameters():
        parameter.normal_()
    parts = {"dit": fresh(TINY, 0).dit, "text": fresh(TINY, 0).text, "vae": given}
    write_model(tmp_path / "given.safetensors", CONFIG, VOCABULARY, parts, {})
    assert isinstance(CONFIG.vae, PatchVAEConfig)
    deeper = PatchVAE(dataclasses.replace(CONFIG.vae, widths=(*CONFIG.vae.widths, 8)))
    leave = deeper.leave.weight.clone()
    autoencoder.begin(deeper, tmp_path / "given.safetensors")
    assert torch.equal(deeper.enter.weight, given.enter.weight.bfloat16().float())
    assert torch.equal(deeper.leave.weight, leave)
    assert not deeper.project.any()  # the linear part is the recipe's own
    with pytest.raises(ValueError, match="first layer is not that of"):
        autoencoder.begin(PatchVAE(PatchVAEConfig(channels=8, widths=(8, 4))), tmp_path / "given.safetensors")


def test_a_deeper_network_begins_as_the_same_function(stories: Stories, tmp_path: Path) -> None:
    shallow = fresh(TINY, 0)
    with torch.no_grad():
        for parameter in shallow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    File(tmp_path).write({"network": Network(shallow, settings(tmp_path, 1))}, 1)
    deep = dataclasses.replace(TINY, config=dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, layers=5)))
    with pytest.raises(ValueError, match="not a model of this preset: missing"):
        load_weights(fresh(deep, 1), tmp_path)
    model = load_weights(fresh(deep, 1), tmp_path, deepen=True)
    batch, cfg = stories.batch(np.random.default_rng(0), 4, "next"), TeacherConfig(causal=0.5)
    values = [teacher.loss(m, batch, Draws(3), cfg) for m in (shallow, model)]
    assert torch.allclose(*values, rtol=1e-5)
    values[1].backward()
    learns = [float(block.ffn[2].weight.grad.norm()) > 0 for block in model.dit.layers()]
    assert all(learns)


@pytest.mark.parametrize("kind", ["image", "shot", "next"])
def test_the_teacher_learns(stories: Stories, tmp_path: Path, kind: str) -> None:
    cfg = TeacherConfig(kind=kind, first_shots=0.0)

    def held_out(model: Model) -> float:
        """The loss on fixed batches with fixed noise."""
        with torch.no_grad():
            draws = [Draws(7), Draws(8)]
            return float(np.mean([teacher.loss(model, stories.batch(d.rng, 8, kind), d, cfg) for d in draws]))

    model = fresh(TINY, 0)
    before = held_out(model)
    teacher.train(CONFIG, cfg, settings(tmp_path, 12), stories, model)
    assert held_out(model) < 0.9 * before


def test_the_autoencoder_learns(vae: PatchVAE, tmp_path: Path) -> None:
    autoencoder.train(CONFIG, AutoencoderConfig(held_out=2), settings(tmp_path, 25, batch=1, lr_adam=4e-3), vae)
    values = losses(tmp_path, "loss")
    assert np.mean(values[-5:]) < np.mean(values[:5])
    assert losses(tmp_path, "psnr")[-1] > losses(tmp_path, "psnr")[0]


def train_teacher(stories: Stories, vae: PatchVAE, runs: RunConfig) -> Network[Model]:
    return teacher.train(CONFIG, TeacherConfig(), runs, stories, fresh(TINY, 0))


def train_ode(stories: Stories, vae: PatchVAE, runs: RunConfig) -> Network[Model]:
    return ode.train(CONFIG, ODEConfig(source="guided"), runs, stories, fresh(TINY, 0))


def train_stage1(stories: Stories, vae: PatchVAE, runs: RunConfig) -> Network[Model]:
    return dmd.train(CONFIG, DMDConfig(), runs, stories, fresh(TINY, 0), fresh(TINY, 1))


def train_stage2(stories: Stories, vae: PatchVAE, runs: RunConfig) -> Network[Model]:
    return dmd.train(CONFIG, DMDConfig("own", lora=2), runs, stories, fresh(TINY, 0), fresh(TINY, 1), vae)


def train_autoencoder(stories: Stories, vae: PatchVAE, runs: RunConfig) -> Network[PatchVAE]:
    return autoencoder.train(CONFIG, AutoencoderConfig(held_out=1), runs, copy.deepcopy(vae))


@pytest.mark.parametrize("recipe", [train_teacher, train_ode, train_stage1, train_stage2, train_autoencoder])
def test_stopping_and_resuming_equals_not_stopping(
    stories: Stories,
    vae: PatchVAE,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: Callable[[Stories, PatchVAE, RunConfig], Network[Model]],
) -> None:
    def runs(name: str) -> RunConfig:
        return settings(tmp_path / name, 4, batch=2)

    whole = recipe(stories, vae, runs("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 2)
        recipe(stories, vae, runs("parts"))
    assert torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 2
    resumed = recipe(stories, vae, runs("parts"))
    assert same_weights(whole.masters, resumed.masters) and same_weights(whole.ema, resumed.ema)
    before = recipe(stories, vae, dataclasses.replace(runs("none"), steps=0))
    assert not same_weights(whole.masters, before.masters)


def test_ode_pairs_start_at_noise_end_at_the_target_and_resume(stories: Stories, tmp_path: Path) -> None:
    cfg = ODEConfig(euler_steps=4, pairs=str(tmp_path), first_shots=0.5)
    model = fresh(TINY, 0)
    ode.write_pairs(tmp_path, model, stories, CONFIG, cfg, shards=3, size=2)
    paths = sorted(tmp_path.iterdir())
    kept = [path.read_bytes() for path in paths]
    paths[1].unlink()
    ode.write_pairs(tmp_path, model, stories, CONFIG, cfg, shards=3, size=2)
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == kept
    batch, states = ode.read_pairs(paths[0])
    assert states.shape[1] == len(CONFIG.schedule.steps) + 1
    assert torch.equal(states[:, -1], batch.latents[:, batch.context :])
    assert abs(float(states[:, 0].std()) - 1) < 0.05
    ode.train(CONFIG, cfg, settings(tmp_path / "ode", 25), stories, model)
    values = losses(tmp_path / "ode", "loss")
    assert np.mean(values[-5:]) < np.mean(values[:5])


def test_a_training_rollout_is_what_a_session_generates(vae: PatchVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 5: the same prompts, history and noise give the same latents in `train.dmd` and in `session`."""
    model = fresh(TINY, 3)
    rolled: dict[int, tuple[Noise, Tensor, Tensor]] = {}
    roll = Roll.shot

    def noted(self: Roll, shot: int, chunks: int, noise: Noise, context: Stills, *rest: object) -> Iterator[Tensor]:
        """The session's rollout, whose noise, context and latents are noted."""
        seen = [torch.zeros(1, 0, *CONFIG.latent_shape)]
        made = list(roll(self, shot, chunks, noise, lambda frames: seen.append(context(frames)) or seen[-1], *rest))
        rolled[shot] = noise, seen[-1], torch.cat(made, dim=1)
        yield from made

    told = ("a wide shot of a green bear", "a blue frog in a top hat", "the bear in the snow at night")
    pipeline = Pipeline(CONFIG, model.dit, vae, model.text)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Roll, "shot", noted)
        session = Session(pipeline, seed=5)
        for caption in told:
            session.cut(caption, global_caption="a story")
        assert len(list(session.stream())) == 3 * CONFIG.chunks
    prompts = {n: torch.tensor(model.text.ids(pipeline.prompt("a story", n, c))) for n, c in enumerate(told)}
    for shot, (noise, stills, lived) in rolled.items():
        picks = context_picks((SHOT_FRAMES,) * shot)
        place = Sample([*stills[0]], [s for s, _ in picks], lived[0], shot, prompts, torch.zeros(6, 8, 12))
        with torch.no_grad():
            trained = rollout(model, collate([place], ContextRule()), noise, None)
        assert torch.equal(trained, lived), f"shot {shot}"
    assert rolled.keys() == {0, 1, 2}


def test_only_the_exit_step_learns(stories: Stories) -> None:
    model = fresh(TINY, 0)
    batch = stories.batch(np.random.default_rng(0), 2, "next", history=1)
    for exit_step in (0, 3):
        x = rollout(model, batch, FreshNoise(Draws(0)), exit_step)
        assert x.requires_grad and x.shape == batch.latents[:, batch.context :].shape
        (x * torch.randn_like(x)).sum().backward()
        assert model.dit.blocks[0].self_attn.k.weight.grad is not None
        model.zero_grad()
    with torch.no_grad():
        assert not rollout(model, batch, FreshNoise(Draws(0)), None).requires_grad


def test_dmd_pulls_towards_the_teacher(stories: Stories) -> None:
    """The gradient with respect to x is (critic - guided teacher) / its scale, and nothing when the two agree."""
    model = fresh(TINY, 0)
    runs = RunConfig(dtype="float32")
    same = dmd.Trio(Network(fresh(TINY, 0), runs), Network(model, runs), model)
    batch = stories.batch(np.random.default_rng(0), 2, "next", history=1)
    x = batch.latents[:, batch.context :].clone().requires_grad_()
    cfg = DMDConfig(guidance=1.0)
    dmd.student_loss(same, batch, x, Draws(0), cfg)[0].backward()
    assert x.grad is not None and x.grad.abs().max() < 1e-6
    other = dataclasses.replace(same, teacher=fresh(TINY, 1))
    x.grad = None
    dmd.student_loss(other, batch, x, Draws(0), cfg)[0].backward()
    assert x.grad is not None and x.grad.abs().mean() > 1e-6


def test_the_second_stage_lives_with_its_own_shots(stories: Stories, vae: PatchVAE) -> None:
    own = dmd.OwnHistory(stories, vae, CONFIG, 2, DMDConfig())
    first = own.next(Draws(0, 0))
    assert first.context == 0
    made = torch.randn(2, 6, *CONFIG.latent_shape)
    own.advance(made)
    second = own.next(Draws(0, 1))
    assert second.context == 6
    frames, _ = vae.decode(made)
    assert torch.equal(second.latents[:, 0], vae.context_latents(frames[:, 0].clamp(-1, 1)))


def test_context_is_clean_and_dropped_context_is_empty(stories: Stories) -> None:
    rng = np.random.default_rng(0)
    next_shot, alone = stories.batch(rng, 4, "next"), stories.batch(rng, 4, "shot")
    assert next_shot.context == 6 and alone.context == 0
    assert (next_shot.flags[:, -1] >= 1).all() and (alone.flags == 0).all()
    assert (next_shot.positions[:, 6:] == alone.positions).all()
    seen: list[Tensor] = []

    class Spy:
        """Stands for the model and its DiT, and notes what the DiT is shown."""

        def __init__(self, model: Model) -> None:
            self.dit, self.read = self, model.read
            self.null, self.places, self.timesteps, self.config = (
                model.null,
                model.places,
                model.timesteps,
                model.config,
            )

        def __call__(self, x: Tensor, timesteps: Tensor, *_: object, **__: object) -> Tensor:
            seen.extend((x, timesteps))
            return torch.zeros_like(x)

    teacher.loss(Spy(fresh(TINY, 0)), next_shot, Draws(0), TeacherConfig())  # type: ignore[arg-type]
    assert torch.equal(seen[0][:, :6], next_shot.latents[:, :6]) and (seen[1][:, :6] == 0).all()
    assert (seen[1][:, 6:] > 0).all() and (seen[1] <= TIMESTEPS).all()


def test_a_wrong_setting_or_missing_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        run_stage(RECIPE, "image", tmp_path, ["runs.stepps=3"])
    with pytest.raises(FileNotFoundError, match="image"):
        run_stage(RECIPE, "shot", tmp_path, [])
    with pytest.raises(ValueError, match="unknown stage"):
        run_stage(RECIPE, "nothing", tmp_path, [])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the whole smoke recipe."""
    root = tmp_path_factory.mktemp("smoke")
    run_all(RECIPE, root, [])
    return root


def matching_losses(smoke: Path, stage: str) -> tuple[list[float], list[float]]:
    """The critic's loss on the shots of this stage's student, and the student's on data, before and after the stage."""
    recipe, stories = RECIPE.stage(stage), source(RECIPE, smoke)
    assert isinstance(recipe.task, DMDConfig)
    student, before = (load_weights(fresh(RECIPE, 0), smoke / name) for name in (stage, recipe.init))
    critics = [load_weights(fresh(RECIPE, 0), smoke / "next"), load_weights(fresh(RECIPE, 0), smoke / stage, "critic")]
    critical, anchored = [0.0, 0.0], [0.0, 0.0]
    for number in range(3):
        draws = Draws(7, number)
        batch = dmd.from_data(stories, draws, 8, recipe.task)
        x = rollout(student, batch, FreshNoise(draws), None, recipe.task)
        for i, critic in enumerate(critics):
            trio = SimpleNamespace(critic=SimpleNamespace(compute=critic))
            critical[i] += float(dmd.critic_loss(trio, batch, x, Draws(8, number), recipe.task))  # type: ignore[arg-type]
        for i, network in enumerate((before, student)):
            anchored[i] += float(dmd.anchor_loss(network, stories, Draws(9, number), 8, recipe.task))
    return critical, anchored


@torch.no_grad()
def test_every_stage_of_the_smoke_recipe_lowers_its_loss(smoke: Path) -> None:
    """On the same samples with the same noise, with the averaged weights of the stage before and of the stage."""
    stories = source(RECIPE, smoke)
    told = [json.loads(line) for line in (smoke / "autoencoder" / "log.jsonl").read_text().splitlines()]
    assert told[-1]["loss"] < 0.8 * told[0]["loss"]

    def loss_of(model: Model, kind: Kind, cfg: TeacherConfig) -> float:
        batches = [(Draws(7, i), stories.batch(Draws(7, i).rng, 16, kind)) for i in range(3)]
        return float(np.mean([float(teacher.loss(model, batch, draws, cfg)) for draws, batch in batches]))

    for stage in (RECIPE.stage(name) for name in ("image", "shot", "next")):
        assert isinstance(stage.task, TeacherConfig)
        before = load_weights(fresh(RECIPE, 0), smoke / stage.init) if stage.init else fresh(RECIPE, 0)
        after = load_weights(fresh(RECIPE, 0), smoke / stage.name)
        values = [loss_of(model, stage.task.kind, stage.task) for model in (before, after)]
        assert values[1] < 0.99 * values[0], stage.name
    before, after = (load_weights(fresh(RECIPE, 0), smoke / name) for name in ("next", "ode"))
    batch, states = ode.read_pairs(smoke / "pairs" / "pairs-00000.safetensors")
    tasks = [ode.task(model, batch, states, Draws(7)) for model in (before, after)]
    values = [float(ode.loss(m, task, task.clean)) for m, task in zip((before, after), tasks, strict=True)]
    assert values[1] < 0.9 * values[0]
    for name in ("stage1", "stage2"):
        critic, anchor = matching_losses(smoke, name)
        assert critic[1] < 0.99 * critic[0] and anchor[1] < 1.02 * anchor[0], name


def test_the_smoke_recipe_goes_from_nothing_to_a_model_that_generates(smoke: Path) -> None:
    path = smoke / f"{RECIPE.config.name}.safetensors"
    for stage in ("autoencoder", "image", "shot", "next", "ode", "stage1", "stage2"):
        assert (smoke / stage / "checkpoint.pt").exists() and (smoke / stage / "config.json").exists()
    trained, read = load_weights(fresh(RECIPE, 1), smoke / "stage2"), load_weights(fresh(RECIPE, 2), path)
    assert same_weights(trained.bfloat16(), read.bfloat16())
    pipeline = load(path)
    session = Session(pipeline, seed=1)
    session.cut("a wide shot of a green bear")
    frames = np.concatenate([chunk.frames for chunk in session.stream()])
    assert frames.shape == (SHOT_FRAMES, CONFIG.height, CONFIG.width, 3)
    _, _, before, _ = read_model(path)
    _, _, after, _ = read_model(run_all(RECIPE, smoke, []))  # everything is finished: nothing changes
    assert all(torch.equal(before[name], after[name]) for name in before)
