"""Tiny runs of every recipe on stories made of noise: what the laws of stopping, killing and sharing work are tried on.

python tiny_training.py FOLDER 'JSON list of {"recipe": ..., "runs": {...}}'      (also under torchrun)
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from shotstream.config import PRESETS
from shotstream.data.storybook import STILLS, Stories
from shotstream.models.dit import DiT
from shotstream.pipeline import load
from shotstream.storybook.world import sample_world
from shotstream.train import dmd, ode, processes, teacher
from shotstream.train.dmd import DMDConfig
from shotstream.train.model import Model
from shotstream.train.ode import ODEConfig
from shotstream.train.run import RunConfig
from shotstream.train.sheets import Sheets
from shotstream.train.teacher import TeacherConfig

CONFIG = PRESETS["tiny"]
FRAMES = 6
DEFAULTS: dict[str, Any] = {
    "batch": 4,
    "lr": 2e-3,
    "lr_adam": 1e-3,
    "dtype": "float32",
    "warmup": 0,
    "final": 1.0,
    "log_every": 1,
    "save_every": 1e9,
    "ema": 0.5,
}


def write_stories(folder: Path, stories: int = 8) -> Path:
    """A shard of noise, of the shape and with the captions of real stories."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = [len(sample_world(seed).shots) for seed in range(stories)]
    shots, (c, h, w) = sum(counts), CONFIG.latent_shape
    random = np.random.default_rng(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.from_numpy(random.standard_normal(shape, dtype=np.float32)).bfloat16()

    tensors = {
        "latents": noise(shots, FRAMES, c, h, w),
        "stills": noise(shots, len(STILLS), c, h, w),
        "coverage": torch.randint(0, 256, (shots, FRAMES, h, w), dtype=torch.uint8),
    }
    metadata = {"seeds": json.dumps(list(range(stories))), "split": "train", "story": json.dumps(counts)}
    save_file(tensors, folder / "train-0000000.safetensors", metadata)
    return folder


def model(seed: int, config=CONFIG) -> Model:
    torch.manual_seed(seed)
    text = load("tiny").text.requires_grad_(True)
    made = Model(DiT(config.dit), text, config)
    for parameter in made.dit.parameters():  # attention that is not flat, and heads that are not zero
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    return made


def train(recipe: str, folder: Path, runs: RunConfig) -> Any:
    stories = Stories(folder, load("tiny").text)
    match recipe:
        case "teacher":
            sample = partial(teacher.sample, steps=2)
            sheets = Sheets(Path(runs.out), load("tiny").vae, stories, sample, "next", rows=2)
            return teacher.train(CONFIG, TeacherConfig(causal=0.5), runs, stories, model(0), sheets.write)
        case "ode":
            return ode.train(CONFIG, ODEConfig("guided", drop_text=0.3), runs, stories, model(0))
        case "stage1":
            return dmd.train(CONFIG, DMDConfig(critic_steps=1), runs, stories, model(0), model(1))
        case "stage2":
            cfg = DMDConfig("own", critic_steps=1, lora=2, drop_context=0.2)
            return dmd.train(CONFIG, cfg, runs, stories, model(0), model(1), load("tiny").vae)


def settings(out: Path, **more: Any) -> RunConfig:
    return RunConfig(**(DEFAULTS | {"out": str(out)} | more))


if __name__ == "__main__":
    torch.set_num_threads(1)
    processes.start()
    for job in json.loads(sys.argv[2]):
        train(job["recipe"], Path(sys.argv[1]), RunConfig(**(DEFAULTS | job["runs"])))
    processes.stop()
