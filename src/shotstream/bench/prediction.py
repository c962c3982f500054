"""How fast a model should be at given rates: written down before a run, compared after it."""

from __future__ import annotations

from dataclasses import dataclass

from shotstream.bench import flops
from shotstream.config import Config


@dataclass(frozen=True)
class Rates:
    """What a device and a program reach, in TFLOP/s, and what a pass costs beside its arithmetic."""

    name: str
    attention: float
    linears: float
    vae: float
    overhead_ms: float = 0.0  # per pass of the DiT
    decode_share: float = 1.0  # of the full decoder's arithmetic: a tiny decoder's is small
    passes: int = 5  # per chunk, the commit included


@dataclass(frozen=True)
class Prediction:
    """Seconds of a shot and frames per second. `dit`: the passes of the chunks alone, as systems usually report it."""

    name: str
    dit_s: float
    shot_s: float
    fps: float
    dit_fps: float


TINY_DECODER = 1.63 / 40.6  # TAEHV against the Wan decoder, 12 frames at 480 x 832

# One H200; the rates behind each are in docs/performance.md.
H200 = (
    Rates("as released", attention=330, linears=600, overhead_ms=45, vae=100),
    Rates("as released, slow host", attention=257, linears=600, overhead_ms=83, vae=62),
    Rates("fast path", attention=600, linears=650, overhead_ms=4, vae=176),
    Rates("fast path, better kernels", attention=600, linears=680, overhead_ms=3, vae=300),
    Rates("fast path, best kernels", attention=640, linears=700, overhead_ms=2.5, vae=400),
    Rates(
        "+ fp8 linears, tiny decoder",
        attention=640, linears=1150, overhead_ms=2.5, vae=400, decode_share=TINY_DECODER,
    ),
    Rates("all arithmetic at 790", attention=790, linears=790, vae=790),
)  # fmt: skip


def predict(config: Config, rates: Rates, chunks: int | None = None) -> Prediction:
    """Time of a shot with full context, every stage after the other."""
    chunks = config.chunks if chunks is None else chunks
    work = flops.shot(config, chunks)
    tokens, text = flops.tokens_per_frame(config), config.text.length
    budget, _ = flops.reads(config, chunks)
    prefill = flops.dit_pass(config.dit, budget, tokens, budget, text)
    share = rates.passes / (len(config.schedule.steps) + 1)
    linears = share * (work.linears + work.cross) / rates.linears
    attention = share * work.attention / rates.attention
    dit = (linears + attention) / 1e12 + chunks * rates.passes * rates.overhead_ms / 1e3
    once = (prefill.total - prefill.attention + work.text) / rates.linears + prefill.attention / rates.attention
    vae = (work.decode * rates.decode_share + work.encode) / rates.vae
    shot = dit + (once + vae) / 1e12 + rates.overhead_ms / 1e3
    frames = config.shot_frames(chunks)
    return Prediction(rates.name, dit, shot, frames / shot, frames / dit)
