"""The published systems as memory policies, by name. Each is torch-free and lives in one file."""

from shotstream.memory.plan import MemoryPolicy, Slots
from shotstream.memory.policies.causvid import CausVid
from shotstream.memory.policies.dual_buffer import DualBuffer, context_picks
from shotstream.memory.policies.infinity_rope import InfinityRope
from shotstream.memory.policies.longlive import LongLive, LongLiveInfinity
from shotstream.memory.policies.pinned_sink import PinnedSink
from shotstream.memory.policies.reward_forcing import RewardForcing
from shotstream.memory.policies.rolling_forcing import RollingForcing
from shotstream.memory.policies.rolling_sink import RollingSink

POLICIES: dict[str, MemoryPolicy] = {
    "dual-buffer": DualBuffer(),  # ShotStream
    "self-forcing": MemoryPolicy(restart=True),  # as released: 21 latent frames, so every shot by itself
    "self-forcing-window": MemoryPolicy(window=21),  # one endless take; new text is swapped in
    "causvid": CausVid(),
    "longlive": LongLive(),
    "longlive-infinity": LongLiveInfinity(),
    "infinite-forcing": Slots(window=9, sink=1),
    "reward-forcing": RewardForcing(),
    "infinity-rope": InfinityRope(),
    "rolling-sink": RollingSink(),
    "rolling-forcing": RollingForcing(),  # with the joint schedule
    "pinned-sink": PinnedSink(),  # chunks of 8 latent frames
}

__all__ = [
    "POLICIES",
    "CausVid",
    "DualBuffer",
    "InfinityRope",
    "LongLive",
    "LongLiveInfinity",
    "MemoryPolicy",
    "PinnedSink",
    "RewardForcing",
    "RollingForcing",
    "RollingSink",
    "Slots",
    "context_picks",
]
