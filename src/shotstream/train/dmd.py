"""Self-forcing distillation: the student rolls out its own shots, DMD compares their distribution with the teacher's.

    shotstream train stage stage1 --preset storybook --out runs
    shotstream train stage stage2 --preset storybook --out runs

Stage 1 (intra-shot, paper 3.3) takes a shot's history from data; stage 2 (inter-shot) rolls a whole story and lets the
student live with its own past. They are one loop: only where the context comes from differs. The rollout is
`rollout.Roll`, the code of inference. method.md 13.4 to 13.7; corrected points of its section 17 are noted in place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shotstream.config import Config
from shotstream.data.storybook import Batch, Stories
from shotstream.flow import TIMESTEPS, add_noise, guide, to_x0
from shotstream.memory.plan import Frame
from shotstream.memory.policies.dual_buffer import context_picks
from shotstream.models.patch_vae import PatchVAE
from shotstream.rollout import Noise, Prompts, Roll, new_memory
from shotstream.storybook.draw import SHOT_FRAMES
from shotstream.train import run
from shotstream.train.run import Log, Network, Pace, RunConfig, learning_scale
from shotstream.train.teacher import Model, places


@dataclass(frozen=True)
class DMDConfig:
    """What is special to this recipe."""

    history: str = "data"  # "data" (stage 1) or "own" (stage 2)
    first_shots: float = 0.25  # stage 1: share of rollouts without context
    critic_steps: int = 2  # critic updates per student update (released: 5)
    critic_lr: float = 6e-4
    guidance: float = 2.0  # of the teacher (released: 4 in the usual convention)
    low: float = 0.02  # sigma of the comparison lies in here
    high: float = 0.98
    shift: float = 3.0


class FreshNoise:
    """Random numbers for training rollouts, kept so that a rollout can be repeated."""

    def __init__(self) -> None:
        self.drawn: dict[tuple[int, int], Tensor] = {}

    def draw(self, chunk: int, step: int, shape: tuple[int, ...]) -> Tensor:
        return self.drawn.setdefault((chunk, step), torch.randn(shape))


@dataclass
class Trio:
    """The three networks of DMD."""

    student: Network[Model]
    critic: Network[Model]
    teacher: Model


def rollout(model: Model, config: Config, batch: Batch, noise: Noise, exit_step: int | None) -> Tensor:
    """The student's shots `b f c h w` for the prompts and context of `batch`, by the code of inference."""
    context, size = batch.context, len(batch.latents)
    channels, height, width = batch.latents.shape[2:]
    shape = (channels, height, width)
    flags = batch.flags[0].tolist()
    roll = Roll(
        model.dit, config.policy, config.schedule, new_memory(model.dit, shape), Prompts(model.dit), shape
    )
    states = model.text(batch.words)
    for shot in sorted(set(flags)):
        roll.prompts.add(shot, states[batch.index[:, flags.index(shot)]])
    # A dropped context is an empty one: the shot then is the first of its story.
    roll.memory.shots = (SHOT_FRAMES,) * flags[-1] if context else ()

    def stills(frames: tuple[Frame, ...]) -> Tensor:
        assert len(frames) == context, f"{len(frames)} context frames wanted, {context} given"
        return batch.latents[:, :context]

    chunks = (len(flags) - context) // config.chunk
    shots = roll.shot(flags[-1], chunks, noise, stills, batch=size, exit_step=exit_step)
    return torch.cat(list(shots), dim=1)


def compare_at(rng: np.random.Generator, count: int, cfg: DMDConfig) -> Tensor:
    """One sigma per sample, [b]: uniform before the shift, kept away from both ends."""
    raw = torch.tensor(rng.uniform(size=count), dtype=torch.float32)
    return (cfg.shift * raw / (1 + (cfg.shift - 1) * raw)).clamp(cfg.low, cfg.high)


def predict(model: Model, batch: Batch, noisy: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
    """x0 of the target by a bidirectional network that sees the clean context (at timestep 0)."""
    context = batch.context
    x = torch.cat((batch.latents[:, :context], noisy), dim=1)
    sigmas = sigma[:, None].expand(x.shape[:2]).clone()
    sigmas[:, :context] = 0
    where = places(model.dit, batch.positions, batch.flags, x.shape)
    velocity = model.dit(x, sigmas * TIMESTEPS, model.read(words, batch.index), where)
    return to_x0(x, velocity, sigmas)[:, context:]


def student_loss(trio: Trio, batch: Batch, x: Tensor, rng: np.random.Generator, cfg: DMDConfig) -> Tensor:
    """Distribution matching: move x along (critic - teacher), normalised by the teacher's distance."""
    with torch.no_grad():
        sigma = compare_at(rng, len(x), cfg).to(x.device)
        noisy = add_noise(x, torch.randn_like(x), sigma)
        fake = predict(trio.critic.compute, batch, noisy, sigma, batch.words)
        text = predict(trio.teacher, batch, noisy, sigma, batch.words)
        null = predict(trio.teacher, batch, noisy, sigma, torch.zeros_like(batch.words))
        real = guide(text, null, cfg.guidance)
        scale = (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
        gradient = torch.nan_to_num((fake - real) / scale)
    return 0.5 * (x.double() - (x - gradient).detach().double()).square().mean()


def critic_loss(trio: Trio, batch: Batch, x: Tensor, rng: np.random.Generator, cfg: DMDConfig) -> Tensor:
    """Flow matching of the critic on the student's shots, in velocity."""
    sigma = compare_at(rng, len(x), cfg).to(x.device)
    noise = torch.randn_like(x)
    x0 = predict(trio.critic.compute, batch, add_noise(x, noise, sigma), sigma, batch.words)
    # velocity error = x0 error / sigma; below .3 the weight stops rising, as in the teacher's loss
    return ((x0 - x).square().mean((1, 2, 3, 4)) / sigma.clamp(min=0.3).square()).mean()


def from_data(stories: Stories, rng: np.random.Generator, size: int, cfg: DMDConfig) -> Batch:
    """Stage 1: a shot and the real frames of earlier shots; one number of earlier shots per batch."""
    if rng.random() < cfg.first_shots:
        return stories.batch(rng, size, "shot")
    return stories.batch(rng, size, "next", history=int(rng.integers(1, 5)))


class OwnHistory:
    """Stage 2: whole stories, each shot's context made of the student's own earlier shots."""

    def __init__(self, stories: Stories, vae: PatchVAE, size: int) -> None:
        self.stories, self.vae, self.size = stories, vae, size
        self.shot = 0
        self.shots = 0
        self.rows: list[int] = []
        self.stills: dict[tuple[int, int], Tensor] = {}

    def next(self, rng: np.random.Generator) -> Batch:
        """The batch for the present shot of the stories being rolled."""
        if self.shot >= self.shots:
            self.shots = int(rng.integers(2, 6))
            self.rows = self.stories.pick_stories(rng, self.size, self.shots)
            self.shot, self.stills = 0, {}
        rows = [(story, self.shot) for story in self.rows]
        batch = self.stories.gather(rows, rng, context=self.shot > 0)
        if self.shot == 0:
            return batch
        picks = context_picks((SHOT_FRAMES,) * self.shot)
        own = torch.stack([self.stills[pick] for pick in picks], dim=1)
        return replace(batch, latents=torch.cat((own, batch.latents[:, batch.context :]), dim=1))

    @torch.no_grad()
    def advance(self, latents: Tensor) -> None:
        """Add the shot just made (the full few-step output, never a random exit step's) to the history."""
        frames, _ = self.vae.decode(latents.cpu())
        for pick in {f for n in range(1, 6) for _, f in context_picks((SHOT_FRAMES,) * n)}:
            self.stills[self.shot, pick] = self.vae.context_latents(frames[:, pick].clamp(-1, 1))
        self.shot += 1


def batches(
    stories: Stories, cfg: DMDConfig, rng: np.random.Generator, size: int, vae: PatchVAE | None
) -> Iterator[tuple[Batch, Callable[[Tensor], None] | None]]:
    """Endless rollout jobs, and what wants to know the finished shot (stage 2)."""
    if cfg.history == "data":
        while True:
            yield from_data(stories, rng, size, cfg), None
    if vae is None:
        raise ValueError("history=own decodes the student's shots: give the trained autoencoder")
    own = OwnHistory(stories, vae, size)
    while True:
        yield own.next(rng), own.advance


def train(
    model: Config,
    cfg: DMDConfig,
    runs: RunConfig,
    stories: Stories,
    student: Model,
    teacher: Model,
    vae: PatchVAE | None = None,
    sheet: run.Sheet | None = None,
) -> Network[Model]:
    """Train until `runs.steps` updates (student and critic together); resumes from `runs.out`."""
    rank, _ = run.start_processes()
    out = Path(runs.out)
    rng = run.seed_everything(runs.seed, rank)
    log = Log(out, enabled=rank == 0)
    student.text.requires_grad_(False)
    teacher.text.requires_grad_(False)
    critic_runs = replace(runs, lr=cfg.critic_lr, lr_adam=cfg.critic_lr / 3)
    trio = Trio(Network(student, runs), Network(copy.deepcopy(teacher), critic_runs), teacher.to(runs.device))
    step = 0
    if state := run.resume(out / "checkpoint.pt"):
        trio.student.load_state_dict(state["network"])
        trio.critic.load_state_dict(state["critic"])
        run.restore_random_state(rng, state["random"], rank)
        step = state["step"]
    run.write_config(out, model=model, recipe=cfg, run=runs)
    pace = Pace(runs)
    jobs = batches(stories, cfg, rng, runs.batch, vae)
    levels = len(model.schedule.steps)
    while step < runs.steps:
        batch, finished = next(jobs)
        batch = batch.to(runs.device)
        exit_step, noise = int(rng.integers(levels)), FreshNoise()
        learn = step % (cfg.critic_steps + 1) == 0
        with torch.set_grad_enabled(learn):
            x = rollout(trio.student.compute, model, batch, noise, exit_step)
        if learn:
            value, network = student_loss(trio, batch, x, rng, cfg), trio.student
        else:
            value, network = critic_loss(trio, batch, x, rng, cfg), trio.critic
        value.backward()
        network.step(learning_scale(step, runs))
        if finished:
            with torch.no_grad():
                finished(rollout(trio.student.compute, model, batch, noise, None))
        step += 1
        pace.add(value.item(), "loss_student" if learn else "loss_critic")
        if step % runs.log_every == 0:
            log.write(step=step, **pace.read(step))
        if rank == 0 and sheet and step % runs.sheet_every == 0:
            sheet(trio.student.ema, step)
        if rank == 0 and (pace.save_due() or step == runs.steps):
            run.save(
                out / "checkpoint.pt",
                {
                    "network": trio.student.state_dict(),
                    "critic": trio.critic.state_dict(),
                    "random": run.random_state(rng),
                    "step": step,
                },
            )
    return trio.student
