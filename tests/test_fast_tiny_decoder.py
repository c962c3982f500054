"""The tiny decoder for Wan's latents: the published layout, the published arithmetic, and the laws of streaming."""

import pytest
import torch
from golden_weights import fill, uniform
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from wan_files import CHANGES, small_config, write_base

from shotstream.bench import flops
from shotstream.checkpoints import ModelError
from shotstream.config import PRESETS, Fast, WanVAEConfig
from shotstream.fast import published_decoder
from shotstream.models.tiny_decoder import TinyDecoder, published_shapes
from shotstream.pipeline import load
from shotstream.session import Session


def shapes() -> dict[str, tuple[int, ...]]:
    """The published file, written out: the code under test must not supply the names."""
    found: dict[str, tuple[int, ...]] = {}

    def conv(name: str, out: int, into: int, bias: bool = True) -> None:
        found[f"{name}.weight"] = (out, into, 3, 3)
        if bias:
            found[f"{name}.bias"] = (out,)

    def memory(name: str, width: int) -> None:
        conv(f"{name}.conv.0", width, 2 * width)
        conv(f"{name}.conv.2", width, width)
        conv(f"{name}.conv.4", width, width)

    conv("encoder.0", 64, 3)
    for first, joined in ((2, 128), (7, 128), (12, 64)):
        found[f"encoder.{first}.conv.weight"] = (64, joined, 1, 1)
        conv(f"encoder.{first + 1}", 64, 64, bias=False)
        for i in range(3):
            memory(f"encoder.{first + 2 + i}", 64)
    conv("encoder.17", 16, 64)
    conv("decoder.1", 256, 16)
    for first, width, narrower, split in ((3, 256, 128, 256), (9, 128, 64, 256), (15, 64, 64, 128)):
        for i in range(3):
            memory(f"decoder.{first + i}", width)
        found[f"decoder.{first + 4}.conv.weight"] = (split, width, 1, 1)
        conv(f"decoder.{first + 5}", narrower, width, bias=False)
    conv("decoder.22", 3, 64)
    return found


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return {name: value.float() for name, value in fill(shapes()).items()}


@pytest.fixture(scope="module")
def decoder(weights) -> TinyDecoder:
    decoder = TinyDecoder().requires_grad_(False)
    decoder.load_state_dict({name: value for name, value in weights.items() if name.startswith("decoder.")})
    return decoder


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return 2 * uniform(7, (2, 4, 16, 2, 3)).float()


# -- as published


def test_the_layout_is_the_published_one(decoder):
    assert published_shapes() == shapes()
    own = {name: tuple(value.shape) for name, value in decoder.state_dict().items()}
    assert own == {name: shape for name, shape in shapes().items() if name.startswith("decoder.")}
    assert round(sum(value.numel() for value in decoder.parameters()) / 1e6, 1) == 9.8  # as published


def all_at_once(weights: dict[str, Tensor], latents: Tensor) -> Tensor:
    """The published decoder for one clip [f 16 h w], layer by layer over all frames; what is before the first is 0."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = weights[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, weights.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    x = F.relu(conv("1", 3 * torch.tanh(latents / 3)))
    for first, parts in ((3, 1), (9, 2), (15, 2)):
        for i in range(first, first + 3):
            before = torch.cat((torch.zeros_like(x[:1]), x))[:-1]
            y = F.relu(conv(f"{i}.conv.0", torch.cat((x, before), dim=1)))
            x = F.relu(conv(f"{i}.conv.4", F.relu(conv(f"{i}.conv.2", y))) + x)
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
        x = torch.cat([frame for both in conv(f"{first + 4}.conv", x) for frame in both.chunk(parts)]).view(
            -1, *x.shape[1:]
        )
        x = conv(f"{first + 5}", x)
    return conv("22", F.relu(x)).clamp(0, 1)[3:] * 2 - 1


def test_decoding_is_the_published_computation(decoder, weights, latents):
    frames, _ = decoder.decode(latents)
    assert frames.shape == (2, 13, 3, 16, 24) and frames.dtype == torch.float32
    expected = torch.stack([all_at_once(weights, clip) for clip in latents])
    assert expected.std() > 0.05 and frames.min() >= -1 and frames.max() <= 1
    assert torch.allclose(frames, expected, atol=1e-5)


def test_its_arithmetic_is_the_published_one():
    """1.63 TFLOP for 12 frames of 480 x 832, a twenty-fifth of Wan's decoder."""
    small, full = (2, 3), (60, 104)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        TinyDecoder().decode(torch.randn(1, 1, 16, *small))
    vae = PRESETS["wan-1.3b"].vae
    assert isinstance(vae, WanVAEConfig)
    assert flops.decode(vae, *small, first=True, tiny=True) == counter.get_total_flops()
    twelve = 3 * flops.decode(vae, *full, first=False, tiny=True)
    assert round(twelve / 1e12, 2) == 1.63
    assert twelve < 3 * flops.decode(vae, *full, first=False) / 24


# -- streaming


@pytest.mark.parametrize("size", [1, 2, 3])
def test_decoding_in_pieces_is_decoding_whole(decoder, latents, size):
    state, pieces = None, []
    for piece in latents.split(size, dim=1):
        frames, state = decoder.decode(piece, state)
        pieces.append(frames)
    assert torch.equal(torch.cat(pieces, dim=1), decoder.decode(latents)[0])


def test_new_latents_never_change_earlier_frames(decoder, latents):
    whole = decoder.decode(latents)[0]
    for count in range(1, 4):
        changed = latents.clone()
        changed[:, count:] = 1
        seen = 1 + 4 * (count - 1)
        again = decoder.decode(changed)[0]
        assert torch.equal(again[:, :seen], whole[:, :seen])
        assert not torch.equal(again[:, seen], whole[:, seen])


def test_the_past_is_seen_and_a_state_can_be_gone_on_from_twice(decoder, latents):
    _, state = decoder.decode(latents[:, :2])
    _, other = decoder.decode(latents[:, 1:2])
    last = latents[:, 2:3]
    once, again, elsewhere = (decoder.decode(last, s)[0] for s in (state, state, other))
    assert torch.equal(once, again) and not torch.equal(once, elsewhere)


def test_streams_of_a_batch_do_not_meet(decoder, latents):
    both, state = decoder.decode(latents[:, :2])
    assert torch.equal(both[:1], decoder.decode(latents[:1, :2])[0])
    alone = decoder.decode(latents[1:, 2:], decoder.decode(latents[1:, :2])[1])[0]
    assert torch.equal(decoder.decode(latents[:, 2:], state)[0][1:], alone)


def test_what_does_not_fit_is_refused(decoder, latents):
    with pytest.raises(ValueError, match="wants b f 16 h w"):
        decoder.decode(latents[:, :, :8])
    _, state = decoder.decode(latents[:1])
    with pytest.raises(ValueError, match="pass state=None"):
        decoder.decode(latents, state)


# -- files

NAME = "tiny-decoder"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOTSTREAM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read(folder):
    return published_decoder(folder, "cpu", torch.float32)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_the_file_is_found_beside_the_model_or_in_the_cache(tmp_path, cache, weights, latents, decoder, kind):
    for folder in (tmp_path / "model", cache / NAME):
        folder.mkdir(parents=True)
        path = folder / f"any-name.{kind}"
        torch.save(weights, path) if kind == "pth" else save_file(weights, path)
        found, made = read(folder if folder.name == "model" else tmp_path)
        assert len(made) == 12 and torch.equal(found.decode(latents)[0], decoder.decode(latents)[0])
        path.unlink()


def test_a_missing_file_says_where_to_get_it(tmp_path, cache):
    with pytest.raises(ModelError) as error:
        read(tmp_path)
    assert f"put https://github.com/madebyollin/taehv/raw/main/taew2_1.pth into {cache / NAME}," in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: {n: t for n, t in w.items() if n != "decoder.13.conv.weight"}, "missing 1: decoder.13.conv.weight"),
        (lambda w: w | {"decoder.22.weight": torch.zeros(12, 64, 3, 3)}, "misshapen 1: decoder.22.weight is"),
        (lambda w: w | {"decoder.23.weight": torch.zeros(1)}, "unexpected 1: decoder.23.weight"),
    ],
    ids=["missing", "misshapen", "unexpected"],
)
def test_a_file_that_is_not_quite_it_is_refused_by_name(tmp_path, weights, change, told):
    save_file(change(weights), tmp_path / "taew2_1.safetensors")
    with pytest.raises(ModelError, match=told):
        read(tmp_path)


def test_a_published_model_draws_with_it(tmp_path, weights):
    folder = write_base(tmp_path / "wan", small_config())
    exact = load(folder, overrides=CHANGES)
    with pytest.raises(ModelError, match="the tiny decoder is not here"):
        load(folder, overrides=CHANGES, fast=Fast(decoder=True))
    save_file(weights, folder / "taew2_1.safetensors")
    fast = load(folder, overrides=CHANGES, fast=Fast(fp8=True, decoder=True))
    assert fast.revision.startswith(f"{exact.revision}+fp8+tiny-")
    picture = uniform(9, (1, 3, 32, 48)).float()
    assert torch.equal(fast.vae.context_latents(picture), exact.vae.context_latents(picture))
    session = Session(fast, seed=1)
    session.cut("a fox", chunks=2)
    first, second = session.stream()
    assert first.frames.shape == (9, 32, 48, 3) and second.frames.shape == (12, 32, 48, 3)
    assert first.frames.std() > 1
