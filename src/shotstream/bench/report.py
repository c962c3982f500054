"""The tables that `shotstream bench` prints."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shotstream.bench.prediction import Prediction


def table(result: dict[str, Any]) -> str:
    """A measurement for people, a fact per line."""
    machine, whole, ceiling = result["machine"], result["end_to_end"], result["ceilings"]
    shape, work, switch = result["shape"], result["arithmetic"], result["prompt_switch_ms"]
    place = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    clock = {"wall": "wall clock", "cpu": "CPU time of this process"}[result["settings"]["clock"]]
    rows = [
        ("machine", f"{place}; torch {machine['torch']}; commit {machine['commit'] or 'unknown'}; {clock}"),
        (
            "model",
            f"{result['model']} ({result['weights']}), {shape['size'][0]} x {shape['size'][1]}, "
            f"{shape['chunks']} chunks a shot, {shape['dtype']}",
        ),
        ("attention", result["attention"]),
        ("ceilings", f"{ceiling['matmul_tflops']} TFLOP/s matrix product, {ceiling['copy_gb_s']} GB/s copy"),
        ("end to end", f"{whole['fps']} frames/s, {whole['times_real_time']} x real time"),
        ("chunk", _quantiles(whole["chunk_ms"])),
        ("DiT alone", f"{result['dit_only']['fps']} frames/s"),
        ("arithmetic", f"{work['gflop_per_shot']} GFLOP a shot, {work['of_ceiling']:.0%} of the ceiling"),
        ("stages of a shot", _pairs(result["stages_ms_per_shot"])),
        ("pass by keys", _pairs(result["pass_ms"], " latent frames")),
    ]
    if fast := result.get("fast"):
        rows.insert(2, ("approximate", approximate(fast, machine)))
    if operators := result["operators_ms_per_shot"]:
        rows.insert(-1, ("operators of a shot", _pairs(operators)))
    if fit := result["pass_ms_fit"]:
        rows.append(("", f"{fit['constant']} ms + {fit['per_latent_frame']} ms per latent frame read"))
    rows += [
        ("first frame", f"cold {result['first_frame_ms']['cold']} ms, warm {result['first_frame_ms']['warm']} ms"),
        ("prompt switch", f"running {_quantiles(switch['running'])}; idle {_quantiles(switch['idle'])}"),
        ("", f"{_pairs(switch['parts'])}; read ahead {switch['ahead']} ms"),
        ("video file", f"{result['video_file_ms_per_chunk']} ms a chunk"),
        ("memory", ", ".join(f"{name.replace('_', ' ')} {mb} MB" for name, mb in result["memory_mb"].items())),
    ]
    for case in result["deadlines"]:
        late = f"{case['late']} of {case['chunks']} chunks late, load {case['load']:.0%}"
        rows.append(("deadlines", f"{case['sessions']} at once: {late}"))
    if grown := result.get("growth"):
        rows.append(
            (
                "growth",
                f"the last 5 of {grown['shots']} shots take {grown['time_ratio']} of the time of shots 8 to 12, "
                f"and hold {grown['memory_ratio']} of their memory",
            )
        )
    return _lines(rows)


def approximate(fast: dict[str, Any], machine: dict[str, Any]) -> str:
    """Of `evaluation.fast.compare`: what is not exact, its speed and, beside it, its loss."""
    like, by_shot = fast["likeness"], fast["likeness"]["psnr_by_shot"]
    speed = f"{fast['time']['of_exact']} of the exact model's time"
    loss = f"PSNR {like['psnr']} dB (shot 1 {by_shot[0]}, shot {len(by_shot)} {by_shot[-1]}), SSIM {like['ssim']}"
    return f"{named(fast['approximate'], machine)}: {speed}; beside its pictures {loss}"


def named(approximate: Iterable[str], machine: dict[str, Any]) -> str:
    """What is approximate; that fp8 is only simulated, where it is."""
    simulated = float(machine.get("capability", 0)) < 8.9  # as `models.fp8.has_kernel` has it
    return " + ".join("fp8 (simulated)" if name == "fp8" and simulated else name for name in approximate)


def predictions(predicted: Iterable[Prediction]) -> str:
    """What a model should reach at some rates."""
    rows = [("", "fps end to end", "fps DiT alone", "DiT s/shot", "s/shot")]
    rows += [(p.name, f"{p.fps:.1f}", f"{p.dit_fps:.1f}", f"{p.dit_s:.2f}", f"{p.shot_s:.2f}") for p in predicted]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for name, *cells in rows:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join((name.ljust(widths[0]), *padded)))
    return "\n".join(lines)


def _quantiles(values: dict[str, float]) -> str:
    return f"p50 {values['p50']} ms, p95 {values['p95']} ms, mean {values['mean']} ms"


def _pairs(values: dict[str, float], unit: str = "") -> str:
    return ", ".join(f"{name}{unit} {value} ms" for name, value in values.items())


def _lines(rows: list[tuple[str, str]]) -> str:
    wide = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(wide)}  {text}" for name, text in rows)
