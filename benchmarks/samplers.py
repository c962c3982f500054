"""How many steps, behind which mask: what different samplers make of the same network.

    python -m benchmarks.samplers MODEL.safetensors [...] [--shots 24] [--out samplers.json]

Shots of validation stories after their true shots, of three kinds: one who moves through a wide shot, one in any other
shot, two. Counted are shots in which everybody is recognised, and right looks and actions of all that were asked for.
"Steps" are the student's: estimate, add noise again, behind its block-causal mask ("causal") or with whole attention;
"Euler" is the teacher's sampler with guidance. If more steps are no better than few, the network's low noise levels are
its weak ones, and a student can learn nothing from them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from shotstream.data.batch import Batch, ContextRule, Sample, collate
from shotstream.evaluation.commands import VALIDATION_SEED
from shotstream.evaluation.generators import floats
from shotstream.flow import TIMESTEPS, add_noise, shift_sigma, to_x0
from shotstream.pipeline import Pipeline, load
from shotstream.session import to_uint8
from shotstream.storybook.captions import captions
from shotstream.storybook.draw import render
from shotstream.storybook.judge import judge
from shotstream.storybook.world import World, sample_world
from shotstream.train.model import Model, after, dual_buffer
from shotstream.train.recipe import RECIPES, fresh, load_weights
from shotstream.train.teacher import sample

Place = tuple[World, int]
KINDS = ("moving", "other", "pair")


def kind_of(world: World, shot: int) -> str:
    script = world.shots[shot]
    if len(script.cast) == 2:
        return "pair"
    return "moving" if script.is_small_motion else "other"


def find_shots(shots: int) -> dict[str, list[Place]]:
    """So many later shots of each kind, one per story."""
    found: dict[str, list[Place]] = {kind: [] for kind in KINDS}
    for seed in count(VALIDATION_SEED):
        world = sample_world(seed, "train")
        wanted = [(kind_of(world, k), k) for k in range(1, len(world.shots))]
        for kind, k in wanted:
            if len(found[kind]) < shots:
                found[kind].append((world, k))
                break
        if all(len(places) == shots for places in found.values()):
            return found
    raise AssertionError


def asked(places: Sequence[Place], pipeline: Pipeline, model: Model) -> Batch:
    """What the network is given: true pictures of earlier shots, and all captions."""
    config, rule = pipeline.config, ContextRule.of(dual_buffer(pipeline.config))
    samples = []
    for world, shot in places:
        told, past = captions(world), [floats(rendered.frames) for rendered in render(world)[:shot]]
        picks = rule.picks([len(frames) for frames in past])
        texts = [pipeline.prompt(told.global_caption, i, told.shots[i]) for i in range(shot + 1)]
        frames = config.chunks * config.chunk
        samples.append(
            Sample(
                stills=[pipeline.vae.context_latents(past[i][picture][None])[0] for i, picture in picks],
                shots=[i for i, _ in picks],
                target=torch.zeros(frames, *config.latent_shape),
                shot=shot,
                prompts={i: torch.tensor(model.text.ids(text)) for i, text in enumerate(texts)},
                coverage=torch.zeros(frames, *config.latent_shape[1:]),
            )
        )
    return collate(samples, rule, rule.zeros)


@torch.no_grad()
def renoised(model: Model, batch: Batch, sigmas: Sequence[float], causal: bool) -> Tensor:
    """The target by estimates and new noise, chunk after chunk behind the mask, or all at once."""
    random, (context, size) = torch.Generator().manual_seed(0), (batch.context, len(batch.latents))
    x = torch.cat((batch.latents[:, :context], torch.randn(batch.target.shape, generator=random)), dim=1)
    levels, chunk = torch.ones(batch.target.shape[:2]), model.config.chunk if causal else batch.target.shape[1]
    text, places = model.read(batch.words, batch.index), model.places(batch)
    mask = model.mask(context, x) if causal else None
    for first in range(0, batch.target.shape[1], chunk):
        part = slice(context + first, context + first + chunk)
        for i, sigma in enumerate(sigmas):
            levels[:, first : first + chunk] = sigma
            every = after(context, levels)
            times = every * TIMESTEPS if causal else model.timesteps(levels, context)
            x0 = to_x0(x, model.dit(x, times, text, places, mask=mask), every)[:, part]
            if i + 1 < len(sigmas):
                noise = torch.randn(x0.shape, generator=random)
                x0 = add_noise(x0, noise, torch.full((size,), sigmas[i + 1]))
            x[:, part] = x0
        levels[:, first : first + chunk] = 0
    return x[:, context:]


def euler(model: Model, batch: Batch, steps: int, guidance: float) -> Tensor:
    torch.manual_seed(0)
    return sample(model, batch, steps, model.config.schedule.shift, guidance)


def spread(steps: int, shift: float) -> list[float]:
    """Noise levels from 1 down to the last before 0."""
    return [float(shift_sigma(torch.tensor(1 - i / steps), shift)) for i in range(steps)]


def ways(model: Model) -> dict[str, partial[Tensor]]:
    schedule = model.config.schedule
    own = [float(sigma) for sigma in schedule.sigmas()]
    steps = {1: own[:1], 2: [1.0, 0.7], len(own): own, 16: spread(16, schedule.shift)}
    rows = {f"{n} steps, causal": partial(renoised, sigmas=s, causal=True) for n, s in steps.items()}
    rows |= {f"{n} steps, whole": partial(renoised, sigmas=s, causal=False) for n, s in steps.items()}
    return rows | {f"Euler {n}, guidance {g}": partial(euler, steps=n, guidance=g) for n in (4, 25) for g in (1.0, 2.0)}


def read(frames: Tensor, places: Sequence[Place]) -> dict[str, float]:
    """Shares of shots with everybody recognised, and of right looks and actions."""
    found, hits = [], []
    for clip, (world, shot) in zip(frames, places, strict=True):
        script, seen = world.shots[shot], judge(to_uint8(clip.clamp(-1, 1)))
        found.append(len(seen.cast) == len(script.cast))
        hits.append(seen.found and seen.action == script.action)
        order = ("centre",) if len(script.cast) == 1 else ("left", "right")
        looks = {member.position: member for member in seen.cast}
        for index, position in zip(script.cast, order, strict=True):
            for name in ("species", "colour", "hat", "shirt"):
                wanted = getattr(world.cast[index], name)
                hits.append(position in looks and getattr(looks[position], name) == wanted)
    return {"recognised": round(sum(found) / len(found), 3), "right": round(sum(hits) / len(hits), 3)}


def measure(path: Path, shots: int) -> dict[str, dict[str, dict[str, float]]]:
    """Sampler -> kind of shot -> shares."""
    pipeline, model = load(path), load_weights(fresh(RECIPES["storybook"], 0), path).eval()
    found = {kind: (places, asked(places, pipeline, model)) for kind, places in find_shots(shots).items()}
    table = {}
    for name, way in ways(model).items():
        with torch.no_grad():
            table[name] = {
                kind: read(pipeline.vae.decode(way(model, batch))[0], places) for kind, (places, batch) in found.items()
            }
        cells = (f"{kind} {row['recognised']:.2f} {row['right']:.2f}" for kind, row in table[name].items())
        print(f"{name:22}", *cells, sep="  ", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--shots", type=int, default=24, help="of each kind")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    tables = {}
    for path in options.models:
        print(path)
        tables[str(path)] = measure(path, options.shots)
    if options.out:
        options.out.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
