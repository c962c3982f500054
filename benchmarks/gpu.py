"""What to run when there is a GPU, in order, each stage within its minutes:

    python -m benchmarks.gpu --stage 1 --out benchmarks/results      # kernels: what attention and products reach
    python -m benchmarks.gpu --stage 2 ...                           # the VAE's decoder
    python -m benchmarks.gpu --stage 3 ...                           # one block, then all: eager, compiled, recorded
    python -m benchmarks.gpu --stage 4 ...                           # whole shots against the released way
    python -m benchmarks.gpu --stage 5 ...                           # several viewers, forty shots, fp8 products
    python -m benchmarks.gpu --stage 4 --dry-run                     # the same code at tiny sizes, on a CPU

The published sizes with random weights, none of them zero: times do not depend on values, unless those are zeros.
Numbers are written as they come, so a stage that is cut off leaves what it has. What to expect of them:
`shotstream bench --predict`.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from benchmarks import ratios
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from shotstream.bench import flops
from shotstream.bench.machine import attention_kernel, ceilings, fastest, machine
from shotstream.bench.measurement import Settings, deadlines, growth, measure
from shotstream.bench.prediction import H200, predict
from shotstream.bench.probe import Clock
from shotstream.config import PRESETS, Config, DiTConfig, WanVAEConfig
from shotstream.graphs import Capture, cuda_graph, record_passes
from shotstream.memory.plan import Call, Frame
from shotstream.memory.store import BoundMemory, FrameStore
from shotstream.models.attention import attention
from shotstream.models.dit import DiT, Text, compile_blocks
from shotstream.models.rope import Rotation
from shotstream.models.vae import VAE, VAEConfig, by_channels, compile_decoder
from shotstream.pipeline import Pipeline


@dataclass
class Lines:
    """Results, one JSON line each, in a file that is whole after every line."""

    path: Path
    head: dict[str, Any]
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")
        self.add("machine", **self.head)

    def add(self, what: str, /, **values: Any) -> None:
        line = json.dumps({"what": what, **values, "at_s": round(time.perf_counter() - self.started, 1)})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


@dataclass(frozen=True)
class Bench:
    """Where and at which size."""

    config: Config
    device: torch.device
    dtype: torch.dtype
    lines: Lines
    clock: Clock

    @property
    def compiler(self) -> str:
        """A dry run traces but generates no code."""
        return "inductor" if self.device.type == "cuda" else "aot_eager"

    @property
    def capture(self) -> Capture:
        """A dry run repeats what a GPU would record."""
        return cuda_graph if self.device.type == "cuda" else lambda work: work

    @property
    def tokens(self) -> int:
        return flops.tokens_per_frame(self.config)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def dit(self) -> DiT:
        """The DiT with random weights, zero-initialised ones too."""
        with torch.device(self.device):
            dit = DiT(self.config.dit)
        for parameter in dit.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.02)
        return dit.to(self.dtype).requires_grad_(False).eval()

    def vae(self) -> VAE:
        assert isinstance(self.config.vae, WanVAEConfig)
        z, wide = self.config.vae.latent_channels, self.config.vae.base_dim
        statistics = {} if z == 16 else {"latent_mean": (0.0,) * z, "latent_std": (1.0,) * z}
        with torch.device(self.device):
            vae = VAE(VAEConfig(base_dim=wide, latent_channels=z, **statistics))
        return vae.to(self.device, self.dtype).requires_grad_(False).eval()


class RandomText:
    """Text states as an encoder of this size would give, different for every prompt."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.length, self.dim = bench, bench.config.text.length, bench.config.dit.text_dim

    def encode(self, texts: list[str]) -> Tensor:
        return self.bench.random(len(texts), self.length, self.dim)

    def warnings(self, text: str) -> list[str]:
        return []


def pipeline(bench: Bench) -> Pipeline:
    """All of it but the text encoder; what that takes is in `prediction` and small."""
    return Pipeline(bench.config, bench.dit(), bench.vae(), RandomText(bench), "random weights")


def kernels(bench: Bench) -> None:
    """Attention at the lengths of a shot, its correctness where lengths are odd, and the DiT's products."""
    lines, dit, rows = bench.lines, bench.config.dit, bench.config.chunk * bench.tokens
    lines.add("ceilings", **ceilings(bench.device, bench.dtype, bench.clock))
    _, keys = flops.reads(bench.config, bench.config.chunks)
    for read in keys:
        q, k, v = (
            bench.random(1, n, dit.heads, dit.head_dim) for n in (rows, read * bench.tokens, read * bench.tokens)
        )
        seconds = fastest(lambda q=q, k=k, v=v: attention(q, k, v), bench.clock)
        work = 4.0 * rows * read * bench.tokens * dit.dim
        few = slice(0, 64)  # rows compared with float32 arithmetic
        truth = scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in (q[:, few], k, v))).transpose(1, 2)
        error = (attention(q, k, v)[:, few].float() - truth).abs().max().item()
        lines.add(
            "attention",
            kernel=attention_kernel(q, k, v),
            keys=read * bench.tokens,
            ms=round(seconds * 1e3, 4),
            tflops=round(work / seconds / 1e12, 2),
            largest_error=round(error, 5),
        )
    for inward, outward in ((dit.dim, dit.dim), (dit.dim, 3 * dit.dim), (dit.dim, dit.ffn_dim), (dit.ffn_dim, dit.dim)):
        x, w = bench.random(rows, inward), bench.random(outward, inward)
        found = {bench.dtype: fastest(lambda x=x, w=w: linear(x, w), bench.clock)}
        if bench.device.type == "cuda":
            found[torch.float8_e4m3fn] = fastest(fp8_product(x, w), bench.clock)
        for dtype, seconds in found.items():
            name = str(dtype).removeprefix("torch.")
            rate = round(2.0 * rows * inward * outward / seconds / 1e12, 2)
            lines.add("product", shape=[rows, inward, outward], dtype=name, ms=round(seconds * 1e3, 4), tflops=rate)


def fp8_product(x: Tensor, w: Tensor) -> Callable[[], Tensor]:
    """The product in 8-bit floats with a scale per row; quantising x is part of it, w's is not."""
    eight, top = torch.float8_e4m3fn, torch.finfo(torch.float8_e4m3fn).max
    w_scale = w.abs().amax(1, keepdim=True).float() / top
    w8 = (w / w_scale).to(eight)

    def product() -> Tensor:
        scale = x.abs().amax(1, keepdim=True).float() / top
        return torch._scaled_mm((x / scale).to(eight), w8.t(), scale, w_scale.t(), out_dtype=x.dtype)

    return product


def decoder(bench: Bench) -> None:
    """A latent frame becoming pictures: contiguous and channels-last, eager and compiled, and how exact each is.

    error_ratio: distance to the same decoder in float32, over that of the plain way (exactness E1: about 1).
    """
    _, height, width = bench.config.latent_shape
    latents = bench.random(1, 1, bench.config.dit.channels, height, width)
    torch.backends.cudnn.benchmark = True
    plain = bench.vae()
    exact = torch.float64 if bench.dtype == torch.float32 else torch.float32
    truth = second_frame(copy.deepcopy(plain).to(exact), latents)
    before = (second_frame(plain, latents) - truth).square().mean().sqrt().clamp(min=1e-12)
    work = flops.decode(bench.config.vae, height, width, first=False)
    for innermost, compiled in ((False, False), (False, True), (True, False), (True, True)):
        vae = copy.deepcopy(plain)
        if innermost:
            by_channels(vae.decoder)
        if compiled:
            vae.decoder.compile(dynamic=False, fullgraph=True, backend=bench.compiler)
        begun = time.perf_counter()
        error = (second_frame(vae, latents) - truth).square().mean().sqrt()
        first = time.perf_counter() - begun
        _, state = vae.decode(latents)
        seconds = fastest(lambda vae=vae, state=state: vae.decode(latents, state), bench.clock)
        bench.lines.add(
            "decode",
            channels="innermost" if innermost else "outermost",
            compiled=compiled,
            ms_per_latent_frame=round(seconds * 1e3, 3),
            tflops=round(work / seconds / 1e12, 3),
            error_ratio=round((error / before).item(), 3),
            first_s=round(first, 2),
        )


def second_frame(vae: VAE, latents: Tensor) -> Tensor:
    """What a stream's second latent frame decodes to, float32 [1 4 3 h w]."""
    _, state = vae.decode(latents)
    return vae.decode(latents, state)[0]


def blocks(bench: Bench) -> None:
    """A pass of one block and of all, at the first and the last chunk of a shot: eager, compiled, as a graph.

    Rows are read as they lie (`rotated`: at their place), or laid out and rotated for every pass anew.
    """
    policy, size = bench.config.policy, bench.config.chunk
    _, keys = flops.reads(bench.config, bench.config.chunks)
    _, height, width = bench.config.latent_shape
    whole = bench.dit()
    one = DiT(replace(bench.config.dit, layers=1)).to(bench.device, bench.dtype).requires_grad_(False)
    text = bench.random(1, bench.config.text.length, bench.config.dit.text_dim)
    latents = bench.random(1, size, *bench.config.latent_shape)
    times = torch.full((1, size), 900.0, device=bench.device)
    for compiled in (False, True):
        for dit in (one, whole):
            if compiled:
                compile_blocks(dit, bench.compiler)
            read = dit.read(text, torch.zeros(1, size, dtype=torch.long, device=bench.device))
            for count in (keys[0], keys[-1]):
                past = tuple(Frame(i) for i in range(count - size))
                new = tuple(Frame(count - size + i, 1, i) for i in range(size))
                store = FrameStore(dit.config.layers, height // dit.config.patch, width // dit.config.patch)
                kv = bench.random(1, bench.tokens, dit.config.heads, dit.config.head_dim)
                store.kept = {frame: [(kv, kv)] * dit.config.layers for frame in past}
                bound = store.bind(policy.plan(Call("denoise", past, new)), new)
                where = bound.rotation(bound.plan.queries, dit.config.head_dim, latents)
                work = flops.dit_pass(dit.config, size, bench.tokens, count, bench.config.text.length).total
                begun = time.perf_counter()
                dit(latents, times, read, where, bound)
                first = time.perf_counter() - begun

                def once(d: DiT = dit, r: Text = read, w: Rotation = where, b: BoundMemory = bound) -> Tensor:
                    return d(latents, times, r, w, b)

                def anew(s: FrameStore = store, run: Callable[[], Tensor] = once) -> Tensor:
                    for rows in s.desk:
                        rows.clear(lambda place: False)
                    return run()

                ways = {"rotated": once, "rotated for each pass": anew}
                if bench.device.type == "cuda":
                    ways["rotated, a graph"] = cuda_graph(once)
                for name, way in ways.items():
                    seconds = fastest(way, bench.clock)
                    bench.lines.add(
                        "pass",
                        layers=dit.config.layers,
                        compiled=compiled,
                        keys=count,
                        rows=name,
                        ms=round(seconds * 1e3, 3),
                        tflops=round(work / seconds / 1e12, 2),
                        first_s=round(first, 2),
                    )


def shots(bench: Bench) -> None:
    """Everything `shotstream bench` prints, the released way beside it, and whether anything makes the host wait."""
    for rates in H200:
        bench.lines.add("predicted", **vars(predict(bench.config, rates)))
    ours = pipeline(bench)
    settings = Settings(shots=2, switches=5, growth=0, sessions=1)
    bench.lines.add("fast, eager", **measure(ours, settings))
    compile_blocks(ours.dit, bench.compiler)
    bench.lines.add("fast, compiled", **measure(ours, settings))
    assert isinstance(ours.vae, VAE)
    compile_decoder(ours.vae, bench.compiler)
    bench.lines.add("fast, compiled, decoder too", **measure(ours, settings))
    record_passes(ours.dit, bench.capture)
    bench.lines.add("fast, compiled, decoder too, recorded", **measure(ours, settings))
    if bench.device.type == "cuda":
        bench.lines.add("waits of the host in a chunk", count=waits(ours))
    bench.lines.add("ratios", **ratios.measure(replace(ours, dit=bench.dit()), 3, bench.config.chunks, rounds=1))


def waits(ours: Pipeline) -> int:
    """How often the host waits for the GPU between the second chunk's start and its latents."""
    import warnings

    from shotstream.bench.measurement import captions
    from shotstream.session import Session

    session = Session(ours, seed=1)
    session.cut(next(captions(1)))
    stream = session.stream()
    next(stream)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            next(stream)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def long_run(bench: Bench) -> None:
    """Two viewers at once, and a story of forty short shots."""
    ours = pipeline(bench)
    compile_blocks(ours.dit, bench.compiler)
    for viewers in (1, 2):
        bench.lines.add("deadlines", **deadlines(ours, bench.clock, viewers, bench.config.chunks, shots=2))
    bench.lines.add("growth", **growth(ours, bench.clock, shots=40, chunks=1))


STAGES = {1: kernels, 2: decoder, 3: blocks, 4: shots, 5: long_run}


def small(config: Config) -> Config:
    """The same model, small enough for a CPU and a minute."""
    return replace(
        config,
        name="wan-tiny",
        height=32,
        width=48,
        chunks=2,
        dit=DiTConfig(dim=96, ffn_dim=192, heads=2, layers=2, text_dim=32, freq_dim=32, channels=4),
        vae=WanVAEConfig(base_dim=2, latent_channels=4),
        text=replace(config.text, length=16, dim=32),
    )


def prepare(dry_run: bool, stage: int, folder: Path) -> Bench:
    """Raises SystemExit without a GPU."""
    if not dry_run and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: no GPU here; --dry-run runs the same code at tiny sizes on the CPU")
    device = torch.device("cpu" if dry_run else "cuda")
    config = small(PRESETS["wan-1.3b"]) if dry_run else PRESETS["wan-1.3b"]
    name = f"{'dry' if dry_run else 'gpu'}-stage{stage}.jsonl"
    head = {"machine": machine(device), "model": config.name, "weights": "random"}
    dtype = torch.float32 if dry_run else torch.bfloat16
    return Bench(config, device, dtype, Lines(folder / name, head), Clock(device))


def stages(asked: str) -> Iterator[int]:
    """ "all", or a number."""
    yield from STAGES if asked == "all" else (int(asked),)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", required=True, choices=[*map(str, STAGES), "all"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args()
    torch.manual_seed(0)
    if given.dry_run:
        torch.set_num_threads(1)
    for stage in stages(given.stage):
        with torch.no_grad():
            STAGES[stage](prepare(given.dry_run, stage, given.out))


if __name__ == "__main__":
    main()
