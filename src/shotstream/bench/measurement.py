"""What `shotstream bench` measures: a model telling stories, timed from outside.

Everything is on random numbers or a model's own pictures, never on zeros, which are faster. Frames per second end to
end count all from a caption to uint8 frames on the host; the video file is timed apart.
"""

from __future__ import annotations

import gc
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shotstream.bench import flops
from shotstream.bench.machine import Operators, attention_kernel, ceilings, machine
from shotstream.bench.probe import Clock, ClockName, Probe
from shotstream.pipeline import Pipeline
from shotstream.session import Chunk, Session
from shotstream.video import VideoWriter

WARM = 2  # shots before anything counts
FULL = 7  # finished shots after which a context of six frames, and all that is kept for it, is full
FIRST = ("text", "encode", "prefill", "denoise", "decode")  # stages between a caption and its first frames
CAPTIONS = tuple(
    f"a {framing} of a {colour} {who} in the {where}"
    for who, colour, where in (("bear", "green", "forest"), ("cat", "red", "city"), ("frog", "blue", "meadow"))
    for framing in ("wide shot", "medium shot", "close-up")
)


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    shots: int = 5  # that count
    chunks: int | None = None  # per shot; None = the model's
    switches: int = 10
    growth: int = 40  # shots of the story whose cost must not grow; 0 = leave out
    sessions: int = 2  # at most, in the test of deadlines
    clock: ClockName = "wall"


def measure(pipeline: Pipeline, settings: Settings) -> dict[str, Any]:
    """Everything about one model on one machine, as plain values: see the keys."""
    device, config = pipeline.dit.device, pipeline.config
    clock = Clock(device, settings.clock)
    chunks = settings.chunks or config.chunks
    top = ceilings(device, pipeline.dit.dtype, clock)
    cold = first_frame(pipeline, clock, chunks)
    story = tell(pipeline, clock, settings.shots, chunks)
    peak = _peak(device)
    result: dict[str, Any] = {
        "model": config.name,
        "weights": pipeline.revision,
        "shape": {
            "size": [config.width, config.height],
            "fps": config.fps,
            "chunks": chunks,
            "tokens_per_latent_frame": flops.tokens_per_frame(config),
            "dtype": str(pipeline.dit.dtype).removeprefix("torch."),
        },
        "settings": asdict(settings),
        "machine": machine(device),
        "ceilings": top,
        "attention": _kernel(pipeline, chunks),
        "first_frame_ms": {"cold": _ms(cold), "warm": _ms(first_frame(pipeline, clock, chunks))},
        **story,
        "operators_ms_per_shot": operators(pipeline, clock, chunks) if device.type == "cpu" else {},
        "prompt_switch_ms": prompt_switches(pipeline, clock, settings.switches),
        "memory_mb": peak,
        "video_file_ms_per_chunk": _ms(_encoding(pipeline, clock)),
        "deadlines": [deadlines(pipeline, clock, n, chunks) for n in range(1, settings.sessions + 1)],
    }
    work, seconds = flops.shot(config, chunks, pipeline.fast.decoder), story["end_to_end"]["shot_s"]
    result["arithmetic"] = {
        "gflop_per_shot": round(work.total / 1e9, 1),
        "dit_share": round(work.dit / work.total, 3),
        "gflop_per_s": round(work.total / seconds / 1e9, 1),
        "of_ceiling": round(work.total / seconds / 1e12 / top["matmul_tflops"], 3),
    }
    if settings.growth:
        result["growth"] = growth(pipeline, clock, settings.growth)
    return result


def captions(count: int) -> Iterator[str]:
    """`count` captions that the storybook model knows, again and again the same few."""
    return (CAPTIONS[i % len(CAPTIONS)] for i in range(count))


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def _session(pipeline: Pipeline, shots: int, chunks: int | None, seed: int = 1) -> Session:
    session = Session(pipeline, seed=seed)
    for caption in captions(shots):
        session.cut(caption, chunks=chunks)
    return session


def first_frame(pipeline: Pipeline, clock: Clock, chunks: int) -> float:
    """Seconds from the first caption of a new story to its first frames on the host."""
    session = Session(pipeline, seed=1)
    begun = clock.settled()
    session.cut(next(captions(1)), chunks=chunks)
    next(session.stream())
    return clock.settled() - begun


def tell(pipeline: Pipeline, clock: Clock, shots: int, chunks: int) -> dict[str, Any]:
    """A story of `shots` shots after warm ones: frames per second and where the time goes."""
    probe = Probe(pipeline, clock)
    session = _session(pipeline, WARM + shots, chunks)
    ends, frames, before = list[float](), 0, 0
    with probe.watch():
        for chunk in islice(session.stream(), (WARM + shots) * chunks):  # without what is read ahead for one more
            ends.append(clock.settled())
            if chunk.shot.index == WARM - 1 and chunk.is_last:
                probe.spans.clear()
                before = len(ends)
            elif chunk.shot.index >= WARM:
                frames += len(chunk.frames)
    total = ends[-1] - ends[before - 1]
    taken = np.diff(ends[before - 1 :])
    names = ("text", "encode", "prefill", "denoise", "commit", "decode")
    stages = {name: sum(probe.seconds(name)) for name in names}
    stages["rest"] = total - sum(stages.values())
    passes = stages["denoise"] + stages["commit"]
    by_keys = probe.by_keys("denoise")
    return {
        "end_to_end": {
            "fps": round(frames / total, 2),
            "times_real_time": round(frames / total / pipeline.config.fps, 2),
            "shot_s": round(total / shots, 4),
            "chunk_ms": _quantiles(taken),
        },
        "dit_only": {"fps": round(frames / passes, 2)},
        "stages_ms_per_shot": {name: _ms(seconds / shots) for name, seconds in stages.items()},
        "pass_ms": {str(keys): _ms(statistics.median(times)) for keys, times in sorted(by_keys.items())},
        "pass_ms_fit": _fit(by_keys),
    }


def operators(pipeline: Pipeline, clock: Clock, chunks: int, most: int = 10) -> dict[str, float]:
    """Milliseconds of a story's second shot by operator, the longest first; "the rest" is all others together."""
    session = _session(pipeline, 2, chunks)
    stream = session.stream()
    for _ in range(chunks):
        next(stream)
    with torch.compiler.set_stance("force_eager"), Operators(clock) as seen:  # a compiled block hides its operators
        for _ in stream:
            pass
    ranked = sorted(seen.seconds.items(), key=lambda item: -item[1])
    found = {name.strip("_"): _ms(seconds) for name, seconds in ranked[:most]}
    return found | {"the rest": _ms(sum(seconds for _, seconds in ranked[most:]))}


def _quantiles(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    values = np.asarray(seconds)
    named = {"mean": values.mean(), "p50": np.median(values), "p95": np.quantile(values, 0.95)}
    return {name: _ms(float(value)) for name, value in named.items()}


def _fit(by_keys: dict[int, list[float]]) -> dict[str, float]:
    """A pass costs a constant and something per latent frame that it reads."""
    if len(by_keys) < 2:
        return {}
    medians = [statistics.median(times) for times in by_keys.values()]
    slope, intercept = np.polyfit(list(by_keys), medians, deg=1)
    return {"constant": _ms(float(intercept)), "per_latent_frame": _ms(float(slope))}


def prompt_switches(pipeline: Pipeline, clock: Clock, count: int) -> dict[str, Any]:
    """From a caption to the first frames of its shot, sent at a random moment of the running shot's last chunk.

    A chunk that has begun is finished first (here always a shot's first, the longest). "idle": nothing was running,
    and the context had been read ahead, which took "ahead".
    """
    draw = random.Random(0)
    probe, session = Probe(pipeline, clock), Session(pipeline, seed=1)
    waited, idle, ahead, parts = list[float](), list[float](), list[float](), list[dict[str, float]]()
    session.cut(next(captions(1)), chunks=1)
    stream, running = session.stream(), 0.0
    with probe.watch():
        for index, caption in enumerate(captions(count + 1)):
            begun = clock.settled()
            probe.spans.clear()
            if index:
                session.cut(caption, chunks=1)
                stream = session.stream()
            next(stream)
            running_now = clock.settled() - begun
            if index:
                idle.append(running_now)
                waited.append(running * draw.random())
                parts.append({name: sum(probe.seconds(name)) for name in FIRST})
            begun = clock.settled()
            for _ in stream:  # there is nothing left to make
                pass
            ahead.append(clock.settled() - begun)
            running = running_now
    together = [rest + own for rest, own in zip(waited, idle, strict=True)]
    return {
        "running": _quantiles(together),
        "idle": _quantiles(idle),
        "ahead": _ms(statistics.median(ahead)),
        "parts": {name: _ms(statistics.median(part[name] for part in parts)) for name in parts[0]},
    }


def growth(pipeline: Pipeline, clock: Clock, shots: int, chunks: int = 2, pairs: int = 5) -> dict[str, Any]:
    """Whether late shots cost more than early ones.

    Two stories of the same captions are told in turns, so that whatever else the machine does meets both: the last
    `pairs` shots of a story of `shots` against the first `pairs` with a full context. The stories are on disk, where
    finished takes belong. `memory_ratio`: of all tensors alive at the end, to those after the first full shots.
    """
    late, early = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder, Session(pipeline, project=Path(folder) / "old", seed=1) as old:
        spent = _shots(old, clock, shots, chunks)
        for _ in range(FULL + pairs):
            next(spent)
        before = held_bytes()
        for _ in range(FULL + pairs, shots - pairs):
            next(spent)
        with Session(pipeline, project=Path(folder) / "young", seed=1) as young:
            reference = _shots(young, clock, FULL + pairs, chunks)
            for _ in range(FULL):
                next(reference)
            for i in range(pairs):  # A-B-B-A
                turns = [(spent, late), (reference, early)]
                for story, times in turns if i % 2 else reversed(turns):
                    times.append(next(story))
        del young, reference, turns, story
        after = held_bytes()
    return {
        "shots": shots,
        "shot_ms_early": _ms(statistics.median(early)),
        "shot_ms_late": _ms(statistics.median(late)),
        "time_ratio": round(statistics.median(a / b for a, b in zip(late, early, strict=True)), 3),
        "tensor_mb_early": round(before / 2**20, 2),
        "tensor_mb_late": round(after / 2**20, 2),
        "memory_ratio": round(after / before, 4),
    }


def _shots(session: Session, clock: Clock, shots: int, chunks: int) -> Iterator[float]:
    """The seconds that each shot of a story takes."""
    for caption in captions(shots):
        session.cut(caption, chunks=chunks)
    stream = session.stream()
    for _ in range(shots):
        begun = clock.settled()
        for chunk in stream:
            if chunk.is_last:
                break
        yield clock.settled() - begun


def held_bytes() -> int:
    """Bytes of all tensors that live: what a story may not make grow. Each storage counts once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def deadlines(pipeline: Pipeline, clock: Clock, sessions: int, chunks: int, shots: int = 3) -> dict[str, float]:
    """Chunks that come after their time when `sessions` viewers watch at the model's frame rate.

    Viewers start with their first chunk; the chunk that is due earliest is made first, and none is made before the one
    ahead of it is being shown. Computing is real, waiting is skipped.
    """
    fps = pipeline.config.fps
    streams = [_session(pipeline, shots, chunks, seed).stream() for seed in range(sessions)]
    due = dict.fromkeys(range(sessions), 0.0)  # when a viewer has nothing left to see
    held = dict.fromkeys(range(sessions), 0.0)  # how long the chunk being shown lasts
    now, busy, late, made = 0.0, 0.0, 0, 0
    while due:
        who = min(due, key=lambda viewer: due[viewer])
        now = max(now, due[who] - held[who])
        begun = clock.settled()
        chunk: Chunk | None = next(streams[who], None)
        taken = clock.settled() - begun
        if chunk is None:
            del due[who]
            continue
        now, busy, made = now + taken, busy + taken, made + 1
        late += bool(held[who]) and now > due[who]
        held[who] = len(chunk.frames) / fps
        due[who] = max(due[who], now) + held[who]
    return {"sessions": sessions, "chunks": made, "late": late, "load": round(busy / max(now, 1e-9), 3)}


def _encoding(pipeline: Pipeline, clock: Clock) -> float:
    """Seconds for a chunk of twelve frames to go into a video file."""
    config = pipeline.config
    size = (config.width, config.height)
    frames = np.random.default_rng(0).integers(0, 256, (12, config.height, config.width, 3), dtype=np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        video = VideoWriter(Path(folder) / "bench.mp4", config.fps, size, 1)
        with video:
            video.begin_shot("bench")
            taken = []
            for _ in range(4):
                begun = clock.now()
                video.write(frames)
                taken.append(clock.now() - begun)
            video.end_shot()
    return statistics.median(taken)


def _peak(device: torch.device) -> dict[str, float]:
    """Memory of the whole process so far, and on a GPU what its allocator took."""
    import resource

    found = {"peak_resident": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10, 1)}
    if device.type == "cuda":
        found |= {
            "peak_allocated": round(torch.cuda.max_memory_allocated(device) / 2**20, 1),
            "peak_reserved": round(torch.cuda.max_memory_reserved(device) / 2**20, 1),
        }
    return found


def _kernel(pipeline: Pipeline, chunks: int) -> str:
    """The attention kernel of a shot's last chunk."""
    config, dit = pipeline.config, pipeline.dit
    tokens = flops.tokens_per_frame(config)
    lengths = (config.chunk * tokens, flops.reads(config, chunks)[1][-1] * tokens)
    q, k = (
        torch.randn(1, length, config.dit.heads, config.dit.head_dim, device=dit.device, dtype=dit.dtype)
        for length in lengths
    )
    return attention_kernel(q, k, k.clone())
