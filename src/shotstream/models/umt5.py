"""umT5, Wan 2.1's text encoder: the network is transformers', the cleaning, padding and file names are Wan's.

Needs the extra `wan`: `pip install 'shotstream[wan]'`.
"""

import bisect
import html
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shotstream.config import UMT5Config

NEEDS_EXTRA = "the umT5 text encoder needs {}: pip install 'shotstream[wan]'"

Tokenize = Callable[[str], list[int]]  # clean text to ids, the closing </s> included, nothing cut or padded


class UMT5(nn.Module):
    """A `TextEncoder`: prompts to `length` rows of width `dim`, rows past a prompt's end zero."""

    def __init__(self, config: UMT5Config, state: Mapping[str, Tensor], tokenize: Tokenize):
        """`state`: weights by native Wan names, used as they are (dtype, device, no copy).

        Raises ImportError without transformers, RuntimeError naming the missing and unexpected weights.
        """
        super().__init__()
        self.config = config
        self.tokenize = tokenize
        self.model = _empty_model(config)
        names = native_names(config.layers)
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
        return self.config.length

    @property
    def dim(self) -> int:
        return self.config.dim

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

    def warnings(self, text: str) -> list[str]:
        return warnings(text, self.tokenize, self.length)

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenize(clean(text))
        return ids if len(ids) <= self.length else [*ids[: self.length - 1], ids[-1]]  # </s> always stays


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


def native_shapes(config: UMT5Config) -> dict[str, tuple[int, ...]]:
    """Shapes by native name, without needing transformers."""
    dim, inner = config.dim, config.heads * config.head_dim
    ends = {
        "token_embedding": (config.vocabulary, dim),
        **{f"attn.{p}": (inner, dim) for p in "qkv"},
        "attn.o": (dim, inner),
        "pos_embedding.embedding": (config.buckets, config.heads),
        "ffn.gate.0": (config.ffn_dim, dim),
        "ffn.fc1": (config.ffn_dim, dim),
        "ffn.fc2": (dim, config.ffn_dim),
    }
    names = native_names(config.layers)
    return {name: ends.get(_within_block(name), (dim,)) for name in names}  # what is left are norms


def _within_block(name: str) -> str:
    return re.sub(r"^blocks\.\d+\.", "", name).removesuffix(".weight")


def warnings(text: str, tokenize: Tokenize, length: int) -> list[str]:
    """What of a prompt will not be read, in words. Needs the tokeniser alone: told before anything is loaded."""
    text = clean(text)
    count = len(tokenize(text))
    if count <= length:
        return []
    words = text.split(" ")
    whole = bisect.bisect_right(range(len(words)), length, key=lambda n: len(tokenize(" ".join(words[:n])))) - 1
    cut = words[whole:]
    shown = " ".join(cut if len(cut) <= 24 else [*cut[:12], "...", *cut[-8:]])
    lost = "word is" if len(cut) == 1 else "words are"
    return [
        f"the prompt has {count} tokens and the text encoder reads {length}: its last {len(cut)} {lost} not read "
        f'("{shown}"); shorten the story\'s common text'
    ]


def clean(text: str) -> str:
    """Wan's cleaning: repaired Unicode, HTML entities resolved twice, runs of white space to one blank."""
    try:
        import ftfy
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format("ftfy")) from error
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def check_extra() -> None:
    """Raise ImportError, naming the remedy, unless everything that `UMT5` needs is installed."""
    for package in ("transformers", "tokenizers", "ftfy"):
        if find_spec(package) is None:
            raise ImportError(NEEDS_EXTRA.format(package))


def load_tokenizer(folder: str | Path) -> Tokenize:
    """The tokeniser in `folder` (`google/umt5-xxl`, also inside Wan's repositories) as a function.

    Reads `tokenizer.json` as it stands: transformers' classes may rebuild parts of it.
    Raises FileNotFoundError; ValueError if the file is damaged.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format("tokenizers")) from error
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no tokeniser; the folder must be a copy of google/umt5-xxl")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: damaged tokeniser ({error}); download it again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()  # we cut ourselves, after warning
    return lambda text: tokenizer.encode(text).ids


def _empty_model(config: UMT5Config) -> Any:
    """transformers' encoder without weights (meta device): nothing is initialised only to be overwritten."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError(NEEDS_EXTRA.format("transformers")) from error
    empty = transformers.UMT5Config(
        vocab_size=config.vocabulary,
        d_model=config.dim,
        d_kv=config.head_dim,
        d_ff=config.ffn_dim,
        num_layers=config.layers,
        num_heads=config.heads,
        relative_attention_num_buckets=config.buckets,
        relative_attention_max_distance=config.max_distance,
        feed_forward_proj="gated-gelu",  # the tanh form
    )
    with torch.device("meta"):
        return transformers.UMT5EncoderModel(empty)
