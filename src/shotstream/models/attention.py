"""The one attention call of the project, and the only file that knows about kernels and devices."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

# On a GPU, best first: on Hopper cuDNN's kernel does 1.7 times the work of the flash kernel. `bench` prints which ran.
GPU_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class BlockCausal:
    """A mask in words: tokens come in blocks, one after the other, and look no further than where their own ends.

    Never laid out: at Wan size it would be 42,120 x 42,120, and no fast kernel takes one.
    """

    ends: tuple[int, ...]

    def after(self, tokens: int) -> BlockCausal:
        """The mask without the first `tokens`."""
        return BlockCausal(tuple(end - tokens for end in self.ends if end > tokens))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockCausal | None = None) -> Tensor:
    """Softmax attention: q [b l n d], k and v [b s n d], mask [l s] or [b 1 l s] (True = may look) -> [b l n d]."""
    if isinstance(mask, BlockCausal):
        blocks = pairwise((0, *mask.ends))
        return torch.cat([attention(q[:, first:end], k[:, :end], v[:, :end]) for first, end in blocks], dim=1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.is_cuda:
        with sdpa_kernel(GPU_KERNELS, set_priority=True):  # without the flag the list is a set, not an order
            return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def block_causal(context: int, chunks: int, chunk: int, tokens: int) -> BlockCausal:
    """The mask of [context | chunks]: context frames see each other, a chunk what is before it and itself (method.md
    section 10). `chunk`: latent frames of one; `tokens`: of a latent frame.
    """
    ends = [context + chunk * number for number in range(chunks + 1)]
    return BlockCausal(tuple(end * tokens for end in ends if end))
