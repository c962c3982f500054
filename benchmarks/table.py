"""The README's table of speed, from result files: ours, the released way, the limit, and what others publish.

python -m benchmarks.table            # writes it between its markers in README.md
python -m benchmarks.table --check    # fails if the README says something else
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from shotstream.bench import flops
from shotstream.bench.prediction import H200, predict
from shotstream.config import PRESETS
from shotstream.evaluation import fast

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- speed: python -m benchmarks.table -->", "<!-- /speed -->"
FAST = "<!-- fast: python -m benchmarks.table -->", "<!-- /fast -->"
PROFILE_OF = "bench-storybook.json"
FAST_OF = "fast-storybook.json"

# Streaming systems of this size on one GPU: what they state, and what they say they count.
PUBLISHED = (
    ("ShotStream, the paper", "15.95", "H200", "not stated", "arXiv 2603.25746"),
    ("Self Forcing, users' measurement", "13", "H100", "with the Wan VAE", "its issue 67"),
    ("LongLive", "20.7", "H100", "not stated", "its README"),
    ("MotionStream 1.3B", "29", "H100", "with a tiny decoder", "arXiv 2511.01266"),
    ("Self Forcing in FlashDreams", "34.9", "H100", "with a tiny decoder, smaller memory", "its benchmark page"),
)


def rows(results: Path) -> list[tuple[str, ...]]:
    """What | frames per second | first frame | prompt switch | counted | machine, commit."""
    found: list[tuple[str, ...]] = []
    for path in sorted(results.glob("ratios-*.json")):
        result = json.loads(path.read_text())
        for name, title in (("fast", "shotstream"), ("naive", "the released way, here")):
            what = f"{title}: {result['model']}, {result['shots']} shots of {result['chunks']} chunks"
            found.append((what, *_measured(result[name]), "all but the video file", _where(result["machine"])))
        ratio = result["naive_over_fast"]
        cells = (f"**{ratio['whole']:.2f} x**", f"{ratio['first_frame']:.1f} x", f"{ratio['switch']:.1f} x")
        found.append(("so many times as fast", *cells, "same process, in turns", ""))
    for path in sorted(results.glob("bench-*.json")):
        result = json.loads(path.read_text())
        work, limit = result["arithmetic"], result["ceilings"]["matmul_tflops"]
        fps = result["end_to_end"]["fps"] / work["of_ceiling"]
        first, switch = result["first_frame_ms"]["warm"] / 1e3, result["prompt_switch_ms"]["idle"]["p50"] / 1e3
        speed = _measured({"fps": result["end_to_end"]["fps"], "first_frame": first, "switch": switch})
        what = f"shotstream: {result['model']}, {result['shape']['chunks']} chunks a shot"
        found.append((what, *speed, "all but the video file", _where(result["machine"])))
        what = f"limit: {result['model']}, all arithmetic at {1e3 * limit:.0f} GFLOP/s"
        found.append((what, f"{fps:.0f}", "", "", "all but the video file", _where(result["machine"])))
    wan = PRESETS["wan-1.3b"]
    for rates in H200:
        if rates.name in ("fast path", "all arithmetic at 790"):
            made = predict(wan, rates)
            counted = f"derived: {flops.shot(wan).total / 1e12:.0f} TFLOP a shot; not measured"
            found.append((f"wan-1.3b, {rates.name}", f"{made.fps:.1f}", "", "", counted, "one H200"))
    for what, fps, gpu, counted, source in PUBLISHED:
        found.append((f"{what} (published)", fps, "", "", f"{counted}; {source}", f"one {gpu}"))
    return found


def _measured(times: dict[str, float]) -> tuple[str, str, str]:
    return f"{times['fps']:.1f}", f"{times['first_frame']:.3f} s", f"{times['switch']:.3f} s"


def _where(machine: dict[str, Any]) -> str:
    threads = machine["threads"]
    place = machine.get("gpu") or f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{place}; {machine['commit']}"


def speed(results: Path = RESULTS) -> str:
    """The README's table."""
    return _markdown(("", "frames/s", "first frame", "prompt switch", "what counts", "machine; commit"), rows(results))


def profile(results: Path = RESULTS) -> str:
    """Where the milliseconds of a shot go: by stage, then by operator."""
    result = json.loads((results / PROFILE_OF).read_text())
    tables = []
    for title, times in (("stage", "stages_ms_per_shot"), ("operator", "operators_ms_per_shot")):
        whole = sum(result[times].values())
        lines = [(name, f"{ms:.1f}", f"{ms / whole:.0%}") for name, ms in result[times].items()]
        tables.append(_markdown((title, "ms per shot", "share"), lines))
    what = f"{result['model']}, {result['shape']['chunks']} chunks a shot; {_where(result['machine'])}"
    return "\n\n".join((what, *tables))


def approximate(results: Path = RESULTS) -> str:
    """What fast mode gains and loses."""
    return fast.table(json.loads((results / FAST_OF).read_text()))


def _markdown(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ("---",) * len(head), *lines))


def placed(text: str, table: str, marks: tuple[str, str] = (BEGIN, END)) -> str:
    """`text` with the table between its markers. Raises ValueError without them."""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise ValueError(f"no {marks[0]} ... {marks[1]}; put both lines where the table belongs")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    page_of_docs = ROOT / "docs" / "performance.md"
    pages = (ROOT / "README.md", speed(), (BEGIN, END)), (page_of_docs, profile(), (BEGIN, END))
    for page, table, marks in (*pages, (page_of_docs, approximate(), FAST)):
        text = page.read_text(encoding="utf-8")
        try:
            wanted = placed(text, table, marks)
        except ValueError as error:
            sys.exit(f"{page}: {error}")
        if wanted == text:
            continue
        if given.check:
            sys.exit(f"{page}: its table of speed is not that of the result files; run python -m benchmarks.table")
        page.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
