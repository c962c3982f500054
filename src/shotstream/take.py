"""A request becoming a take: the one path from words to chunks of frames, for session, server and film alike.

    maker = Maker(pipeline)
    for chunk in maker.make(request, shelf):          # a `shotstream.project.Request`
        show(chunk.frames)
    shelf.keep(request.take, latents, chunk.stills)   # those of all chunks; the last one brings the stills

A *shelf* holds the latents of takes: in a project's folder, so that any process can go on from there, or in memory.
The past reaches a shot as stills, frames of earlier takes encoded one by one, from floats: a story made on from 8-bit
pictures would drift with every remake. Stills that the rule will pick are kept with the take; others, which pins or
a shot put in before ask for, are decoded and encoded again, to the same bits, for decoding in pieces is exact.
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from shotstream.folder import UNFINISHED, ProjectError, write
from shotstream.memory.plan import Frame, MemoryPolicy
from shotstream.memory.policies import DualBuffer, choose
from shotstream.models.dit import Text
from shotstream.models.text import Words
from shotstream.pipeline import Pipeline
from shotstream.records import Model, Request, Take, after
from shotstream.rollout import Levels, Memory, Prompts, Roll, SeededNoise, Stills, new_memory

KEPT = 16  # takes whose latents a shelf in memory holds
STEERED = 1_000_000  # numbers of prompts inside a shot begin here; no shot has them


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
    """Finished frames of a shot."""

    frames: np.ndarray  # uint8 [t h w 3]
    latents: Tensor  # f c h w
    shot: Shot
    index: int  # in the shot
    chunks: int  # of the shot
    is_last: bool
    timings: dict[str, float]  # seconds: "denoise" and "decode"
    take: str = ""
    stills: Mapping[int, Tensor] = field(default_factory=dict)  # with the last chunk: by frame of the shot, c h w


class Shelf(Protocol):
    """Where takes' latents are. Raises ProjectError for what is not there, OSError for what cannot be kept."""

    def latents(self, take: str) -> Tensor:
        """f c h w."""
        ...

    def still(self, take: str, frame: int) -> Tensor | None:
        """c h w, or None if it was not kept."""
        ...

    def keep(self, take: str, latents: Tensor, stills: Mapping[int, Tensor]) -> None: ...

    def hold(self, take: Take, latents: Tensor) -> None:
        """What there is so far of the take being made, lest it be lost if the process is killed."""
        ...


class MemoryShelf:
    """The newest takes only, so that a long story does not grow."""

    def __init__(self, limit: int = KEPT) -> None:
        self.limit = limit
        self.takes: OrderedDict[str, tuple[Tensor, Mapping[int, Tensor]]] = OrderedDict()

    def latents(self, take: str) -> Tensor:
        return self._take(take)[0]

    def still(self, take: str, frame: int) -> Tensor | None:
        return self._take(take)[1].get(frame)

    def keep(self, take: str, latents: Tensor, stills: Mapping[int, Tensor]) -> None:
        self.takes[take] = latents, stills
        self.takes.move_to_end(take)
        while len(self.takes) > self.limit:
            self.takes.popitem(last=False)

    def hold(self, take: Take, latents: Tensor) -> None:
        """Memory is lost with the process."""

    def _take(self, take: str) -> tuple[Tensor, Mapping[int, Tensor]]:
        if take not in self.takes:
            raise ProjectError(
                f"take {take} is not in memory: a session without a project keeps the last {self.limit}; give it one"
            )
        return self.takes[take]


class FolderShelf:
    """`latents.safetensors` in the folders of takes: "latents", and "still.<frame>" for each still."""

    def __init__(self, takes: Path) -> None:
        self.takes = takes

    def latents(self, take: str) -> Tensor:
        latents = self._read(take, "latents")
        assert latents is not None
        return latents

    def still(self, take: str, frame: int) -> Tensor | None:
        return self._read(take, f"still.{frame}")

    def keep(self, take: str, latents: Tensor, stills: Mapping[int, Tensor]) -> None:
        write(self._path(take), packed(latents, stills))
        self._unfinished.unlink(missing_ok=True)

    def hold(self, take: Take, latents: Tensor) -> None:
        write(self._unfinished, packed(latents, {}, take), lasting=False)

    @property
    def _unfinished(self) -> Path:
        return self.takes.parent / UNFINISHED

    def _path(self, take: str) -> Path:
        return self.takes / take / "latents.safetensors"

    def _read(self, take: str, name: str) -> Tensor | None:
        path = self._path(take)
        try:
            with safe_open(path, "pt") as file:
                return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            remedy = f"delete {path.parent}, and its shot is made again"
            raise ProjectError(f"{path}: cannot be read ({reason}); {remedy}") from None


def packed(latents: Tensor, stills: Mapping[int, Tensor], take: Take | None = None) -> bytes:
    """The content of `latents.safetensors`; with its record, of `unfinished.safetensors`."""
    tensors = {"latents": latents, **{f"still.{frame}": still for frame, still in stills.items()}}
    about = {"take": json.dumps(asdict(take))} if take else None
    return save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, about)


def model_of(pipeline: Pipeline) -> Model:
    """What a `Project` must know of a loaded model."""
    words = pipeline.text.vocabulary if isinstance(pipeline.text, Words) else None
    return Model(pipeline.config, pipeline.revision, words, pipeline.fast.names)


def shot_of(request: Request) -> Shot:
    """What a request says of its shot."""
    return Shot(request.number, request.shot, request.caption, request.global_caption, request.seed, request.chunks)


def candidates(number: int, pictures: int, policy: DualBuffer) -> set[int]:
    """Frames that the rule picks from shot `number` (from 0), of `pictures` frames, for any shot after it."""
    stories = ((pictures,) * count for count in range(number + 1, number + policy.budget + 1))
    return {frame for story in stories for shot, frame in policy.picks(story) if shot == number}


@dataclass(frozen=True)
class _Past:
    """All that a shot of `DualBuffer` begins from: the takes before it, their frames, their prompts, the pins."""

    line: tuple[str, ...]
    lengths: tuple[int, ...]
    prompts: tuple[str, ...]
    pins: tuple[tuple[int, int], ...] = ()


class Maker:
    """Makes takes on one model. Same request: the same latents, on any maker, whatever else it makes in between.

    policy: instead of the model's; a name or an object (`memory.policies.choose`). With `DualBuffer` a request and the
    stills it names say everything. Other policies carry keys and values over cuts: the takes before are passed through
    the network once more, unless the newest of them is what this maker finished last.
    """

    def __init__(self, pipeline: Pipeline, policy: str | MemoryPolicy | None = None) -> None:
        self.pipeline = pipeline
        self.policy, self.schedule = choose(policy, pipeline.config)
        self._texts: OrderedDict[str, Text] = OrderedDict()  # the prompts read last
        self._levels = Levels(pipeline.dit)
        self._memory: tuple[str, Memory] | None = None  # what a roll remembers after all takes of this past
        self._ahead: tuple[_Past, Roll] | None = None  # a roll that has made the cut after this past

    @torch.inference_mode()
    def make(self, request: Request, shelf: Shelf) -> Generator[Chunk, str | None, None]:
        """Make a take chunk by chunk. May be closed at any chunk; the take can be made again then.

        Experimental: a prompt sent in (`send`) is what the shot reads from the next chunk on.
        """
        vae, wanted = self.pipeline.vae, self._wanted(request.number, request.frames)
        state, first, stills, steered = None, 0, dict[int, Tensor](), False
        began = time.perf_counter()
        roll, context = self._roll(request, shelf), self._context(request.line, shelf)
        noise = SeededNoise(request.seed, request.number)
        for index, latents in enumerate(roll.shot(request.number, request.chunks, noise, context)):
            denoised = time.perf_counter()
            frames, state = vae.decode(latents, state)
            frames = frames[0].float().clamp_(-1, 1)
            kept = {frame: frames[frame - first] for frame in range(first, first + len(frames)) if frame in wanted}
            first += len(frames)
            if is_last := index + 1 == request.chunks:
                stills |= self._encoded(kept)
                self._remember(request, roll, first, steered)
            done = time.perf_counter()
            prompt = yield Chunk(
                frames=to_uint8(frames),
                latents=_lasting(latents[0]),
                shot=shot_of(request),
                index=index,
                chunks=request.chunks,
                is_last=is_last,
                timings={"denoise": denoised - began, "decode": done - denoised},
                take=request.take,
                stills={frame: _lasting(still) for frame, still in stills.items()} if is_last else {},
            )
            began = time.perf_counter()
            if not is_last:
                stills |= self._encoded(kept)  # not before: the chunk is on its way by now
            if prompt is not None:
                steered = True
                roll.steer(STEERED + index + 1, self.pipeline.text.encode([prompt]))

    @torch.inference_mode()
    def prepare(self, request: Request, take: str, shelf: Shelf) -> None:
        """Look ahead, now that `request` has become `take` and nothing is to be made: let the next shot's cut be made.

        Its own words come later; what it remembers of earlier shots does not depend on them. If the next request has
        another past, this was for nothing. Does nothing for policies other than `DualBuffer`.
        """
        if isinstance(self.policy, DualBuffer):
            past = _Past((*request.line, take), (*request.lengths, request.frames), (*request.prompts, request.prompt))
            roll = self._before(past)
            if roll.prepare(len(past.line), self._context(past.line, shelf)):
                self._ahead = past, roll

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Iterator[Tensor]:
        """The frames of a take, `t c h w` floats, chunk by chunk: those it was made with, bit for bit."""
        state = None
        for piece in latents[None].to(self._device).split(self.policy.chunk, dim=1):
            frames, state = self.pipeline.vae.decode(piece, state)
            yield frames[0].float().clamp_(-1, 1)

    def picture(self, shelf: Shelf, take: str, frame: int) -> Tensor:
        """One frame of a take, `c h w` floats."""
        first = 0
        for frames in self.decode(shelf.latents(take)):
            if frame < first + len(frames):
                return frames[frame - first]
            first += len(frames)
        raise IndexError(f"take {take} has {first} frames; there is no frame {frame}")

    @torch.no_grad()
    def stills(self, number: int, frames: Tensor) -> dict[int, Tensor]:
        """The stills to keep of a clip, `t c h w` floats, that was not made here but is shot `number`."""
        return self._encoded({frame: frames[frame] for frame in self._wanted(number, len(frames))})

    # Inside

    @property
    def _device(self) -> torch.device:
        return self.pipeline.dit.device

    def _wanted(self, number: int, frames: int) -> set[int]:
        return candidates(number, frames, self.policy) if isinstance(self.policy, DualBuffer) else set()

    def _encoded(self, pictures: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Each picture alone: together, their bits could depend on the company."""
        return {frame: self.pipeline.vae.context_latents(picture[None])[0] for frame, picture in pictures.items()}

    def _still(self, shelf: Shelf, take: str, frame: int) -> Tensor:
        kept = shelf.still(take, frame)
        return self._encoded({frame: self.picture(shelf, take, frame)})[frame] if kept is None else kept

    def _context(self, line: Sequence[str], shelf: Shelf) -> Stills:
        """What the roll asks for: the stills it names, `1 f c h w`; zeros where the offset is -1."""

        def still(frame: Frame) -> Tensor:
            if frame.offset < 0:
                return torch.zeros(self.pipeline.config.latent_shape, device=self._device)
            return self._still(shelf, line[frame.shot], frame.offset).to(self._device)

        return lambda frames: torch.stack([still(frame) for frame in frames])[None]

    def _roll(self, request: Request, shelf: Shelf) -> Roll:
        """A roll that has gone through all takes before this one, as far as the policy cares, and knows the words."""
        if isinstance(self.policy, DualBuffer):
            past = _Past(request.line, request.lengths, request.prompts, request.pins)
            ahead, self._ahead = self._ahead, None
            roll = ahead[1] if ahead and ahead[0] == past else self._before(past)
        else:
            if self._memory is None or self._memory[0] != request.past:
                self._memory = request.past, self._replayed(request, shelf)
            roll = self._new_roll(self.policy)
            roll.memory = self._memory[1].fork()  # an interrupted shot can begin again
            roll.memory.shots = request.lengths
        roll.prompts.known[request.number] = self._text(request.prompt)
        return roll

    def _before(self, past: _Past) -> Roll:
        """A roll that knows what `DualBuffer` has to know after this past."""
        assert isinstance(self.policy, DualBuffer)
        policy = replace(self.policy, pins=past.pins)
        roll = self._new_roll(policy)
        roll.memory.shots = past.lengths
        numbers = sorted({shot for shot, _ in policy.picks(past.lengths)})
        roll.prompts.known = {i: self._text(past.prompts[i]) for i in numbers}
        return roll

    def _remember(self, request: Request, roll: Roll, frames: int, steered: bool) -> None:
        """Keep what the next shot may go on from; a steered take is not the one that the request names."""
        if not isinstance(self.policy, DualBuffer):
            roll.memory.shots = (*request.lengths, frames)
            self._memory = None if steered else (after(request.past, request.take), roll.memory)

    def _replayed(self, request: Request, shelf: Shelf) -> Memory:
        """What a roll remembers after all takes before this one."""
        roll, context = self._new_roll(self.policy), self._context(request.line, shelf)
        for i, take in enumerate(request.line):
            roll.prompts.known = {i: self._text(request.prompts[i])}
            roll.memory.shots = request.lengths[:i]
            for chunk, prompt in request.steered[i]:
                roll.prompts.add(STEERED + chunk, self.pipeline.text.encode([prompt]))
            steered = {chunk: STEERED + chunk for chunk, _ in request.steered[i]}
            roll.replay(i, shelf.latents(take)[None], context, steered)
        return roll.memory

    def _new_roll(self, policy: MemoryPolicy) -> Roll:
        dit, shape = self.pipeline.dit, self.pipeline.config.latent_shape
        return Roll(dit, policy, self.schedule, new_memory(dit, shape, policy), Prompts(dit), shape, self._levels)

    def _text(self, prompt: str) -> Text:
        """What the network reads of a prompt; the last few are kept, for context shots are asked for again."""
        if prompt not in self._texts:
            prompts = Prompts(self.pipeline.dit)
            prompts.add(0, self.pipeline.text.encode([prompt]))
            self._texts[prompt] = prompts.known[0]
        self._texts.move_to_end(prompt)
        limit = self.policy.budget + 1 if isinstance(self.policy, DualBuffer) else 1
        while len(self._texts) > limit:
            self._texts.popitem(last=False)
        return self._texts[prompt]


def _lasting(made: Tensor) -> Tensor:
    """A tensor like any other, of one that was made in inference mode: whoever gets it may train with it."""
    with torch.inference_mode(False):
        return made.clone()


def to_uint8(frames: Tensor) -> np.ndarray:
    """float `t c h w` in [-1, 1] -> uint8 [t h w 3], rounded (the release truncates, half a level darker)."""
    levels = (frames + 1).mul_(127.5).round_().permute(0, 2, 3, 1)
    made = levels.to(torch.uint8, memory_format=torch.contiguous_format)
    if made.device.type != "cuda":
        return made.numpy()
    host = torch.empty(made.shape, dtype=made.dtype, pin_memory=True)  # pageable memory is a hundred times as slow
    host.copy_(made, non_blocking=True)
    torch.cuda.current_stream(made.device).synchronize()
    return host.numpy()
