"""umT5, Wan 2.1's text encoder: the network is transformers', the cleaning, padding and file names are Wan's.

Needs the extra `wan`: `pip install 'shotstream[wan]'`.
"""

import html
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NEEDS_EXTRA = "the umT5 text encoder needs {}: pip install 'shotstream[wan]'"

Tokenize = Callable[[str], list[int]]  # clean text to ids, the closing </s> included, nothing cut or padded


@dataclass(frozen=True)
class UMT5Sizes:
    """Sizes of the encoder; the defaults are umT5-xxl's."""

    vocabulary: int = 256_384
    dim: int = 4096
    heads: int = 64
    head_dim: int = 64
    ffn_dim: int = 10_240
    layers: int = 24
    buckets: int = 32  # of the relative position bias; distances from max_distance on share the last
    max_distance: int = 128
    length: int = 512  # tokens per prompt, padding included


class UMT5(nn.Module):
    """A `TextEncoder`: prompts to `length` rows of width `dim`, rows past a prompt's end zero."""

    def __init__(self, sizes: UMT5Sizes, state: Mapping[str, Tensor], tokenize: Tokenize):
        """`state`: weights by native Wan names, used as they are (dtype, device, no copy).

        Raises ImportError without transformers, RuntimeError naming the missing and unexpected weights.
        """
        super().__init__()
        self.sizes = sizes
        self.tokenize = tokenize
        self.model = _empty_model(sizes)
        names = self.native_names(sizes.layers)
        missing, unexpected = sorted(names.keys() - state.keys()), sorted(state.keys() - names.keys())
        if missing or unexpected:
            raise RuntimeError(f"umT5 weights do not fit: missing {missing[:4]}, unexpected {unexpected[:4]}")
        renamed = {other: state[native] for native, other in names.items()}
        renamed["encoder.embed_tokens.weight"] = renamed["shared.weight"]  # one table under two names
        self.model.load_state_dict(renamed, strict=True, assign=True)
        self.model.set_input_embeddings(self.model.shared)  # tied again: .to() must not make two tables of it
        self.requires_grad_(False).eval()

    @property
    def length(self) -> int:
        return self.sizes.length

    @property
    def dim(self) -> int:
        return self.sizes.dim

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """States `n 512 4096` of n prompts in the weights' dtype and on their device."""
        return torch.stack([self.states(self._ids(text)) for text in texts])

    def states(self, ids: list[int]) -> Tensor:
        """States `length dim` of one tokenised prompt.

        Only its own tokens are computed: padding is masked as a key and zeroed as a row, so it changes
        nothing, and no prompt's states depend on its neighbours in a batch.
        """
        device = next(self.parameters()).device
        states = self.model(input_ids=torch.tensor([ids], device=device)).last_hidden_state[0]
        return F.pad(states, (0, 0, 0, self.length - len(ids)))

    def token_count(self, text: str) -> int:
        """Tokens of the prompt, closing token included; more than `length` means its end will be cut off."""
        return len(self.tokenize(clean(text)))

    def warnings(self, text: str) -> list[str]:
        count = self.token_count(text)
        if count <= self.length:
            return []
        return [
            f"the prompt has {count} tokens and the text encoder reads {self.length}: its end, which is the "
            "shot's own text, will be cut off; shorten the story's common text"
        ]

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenize(clean(text))
        return ids if len(ids) <= self.length else [*ids[: self.length - 1], ids[-1]]  # </s> always stays

    @staticmethod
    def native_names(layers: int) -> dict[str, str]:
        """Wan's parameter names (`models_t5_umt5-xxl-enc-bf16.pth`) to those of `UMT5EncoderModel`."""
        names = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
        for i in range(layers):
            attention, ffn = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
            names |= {f"blocks.{i}.attn.{p}": f"{attention}.SelfAttention.{p}" for p in "qkvo"}
            names |= {
                f"blocks.{i}.norm1": f"{attention}.layer_norm",
                f"blocks.{i}.pos_embedding.embedding": f"{attention}.SelfAttention.relative_attention_bias",
                f"blocks.{i}.norm2": f"{ffn}.layer_norm",
                f"blocks.{i}.ffn.gate.0": f"{ffn}.DenseReluDense.wi_0",
                f"blocks.{i}.ffn.fc1": f"{ffn}.DenseReluDense.wi_1",
                f"blocks.{i}.ffn.fc2": f"{ffn}.DenseReluDense.wo",
            }
        return {f"{native}.weight": f"{other}.weight" for native, other in names.items()}


def clean(text: str) -> str:
    """Wan's cleaning: repaired Unicode, HTML entities resolved twice, runs of white space to one blank."""
    try:
        import ftfy
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format("ftfy")) from error
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(folder: str | Path) -> Tokenize:
    """The tokeniser in `folder` (`google/umt5-xxl`, also inside Wan's repositories) as a function.

    Reads `tokenizer.json` as it stands: transformers' classes may rebuild parts of it.
    Raises FileNotFoundError.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format("tokenizers")) from error
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no tokeniser; the folder must be a copy of google/umt5-xxl")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()  # we cut ourselves, after warning
    return lambda text: tokenizer.encode(text).ids


def _empty_model(sizes: UMT5Sizes) -> Any:
    """transformers' encoder without weights (meta device): nothing is initialised only to be overwritten."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format("transformers")) from error
    config = transformers.UMT5Config(
        vocab_size=sizes.vocabulary,
        d_model=sizes.dim,
        d_kv=sizes.head_dim,
        d_ff=sizes.ffn_dim,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        relative_attention_num_buckets=sizes.buckets,
        relative_attention_max_distance=sizes.max_distance,
        feed_forward_proj="gated-gelu",  # the tanh form
    )
    with torch.device("meta"):
        return transformers.UMT5EncoderModel(config)
