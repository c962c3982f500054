"""Self-forcing distillation: the student rolls out its own shots, DMD compares their distribution with the teacher's.

    shotstream train stage stage1 --preset storybook --out runs
    shotstream train stage stage2 --preset storybook --out runs

Stage 1 (intra-shot, paper 3.3) takes a shot's history from data; stage 2 (inter-shot) rolls a whole story and lets the
student live with its own past. They are one loop: only where the context comes from differs. The rollout is
`rollout.Roll`, the code of inference. method.md 13.4 to 13.7; corrected points of its section 17 are noted in place.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from shotstream.config import Config
from shotstream.data.batch import Batch, ContextRule, Source
from shotstream.flow import add_noise, guide, shift_sigma, to_x0
from shotstream.memory.plan import Frame
from shotstream.pipeline import VAE
from shotstream.rollout import Noise, Prompts, Roll, new_memory
from shotstream.train import lora, processes
from shotstream.train.draws import Draws
from shotstream.train.model import Model, after, dual_buffer
from shotstream.train.network import Network, frozen, network
from shotstream.train.released import NoisyCommits, straight_through
from shotstream.train.run import Job, RunConfig, Sheet, learning_scale
from shotstream.train.teacher import TeacherConfig
from shotstream.train.teacher import loss as teacher_loss


@dataclass(frozen=True)
class DMDConfig:
    """What is special to this recipe. What the release does otherwise is in brackets."""

    history: Literal["data", "own"] = "data"  # stage 1 or stage 2
    first_shots: float = 0.25  # stage 1: share of rollouts without context
    drop_context: float = 0.0  # stage 2: share of later shots that lose theirs (0.1)
    critic: Literal["teacher", "stage"] = "teacher"  # what it begins as; "stage": the critic of the stage before
    critic_first: int = 0  # critic updates before the student moves: it begins as the teacher and sees no difference
    critic_steps: int = 5  # then, critic updates per student update (5)
    critic_lr: float = 6e-4  # of Muon, as in RunConfig
    critic_lr_adam: float = 2e-4  # of AdamW
    critic_optimizer: Literal["", "muon", "adamw"] = ""  # default: the student's
    critic_clip: float = 0.0  # largest norm of its gradient; 0: the student's (10)
    critic_average: float = 0.0  # decay of the averaged critic that judges the student; 0: the critic as it is (0)
    guidance: float = 2.0  # of the teacher (4 in the usual convention)
    low: float = 0.02  # sigma of the comparison lies in here
    high: float = 0.98
    shift: float = 3.0
    exits: Literal["any", "last"] = "any"  # steps that learn, one per rollout; "last": what is shown is what is matched
    anchor: float = 0.0  # weight of flow matching on data behind the mask, beside the student's loss (0)
    sigma_floor: float = 0.3  # of the critic's weight 1 / sigma^2; 0: unweighted in velocity (0)
    lora: int = 0  # rank of adapters for student and critic; 0: everything learns (stage 2: 256)
    shots: int = 5  # stage 2: longest story that is rolled
    past: Literal["whole", "exit"] = "whole"  # stage 2's history: full few-step output, or the exit step's x0 ("exit")
    straight_through: bool = False  # let gradients into earlier chunks' keys and values (true)
    commit_noise: float = 0.0  # sigma of noise added to a chunk as it is committed (0.00794)


class FreshNoise:
    """Random numbers for training rollouts, kept so that a rollout can be repeated."""

    def __init__(self, draws: Draws) -> None:
        self.draws = draws
        self.drawn: dict[tuple[int, int], Tensor] = {}

    def draw(self, chunk: int, step: int, shape: tuple[int, ...]) -> Tensor:
        if (chunk, step) not in self.drawn:
            self.drawn[chunk, step] = self.draws.noise(shape)
        return self.drawn[chunk, step]


ANCHOR = TeacherConfig("next", drop_text=0.0, causal=1.0, sigma_mean=2.1, sigma_deviation=1.6, cast_weight=5.0)
"""How `DMDConfig.anchor` asks: as the storybook recipe's stage `next` does, always behind the mask."""


@dataclass
class Trio:
    """The three networks of DMD."""

    student: Network[Model]
    critic: Network[Model]
    teacher: Model


def rollout(model: Model, batch: Batch, noise: Noise, exit_step: int | None, cfg: DMDConfig = DMDConfig()) -> Tensor:
    """The student's shots `b f c h w` for the prompts and context of `batch`, by the code of inference."""
    config, context, size = model.config, batch.context, len(batch.latents)
    channels, height, width = batch.latents.shape[2:]
    shape = (channels, height, width)
    memory, prompts = new_memory(model.dit, shape), Prompts(model.dit)
    roll = Roll(model.dit, config.policy, config.schedule, memory, prompts, shape)
    if cfg.commit_noise:
        roll = NoisyCommits(**vars(roll), sigma=cfg.commit_noise, noise=noise)
    if cfg.straight_through:
        straight_through(memory)
    states = model.text(batch.words)
    shots = [batch.finished] * batch.latents.shape[1] if batch.zeros else batch.flags[0].tolist()
    for shot in sorted(set(shots)):
        prompts.add(shot, states[batch.index[:, shots.index(shot)]])
    # A dropped context is an empty one: the shot then is the first of its story.
    memory.shots = (config.shot_frames(),) * batch.finished

    def stills(frames: tuple[Frame, ...]) -> Tensor:
        assert len(frames) == context, f"{len(frames)} context frames wanted, {context} given"
        return batch.latents[:, :context]

    chunks = (len(shots) - context) // config.chunk
    rolled = roll.shot(batch.finished, chunks, noise, stills, batch=size, exit_step=exit_step)
    return torch.cat(list(rolled), dim=1)


def compare_at(draws: Draws, count: int, cfg: DMDConfig) -> Tensor:
    """One sigma per sample, [b]: uniform before the shift, kept away from both ends."""
    return shift_sigma(draws.uniform(count), cfg.shift).clamp(cfg.low, cfg.high)


def predict(model: Model, batch: Batch, noisy: Tensor, sigma: Tensor, words: Tensor) -> Tensor:
    """x0 of the target by a bidirectional network that sees the clean context."""
    x = torch.cat((batch.latents[:, : batch.context], noisy), dim=1)
    levels = sigma[:, None].expand(noisy.shape[:2])
    index = batch.index if len(words) == len(batch.words) else torch.zeros_like(batch.index)
    text = model.read(words, index)
    velocity = model.dit(x, model.timesteps(levels, batch.context), text, model.places(batch))
    return to_x0(x, velocity, after(batch.context, levels))[:, batch.context :]


def guided(teacher: Model, batch: Batch, noisy: Tensor, sigma: Tensor, cfg: DMDConfig) -> Tensor:
    """The teacher's x0 of the target, with guidance."""
    text = predict(teacher, batch, noisy, sigma, batch.words)
    if cfg.guidance == 1:
        return text
    null = predict(teacher, batch, noisy, sigma, teacher.null(batch.words))
    return guide(text, null, cfg.guidance)


def student_loss(trio: Trio, batch: Batch, x: Tensor, draws: Draws, cfg: DMDConfig) -> tuple[Tensor, Tensor]:
    """Distribution matching: move x along (critic - teacher), normalised by the teacher's distance.

    Also returns how far the critic can be trusted, a number without gradient. Critic and teacher both estimate x; the
    share of critic - teacher that leads from the teacher's estimate to x is 1 for a perfect critic, less if there is
    noise in it, nothing if it is all noise, and more than 1 if the critic lags behind the student.
    """
    critic = trio.critic.ema if cfg.critic_average else trio.critic.compute
    with torch.no_grad():
        sigma = compare_at(draws, len(x), cfg).to(x.device)
        noisy = add_noise(x, draws.noise(tuple(x.shape), x.device), sigma)
        fake = predict(critic, batch, noisy, sigma, batch.words)
        real = guided(trio.teacher, batch, noisy, sigma, cfg)
        scale = (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
        gradient = torch.nan_to_num((fake - real) / scale)
        trust = ((x - real) * (fake - real)).sum() / (fake - real).square().sum().clamp(min=1e-12)
    return 0.5 * (x.double() - (x - gradient).detach().double()).square().mean(), trust


def anchor_loss(student: Model, stories: Source, draws: Draws, size: int, cfg: DMDConfig) -> Tensor:
    """What the student knew already, asked again: flow matching on data behind its mask. Distribution matching moves
    the answers of the steps that learn, and nothing else holds those of the others where they were.
    """
    batch = from_data(stories, draws, size, cfg).to(student.dit.device)
    return teacher_loss(student, batch, draws, ANCHOR)


def critic_loss(trio: Trio, batch: Batch, x: Tensor, draws: Draws, cfg: DMDConfig) -> Tensor:
    """Flow matching of the critic on the student's shots, in velocity."""
    sigma = compare_at(draws, len(x), cfg).to(x.device)
    noise = draws.noise(tuple(x.shape), x.device)
    x0 = predict(trio.critic.compute, batch, add_noise(x, noise, sigma), sigma, batch.words)
    # velocity error = x0 error / sigma; below the floor the weight stops rising, as in the teacher's loss
    return ((x0 - x).square().mean((1, 2, 3, 4)) / sigma.clamp(min=cfg.sigma_floor).square()).mean()


def from_data(stories: Source, draws: Draws, size: int, cfg: DMDConfig) -> Batch:
    """Stage 1: a shot and the real frames of earlier shots; one number of earlier shots per batch."""
    if draws.rng.random() < cfg.first_shots:
        return stories.batch(draws.rng, size, "shot", share=draws.share)
    history = int(draws.rng.integers(1, cfg.shots))
    return stories.batch(draws.rng, size, "next", history, draws.share)


class OwnHistory:
    """Stage 2: whole stories, each shot's context made of the student's own earlier shots."""

    def __init__(self, stories: Source, vae: VAE, config: Config, size: int, cfg: DMDConfig) -> None:
        self.stories, self.vae, self.size, self.cfg = stories, vae, size, cfg
        self.rule = ContextRule.of(dual_buffer(config))
        self.length = config.shot_frames()
        self.latents = config.chunks * config.chunk
        self.shot = 0
        self.shots = 0
        self.rows: list[int] = []
        self.stills: dict[tuple[int, int], Tensor] = {}

    def next(self, draws: Draws) -> Batch:
        """The batch for the present shot of the stories being rolled; the first shot's draws choose the stories."""
        if self.shot == 0:
            self.shots = int(draws.rng.integers(2, self.cfg.shots + 1))
            self.rows = self.stories.pick_stories(draws.rng, self.size, self.shots)
        rows = [(story, self.shot) for story in self.rows]
        kept = self.shot > 0 and draws.rng.random() >= self.cfg.drop_context
        batch = self.stories.gather(rows, draws.rng, context=kept, frames=self.latents, share=draws.share)
        if not kept:
            return batch
        own = torch.stack([self.stills[pick] for pick in self.rule.picks((self.length,) * self.shot)], dim=1)
        mine = torch.stack(draws.part.of(list(own)))
        return replace(batch, latents=torch.cat((mine, batch.target), dim=1))

    @torch.no_grad()
    def advance(self, latents: Tensor) -> None:
        """Add the shot just made, of all of this process's stories, to the history; after the last, forget them."""
        frames, _ = self.vae.decode(latents)
        for picture in self.rule.pictures(self.length, self.cfg.shots):
            self.stills[self.shot, picture] = self.vae.context_latents(frames[:, picture].clamp(-1, 1)).float().cpu()
        self.shot += 1
        if self.shot == self.shots:
            self.shot, self.stills = 0, {}

    def state_dict(self) -> dict[str, Any]:
        """Where the stories stand, of all processes together."""
        stills = [(*place, processes.joined(still)) for place, still in self.stills.items()]
        return {"shot": self.shot, "shots": self.shots, "rows": self.rows, "stills": stills}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shot, self.shots, self.rows = state["shot"], state["shots"], state["rows"]
        share = processes.share()
        self.stills = {(shot, p): torch.stack(share.of(still)) for shot, p, still in state["stills"]}


def train(
    model: Config,
    cfg: DMDConfig,
    runs: RunConfig,
    stories: Source,
    student: Model,
    teacher: Model,
    vae: VAE | None = None,
    sheet: Sheet | None = None,
    critic: Model | None = None,
) -> Network[Model]:
    """Train until `runs.steps` updates (student and critic together); resumes from `runs.out`.

    `critic`: what it begins as; default: the teacher.
    Raises ValueError if stage 2 is given no autoencoder to decode the student's shots with.
    """
    if cfg.history == "own" and vae is None:
        raise ValueError("history=own decodes the student's shots: give the trained autoencoder")
    critic = critic or copy.deepcopy(teacher)
    for learns in (student, critic):
        learns.text.requires_grad_(False)
        if cfg.lora:
            lora.add(learns.dit, cfg.lora)
    critic_runs = replace(
        runs,
        optimizer=cfg.critic_optimizer or runs.optimizer,
        lr=cfg.critic_lr,
        lr_adam=cfg.critic_lr_adam,
        ema=cfg.critic_average,
        clip=cfg.critic_clip or runs.clip,
    )
    trio = Trio(network(student, runs), network(critic, critic_runs), frozen(teacher, runs))
    history = OwnHistory(stories, vae, model, runs.batch, cfg) if cfg.history == "own" and vae else None
    parts = {"network": trio.student, "critic": trio.critic} | ({"history": history} if history else {})
    job = Job(runs, parts, sheet, model=model, recipe=cfg)
    levels = len(model.schedule.steps)
    moving = replace(runs, steps=runs.steps - cfg.critic_first)  # the student's own warm-up begins with its first step
    for draws in job.steps():
        turn = job.step - cfg.critic_first
        learn = turn >= 0 and turn % (cfg.critic_steps + 1) == 0
        made: list[tuple[Batch, FreshNoise, Tensor]] = []
        for part in draws.parts(runs.accumulate):
            batch = history.next(part) if history else from_data(stories, part, runs.batch, cfg)
            batch = batch.to(runs.device)
            drawn, noise = int(part.rng.integers(levels)), FreshNoise(part)
            exit_step = drawn if cfg.exits == "any" else levels - 1
            with torch.set_grad_enabled(learn):
                x = rollout(trio.student.compute, batch, noise, exit_step, cfg)
            if learn:
                value, trust = student_loss(trio, batch, x, part, cfg)
                job.tell(**{"loss_student": value, f"trust_{exit_step}": trust})
                if cfg.anchor:
                    held = anchor_loss(trio.student.compute, stories, part, runs.batch, cfg)
                    job.tell(loss_anchor=held)
                    value = value + cfg.anchor * held
            else:
                value = critic_loss(trio, batch, x, part, cfg)
                job.tell(loss_critic=value)
            (value / runs.accumulate).backward()
            made.append((batch, noise, x.detach()))
        if learn:
            job.tell(norm_student=trio.student.step(learning_scale(turn, moving)))
        else:
            job.tell(norm_critic=trio.critic.step(job.scale))
        if history:
            history.advance(torch.cat([past(trio.student.compute, *one, cfg) for one in made]))
    return trio.student


@torch.no_grad()
def past(student: Model, batch: Batch, noise: FreshNoise, x: Tensor, cfg: DMDConfig) -> Tensor:
    """What the history remembers of a shot: never the answer of a random exit step, and with the weights just learned,
    unless `past=exit`.
    """
    return x if cfg.past == "exit" else rollout(student, batch, noise, None, cfg)
