"""Where a teacher learns: its x0 error at each noise level, with its context, with another story's, and without text.

    python -m benchmarks.levels MODEL.safetensors [...] [--stories 32] [--out levels.json]

Squared error of the target's latents over the cells that the cast covers, on the last shots of test stories, all with
the same noise. Where the three columns agree, the picture itself tells the network everything, and nothing about text
or memory can be learned there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

from shotstream.data.storybook import Stories, write_shards
from shotstream.evaluation.commands import TEST_SEED
from shotstream.flow import TIMESTEPS, add_noise, to_x0
from shotstream.models.patch_vae import PatchVAE
from shotstream.pipeline import load
from shotstream.train.model import after
from shotstream.train.recipe import RECIPES, fresh, load_weights

LEVELS = (0.3, 0.5, 0.7, 0.85, 0.95, 1.0)


@torch.no_grad()
def errors(path: Path, stories: int) -> dict[str, list[float]]:
    """Level -> x0 error [with context, with another story's context, without text]."""
    model = load_weights(fresh(RECIPES["storybook"], 0), path).eval()
    vae = load(path).vae
    assert isinstance(vae, PatchVAE)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), vae, stories, "train", TEST_SEED)
        batch = Stories(Path(folder), model.text).batch(np.random.default_rng(0), stories, "next")
    n, cast = batch.context, (batch.coverage > 0).float()
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    others = batch.latents.clone()
    others[:, :n] = others[:, :n].roll(1, dims=0)
    table: dict[str, list[float]] = {}
    for level in LEVELS:
        sigmas = after(n, torch.full((stories, batch.latents.shape[1] - n), level))
        row = []
        for latents, words in (
            (batch.latents, batch.words),
            (others, batch.words),
            (batch.latents, torch.zeros_like(batch.words)),
        ):
            x = add_noise(latents, noise, sigmas)
            text = model.read(words, batch.index)
            velocity = model.dit(x, sigmas * TIMESTEPS, text, model.places(batch))
            error = (to_x0(x, velocity, sigmas) - batch.latents)[:, n:].square().mean(2)
            row.append(round(float((error * cast).sum() / cast.sum()), 3))
        table[str(level)] = row
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--stories", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tables = {str(path): errors(path, options.stories) for path in options.models}
    for path, table in tables.items():
        print(f"{path}\nsigma  context  other's  no text")
        for level, row in table.items():
            print(f"{level:>5}  " + "  ".join(f"{value:7.3f}" for value in row))
    if options.out:
        options.out.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
