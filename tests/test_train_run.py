"""Laws of the bookkeeping: random numbers belong to samples, checkpoints appear whole, logs can be read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_training import CONFIG, FRAMES, model, settings, train, write_stories

from shotstream.data.batch import Share
from shotstream.data.storybook import Stories
from shotstream.errors import Failure
from shotstream.pipeline import load
from shotstream.storybook.draw import Rendered
from shotstream.storybook.world import ShotScript, World, sample_world
from shotstream.train import autoencoder, checkpoint, ode, teacher
from shotstream.train.checkpoint import File
from shotstream.train.draws import Draws
from shotstream.train.muon import Muon
from shotstream.train.network import Network
from shotstream.train.ode import ODEConfig, Pairs
from shotstream.train.run import Log, RunConfig, learning_scale
from shotstream.train.teacher import TeacherConfig


def test_processes_share_the_noise_and_the_decisions_of_one() -> None:
    whole = Draws(3, 5)
    halves = [Draws(3, 5, Share(rank, 2)) for rank in range(2)]
    for _ in range(2):  # the second call draws other numbers
        noise = whole.noise((4, 2, 3))
        assert torch.equal(torch.cat([half.noise((2, 2, 3)) for half in halves]), noise)
        assert torch.equal(torch.cat([half.uniform(2, 3) for half in halves]), whole.uniform(4, 3))
        assert torch.equal(torch.cat([half.normal(1.0, 2.0, 2) for half in halves]), whole.normal(1.0, 2.0, 4))
        assert torch.equal(torch.cat([half.integers(9, 2, 3) for half in halves]), whole.integers(9, 4, 3))
        assert {half.rng.random() for half in halves} == {whole.rng.random()}


def test_noise_is_normal_and_never_the_same() -> None:
    draws = Draws(0)
    parts = [draws.noise((3, 4000)), draws.noise((3, 4000)), Draws(0, 1).noise((3, 4000)), Draws(1).noise((3, 4000))]
    rows = torch.cat(parts)
    assert abs(float(rows.mean())) < 0.02 and abs(float(rows.std()) - 1) < 0.02
    correlations = torch.corrcoef(rows) - torch.eye(len(rows))
    assert float(correlations.abs().max()) < 0.08


def test_parts_of_a_share_have_the_numbers_of_the_whole() -> None:
    half = Draws(3, 5, Share(1, 2))
    parts = half.parts(2)
    for _ in range(2):
        noise = half.noise((4, 3))
        assert torch.equal(torch.cat([part.noise((2, 3)) for part in parts]), noise)
        assert torch.equal(torch.cat([part.uniform(2) for part in parts]), half.uniform(4))
        assert {part.rng.random() for part in parts} == {half.rng.random()}
    assert [part.part.of(["a", "b"]) for part in parts] == [["a"], ["b"]]


@pytest.mark.parametrize("recipe", ["stage1", "stage2"])
def test_working_in_parts_changes_nothing(recipe: str, tmp_path: Path) -> None:
    """Stage 2 is stopped in the middle of a story, and goes on with another number of parts."""
    folder = write_stories(tmp_path / "stories")

    def run(name: str, steps: int, parts: int) -> dict[str, torch.Tensor]:
        runs = settings(tmp_path / name, steps=steps, accumulate=parts, optimizer="adamw", clip=1e9)
        return train(recipe, folder, runs).masters.state_dict()

    start, whole = run("none", 0, 1), run("whole", 5, 1)
    run("parts", 3, 2)
    in_parts = run("parts", 5, 4)
    moved = max(float((whole[n] - start[n]).abs().max()) for n in whole)
    apart = max(float((whole[n] - in_parts[n]).abs().max()) for n in whole)
    assert moved > 1e-3 and apart < 0.02 * moved


def test_a_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(torch.nn.Linear(2, 2), RunConfig(dtype="float32"))
    file = File(tmp_path)
    file.write({"network": network}, 1)

    def cut_short(state: object, out: object) -> None:
        out.write(b"half of it")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(OSError, match="No space"):
        file.write({"network": network}, 2)
    assert file.read({"network": network}) == 1
    assert checkpoint.newest_folder(tmp_path / "none") is None


def test_an_unfinished_folder_is_no_checkpoint(tmp_path: Path) -> None:
    for name, whole in (("00000002", True), ("00000010", False), ("notes", True)):
        (tmp_path / name).mkdir()
        if whole:
            (tmp_path / name / ".metadata").touch()
    assert checkpoint.newest_folder(tmp_path) == tmp_path / "00000002"


def test_logs_and_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = write_stories(tmp_path / "stories")
    train("teacher", folder, settings(tmp_path / "run", steps=4, log_every=2, tensorboard=True))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4] and lines[-1]["eta_min"] == 0
    assert all(line["samples_per_s"] > 0 and line["norm"] > 0 for line in lines)
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_wanted_curves_without_tensorboard_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(Failure, match=r"pip install 'shotstream\[train\]'"):
        Log(tmp_path, tensorboard=True)


def test_learning_rates_rise_and_fall() -> None:
    config = RunConfig(steps=110, warmup=10, final=0.1)
    scales = [learning_scale(step, config) for step in range(111)]
    assert (
        scales[0] == 0.1 and scales[9] == 1 and scales[60] == pytest.approx(0.55) and scales[110] == pytest.approx(0.1)
    )


def test_the_average_follows_the_masters(tmp_path: Path) -> None:
    network = Network(
        torch.nn.Linear(1, 1, bias=False), RunConfig(dtype="float32", optimizer="adamw", ema=0.9, lr_adam=1.0)
    )
    values = [network.masters.weight.item()]
    for _ in range(30):
        network.compute.weight.grad = torch.ones(1, 1)
        network.step(1.0)
        values.append(network.masters.weight.item())
        assert torch.equal(network.compute.weight, network.masters.weight)
    expected = values[0]
    for update, value in enumerate(values[1:], 1):
        decay = min(0.9, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
    assert network.ema.weight.item() == pytest.approx(expected, rel=1e-5)


def test_muon_cannot_be_sharded() -> None:
    with pytest.raises(ValueError, match=r"adamw with runs\.shard=true"):
        Network(torch.nn.Linear(2, 2), RunConfig(shard=True))


def test_pairs_are_shared_and_kinds_are_not_mixed(tmp_path: Path) -> None:
    stories = Stories(write_stories(tmp_path / "stories"), load("tiny").text)
    cfg = ODEConfig(euler_steps=4, first_shots=0.5)
    ode.write_pairs(tmp_path / "pairs", model(0), stories, CONFIG, cfg, shards=6, size=2)
    pairs = Pairs(tmp_path / "pairs")
    assert set(pairs.shapes) == {(0, 6), (6, 6)} and pairs.size == 2
    for step in range(4):
        whole, states = pairs.batch(Draws(0, step), 8)
        halves = [pairs.batch(Draws(0, step, Share(rank, 2)), 8) for rank in range(2)]
        assert len(states) == 8 and torch.equal(torch.cat([s for _, s in halves]), states)
        assert torch.equal(torch.cat([b.words[b.index] for b, _ in halves]), whole.words[whole.index])
        assert torch.equal(torch.cat([b.latents for b, _ in halves]), whole.latents)


def test_batches_are_shared(tmp_path: Path) -> None:
    stories = Stories(write_stories(tmp_path / "stories"), load("tiny").text)
    whole = stories.batch(np.random.default_rng(1), 4, "next")
    halves = [stories.batch(np.random.default_rng(1), 4, "next", share=Share(rank, 2)) for rank in range(2)]
    assert torch.equal(torch.cat([h.latents for h in halves]), whole.latents)
    assert torch.equal(torch.cat([h.words[h.index] for h in halves]), whole.words[whole.index])


def is_pair(script: ShotScript) -> bool:
    return len(script.cast) == 2


def is_small_motion(script: ShotScript) -> bool:
    return script.framing == "wide" and script.action in ("walk", "jump", "dance")


@pytest.mark.parametrize(("asked", "shows"), [("pairs", is_pair), ("moving", is_small_motion)])
def test_what_is_hard_is_shown_more_often_when_asked_for(
    tmp_path: Path, asked: str, shows: Callable[[ShotScript], bool]
) -> None:
    folder = write_stories(tmp_path / "stories", stories=40)
    rng = np.random.default_rng(0)
    rates = []
    for share in (0.0, 0.5):
        stories = Stories(folder, load("tiny").text, **{asked: share})
        chosen = [stories._pick(rng, "next", None) for _ in range(400)]
        assert all(0 < shot < len(sample_world(stories.seeds[story]).shots) for story, shot in chosen)
        rates.append(np.mean([shows(sample_world(stories.seeds[s]).shots[n]) for s, n in chosen]))
    usual = rates[0]
    assert rates[1] == pytest.approx(0.5 + 0.5 * usual, abs=0.1) and usual < 0.4


def test_the_autoencoder_sees_more_of_what_moves_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[ShotScript] = []

    def note(world: World, shot: int) -> Rendered:
        drawn.append(world.shots[shot])
        return Rendered(np.zeros((5, 32, 32, 3), np.uint8), np.zeros((5, 32, 32), np.bool_))

    monkeypatch.setattr(autoencoder, "render_shot", note)
    rates = []
    for share in (0.0, 0.5):
        drawn.clear()
        autoencoder.batch(np.random.default_rng(0), 300, 0, moving=share)
        rates.append(np.mean([is_small_motion(script) for script in drawn]))
    assert rates[0] < 0.4 and rates[1] == pytest.approx(0.5 + 0.5 * rates[0], abs=0.1)


def test_a_history_that_no_story_has(tmp_path: Path) -> None:
    stories = Stories(write_stories(tmp_path / "stories"), load("tiny").text)
    with pytest.raises(ValueError, match="no story has a shot with 9 shots before it"):
        stories.batch(np.random.default_rng(1), 4, "next", history=9)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_muon_moves_as_the_library_does_but_for_its_rounding(shape: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=random) for _ in range(3)]
    mine, theirs = ([torch.nn.Parameter(t.clone()) for t in start] for _ in range(2))
    optimizers = Muon(mine, 0.1, weight_decay=0.5), torch.optim.Muon(theirs, 0.1, momentum=0.95, weight_decay=0.5)
    for _ in range(3):
        for pair in zip(mine, theirs, strict=True):
            gradient = torch.randn(shape, generator=random)
            for parameter in pair:
                parameter.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, before in zip(mine, theirs, start, strict=True):
        assert (a - b).norm() < 0.04 * (a - before).norm()  # bf16 has eight bits


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"not parameters of shape \[3\]"):
        Muon([torch.nn.Parameter(torch.zeros(3))], 0.1)


def test_a_level_that_weighs_nothing_leaves_no_hole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released grid gives its first level no weight: a part of a batch may hold nothing else."""
    stories = Stories(write_stories(tmp_path / "stories"), load("tiny").text)
    zeros = torch.zeros(1, FRAMES)
    monkeypatch.setattr(teacher, "shot_sigmas", lambda *_: (zeros + 1, zeros))
    value = teacher.loss(model(0), stories.batch(np.random.default_rng(0), 1, "shot"), Draws(0), TeacherConfig())
    assert value == 0


def test_pairs_of_two_lengths_are_not_mixed(tmp_path: Path) -> None:
    stories = Stories(write_stories(tmp_path / "stories"), load("tiny").text)
    cfg, short = ODEConfig(euler_steps=4, first_shots=0.0), tmp_path / "pairs" / "pairs-00009.safetensors"
    ode.write_pairs(tmp_path / "pairs", model(0), stories, CONFIG, cfg, shards=1, size=2)
    tensors = load_file(tmp_path / "pairs" / "pairs-00000.safetensors")
    ends = {"states": 2, "positions": 1, "flags": 1, "index": 1, "coverage": 1}  # the axis of frames
    kept = {n: t.narrow(ends[n], 0, t.shape[ends[n]] - 3) if n in ends else t for n, t in tensors.items()}
    save_file({name: tensor.contiguous() for name, tensor in kept.items()}, short, {"zeros": "False"})
    pairs = Pairs(tmp_path / "pairs")
    assert set(pairs.shapes) == {(6, 6), (6, 3)}
    assert {pairs.batch(Draws(0, step), 4)[1].shape[2] for step in range(8)} == {3, 6}
