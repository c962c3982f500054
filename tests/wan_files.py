"""Small files in the layouts in which Wan 2.1, ShotStream and their relatives are published; the names are real."""

from pathlib import Path
from typing import Any

import torch
from golden_weights import fill
from safetensors.torch import save_file
from torch import Tensor

from shotstream.config import PRESETS, Config, override

CHANGES = (
    *("height=32", "width=48", "chunks=2", "dit.dim=48", "dit.heads=2", "dit.ffn_dim=64", "dit.layers=2"),
    *("dit.text_dim=32", "dit.freq_dim=32", "vae.base_dim=8", "text.dim=32", "text.vocabulary=64", "text.heads=4"),
    *("text.head_dim=8", "text.ffn_dim=48", "text.layers=2", "text.length=64"),
)
SET = tuple(word for change in CHANGES for word in ("--set", change))


def small_config(*changes: str) -> Config:
    return override(PRESETS["wan-1.3b"], [*CHANGES, *changes])


def dit_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Wan's names, written out: the code under test must not supply them."""
    size = config.dit
    d, f, patch = size.dim, size.ffn_dim, (1, size.patch, size.patch)
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.weight": (d, size.channels, *patch),
        "patch_embedding.bias": (d,),
        "head.modulation": (1, 2, d),
    }

    def linear(name: str, out: int, into: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, into), (out,)

    linear("text_embedding.0", d, size.text_dim)
    linear("text_embedding.2", d, d)
    linear("time_embedding.0", d, size.freq_dim)
    linear("time_embedding.2", d, d)
    linear("time_projection.1", 6 * d, d)
    linear("head.head", size.channels * size.patch**2, d)
    for i in range(size.layers):
        shapes[f"blocks.{i}.modulation"] = (1, 6, d)
        shapes |= {f"blocks.{i}.norm3.weight": (d,), f"blocks.{i}.norm3.bias": (d,)}
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                linear(f"blocks.{i}.{attention}.{projection}", d, d)
            shapes |= {f"blocks.{i}.{attention}.norm_{x}.weight": (d,) for x in "qk"}
        linear(f"blocks.{i}.ffn.0", f, d)
        linear(f"blocks.{i}.ffn.2", d, f)
    return shapes


def dit_weights(config: Config, first_key: int = 0) -> dict[str, Tensor]:
    return {name: value.float() for name, value in fill(dit_shapes(config), first_key).items()}


LINEARS = [f"{a}_attn.{p}" for a in ("self", "cross") for p in "qkvo"] + ["ffn.0", "ffn.2"]


def lora_of(config: Config, rank: int = 4) -> dict[str, Tensor]:
    """A LoRA of every linear layer inside the blocks, in peft's layout."""
    shapes, parts = dit_shapes(config), dict[str, Tensor]()
    generator = torch.Generator().manual_seed(1)
    for i in range(config.dit.layers):
        for linear in LINEARS:
            out, into = shapes[f"blocks.{i}.{linear}.weight"]
            name = f"base_model.model.blocks.{i}.{linear}"
            parts[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator)
            parts[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    return parts


def vae_weights(config: Config) -> dict[str, Tensor]:
    from shotstream.models.vae import VAE, VAEConfig

    vae = VAE(VAEConfig(base_dim=config.vae.base_dim))  # type: ignore[union-attr]
    return {name: value.float() for name, value in fill({n: v.shape for n, v in vae.state_dict().items()}).items()}


def text_weights(config: Config) -> dict[str, Tensor]:
    from shotstream.models.umt5 import native_shapes

    return {name: value.bfloat16() for name, value in fill(native_shapes(config.text)).items()}  # type: ignore[arg-type]


def write_tokenizer(folder: Path) -> Path:
    """A letter is a token; `</s>` closes, as in umT5's own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:-'01"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((letter, -1.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write_base(folder: Path, config: Config, dit: bool = True) -> Path:
    """Wan's own repository."""
    folder.mkdir(parents=True, exist_ok=True)
    if dit:
        save_file(dit_weights(config), folder / "diffusion_pytorch_model.safetensors")
    torch.save(vae_weights(config), folder / "Wan2.1_VAE.pth")
    torch.save(text_weights(config), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(folder / "google" / "umt5-xxl")
    return folder


def write_release(path: Path, config: Config, part: str = "generator", first_key: int = 100) -> dict[str, Tensor]:
    """A checkpoint as ShotStream and Self Forcing publish theirs; returns its weights by native name."""
    weights = dit_weights(config, first_key)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({part: {f"model.{name}": value for name, value in weights.items()}, "step": 7}, path)
    return weights


def write_diffusers(folder: Path, config: Config) -> dict[str, Any]:
    """The diffusers layout, written by diffusers and transformers themselves, in pieces; returns their models."""
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    size, text = config.dit, config.text
    transformer = WanTransformer3DModel(
        num_attention_heads=size.heads,
        attention_head_dim=size.head_dim,
        in_channels=size.channels,
        out_channels=size.channels,
        text_dim=size.text_dim,
        freq_dim=size.freq_dim,
        ffn_dim=size.ffn_dim,
        num_layers=size.layers,
    )
    vae = AutoencoderKLWan(base_dim=config.vae.base_dim, z_dim=16)  # type: ignore[union-attr]
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=text.vocabulary,  # type: ignore[union-attr]
            d_model=text.dim,
            d_kv=text.head_dim,  # type: ignore[union-attr]
            d_ff=text.ffn_dim,  # type: ignore[union-attr]
            num_layers=text.layers,  # type: ignore[union-attr]
            num_heads=text.heads,
            feed_forward_proj="gated-gelu",
        )
    )
    for model in (transformer, vae, encoder):
        weights = fill({name: tuple(p.shape) for name, p in model.named_parameters()})
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name].view(parameter.shape))
        model.eval()
    transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    vae.save_pretrained(folder / "vae")
    encoder.save_pretrained(folder / "text_encoder", max_shard_size="30KB")
    write_tokenizer(folder / "tokenizer")
    return {"transformer": transformer, "vae": vae, "text_encoder": encoder}
