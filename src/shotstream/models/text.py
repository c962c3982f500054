"""Text encoders: what the DiT's cross-attention reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from shotstream.config import WordsConfig
from shotstream.models.attention import attention


class TextEncoder(Protocol):
    """Turns prompts into text states: `length` rows of width `dim` each, rows past a prompt's end zero."""

    @property
    def length(self) -> int:
        """Tokens per prompt, padding included (`s`)."""
        ...

    @property
    def dim(self) -> int:
        """Width of a text state (`d`)."""
        ...

    def encode(self, texts: list[str]) -> Tensor:
        """States `n s d` of n prompts. A prompt's states do not depend on the others in the list."""
        ...

    def warnings(self, text: str) -> list[str]:
        """What a writer should know about this prompt before generating, a sentence each; usually none."""
        ...


class Words(nn.Module):
    """The storybook text encoder: a word-level vocabulary and one transformer layer, trained with the DiT.

    `tokenize` splits a caption into content words (stop words dropped); words outside the vocabulary are ignored
    and reported by `warnings`. The empty text is all zeros: it is the null text of guidance.
    """

    def __init__(
        self,
        config: WordsConfig,
        vocabulary: tuple[str, ...],
        tokenize: Callable[[str], list[str]],
    ) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.vocabulary = vocabulary
        self.tokenize = tokenize
        self.number = {word: i + 1 for i, word in enumerate(vocabulary)}  # 0 is padding
        self.embedding = nn.Embedding(len(vocabulary) + 1, dim)
        self.position = nn.Parameter(torch.randn(config.length, dim) * 0.02)
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU("tanh"), nn.Linear(2 * dim, dim))
        self.norm = nn.LayerNorm(dim)

    @property
    def length(self) -> int:
        return self.config.length

    @property
    def dim(self) -> int:
        return self.config.dim

    def ids(self, text: str) -> list[int]:
        """`length` word numbers, 0 where there is no word; words beyond are cut."""
        known = [self.number[word] for word in self.tokenize(text) if word in self.number][: self.length]
        return known + [0] * (self.length - len(known))

    def forward(self, ids: Tensor) -> Tensor:
        """Word numbers [n s] -> states [n s d], rows of padding zero."""
        there = ids > 0
        x = self.embedding(ids) + self.position
        q, k, v = (part.unflatten(-1, (self.config.heads, -1)) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(attention(q, k, v, there[:, None, None, :]).flatten(-2))
        x = x + self.ffn(self.norm2(x))
        return self.norm(x) * there[..., None]

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        return self(torch.tensor([self.ids(text) for text in texts], device=self.position.device))

    def unknown(self, text: str) -> list[str]:
        """Words of `text` that this model has never seen, in order, once each."""
        return list(dict.fromkeys(word for word in self.tokenize(text) if word not in self.number))

    def warnings(self, text: str) -> list[str]:
        found = []
        if unknown := self.unknown(text):
            found.append(f"the model does not know {', '.join(map(repr, unknown))} and ignores it")
        known = [word for word in self.tokenize(text) if word in self.number]
        if len(known) > self.length:
            cut = " ".join(known[self.length :])
            found.append(f"only the first {self.length} words it knows are read; cut: {cut}")
        return found
