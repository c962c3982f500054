"""Linear layers in 8-bit floats: half of fast mode, and class E2, which is not exact.

Weights have a scale per output row, inputs one per token, found anew at each call. float8_e4m3fn keeps three bits after
the leading one, so a number moves by at most 1/16 of itself: 16 times what bfloat16 may move it. A GPU that multiplies
such numbers does so (`torch._scaled_mm`); anywhere else the same numbers are multiplied in the network's own
precision, which shows what is lost and gains nothing.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shotstream.models.dit import DiT

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
SMALLEST = torch.finfo(torch.float32).tiny  # scale of a row of zeros


def in_fp8(name: str) -> bool:
    """The rule: of the DiT, whose layers are named as Wan names them, these linears are computed in 8 bits.

    What every token passes in every block: self-attention's four, cross-attention's queries and output, and the
    feed-forward. The first and the last layers keep their precision (patches, time, text, places; head), and so do
    cross-attention's keys and values, which are computed once per prompt: there is nothing to gain.
    """
    return re.fullmatch(r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qo]|ffn\.\d)", name) is not None


def has_kernel(device: torch.device) -> bool:
    """Whether this device multiplies 8-bit floats itself: NVIDIA's from compute capability 8.9 on (Ada, Hopper)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [n d] as 8-bit floats [n d], the largest of each row 448, and the float32 scales [n 1] that undo it."""
    wide = x.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=SMALLEST)
    return (wide / scale).to(FP8), scale


class Fp8Linear(nn.Module):
    """A linear layer whose weight [out in] and inputs [... in] are 8-bit floats with a scale per row."""

    weight: Tensor
    scale: Tensor
    bias: Tensor

    def __init__(self, linear: nn.Linear, kernel: bool) -> None:
        """kernel: the device multiplies 8-bit floats; else the same values are kept in the dtype of `linear`."""
        super().__init__()
        assert linear.weight.shape[0] % 16 == linear.weight.shape[1] % 16 == 0, "8-bit products come in sixteens"
        weight, scale = quantised(linear.weight.detach())
        if not kernel:
            weight = weight.to(linear.weight.dtype).t().contiguous().t()  # the layout of `dit.by_columns`
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())  # 1 out
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        values, scale = quantised(x.flatten(0, -2))
        multiply = self._on_tensor_cores if self.weight.dtype == FP8 else self._simulated
        return multiply(values, scale).to(x.dtype).unflatten(0, x.shape[:-1])

    def _on_tensor_cores(self, values: Tensor, scale: Tensor) -> Tensor:
        return torch._scaled_mm(
            values,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias.bfloat16(),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def _simulated(self, values: Tensor, scale: Tensor) -> Tensor:
        return F.linear(values.to(self.weight.dtype), self.weight) * scale * self.scale + self.bias


def to_fp8(dit: DiT) -> DiT:
    """Compute the linears that `in_fp8` names in 8 bits, in place; on a GPU they also take half the memory."""
    kernel = has_kernel(dit.device)
    for name, layer in list(dit.named_modules()):
        if isinstance(layer, nn.Linear) and in_fp8(name):
            dit.set_submodule(name, Fp8Linear(layer, kernel))
    return dit
