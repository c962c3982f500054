"""Published models: which file comes from where, and the schedule and memory policy its weights were made for.

Facts are those of the systems' releases (docs/method.md and the papers named here). Every system runs on Wan 2.1's VAE,
text encoder and tokeniser. No torch and no network here: `hub` fetches, `pipeline` loads.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from shotstream.config import PRESETS, RELEASED, Config
from shotstream.memory.plan import MemoryPolicy
from shotstream.memory.policies import POLICIES
from shotstream.memory.schedule import SCHEDULES, NoiseSchedule


@dataclass(frozen=True)
class Remote:
    """A file on the Hugging Face Hub. `part`: the entry of a pickle that is wanted."""

    repo: str
    path: str
    part: str | None = None
    revision: str = "main"

    def __str__(self) -> str:
        pinned = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{pinned}/{self.path}"


BASE = "Wan-AI/Wan2.1-T2V-1.3B"
VAE = Remote(BASE, "Wan2.1_VAE.pth")
TEXT = Remote(BASE, "models_t5_umt5-xxl-enc-bf16.pth")
TOKENIZER = Remote(BASE, "google/umt5-xxl/tokenizer.json")


@dataclass(frozen=True)
class Release:
    """A published model: its DiT, perhaps a LoRA to merge into it, and what it runs with."""

    name: str
    about: str
    licence: str
    config: Config
    dit: Remote
    lora: Remote | None = None

    @property
    def files(self) -> tuple[Remote, ...]:
        """Everything that generating needs."""
        own = (self.dit,) if self.lora is None else (self.dit, self.lora)
        return (*own, VAE, TEXT, TOKENIZER)

    def at(self, revision: str) -> Release:
        """The same with its own files pinned to a commit, branch or tag; the shared files stay as they are."""
        lora = self.lora and dataclasses.replace(self.lora, revision=revision)
        return dataclasses.replace(self, dit=dataclasses.replace(self.dit, revision=revision), lora=lora)


_WAN = PRESETS["wan-1.3b"]
_ONE_TEXT = "{global_caption} {caption}"  # of systems that were trained with one caption per video


def _release(
    name: str,
    about: str,
    licence: str,
    dit: Remote,
    policy: MemoryPolicy,
    schedule: NoiseSchedule,
    prompt: str = _ONE_TEXT,
    lora: Remote | None = None,
) -> Release:
    config = dataclasses.replace(_WAN, name=name, policy=policy, schedule=schedule, prompt=prompt)
    return Release(name, about, licence, config, dit, lora)


def _shotstream(name: str, about: str, path: str) -> Release:
    licence = "none stated in the repository"
    dit = Remote("KlingTeam/ShotStream", path, "generator")
    return _release(name, about, licence, dit, RELEASED, SCHEDULES["shotstream"], _WAN.prompt)


_SELF_FORCING = Remote("gdhe17/Self-Forcing", "checkpoints/self_forcing_dmd.pt", "generator_ema")
_INFINITE_FORCING = Remote("SOTAMak1r/Infinite-Forcing", "ema_model.pt", "generator_ema")
_LONGLIVE = "Efficient-Large-Model/LongLive-1.3B"
_FEW = SCHEDULES["self-forcing"]

_ALL = (
    _shotstream("shotstream", "ShotStream, the merged student (arXiv 2603.25746)", "shotstream_merged.pt"),
    _shotstream("shotstream-ode", "its causal initialisation: blurred, a start for training", "ode_init.pt"),
    _shotstream("shotstream-teacher", "its bidirectional teacher: for training", "bidirectional_teacher.pt"),
    _release(
        "self-forcing",
        "Self Forcing (arXiv 2506.08009): every shot by itself",
        "Apache-2.0",
        _SELF_FORCING,
        POLICIES["self-forcing"],
        _FEW,
    ),
    _release(
        "causvid",
        "CausVid (arXiv 2412.07772), the public port to 1.3B",
        "CC BY-NC-SA 4.0",
        Remote("tianweiy/CausVid", "autoregressive_checkpoint/model.pt", "generator"),
        POLICIES["causvid"],
        SCHEDULES["causvid"],
    ),
    _release(
        "longlive",
        "LongLive 1.0 (arXiv 2509.22622), base and LoRA",
        "Apache-2.0",
        Remote(_LONGLIVE, "models/longlive_base.pt", "generator"),
        POLICIES["longlive"],
        _FEW,
        lora=Remote(_LONGLIVE, "models/lora.pt", "generator_lora"),
    ),
    _release(
        "infinite-forcing",
        "Infinite-Forcing: sink of 1, window of 9, positions are slots",
        "Apache-2.0",
        _INFINITE_FORCING,
        POLICIES["infinite-forcing"],
        _FEW,
    ),
    _release(
        "infinity-rope",
        "Infinity-RoPE (arXiv 2511.20649), on Infinite-Forcing's weights",
        "Apache-2.0",
        _INFINITE_FORCING,
        POLICIES["infinity-rope"],
        _FEW,
        prompt="Scene cut to {global_caption} {caption}",  # its authors' advice
    ),
    _release(
        "rolling-sink",
        "Rolling Sink (arXiv 2602.07775), on Self Forcing's weights",
        "Apache-2.0",
        _SELF_FORCING,
        POLICIES["rolling-sink"],
        _FEW,
    ),
    _release(
        "reward-forcing",
        "Reward Forcing (arXiv 2512.04678)",
        "Apache-2.0",
        Remote("JaydenLu666/Reward-Forcing-T2V-1.3B", "rewardforcing.pt"),
        POLICIES["reward-forcing"],
        _FEW,
    ),
    _release(
        "rolling-forcing",
        "Rolling Forcing (arXiv 2509.25161): chunks at rising noise levels share a call",
        "contradictory (code: academic use; model card: MIT)",
        Remote("TencentARC/RollingForcing", "checkpoints/rolling_forcing_dmd.pt", "generator_ema"),
        POLICIES["rolling-forcing"],
        SCHEDULES["rolling-forcing"],
    ),
    _release(
        "wan-1.3b",
        "Wan 2.1 itself, what all others start from: bidirectional, for training",
        "Apache-2.0",
        Remote(BASE, "diffusion_pytorch_model.safetensors"),
        RELEASED,
        SCHEDULES["shotstream"],
        _WAN.prompt,
    ),
)

RELEASES: dict[str, Release] = {release.name: release for release in _ALL}


def find(name: str) -> Release | None:
    """The release with this name or repository (its first, where it holds several), `@revision` pinned if given."""
    name, _, revision = name.partition("@")
    by_repo = {release.dit.repo: release for release in reversed(_ALL)}
    release = RELEASES.get(name) or by_repo.get(name)
    return release.at(revision) if release and revision else release


def nearest(name: str) -> str:
    """What an unknown name may have meant, for messages: a few known names."""
    known = [*RELEASES, *dict.fromkeys(release.dit.repo for release in _ALL)]
    lower = {other.lower(): other for other in known}
    near = [lower[found] for found in difflib.get_close_matches(name.lower(), lower, n=2, cutoff=0.5)]
    return ", ".join(near or RELEASES)
