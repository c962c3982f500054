"""Systems by name, fitted to a model: what `--policy NAME` and `Session(policy=...)` mean. No torch.

    policy, schedule = choose("longlive", pipeline.config)

Published windows are made for shots of seven chunks. A model with shorter shots gets shorter windows, so that a system
looks back as many shots as it was published to (`scaled`). The published weights of each system, with the schedule
they were distilled for, are in `releases.py`.
"""

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from shotstream.memory.plan import Frame, MemoryPolicy, Slots
from shotstream.memory.policies.causvid import CausVid
from shotstream.memory.policies.dual_buffer import DualBuffer
from shotstream.memory.policies.infinity_rope import InfinityRope
from shotstream.memory.policies.longlive import LongLive, LongLiveInfinity
from shotstream.memory.policies.pinned_sink import PinnedSink
from shotstream.memory.policies.reward_forcing import RewardForcing
from shotstream.memory.policies.rolling_forcing import RollingForcing
from shotstream.memory.policies.rolling_sink import RollingSink
from shotstream.memory.schedule import NoiseSchedule

POLICIES: dict[str, MemoryPolicy] = {  # as published
    "shotstream": DualBuffer(),
    "self-forcing": MemoryPolicy(restart=True),  # 21 latent frames, so every shot by itself; also Causal Forcing
    "self-forcing-window": MemoryPolicy(window=21),  # one endless take; new text is swapped in
    "causvid": CausVid(),
    "longlive": LongLive(),
    "longlive-infinity": LongLiveInfinity(),
    "infinite-forcing": Slots(window=9, sink=1),
    "reward-forcing": RewardForcing(),
    "infinity-rope": InfinityRope(),
    "rolling-sink": RollingSink(),
    "rolling-forcing": RollingForcing(restart=True),  # joint windows; each shot's run to their end before the next
    "pinned-sink": PinnedSink(),  # LongLive 2.0's rule alone; published for chunks of 8 latent frames
}

CHUNKS = 7  # in the shots that published windows are made for: 21 latent frames of 3


class PolicyError(ValueError):
    """A policy that is not there, or does not fit the model. One line: which, why, what to do."""


class Model(Protocol):
    """What a policy must know of a model; `config.Config` has it."""

    @property
    def policy(self) -> MemoryPolicy: ...
    @property
    def schedule(self) -> NoiseSchedule: ...
    @property
    def chunk(self) -> int: ...
    @property
    def chunks(self) -> int: ...


def choose(policy: str | MemoryPolicy | None, model: Model) -> tuple[MemoryPolicy, NoiseSchedule]:
    """The policy and schedule for a model: its own (None), a system by name fitted to it, or a policy as it stands.

    Noise levels are the model's, for its weights were distilled at them; Rolling Forcing visits them in joint windows.
    Raises PolicyError: an unknown name, or a policy for chunks of another size.
    """
    if policy is None:
        policy = model.policy
    elif isinstance(policy, str):
        published = named(policy)
        ours = isinstance(published, DualBuffer) and isinstance(model.policy, DualBuffer)
        policy = model.policy if ours else scaled(published, model.chunk, model.chunks)
    if policy.chunk != model.chunk:
        raise PolicyError(
            f"{type(policy).__name__}(chunk={policy.chunk}): the model makes {model.chunk} latent frames at a time; "
            f"give chunk={model.chunk}, or a policy by name"
        )
    return policy, replace(model.schedule, joint=isinstance(policy, RollingForcing))


def named(name: str) -> MemoryPolicy:
    """A system as published. Raises PolicyError with the nearest name and all that are known."""
    if name not in POLICIES:
        near = difflib.get_close_matches(name.lower(), POLICIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise PolicyError(f"unknown policy {name!r}; {hint}known: {', '.join(POLICIES)}")
    return POLICIES[name]


def scaled(policy: MemoryPolicy, chunk: int, chunks: int) -> MemoryPolicy:
    """A published policy for a model that makes `chunk` latent frames at a time and shots of `chunks` chunks.

    Its window keeps its length in shots, in whole chunks and never longer than published; but it always holds the
    sink, the chunk before and the chunk itself, and for Rolling Sink a replayed one. A sink of whole chunks stays so.
    What a policy derives from its window follows. `limit` stays: it is a promise about weights, not a horizon.
    """
    sizes: dict[str, Any] = {"chunk": chunk}
    if policy.sink >= policy.chunk:
        sizes["sink"] = policy.sink // policy.chunk * chunk
    if policy.window is not None:
        published = policy.window * chunk // policy.chunk
        in_proportion = -(-published * chunks // (CHUNKS * chunk)) * chunk  # rounded up to whole chunks
        least = sizes.get("sink", policy.sink) + (3 if isinstance(policy, RollingSink) else 2) * chunk
        sizes["window"] = min(published, max(in_proportion, least))
    match policy:
        case LongLive():
            sizes["history"] = sizes["window"]
        case RollingSink():
            sizes["archive"] = sizes["window"] - chunk
        case RollingForcing():
            sizes["budget"] = sizes["window"] - chunk
        case CausVid(overlap=overlap) if overlap:
            sizes |= {"overlap": chunk, "history": chunk - 1}
    return replace(policy, **sizes)


def rehearse(policy: MemoryPolicy, shots: Sequence[int], stride: int = 4) -> None:
    """Go through a story's shots (chunks of each) without a network, to meet a policy's limit before the wait.

    `stride`: pictures per latent frame. Raises the policy's ValueError, with the shot's number before it.
    """
    limited = policy.window is None and policy.limit is not None
    memory: tuple[Frame, ...] = ()
    pictures: list[int] = []
    first = 0
    for shot, chunks in enumerate(shots):
        for chunk in range(chunks if limited else 1):
            new = tuple(Frame(first + i, shot, chunk * policy.chunk + i, shot) for i in range(policy.chunk))
            try:
                if chunk == 0:
                    boundary = policy.boundary(memory, new, True, pictures)
                    memory = boundary.memory + boundary.prefill[len(boundary.memory) :]
                memory = policy.settle(policy.fit(memory, new).memory, new).memory
            except ValueError as error:
                raise ValueError(f"shot {shot + 1}: {error}") from None
            first += policy.chunk
        pictures.append(stride * (policy.chunk * chunks - 1) + 1)
