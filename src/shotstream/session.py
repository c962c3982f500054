"""A directing session: shots are queued by `cut` and come out of `stream` chunk by chunk while they are generated.

    session = Session(load("storybook"), seed=7)
    session.cut("a wide shot of a green bear in a crown walking in the meadow")
    for chunk in session.stream():
        show(chunk.frames)

The past reaches a shot only through its context frames and their captions; the rest of a finished shot is not kept.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from shotstream.memory.plan import Frame, MemoryPolicy
from shotstream.memory.policies.dual_buffer import evenly_spaced
from shotstream.pipeline import Pipeline
from shotstream.rollout import Noise, Prompts, Roll, SeededNoise, new_memory


@dataclass(frozen=True)
class Shot:
    """A shot as it is generated: its place in the story, its words, its seed and length (in chunks)."""

    index: int
    id: str
    caption: str
    global_caption: str
    seed: int
    chunks: int


@dataclass(frozen=True)
class Chunk:
    """What `stream` yields: finished frames of a shot."""

    frames: np.ndarray  # uint8 [t h w 3]
    latents: Tensor  # f c h w
    shot: Shot
    index: int  # in the shot
    chunks: int  # of the shot
    is_last: bool
    timings: dict[str, float]  # seconds: "denoise" and "decode"


@dataclass
class Stills:
    """Frames of a finished shot that may become context, by frame number, encoded when first asked for.

    From float frames, never from 8-bit ones: a story would drift with every remake.
    """

    pictures: int
    frames: dict[int, Tensor] = field(default_factory=dict)  # c h w
    latents: dict[int, Tensor] = field(default_factory=dict)  # c h w


def candidates(pictures: int, budget: int) -> set[int]:
    """Frames that the context rule can ever pick from a shot of `pictures` frames."""
    return {frame for count in range(1, budget + 1) for frame in evenly_spaced(pictures, count)}


class Session:
    """A linear story being made on one model. Same seed, captions and lengths: the same latents, always."""

    def __init__(self, pipeline: Pipeline, seed: int = 0, policy: MemoryPolicy | None = None) -> None:
        self.pipeline = pipeline
        self.seed = seed
        self.budget = pipeline.config.policy.budget
        self.queue: deque[Shot] = deque()
        self.cuts = 0
        self._stills: dict[int, Stills] = {}
        self._roll = Roll(
            dit=pipeline.dit,
            policy=policy or pipeline.config.policy,
            schedule=pipeline.config.schedule,
            memory=new_memory(pipeline.dit, pipeline.config.latent_shape),
            prompts=Prompts(pipeline.dit),
            latent_shape=pipeline.config.latent_shape,
        )

    def cut(
        self,
        caption: str,
        *,
        global_caption: str = "",
        seed: int | None = None,
        chunks: int | None = None,
        id: str | None = None,
    ) -> Shot:
        """Queue a new shot after the last one. `chunks` and `seed` default to the model's and the session's."""
        chunks = self.pipeline.config.chunks if chunks is None else chunks
        if chunks < 1:
            raise ValueError(f"a shot needs at least one chunk, not {chunks}")
        shot = Shot(
            index=self.cuts,
            id=id or f"s{self.cuts + 1}",
            caption=caption,
            global_caption=global_caption,
            seed=self.seed if seed is None else seed,
            chunks=chunks,
        )
        self.queue.append(shot)
        self.cuts += 1
        return shot

    @torch.no_grad()
    def adopt(self, frames: Tensor, caption: str, *, global_caption: str = "") -> None:
        """Take `frames` (`t c h w` in [-1, 1], 4k+1 of them) as the next finished shot, as if it had been generated.

        Raises ValueError while shots are queued: the past cannot be put after the future.
        """
        if self.queue:
            raise ValueError("adopt a clip before the next shot is queued, or stream the queue first")
        prompt = self.pipeline.prompt(global_caption, self.cuts, caption)
        self._roll.prompts.add(self.cuts, self.pipeline.text.encode([prompt]))
        wanted = candidates(len(frames), self.budget)
        self._finish(self.cuts, Stills(len(frames), {f: frames[f] for f in wanted}))
        self.cuts += 1

    def stream(self) -> Iterator[Chunk]:
        """Generate the queued shots, yielding each chunk as soon as it is decoded; ends when the queue is empty.

        May be closed at any chunk: the shot begun is then dropped, finished ones stay part of the story.
        """
        while self.queue:
            yield from self._generate(self.queue[0])

    @torch.no_grad()
    def _latents(self, shot: Shot, noise: Noise) -> Iterator[Tensor]:
        prompt = self.pipeline.prompt(shot.global_caption, shot.index, shot.caption)
        self._roll.prompts.add(shot.index, self.pipeline.text.encode([prompt]))
        yield from self._roll.shot(shot.index, shot.chunks, noise, self._context)

    def _generate(self, shot: Shot) -> Iterator[Chunk]:
        latents = self._latents(shot, SeededNoise(shot.seed, shot.index))
        pictures = self.pipeline.config.shot_frames(shot.chunks)
        stills = Stills(pictures)
        wanted = candidates(pictures, self.budget)
        state, first = None, 0
        for index in range(shot.chunks):
            begun = time.perf_counter()
            x0 = next(latents)
            denoised = time.perf_counter()
            with torch.no_grad():
                frames, state = self.pipeline.vae.decode(x0, state)
            frames = frames[0].float().clamp(-1, 1)
            here = range(first, first + len(frames))
            stills.frames |= {f: frames[f - first].clone() for f in wanted if f in here}
            first += len(frames)
            done = time.perf_counter()
            if index + 1 == shot.chunks:
                self.queue.popleft()  # before its last chunk is handed out: the stream may be closed there
                self._finish(shot.index, stills)
            yield Chunk(
                frames=to_uint8(frames),
                latents=x0[0],
                shot=shot,
                index=index,
                chunks=shot.chunks,
                is_last=index + 1 == shot.chunks,
                timings={"denoise": denoised - begun, "decode": done - denoised},
            )

    def _finish(self, shot: int, stills: Stills) -> None:
        """Let the shot join the history; forget what can never be context again."""
        self._stills[shot] = stills
        self._roll.memory.shots = (*self._roll.memory.shots, stills.pictures)
        reach = shot + 1 - self.budget  # with more shots than budget only the last ones give a frame each
        self._stills = {i: s for i, s in self._stills.items() if i >= reach}
        self._roll.prompts.retain(set(self._stills))

    def _context(self, frames: tuple[Frame, ...]) -> Tensor:
        """Latents `1 f c h w` of context frames; offset -1 is a zero latent."""
        return torch.stack([self._still(frame) for frame in frames])[None]

    def _still(self, frame: Frame) -> Tensor:
        if frame.offset < 0:
            return torch.zeros(self.pipeline.config.latent_shape)
        stills = self._stills[frame.shot]
        if frame.offset not in stills.latents:
            picture = stills.frames[frame.offset]
            stills.latents[frame.offset] = self.pipeline.vae.context_latents(picture[None])[0]
        return stills.latents[frame.offset]


def to_uint8(frames: Tensor) -> np.ndarray:
    """float `t c h w` in [-1, 1] -> uint8 [t h w 3], rounded (the release truncates, half a level darker)."""
    return ((frames + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
