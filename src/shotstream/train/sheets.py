"""Contact sheets of a model while it learns: the same few stories again and again, one row per story."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from shotstream.data.batch import Batch, Kind, Source
from shotstream.pipeline import VAE
from shotstream.session import to_uint8
from shotstream.train import processes
from shotstream.train.model import Model

Sample = Callable[[Model, Batch], Tensor]
"""How a recipe generates: the target latents `b f c h w` of a batch."""

COLUMNS = 4


class Sheets:
    """Writes `<out>/sheets/<step>.png`: context (if any) left, generated frames right."""

    def __init__(
        self, out: Path, vae: VAE, stories: Source, sample: Sample, kind: Kind, rows: int = 6, device: str = "cpu"
    ) -> None:
        """`device`: where `vae` is."""
        self.device = device
        self.folder = out / "sheets"
        self.vae, self.sample = vae, sample
        history = 1 if kind == "next" else None  # a rollout's samples have one number of shots before them
        self.batch = stories.batch(np.random.default_rng(1), rows, kind, history)

    @torch.no_grad()
    def write(self, model: Model, step: int) -> None:
        """The same prompts, history and noise at every step; the training's random numbers are left alone."""
        with torch.random.fork_rng():
            torch.manual_seed(1)
            latents = self.sample(model, self.batch.to(model.dit.device)).cpu()
        if not processes.leads():  # a sharded network samples in all processes
            return
        context = self.batch.latents[:, : self.batch.context : 2]
        rows = [
            np.concatenate([*(self._frames(still[None])[0] for still in past), *self._some(made)], axis=1)
            for past, made in zip(context, latents, strict=True)
        ]
        self.folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(rows)).save(self.folder / f"{step:06d}.png")

    def _some(self, latents: Tensor) -> list[np.ndarray]:
        frames = self._frames(latents)
        return [frames[round(i)] for i in np.linspace(0, len(frames) - 1, min(COLUMNS, len(frames)))]

    def _frames(self, latents: Tensor) -> np.ndarray:
        frames, _ = self.vae.decode(latents[None].to(self.device))
        return to_uint8(frames[0].clamp(-1, 1).cpu())
