"""Storybook stories as latents: rendered, encoded and written in shards; read back as training batches.

    shotstream train stage data --preset storybook --out runs

A shard is one safetensors file of 64 stories. It holds latents and single-frame latents ("stills", what the context
is made of); captions are made anew at load time from the stories' seeds, in several paraphrases.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from shotstream.data.batch import WHOLE, Batch, ContextRule, Kind, Sample, Share, collate
from shotstream.memory.policies.dual_buffer import context_picks
from shotstream.models.patch_vae import PatchVAE
from shotstream.models.text import Words
from shotstream.storybook.captions import captions
from shotstream.storybook.draw import SHOT_FRAMES, render_shot
from shotstream.storybook.world import Split, sample_world

SHARD = 64
# Every frame that the context rule can pick from a shot of 21 frames, whatever the number of shots.
STILLS = tuple(sorted({frame for shots in range(1, 7) for _, frame in context_picks([SHOT_FRAMES] * shots, 6)}))


def to_frames(pixels: np.ndarray) -> Tensor:
    """uint8 [f h w 3] -> float `f c h w` in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit_vae(vae: PatchVAE, shots: int, first_seed: int = 10_000_000) -> None:
    """Fit the linear part of the autoencoder to `shots` freshly rendered shots."""
    clips = [to_frames(render_shot(sample_world(first_seed + i), i % 2)[0]) for i in range(shots)]
    vae.fit(torch.stack(clips))


def coverage(mask: np.ndarray, patch: int) -> Tensor:
    """Share of each latent cell that the cast covers, [f h/p w/p] over latent frames, from a mask [4k+1 h w]."""
    first, rest = mask[:1], mask[1:]
    per_latent = np.concatenate([first, rest.reshape(-1, 4, *mask.shape[1:]).mean(1)])
    f, h, w = per_latent.shape
    return torch.from_numpy(per_latent.reshape(f, h // patch, patch, w // patch, patch).mean((2, 4)))


def write_shards(
    out: Path,
    vae: PatchVAE,
    stories: int,
    split: Split,
    first_seed: int = 0,
    workers: int = 1,
    share: Share = WHOLE,
) -> None:
    """Write this share of the shards of `stories` stories; those that exist are kept, so the command can be resumed."""
    out.mkdir(parents=True, exist_ok=True)
    end = first_seed + stories
    ranges = [range(start, min(start + SHARD, end)) for start in range(first_seed, end, SHARD)]
    ranges = ranges[share.rank :: share.processes]
    write = partial(_write_shard, out, vae, split)
    if workers == 1:
        _tell_every(map(write, ranges), len(ranges))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        _tell_every(pool.map(write, ranges), len(ranges))


def _tell_every(written: Iterable[None], count: int) -> None:
    """A line after every tenth shard, and after the last."""
    for number, _ in enumerate(written, 1):
        if number % 10 == 0 or number == count:
            print(f"shard {number} of {count}", flush=True)


def _write_shard(out: Path, vae: PatchVAE, split: Split, seeds: range) -> None:
    path = out / f"{split}-{seeds[0]:07d}.safetensors"
    if path.exists():
        return
    unfinished = path.with_suffix(f".{os.getpid()}")
    tensors, story = _shard(vae, split, seeds)
    save_file(tensors, unfinished, metadata={"seeds": json.dumps(list(seeds)), "split": split, "story": story})
    os.replace(unfinished, path)


def _shard(vae: PatchVAE, split: Split, seeds: range) -> tuple[dict[str, Tensor], str]:
    latents, stills, cover, shots = [], [], [], []
    for seed in seeds:
        world = sample_world(seed, split)
        shots.append(len(world.shots))
        for i in range(len(world.shots)):
            pixels, mask = render_shot(world, i, SHOT_FRAMES)
            frames = to_frames(pixels)
            latents.append(vae.encode(frames[None])[0].bfloat16())
            stills.append(vae.context_latents(frames[list(STILLS)]).bfloat16())
            cover.append((coverage(mask, vae.spatial_stride) * 255).round().to(torch.uint8))
    return {
        "latents": torch.stack(latents).contiguous(),
        "stills": torch.stack(stills).contiguous(),
        "coverage": torch.stack(cover),
    }, json.dumps(shots)


class Stories:
    """All shards of a folder, memory-mapped by safetensors and held as one table of shots."""

    def __init__(
        self,
        folder: Path,
        text: Words,
        split: Split = "train",
        paraphrases: int = 4,
        limit: int = 0,
        rule: ContextRule = ContextRule(),
        pairs: float = 0.0,
        moving: float = 0.0,
    ) -> None:
        """`pairs`, `moving`: the shares of samples that are asked to show two characters, and somebody small who moves
        (`ShotScript.is_small_motion`); the others show them as stories do.
        """
        paths = sorted(folder.glob(f"{split}-*.safetensors"))[: limit or None]
        if not paths:
            raise FileNotFoundError(f"{folder}: no {split}-*.safetensors; make them with `shotstream train stage data`")
        parts: dict[str, list[Tensor]] = {"latents": [], "stills": [], "coverage": []}
        self.seeds: list[int] = []
        counts: list[int] = []
        for path in paths:
            with safe_open(path, "pt") as shard:
                for name, tensors in parts.items():
                    tensors.append(shard.get_tensor(name))
                self.seeds += json.loads(shard.metadata()["seeds"])
                counts += json.loads(shard.metadata()["story"])
        self.latents, self.stills, self.coverage = (torch.cat(parts[n]) for n in ("latents", "stills", "coverage"))
        self.first = np.concatenate([[0], np.cumsum(counts)])  # first shot of each story
        self.rule = rule
        self.pairs, self.moving = pairs, moving
        worlds = [sample_world(seed, split) for seed in self.seeds]
        self.place = np.concatenate([np.arange(len(world.shots)) for world in worlds])  # of each shot in its story
        scripts = [script for world in worlds for script in world.shots]
        self.shows_pair = np.array([len(script.cast) == 2 for script in scripts])
        self.shows_motion = np.array([script.is_small_motion for script in scripts])
        self.words = self._words(text, split, paraphrases)

    def _words(self, text: Words, split: Split, paraphrases: int) -> Tensor:
        rows = []
        for seed in self.seeds:
            world = sample_world(seed, split)
            versions = [captions(world, seed * 1000 + i) for i in range(paraphrases)]
            for shot in range(len(world.shots)):
                rows.append([text.ids(f"{v.global_caption} {v.shots[shot]}") for v in versions])
        return torch.tensor(rows, dtype=torch.int16)  # shots, paraphrases, s

    def __len__(self) -> int:
        return len(self.seeds)

    def batch(
        self, rng: np.random.Generator, size: int, kind: Kind, history: int | None = None, share: Share = WHOLE
    ) -> Batch:
        """Draw `size` samples and read this process's share of them. kind: "image" (a shot's first latent frame),
        "shot" (a whole shot without context), "next" (a shot and its context; `history`: only shots with that many
        shots before them).
        """
        if kind == "next" and history is None and self.rule.frames != "dynamic":
            history = int(rng.integers(1, np.diff(self.first).max()))  # a batch has one number of context frames
        rows = [self._pick(rng, kind, history) for _ in range(size)]
        return self.gather(rows, rng, kind == "next", 1 if kind == "image" else None, share)

    def pick_stories(self, rng: np.random.Generator, size: int, shots: int) -> list[int]:
        """Stories of at least `shots` shots."""
        counts = np.diff(self.first)
        return [int(i) for i in rng.choice(np.flatnonzero(counts >= shots), size)]

    def gather(
        self,
        rows: Sequence[tuple[int, int]],
        rng: np.random.Generator,
        context: bool,
        frames: int | None = None,
        share: Share = WHOLE,
    ) -> Batch:
        """The batch of this share of these (story, shot) pairs; `frames`: only so many latent frames of the target."""
        told = rng.integers(self.words.shape[1], size=len(rows))  # which paraphrase
        mine = share.of(list(zip(rows, map(int, told), strict=True)))
        samples = [self._sample(story, shot, version, context, frames) for (story, shot), version in mine]
        return collate(samples, self.rule, zeros=self.rule.zeros and frames != 1)

    def _sample(self, story: int, shot: int, paraphrase: int, context: bool, frames: int | None) -> Sample:
        first = int(self.first[story])
        picks = self.rule.picks([SHOT_FRAMES] * shot) if context else ()
        shots = [s for s, _ in picks]
        return Sample(
            stills=[self.stills[first + s, STILLS.index(f)] for s, f in picks],
            shots=shots,
            target=self.latents[first + shot, :frames],
            shot=shot,
            prompts={s: self.words[first + s, paraphrase] for s in {*shots, shot}},
            coverage=self.coverage[first + shot, :frames].float() / 255,
        )

    def _pick(self, rng: np.random.Generator, kind: str, history: int | None) -> tuple[int, int]:
        """A (story, shot) for a sample of this kind, all shots that suit being as likely."""
        if kind != "next":
            suits = np.full(len(self.place), True)
        elif history is None:
            suits = self.place > 0
        else:
            suits = self.place == history
        if self.pairs or self.moving:
            drawn = rng.random()
            wanted = self.shows_pair if drawn < self.pairs else self.shows_motion
            if drawn < self.pairs + self.moving and (suits & wanted).any():
                suits = suits & wanted
        if not suits.any():
            raise ValueError(f"no story has a shot with {history or 'any'} shots before it")
        row = int(rng.choice(np.flatnonzero(suits)))
        return int(np.searchsorted(self.first, row, side="right")) - 1, int(self.place[row])
