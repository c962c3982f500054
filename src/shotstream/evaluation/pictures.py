"""What the numbers are of: a grid of shots drawn by lot, and the stories with most mistakes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shotstream.evaluation.measures import Pair, pairs
from shotstream.evaluation.records import JudgedStory
from shotstream.storybook.draw import WIDTH
from shotstream.video import ContactSheet

COLUMNS, LINES, WORST = 6, 8, 10
SCENE_ALONE = ("place", "time", "framing")
"""What can be wrong where nobody is seen."""


def draw_grid(stories: Sequence[JudgedStory], path: Path) -> None:
    """Middle frames of 48 shots, or of all if there are fewer: always the same draw, never a selection."""
    shots = [(story.strip, k) for story in stories if story.strip for k in range(len(story.readings))]
    if not shots:
        return
    drawn = np.random.default_rng(0).permutation(len(shots))[: COLUMNS * LINES]
    tiles = [_tiles(strip)[k] for strip, k in (shots[i] for i in drawn)]
    columns = min(COLUMNS, len(tiles))
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    lines = [np.concatenate(tiles[i : i + columns], axis=1) for i in range(0, len(tiles), columns)]
    Image.fromarray(np.concatenate(lines)).save(path)


def draw_worst(stories: Sequence[JudgedStory], path: Path, row: str) -> None:
    """The ten worst stories, and what was seen instead of what."""
    chosen = worst(stories)
    if not chosen:
        return
    sheet = ContactSheet(f"{row}: worst of {len(stories)}", columns=max(len(story.readings) for story in chosen))
    for story in chosen:
        assert story.strip
        sheet.begin_shot(f"story {story.world.seed}. {mistakes(story)}", len(story.readings))
        sheet.write(np.stack(_tiles(story.strip)))
    sheet.save(path)


def worst(stories: Sequence[JudgedStory]) -> list[JudgedStory]:
    """The ten stories, of those with pictures, of which the smallest share of what is named is seen (T1)."""
    return sorted((story for story in stories if story.strip), key=_share_right)[:WORST]


def mistakes(story: JudgedStory) -> str:
    """What was seen instead of what, shot by shot."""
    said = []
    for shot, reading in enumerate(story.readings):
        wrong = [pair for pair in _named(story) if pair.shot == shot and pair.wanted != pair.seen]
        seen = [f"{pair.seen} for {pair.wanted}" for pair in wrong if reading.found or pair.attribute in SCENE_ALONE]
        said += [f"{shot + 1}: {', '.join(seen if reading.found else ['nobody', *seen])}"] if wrong else []
    return "; ".join(said) or "all right"


def _named(story: JudgedStory) -> list[Pair]:
    return [pair for pair in pairs(story) if pair.group == "named"]


def _share_right(story: JudgedStory) -> float:
    return float(np.mean([pair.wanted == pair.seen for pair in _named(story)]))


def _tiles(strip: Path) -> list[NDArray[np.uint8]]:
    with Image.open(strip) as image:
        whole = np.asarray(image)
    return np.split(whole, range(WIDTH, whole.shape[1], WIDTH), axis=1)
