"""Clips as latents: encoded once, kept in shards, read back as training batches.

    shotstream data cache-latents clips.jsonl --model wan-1.3b --out runs/wan/data

A shard is a tar file in `webdataset`'s layout, so that any reader of those can stream it. A sample is a clip: `json`
says what it is, and `0.safetensors`, `1.safetensors`, ... hold a shot each: `latents` (the shot as a target), `stills`
(single pictures, each encoded alone: what context is made of) and `text` (the states of its prompt).

Training picks clips at random and reads only the shots it needs, straight from their place in the tar. So the data of a
step are a function of the step, and a stopped run goes on exactly.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from shotstream.data.batch import WHOLE, Batch, ContextRule, Kind, Sample, Share, collate
from shotstream.data.clips import Clip, shot_pictures
from shotstream.errors import MISSING, Failure
from shotstream.pipeline import Pipeline

PER_SHARD = 16
# Wan's own negative prompt: its phrases, with full-width commas between them.
NEGATIVE = "\uff0c".join(
    (
        "色调艳丽",
        "过曝",
        "静态",
        "细节模糊不清",
        "字幕",
        "风格",
        "作品",
        "画作",
        "画面",
        "静止",
        "整体发灰",
        "最差质量",
        "低质量",
        "JPEG压缩残留",
        "丑陋的",
        "残缺的",
        "多余的手指",
        "画得不好的手部",
        "画得不好的脸部",
        "畸形的",
        "毁容的",
        "形态畸形的肢体",
        "手指融合",
        "静止不动的画面",
        "杂乱的背景",
        "三条腿",
        "背景人很多",
        "倒着走",
    )
)
NOTHING = "nothing.safetensors"  # the states of the null text
RULES = tuple(ContextRule(frames=frames) for frames in ("dynamic", "first", "first-last"))  # all can be trained on


def target_frames(count: int, longest: int) -> range:
    """Which frames of a shot are learned: a long one is thinned by a whole step, then cut to 4k + 1 (method.md 13.1).

    `longest`: frames of the model's own shots, 81 at Wan size.
    """
    step = max(1, count // longest)
    kept = min(len(range(0, count, step)), longest)
    return range(0, ((kept - 1) // 4 * 4 + 1) * step, step)


def write_latents(
    out: Path, clips: Sequence[Clip], pipeline: Pipeline, nothing: str = "", share: Share = WHOLE
) -> None:
    """Write the shards of `clips`; those that exist are kept, so several processes and restarts add up.

    `nothing`: the null text, at Wan size the negative prompt.
    """
    try:
        from webdataset import TarWriter
    except ImportError:
        raise Failure("latent shards need webdataset: pip install 'shotstream[train]'", MISSING) from None
    out.mkdir(parents=True, exist_ok=True)
    if share.rank == 0:
        save_file({"nothing": pipeline.text.encode([nothing])[0].float().cpu()}, out / NOTHING)
    numbers = range(0, len(clips), PER_SHARD)
    for first in numbers[share.rank :: share.processes]:
        path = out / f"clips-{first // PER_SHARD:05d}.tar"
        if path.exists():
            continue
        unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with TarWriter(str(unfinished)) as tar:
                for number, clip in enumerate(clips[first : first + PER_SHARD], first):
                    tar.write(encoded(clip, f"{number:07d}", pipeline))
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


@torch.no_grad()
def encoded(clip: Clip, key: str, pipeline: Pipeline) -> dict[str, object]:
    """A clip as a sample of a shard."""
    config, vae = pipeline.config, pipeline.vae
    sample: dict[str, object] = {"__key__": key}
    shots = []
    for number, (shot, pictures) in enumerate(shot_pictures(clip, config.height, config.width)):
        frames = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1  # f c h w
        frames = frames.to(next(pipeline.dit.parameters()).device)
        wanted = target_frames(len(frames), config.shot_frames())
        stills = sorted({p for rule in RULES for p in rule.pictures(len(frames), len(clip.shots))})
        prompt = pipeline.prompt(clip.global_caption, number, shot.caption)
        states = pipeline.text.encode([prompt])[0]
        written = int(states.any(-1).nonzero().max()) + 1 if states.any() else 1
        tensors = {
            "latents": vae.encode(frames[list(wanted)][None])[0],
            "stills": vae.context_latents(frames[stills]),
            "text": states[:written],
        }
        sample[f"{number}.safetensors"] = save_tensors({n: t.bfloat16().contiguous().cpu() for n, t in tensors.items()})
        shots.append(
            {
                "caption": shot.caption,
                "frames": shot.frames,
                "latents": len(tensors["latents"]),
                "pictures": stills,
            }
        )
    sample["json"] = {"video": clip.video.name, "global_caption": clip.global_caption, "shots": shots}
    return sample


@dataclass(frozen=True)
class _Shot:
    """Where a shot lies, and what is known of it without reading it."""

    shard: Path
    offset: int
    size: int
    frames: int  # pictures
    latents: int  # latent frames as a target
    pictures: tuple[int, ...]  # which stills there are


def null_states(folder: Path) -> Tensor:
    """The states [s d] of the null text of guidance. Raises FileNotFoundError."""
    path = folder / NOTHING
    if not path.exists():
        raise FileNotFoundError(f"{path}: make it with `shotstream data cache-latents`")
    return load_file(path)["nothing"]


class Clips:
    """All shards of a folder, by clip and shot; only the table of contents is held."""

    def __init__(self, folder: Path, rule: ContextRule = ContextRule(), chunk: int = 3) -> None:
        shards = sorted(folder.glob("clips-*.tar"))
        if not shards:
            raise FileNotFoundError(f"{folder}: no clips-*.tar; make them with `shotstream data cache-latents`")
        self.rule = rule
        self.chunk = chunk  # targets are cut to whole chunks
        self.nothing = null_states(folder)
        self.clips = [clip for shard in shards for clip in _contents(shard)]
        self.places = [(c, s) for c, clip in enumerate(self.clips) for s in range(len(clip)) if self._length((c, s))]
        if not self.places:
            raise ValueError(f"{folder}: no shot is as long as a chunk of {chunk} latent frames")

    def __len__(self) -> int:
        return len(self.clips)

    def batch(
        self, rng: np.random.Generator, size: int, kind: Kind, history: int | None = None, share: Share = WHOLE
    ) -> Batch:
        """Draw `size` samples of one length, and read this process's share of them; as `Stories.batch`."""
        if kind == "next" and history is None and self.rule.frames != "dynamic":
            history = int(rng.integers(1, max(map(len, self.clips))))
        able = [p for p in self.places if kind != "next" or (p[1] == history if history else p[1] > 0)]
        if not able:
            wanted = f"with {history} shots before it" if history else "after another"
            raise ValueError(f"no clip has a shot {wanted}: a batch of kind {kind!r} cannot be drawn")
        length = self._length(able[int(rng.integers(len(able)))])
        alike = [place for place in able if kind == "image" or self._length(place) == length]
        rows = [alike[i] for i in rng.integers(len(alike), size=size)]
        return self.gather(rows, rng, kind == "next", 1 if kind == "image" else None, share)

    def pick_stories(self, rng: np.random.Generator, size: int, shots: int) -> list[int]:
        """Clips of at least `shots` shots."""
        able = [c for c, clip in enumerate(self.clips) if len(clip) >= shots]
        if not able:
            raise ValueError(f"no clip has {shots} shots; lower task.shots")
        return [able[i] for i in rng.integers(len(able), size=size)]

    def gather(
        self,
        rows: Sequence[tuple[int, int]],
        rng: np.random.Generator,
        context: bool,
        frames: int | None = None,
        share: Share = WHOLE,
    ) -> Batch:
        """The batch of this share of these (clip, shot) pairs; `frames`: so many latent frames of the target, whether
        the clip has fewer (then zeros follow: a student that tells stories of its own needs the captions) or more.
        """
        samples = [self._sample(clip, shot, context, frames) for clip, shot in share.of(list(rows))]
        return collate(samples, self.rule, zeros=self.rule.zeros and frames != 1)

    def _length(self, place: tuple[int, int]) -> int:
        return self.clips[place[0]][place[1]].latents // self.chunk * self.chunk

    def _sample(self, clip: int, shot: int, context: bool, frames: int | None) -> Sample:
        shots = self.clips[clip]
        picks = self.rule.picks([s.frames for s in shots[:shot]]) if context else ()
        read = {s: _read(shots[s]) for s in {*(s for s, _ in picks), shot}}
        target = read[shot]["latents"][: frames or self._length((clip, shot))]
        if frames and len(target) < frames:
            target = torch.cat((target, target.new_zeros(frames - len(target), *target.shape[1:])))
        return Sample(
            stills=[read[s]["stills"][shots[s].pictures.index(p)] for s, p in picks],
            shots=[s for s, _ in picks],
            target=target,
            shot=shot,
            prompts={s: self._padded(tensors["text"]) for s, tensors in read.items()},
            coverage=torch.zeros(len(target), *target.shape[-2:]),
        )

    def _padded(self, text: Tensor) -> Tensor:
        """States of all rows: those past a prompt's end are zero."""
        return torch.nn.functional.pad(text, (0, 0, 0, len(self.nothing) - len(text)))


def _contents(shard: Path) -> list[list[_Shot]]:
    """Clips of a shard, shot by shot: reads headers and the small `json` alone."""
    places: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(shard, "r:") as tar:
        for member in tar:
            key, _, kind = member.name.partition(".")
            places.setdefault(key, {})[kind] = member
        clips = []
        for fields in places.values():
            opened = tar.extractfile(fields["json"])
            assert opened is not None
            shots = json.loads(opened.read())["shots"]
            clips.append(
                [
                    _Shot(
                        shard,
                        fields[f"{i}.safetensors"].offset_data,
                        fields[f"{i}.safetensors"].size,
                        shot["frames"],
                        shot["latents"],
                        tuple(shot["pictures"]),
                    )
                    for i, shot in enumerate(shots)
                ]
            )
    return clips


def _read(shot: _Shot) -> dict[str, Tensor]:
    with shot.shard.open("rb") as file:
        file.seek(shot.offset)
        return load_tensors(file.read(shot.size))
