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
from shotstream.memory.policies.systems import POLICIES, PolicyError, choose, named, rehearse

__all__ = [
    "POLICIES",
    "CausVid",
    "DualBuffer",
    "InfinityRope",
    "LongLive",
    "LongLiveInfinity",
    "MemoryPolicy",
    "PinnedSink",
    "PolicyError",
    "RewardForcing",
    "RollingForcing",
    "RollingSink",
    "Slots",
    "choose",
    "context_picks",
    "named",
    "rehearse",
]
