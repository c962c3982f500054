"""The one attention call of the project, and the only file that knows about kernels and devices."""

from __future__ import annotations

from collections.abc import Sequence

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


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Softmax attention: q [b l n d], k and v [b s n d], mask [l s] or [b 1 l s] (True = may look) -> [b l n d]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.is_cuda:
        with sdpa_kernel(GPU_KERNELS, set_priority=True):  # without the flag the list is a set, not an order
            return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def block_causal_mask(tags: Sequence[int], tokens: int, device: torch.device | None = None) -> Tensor:
    """Who may look at whom, [l l]: a latent frame sees those whose tag is not above its own.

    Tags: 0 for context, b + 1 for chunk b (method.md section 10); `tokens` per latent frame.
    """
    tag = torch.tensor(tags, device=device).repeat_interleave(tokens)
    return tag[:, None] >= tag[None, :]
