"""The recipe from Wan's weights, at a tiny size: from video files to an exported student and its adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from shotstream.checkpoints import ModelError, dit_network, read_lora, recognise, state, write_tensors
from shotstream.config import PRESETS, UMT5Config, WanVAEConfig, WordsConfig
from shotstream.data.clips import Clip, Shot
from shotstream.data.latents import write_latents
from shotstream.models.dit import DiT
from shotstream.models.text import Words
from shotstream.models.vae import VAE, VAEConfig
from shotstream.pipeline import Pipeline
from shotstream.storybook.captions import VOCABULARY, tokenize
from shotstream.train import lora
from shotstream.train.checkpoint import averaged_weights
from shotstream.train.recipe import RECIPES, PairsConfig, Recipe, Stage, export, fresh, load_weights, run_stage
from shotstream.video import VideoWriter

WAN = PRESETS["wan-1.3b"]
CONFIG = dataclasses.replace(
    WAN,
    height=32,
    width=48,
    chunks=2,
    dit=dataclasses.replace(WAN.dit, dim=48, ffn_dim=64, heads=2, layers=2, text_dim=32),
    vae=WanVAEConfig(base_dim=4, latent_channels=16),
    text=UMT5Config(length=24, dim=32),
)


def tiny(stage: Stage) -> Stage:
    task = stage.task
    if isinstance(task, PairsConfig):
        task = dataclasses.replace(task, shards=4)
    if stage.name == "stage2":
        task = dataclasses.replace(task, lora=4)
    runs = dataclasses.replace(stage.runs, steps=2, batch=2, device="cpu", shard=False, lr_adam=1e-3, log_every=1)
    return dataclasses.replace(stage, task=task, runs=runs)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    released = RECIPES["wan-1.3b"]
    return dataclasses.replace(released, config=CONFIG, stages=tuple(map(tiny, released.stages)))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the guide has it: clips in shards, Wan's DiT, Wan's VAE."""
    root = tmp_path_factory.mktemp("wan")
    with VideoWriter(root / "film.mp4", 16, (48, 32)) as video:
        video.begin_shot("all")
        video.write(np.random.default_rng(0).integers(0, 255, (66, 32, 48, 3), dtype=np.uint8))
    shots = tuple(Shot(f"shot {i}", 22 * i, 22 * i + 22) for i in range(3))
    torch.manual_seed(0)
    vae = VAE(VAEConfig(base_dim=4, latent_channels=16)).eval()
    dit = DiT(CONFIG.dit)
    for network in (dit, vae):
        for parameter in network.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.1)
    text = Words(WordsConfig(dim=32, heads=2, length=24), VOCABULARY, tokenize)
    write_latents(
        root / "data", [Clip(root / "film.mp4", "a film", shots)] * 4, Pipeline(CONFIG, dit, vae, text), "red"
    )
    write_tensors(root / "base.safetensors", dit.state_dict(), {})
    torch.save(vae.state_dict(), root / "vae.pth")
    return root


@pytest.mark.slow
def test_from_clips_to_a_student_with_adapters(recipe: Recipe, root: Path, tmp_path: Path) -> None:
    base = {f"dit.{name}": value for name, value in weights_in(root / "base.safetensors").items()}
    for name in ("next", "pairs", "ode", "stage1", "stage2"):
        shots = ["task.shots=3"] if name.startswith("stage") else []
        run_stage(recipe, name, root, shots)
    learned = averaged_weights(root / "next")
    assert all(torch.equal(learned[name], base[name]) == ("self_attn" not in name) for name in base)
    assert any(not torch.equal(averaged_weights(root / "ode")[name], learned[name]) for name in base)
    student = export(recipe, "stage2", root, tmp_path / "student.safetensors")
    merged = lora.merged(averaged_weights(root / "stage2"))
    exported = weights_in(student)
    assert exported.keys() == {name.removeprefix("dit.") for name in merged}
    assert all(torch.equal(value.bfloat16(), merged[f"dit.{name}"].bfloat16()) for name, value in exported.items())
    adapters = read_lora(tmp_path / "student.lora" / "adapter_model.safetensors", dit_network(CONFIG.dit))
    before = load_weights(fresh(recipe, 0), root / "stage1").dit.state_dict()
    changed = {name: adapters.merged(name, value) for name, value in before.items()}
    assert all(torch.allclose(value, merged[f"dit.{name}"], atol=1e-6) for name, value in changed.items())
    assert any(not torch.equal(changed[name], before[name]) for name in before)


def weights_in(path: Path) -> dict[str, torch.Tensor]:
    return state(recognise([path], [dit_network(CONFIG.dit)]), torch.float32, "cpu")


@pytest.mark.slow
def test_what_is_missing_is_named(recipe: Recipe, root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="cache-latents"):
        run_stage(recipe, "next", tmp_path, [])
    (tmp_path / "data").symlink_to(root / "data")
    with pytest.raises(ModelError, match=r"base\.safetensors: no such file"):
        run_stage(recipe, "next", tmp_path, [])
    (tmp_path / "base.safetensors").symlink_to(root / "base.safetensors")
    for name in ("next", "ode", "stage1"):
        (tmp_path / name).symlink_to(root / "next")
    with pytest.raises(FileNotFoundError, match=r"vae\.safetensors: link Wan's VAE there"):
        run_stage(recipe, "stage2", tmp_path, [])
    (tmp_path / "vae.pth").symlink_to(root / "vae.pth")
    with pytest.raises(ValueError, match=r"no clip has [45] shots; lower task\.shots"):
        run_stage(recipe, "stage2", tmp_path, ["runs.steps=20"])
