"""Laws of distribution matching: LoRA is exact, and a habit of the release changes what it should and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_training import CONFIG, model, settings, train, write_stories
from torch import Tensor

from shotstream.checkpoints import dit_network, read_lora
from shotstream.config import PRESETS
from shotstream.data.batch import Batch
from shotstream.data.storybook import Stories
from shotstream.flow import spread
from shotstream.models.dit import DiT
from shotstream.pipeline import load
from shotstream.train import dmd, lora
from shotstream.train.dmd import DMDConfig, FreshNoise, OwnHistory, rollout
from shotstream.train.draws import Draws
from shotstream.train.model import Model
from shotstream.train.network import Network, network
from shotstream.train.recipe import RECIPES
from shotstream.train.run import RunConfig


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Stories:
    return Stories(write_stories(tmp_path_factory.mktemp("stories")), load("tiny").text)


@pytest.fixture
def batch(stories: Stories) -> Batch:
    return stories.batch(Draws(0).rng, 2, "next", history=2)


def velocity(model: Model, batch: Batch) -> Tensor:
    """The network's answer to the batch at half noise."""
    levels = torch.full(batch.target.shape[:2], 0.5)
    text = model.read(batch.words, batch.index)
    return model.dit(batch.latents, model.timesteps(levels, batch.context), text, model.places(batch))


def adapted(seed: int, rank: int = 4) -> Model:
    """A model whose adapters have learned something."""
    made = model(seed)
    lora.add(made.dit, rank)
    for name, parameter in made.dit.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return made


# LoRA


def test_new_adapters_change_nothing_and_are_all_that_learns(batch: Batch) -> None:
    plain, with_adapters = model(0), model(0)
    lora.add(with_adapters.dit, 4)
    assert torch.equal(velocity(plain, batch), velocity(with_adapters, batch))
    learns = {name for name, p in with_adapters.dit.named_parameters() if p.requires_grad}
    assert learns and all(".lora_" in name for name in learns)
    assert sum(".lora_A." in name for name in learns) == 10 * CONFIG.dit.layers


def test_merged_equals_unmerged(batch: Batch) -> None:
    unmerged, plain = adapted(0), model(0)
    before = velocity(plain, batch)
    plain.load_state_dict(lora.merged(unmerged.state_dict()))
    after = velocity(plain, batch)
    assert (after - before).abs().max() > 0.05
    assert torch.allclose(after, velocity(unmerged, batch), rtol=1e-4, atol=1e-4)


def test_at_wan_size_there_are_300_modules_and_350_million_numbers() -> None:
    config = PRESETS["wan-1.3b"].dit
    with torch.device("meta"):
        dit = DiT(config)
        lora.add(dit, 256)
    sizes = {name: p.numel() for name, p in dit.named_parameters() if p.requires_grad}
    assert sum(".lora_A." in name for name in sizes) == 300
    assert sum(sizes.values()) == lora.size(config, 256) == 349_962_240


def test_the_adapters_file_is_pefts_and_our_loader_reads_it(tmp_path: Path, batch: Batch) -> None:
    peft = pytest.importorskip("peft")
    trained, base = adapted(0), model(0)
    path = lora.write(tmp_path / "adapters", trained.state_dict())
    read = read_lora(path, dit_network(CONFIG.dit))
    merged = lora.merged(trained.state_dict())
    for name, value in base.dit.state_dict().items():
        assert torch.allclose(read.merged(name, value), merged[f"dit.{name}"], atol=1e-6), name
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base.dit), str(tmp_path / "adapters"))
    for name, value in theirs.merge_and_unload().state_dict().items():
        assert torch.allclose(value, merged[f"dit.{name}"], atol=1e-6), name
    with pytest.raises(ValueError, match="no adapters"):
        lora.write(tmp_path, base.state_dict())


def test_training_adapters_leaves_the_base_alone(stories: Stories, tmp_path: Path) -> None:
    folder = write_stories(tmp_path / "stories")
    network = train("stage2", folder, settings(tmp_path / "run", steps=3, batch=2))
    start, now = model(0).state_dict(), network.masters.state_dict()
    for name, value in now.items():
        if ".lora_" not in name:
            assert torch.equal(value, start[name.replace(".base_layer.", ".")]), name
    assert any(value.any() for name, value in now.items() if ".lora_B." in name)


# The release's habits


def rolled(model: Model, batch: Batch, cfg: DMDConfig) -> Tensor:
    return rollout(model, batch, FreshNoise(Draws(1)), 1, cfg)


def test_straight_through_changes_gradients_and_no_number(batch: Batch) -> None:
    student = model(0)
    gradients, outputs = [], []
    for through in (False, True):
        x = rolled(student, batch, DMDConfig(straight_through=through))
        student.zero_grad()
        x[:, CONFIG.chunk :].sum().backward()  # the last chunk alone: what it read of the first is the question
        gradients.append([p.grad.clone() for p in student.dit.parameters() if p.grad is not None])
        outputs.append(x.detach())
    assert torch.equal(*outputs)
    difference = max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True))
    assert difference > 1e-3 * max(float(a.abs().max()) for a in gradients[0])


def test_committed_keys_are_detached_by_default(batch: Batch) -> None:
    """The last chunk's output does not depend, as gradients go, on the noise that made the first."""
    student, shape = model(0), (len(batch.latents), CONFIG.chunk, *CONFIG.latent_shape)
    for through in (False, True):
        noise = FreshNoise(Draws(1))
        first = torch.randn(shape, requires_grad=True)
        noise.drawn[0, 0] = first
        x = rollout(student, batch, noise, 0, DMDConfig(straight_through=through))
        x[:, CONFIG.chunk :].sum().backward()
        assert (first.grad is not None and bool(first.grad.any())) == through


def test_noise_at_commit_reaches_later_chunks_only(batch: Batch) -> None:
    student = model(0)
    with torch.no_grad():
        clean, little, much = (rolled(student, batch, DMDConfig(commit_noise=s)) for s in (0.0, 0.00794, 0.5))
    assert torch.equal(clean[:, : CONFIG.chunk], little[:, : CONFIG.chunk])
    assert 0 < (clean - little).square().mean() < (clean - much).square().mean()


def test_history_is_the_whole_few_step_output(
    stories: Stories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int | None] = []
    roll = dmd.rollout

    def noted(model: Model, batch: Batch, noise: FreshNoise, exit_step: int | None, cfg: DMDConfig) -> Tensor:
        steps.append(exit_step)
        return roll(model, batch, noise, exit_step, cfg)

    monkeypatch.setattr(dmd, "rollout", noted)
    for past, calls in (("whole", 2), ("exit", 1)):
        steps.clear()
        cfg = DMDConfig("own", past=past)  # type: ignore[arg-type]
        runs = settings(tmp_path / past, steps=2, batch=2)
        dmd.train(CONFIG, cfg, runs, stories, model(0), model(1), load("tiny").vae)
        assert len(steps) == 2 * calls and (None in steps) == (past == "whole")


def test_dropped_context_makes_a_first_shot(stories: Stories) -> None:
    history = OwnHistory(stories, load("tiny").vae, CONFIG, 2, DMDConfig("own", drop_context=1.0))
    for step in range(4):
        assert history.next(Draws(0, step)).context == 0
        history.advance(torch.randn(2, 6, *CONFIG.latent_shape))


def test_stage_two_stops_and_says_what_it_needs(stories: Stories, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give the trained autoencoder"):
        dmd.train(CONFIG, DMDConfig("own"), settings(tmp_path, steps=1), stories, model(0), model(1))


# The mathematics, where everything is known: one number, normally distributed


class Normal(torch.nn.Module):
    """Normally distributed numbers: draws them, and is their denoiser."""

    def __init__(self, mean: float, deviation: float) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))
        self.log = torch.nn.Parameter(torch.tensor(deviation).log())

    def draw(self, noise: Tensor) -> Tensor:
        return self.mean + self.log.exp() * noise

    def x0(self, noisy: Tensor, sigma: Tensor) -> Tensor:
        """E[x | (1 - sigma) x + sigma noise]."""
        kept, variance = 1 - spread(sigma, noisy), (2 * self.log).exp()
        gain = variance * kept / (kept.square() * variance + spread(sigma, noisy).square())
        return self.mean + gain * (noisy - kept * self.mean)

    def values(self) -> list[float]:
        return [self.mean.item(), self.log.exp().item()]


class World:
    """Distribution matching of such numbers: the losses of `dmd`, with denoisers of our own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, student: Normal, teacher: Normal, **recipe: object) -> None:
        def predict(model: Normal, batch: object, noisy: Tensor, sigma: Tensor, words: object) -> Tensor:
            return model.x0(noisy, sigma)

        monkeypatch.setattr(dmd, "predict", predict)
        self.cfg = DMDConfig(guidance=1.0, **recipe)  # type: ignore[arg-type]
        critic = copy.deepcopy(teacher)
        student_side, critic_side = (SimpleNamespace(compute=n, ema=n) for n in (student, critic))
        self.trio = dmd.Trio(student_side, critic_side, teacher)  # type: ignore[arg-type]
        self.student, self.critic = student, critic
        self.optimizers = [torch.optim.Adam(n.parameters(), lr) for n, lr in ((student, 0.01), (critic, 0.03))]
        self.step = 0

    def shots(self, draws: Draws, count: int) -> Tensor:
        """Many numbers each: the normaliser is a mean over a shot, and of a single number it would be the number."""
        return self.student.draw(draws.noise((count, 1, 1, 8, 8)))

    def train(self, steps: int, count: int = 16) -> None:
        batch: Any = SimpleNamespace(words=None)
        for _ in range(steps):
            draws = Draws(0, self.step)
            learn = self.step % 4 == 0
            x = self.shots(draws, count)
            if learn:
                value, self.trust = dmd.student_loss(self.trio, batch, x, draws, self.cfg)
            else:
                value = dmd.critic_loss(self.trio, batch, x.detach(), draws, self.cfg)
            optimizer = self.optimizers[0 if learn else 1]
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            self.step += 1


def test_a_wrong_student_ends_with_the_teachers_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and spread, although the normaliser, the shift and the critic's lag are all at work."""
    world = World(monkeypatch, Normal(-1.0, 1.5), Normal(1.0, 0.5))
    world.train(1200)
    assert world.student.values() == pytest.approx([1.0, 0.5], abs=0.04)
    assert world.critic.values() == pytest.approx(world.student.values(), abs=0.04)


@pytest.mark.parametrize(("mean", "low", "high"), [(-1.0, 0.98, 1.02), (0.0, 1.5, 2.5), (-3.0, 0.4, 0.6)])
def test_trust_says_what_the_critic_is_worth(
    monkeypatch: pytest.MonkeyPatch, mean: float, low: float, high: float
) -> None:
    """A critic that knows the student; one that lags, half way from the teacher; one that is wrong by as much again."""
    world = World(monkeypatch, Normal(-1.0, 0.5), Normal(1.0, 0.5))
    world.critic.load_state_dict(Normal(mean, 0.5).state_dict())
    draws = Draws(0)
    x = world.shots(draws, 512).detach()
    _, found = dmd.student_loss(world.trio, SimpleNamespace(words=None), x, draws, world.cfg)  # type: ignore[arg-type]
    assert low < found.item() < high


def test_the_right_student_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step in expectation; a critic that sees other numbers than the student makes is what would push it away."""
    world = World(monkeypatch, Normal(1.0, 0.5), Normal(1.0, 0.5))
    world.train(400)
    assert world.student.values() == pytest.approx([1.0, 0.5], abs=0.05)


def test_the_student_waits_for_its_critic(stories: Stories, tmp_path: Path) -> None:
    cfg = DMDConfig(critic_first=3, critic_steps=1)
    for steps, moved in ((3, False), (4, True)):
        runs = settings(tmp_path / str(steps), steps=steps, batch=2)
        network = dmd.train(CONFIG, cfg, runs, stories, model(0), model(1))
        assert moved != torch.equal(network.masters.dit.head.head.weight, model(0).dit.head.head.weight)


def test_the_last_step_alone_learns_if_wanted(
    stories: Stories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: set[int | None] = set()
    roll = dmd.rollout

    def noted(model: Model, batch: Batch, noise: FreshNoise, exit_step: int | None, cfg: DMDConfig) -> Tensor:
        steps.add(exit_step)
        return roll(model, batch, noise, exit_step, cfg)

    monkeypatch.setattr(dmd, "rollout", noted)
    for exits in ("any", "last"):
        steps.clear()
        runs = settings(tmp_path / exits, steps=8, batch=1)
        dmd.train(CONFIG, DMDConfig(exits=exits), runs, stories, model(0), model(1))  # type: ignore[arg-type]
        assert steps == {3} if exits == "last" else len(steps) > 1


def test_the_anchor_alone_is_flow_matching_on_data(
    stories: Stories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With nothing to match, what an anchored student learns is what stage `next` teaches; without one, nothing."""
    monkeypatch.setattr(dmd, "student_loss", lambda trio, batch, x, draws, cfg: (x.sum() * 0, torch.tensor(1.0)))

    @torch.no_grad()
    def error(student: Model) -> float:
        draws = [Draws(9, step) for step in range(8)]
        return sum(float(dmd.anchor_loss(student, stories, each, 8, DMDConfig())) for each in draws)

    errors = {}
    for anchor in (0.0, 1.0):
        cfg, runs = DMDConfig(anchor=anchor, critic_steps=0), settings(tmp_path / str(anchor), steps=12, batch=4)
        errors[anchor] = error(dmd.train(CONFIG, cfg, runs, stories, model(0), model(1)).masters)
    before = error(model(0))
    assert errors[0.0] == pytest.approx(before, rel=1e-3)
    assert errors[1.0] < 0.9 * before


@torch.no_grad()
def test_the_teachers_answer_is_guided(batch: Batch) -> None:
    teacher, levels = model(3), torch.full((len(batch.latents),), 0.6)
    noisy = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(0))
    text = dmd.predict(teacher, batch, noisy, levels, batch.words)
    null = dmd.predict(teacher, batch, noisy, levels, teacher.null(batch.words))
    assert not torch.allclose(text, null, atol=1e-3)
    for scale in (1.0, 4.0):
        answer = dmd.guided(teacher, batch, noisy, levels, DMDConfig(guidance=scale))
        assert torch.allclose(answer, null + scale * (text - null), atol=1e-4)


def test_the_critic_has_a_clip_of_its_own(stories: Stories, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = []

    def note(masters: Model, runs: RunConfig) -> Network[Model]:
        clips.append(runs.clip)
        return network(masters, runs)

    monkeypatch.setattr(dmd, "network", note)
    for cfg in (DMDConfig(), DMDConfig(critic_clip=10.0)):
        dmd.train(CONFIG, cfg, settings(tmp_path / str(cfg.critic_clip), steps=0), stories, model(0), model(1))
    assert clips == [1.0, 1.0, 1.0, 10.0]
    released = RECIPES["wan-1.3b"].stage("stage1")
    assert (released.runs.clip, released.task.critic_clip) == (1.0, 10.0)
