"""What is trained: float32 masters, the copy that computes, their moving average, and the optimisers.

Two layouts with one interface. `Network`: every process has everything, and gradients are averaged; weights compute as
a copy in `runs.dtype` (on the CPU bf16 copies are 1.7x faster than autocast). `ShardedNetwork`: FSDP2 spreads masters,
average and optimisers over the processes, and gathers a block at a time in `runs.dtype` to compute with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from shotstream.models.dit import Block, DiT, Text
from shotstream.train import processes
from shotstream.train.muon import Muon
from shotstream.train.run import RunConfig

M = TypeVar("M", bound=nn.Module)


class Network(Generic[M]):
    """A trained module: masters, the copy that computes, their average, and the optimisers.

    What requires gradients in `masters` is trained; the rest stays as it is.
    """

    masters: M
    ema: M
    compute: M

    def __init__(self, masters: M, config: RunConfig) -> None:
        self.config = config
        self.updates = 0
        self._lay_out(masters.to(config.device))
        self.optimizers = optimizers(self.masters, config)

    def _lay_out(self, masters: M) -> None:
        self.masters = masters
        self.ema = copy.deepcopy(masters).requires_grad_(False)
        self.compute = copy.deepcopy(masters).to(getattr(torch, self.config.dtype))
        if self.config.checkpointing:
            recompute_blocks(self.compute)

    def step(self, scale: float) -> float:
        """Apply the gradients of the computing copy with learning rates times `scale`; returns the gradient norm."""
        self._collect()
        norm = nn.utils.clip_grad_norm_(trained(self.masters), self.config.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * scale
            optimizer.step()
            optimizer.zero_grad()
        self.updates += 1
        decay = min(self.config.ema, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            pairs = zip(self.ema.parameters(), self.masters.parameters(), strict=True)
            averages, values = zip(*((e, m.detach()) for e, m in pairs if m.requires_grad), strict=True)
            torch._foreach_lerp_(averages, values, 1 - decay)
            self._publish()
        return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def _collect(self) -> None:
        """Move the copy's gradients to the masters, averaged over the processes."""
        for master, copy_ in zip(self.masters.parameters(), self.compute.parameters(), strict=True):
            master.grad = None if copy_.grad is None else copy_.grad.float()
            copy_.grad = None
        processes.average(p.grad for p in trained(self.masters) if p.grad is not None)

    def _publish(self) -> None:
        """Give the copy the masters' new values."""
        torch._foreach_copy_([*trained(self.compute)], [*trained(self.masters)])

    def state_dict(self) -> dict[str, Any]:
        return {
            "masters": self.masters.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masters.load_state_dict(state["masters"])
        self.ema.load_state_dict(state["ema"])
        self.compute.load_state_dict(state["masters"])
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.updates = state["updates"]


class ShardedNetwork(Network[M]):
    """The same, spread over the processes. The masters compute: FSDP2 casts them as it gathers them."""

    def _lay_out(self, masters: M) -> None:
        self.ema = copy.deepcopy(masters).requires_grad_(False)
        if self.config.checkpointing:
            recompute_blocks(masters)
        self.masters = self.compute = shard(masters, self.config)
        shard(self.ema, self.config)

    def _collect(self) -> None:
        pass  # FSDP2 has averaged them, in float32

    def _publish(self) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        masters, optimizers = get_state_dict(self.masters, self.optimizers)
        return {
            "masters": masters,
            "ema": self.ema.state_dict(),
            "optimizers": optimizers,
            "updates": self.updates,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.masters,
            self.optimizers,
            model_state_dict=state["masters"],
            optim_state_dict=state["optimizers"],
        )
        self.ema.load_state_dict(state["ema"])
        self.updates = state["updates"]


def network(masters: M, config: RunConfig) -> Network[M]:
    """The layout that `config` asks for."""
    return ShardedNetwork(masters, config) if config.shard else Network(masters, config)


def frozen(module: M, config: RunConfig) -> M:
    """A module that only answers, laid out like the trained ones: a teacher."""
    module.requires_grad_(False)
    return shard(module, config) if config.shard else module.to(config.device, getattr(torch, config.dtype))


def shard(module: M, config: RunConfig) -> M:
    """Spread a module's parameters over all processes, a unit per transformer block and one for the rest of a network.

    Gradients are reduced in float32; inputs keep their type: a timestep rounded to bf16 is another noise level.
    """
    _know_text()
    spread = partial(
        fully_shard,
        mesh=processes.mesh(config.device),
        mp_policy=MixedPrecisionPolicy(
            param_dtype=getattr(torch, config.dtype), reduce_dtype=torch.float32, cast_forward_inputs=False
        ),
    )
    module.to(config.device)
    for part in module.children():
        for block in part.modules():
            if isinstance(block, Block):
                spread(block)
                register_fsdp_forward_method(block, "read")
                register_fsdp_forward_method(block, "keep")
        if any(True for _ in part.parameters()):
            spread(part)
        if isinstance(part, DiT):
            register_fsdp_forward_method(part, "read")
    return module


def _know_text() -> None:
    """FSDP2 finds the tensors of an output by walking it as a tree; a `Text` must be known as a branch."""
    if Text not in pytree.SUPPORTED_NODES:
        names = [f.name for f in fields(Text)]
        pytree.register_dataclass(Text, field_names=names)


def recompute_blocks(module: nn.Module) -> None:
    """Gradient checkpointing: a block keeps its input alone, and computes the rest again on the way back."""
    for block in module.modules():
        if isinstance(block, Block):
            block.forward = partial(_recomputed, block.forward)  # type: ignore[method-assign]


def _recomputed(forward: Any, *inputs: Any) -> Tensor:
    return checkpoint(forward, *inputs, use_reentrant=False) if torch.is_grad_enabled() else forward(*inputs)


def trained(module: nn.Module) -> Sequence[Tensor]:
    """The parameters that learn."""
    return [p for p in module.parameters() if p.requires_grad]


def optimizers(module: nn.Module, config: RunConfig) -> list[torch.optim.Optimizer]:
    """What moves the masters.

    "muon": Muon for the matrices inside transformer blocks, AdamW for embeddings, input, output and vectors.
    "adamw": AdamW for everything, with rate `lr_adam` (the paper's choice, and the only one for sharded networks,
    because Muon's step needs whole matrices).
    """
    if config.optimizer == "adamw":
        found: list[torch.optim.Optimizer] = [_adamw(trained(module), config)]
    elif config.optimizer == "muon" and not config.shard:
        found = [o for o in _muon_and_adamw(module, config) if o.param_groups]
    else:
        raise ValueError(f"runs.optimizer={config.optimizer}: use muon or adamw, and adamw with runs.shard=true")
    for optimizer in found:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return found


def _muon_and_adamw(module: nn.Module, config: RunConfig) -> Iterator[torch.optim.Optimizer]:
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and "blocks." in n]
    rest = [p for n, p in named if not (p.ndim == 2 and "blocks." in n)]
    if matrices:
        yield Muon(matrices, config.lr)
    if rest:
        yield _adamw(rest, config)


def _adamw(parameters: Sequence[Tensor], config: RunConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters, lr=config.lr_adam, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
    )
