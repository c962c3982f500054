"""CausVid (arXiv 2412.07772): independent rollouts of 21 latent frames that overlap."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shotstream.memory.plan import Boundary, Frame, MemoryPolicy


@dataclass(frozen=True)
class CausVid(MemoryPolicy):
    """At a cut: empty memory, then the start latents of the new rollout, which adds `limit - overlap` more.

    The start latents stand for the finished rollout's last `overlap` latent frames: the picture where those
    begin, encoded alone, and all but the first of them unchanged. `overlap=0` restarts from nothing. A new
    text inside a rollout is a plain swap (the release has no such event).
    """

    overlap: int = 3  # a multiple of the chunk
    restart: bool = True
    history: int = 2  # overlap - 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.overlap < 0 or self.overlap % self.chunk:
            raise ValueError(f"CausVid: overlap {self.overlap} must be a multiple of chunk {self.chunk}")
        if self.history < self.overlap - 1:
            raise ValueError(f"CausVid: overlap {self.overlap} needs history >= {self.overlap - 1}")

    def boundary(self, memory: tuple[Frame, ...], new: tuple[Frame, ...], cut: bool, shots: Sequence[int]) -> Boundary:
        if not cut or not shots or not self.overlap:
            return super().boundary(memory, new, cut, shots)
        picture = shots[-1] - (4 * (self.overlap - 1) + 1)
        if picture < 0:
            raise ValueError(f"{shots[-1]} pictures are too few for an overlap of {self.overlap} latent frames")
        first, *rest = (replace(new[0], index=new[0].index - i, offset=-i) for i in range(self.overlap, 0, -1))
        first = replace(first, shot=len(shots) - 1, offset=picture, role="context")
        return Boundary((), (first, *rest))
