"""Wan's VAE: the released numbers, diffusers' numbers, and the laws of streaming."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import fill, uniform
from torch import Tensor

from shotstream.models.vae import VAE, CausalConv3d, VAEConfig, compile_decoder, diffusers_names

GOLDEN = np.load(Path(__file__).parent / "golden" / "vae.npz")
CONFIG = VAEConfig(
    base_dim=8,
    latent_channels=4,
    latent_mean=(0.1, -0.2, 0.3, 0.05),
    latent_std=(1.5, 2.0, 0.7, 1.1),
)


@pytest.fixture(scope="module")
def vae() -> VAE:
    vae = VAE(CONFIG)
    fill(vae)
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return uniform(1004, (1, 3, 9, 32, 48)).clamp(-1, 1).transpose(1, 2)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return uniform(1005, (1, 4, 4, 4, 6)).transpose(1, 2)


@pytest.fixture(scope="module")
def small() -> Tensor:
    """Seven latent frames of 2 x 3: two chunks and one more, quick to decode."""
    return uniform(2000, (1, 7, 4, 2, 3))


def difference(ours: Tensor, golden: np.ndarray) -> float:
    golden = golden.swapaxes(1, 2)
    assert ours.shape == golden.shape
    return float(np.abs(ours.numpy() - golden).max())


def in_pieces(vae: VAE, latents: Tensor, size: int) -> Tensor:
    state, frames = None, []
    for piece in latents.split(size, dim=1):
        decoded, state = vae.decode(piece, state)
        frames.append(decoded)
    return torch.cat(frames, dim=1)


# -- the released numbers


def test_encode_golden(vae, frames):
    assert difference(vae.encode(frames), GOLDEN["vae_latents_9f"]) < 2e-6


def test_decode_golden(vae, latents):
    assert difference(vae.decode(latents)[0], GOLDEN["vae_decode"].clip(-1, 1)) < 2e-6


def test_golden_in_float32(frames, latents):
    vae = VAE(CONFIG)
    fill(vae)
    vae.float().requires_grad_(False)
    assert difference(vae.encode(frames), GOLDEN["vae_latents_9f"]) < 5e-5
    assert difference(vae.decode(latents)[0], GOLDEN["vae_decode"].clip(-1, 1)) < 5e-5


def test_each_context_frame_is_encoded_alone(vae, frames):
    alone = vae.context_latents(frames[0, [4, 0]])
    assert difference(alone[:1].unsqueeze(1), GOLDEN["vae_latents_single"]) < 2e-6
    assert torch.allclose(alone[1], vae.encode(frames[:, :1])[0, 0], atol=1e-12)
    assert (alone[0] - vae.encode(frames)[0, 1]).abs().max() > 0.01  # in the clip it would see the frames before


# -- time


def test_frame_counts(vae, frames):
    assert (vae.temporal_stride, vae.spatial_stride, vae.latent_channels) == (4, 8, 4)
    assert vae.encode(frames).shape == (1, 3, 4, 4, 6)
    assert vae.encode(frames[:, :4]).shape[1] == 1  # cut to 4k + 1
    first, state = vae.decode(torch.zeros(1, 3, 4, 2, 2))
    later, _ = vae.decode(torch.zeros(1, 3, 4, 2, 2), state)
    assert (first.shape, later.shape) == ((1, 9, 3, 16, 16), (1, 12, 3, 16, 16))


def test_dropped_frames_change_nothing(vae, frames):
    assert torch.equal(vae.encode(frames[:, :8]), vae.encode(frames[:, :5]))


def test_encoding_is_causal(vae, frames):
    changed = frames.clone()
    changed[:, 5:] = 0
    before, after = vae.encode(frames), vae.encode(changed)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_decoding_in_pieces_is_decoding_whole(vae, small, size):
    assert torch.equal(in_pieces(vae, small, size), vae.decode(small)[0])


def test_new_latents_never_change_earlier_frames(vae, small):
    whole, _ = vae.decode(small)
    prefix, _ = vae.decode(small[:, :4])
    assert torch.equal(prefix, whole[:, :13])


def test_two_branches_from_one_state(vae, small):
    _, state = vae.decode(small[:, :3])
    kept = [tail.clone() for tail in state.tails]
    one, _ = vae.decode(small[:, 3:5], state)
    other, _ = vae.decode(-small[:, 3:5], state)
    again, _ = vae.decode(small[:, 3:5], state)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert all(torch.equal(a, b) for a, b in zip(kept, state.tails, strict=True))


def test_state_does_not_grow(vae, small):
    _, early = vae.decode(small[:, :1])
    _, late = vae.decode(small)
    assert [tail.shape for tail in early.tails] == [tail.shape for tail in late.tails]
    assert all(tail.untyped_storage().nbytes() == tail.nbytes for tail in late.tails)  # no views


def test_a_batch_is_its_rows(vae, small):
    both, _ = vae.decode(torch.cat([small[:, :3], -small[:, :3]]))
    assert torch.allclose(both[1:], vae.decode(-small[:, :3])[0], atol=1e-9)


@pytest.mark.parametrize("count", [1, 3])
def test_a_history_wrong_by_one_frame_is_seen(vae, latents, monkeypatch, count):
    """The golden number can fail: give every convolution one frame of history too few or too many."""
    conv = torch.nn.Conv3d.forward

    def wrong(self: CausalConv3d, x: Tensor, stream) -> Tensor:
        joined = stream.join(x, count)
        joined = torch.cat([joined[:, :, :1], joined], dim=2) if count == 1 else joined[:, :, :-1]
        return conv(self, joined)

    monkeypatch.setattr(CausalConv3d, "forward", wrong)
    assert difference(vae.decode(latents)[0], GOLDEN["vae_decode"].clip(-1, 1)) > 1e-2


def test_a_state_lost_on_the_way_is_seen(vae, small):
    pieces = torch.cat([vae.decode(piece)[0] for piece in small.split(1, dim=1)], dim=1)
    whole, _ = vae.decode(small)
    assert pieces.shape != whole.shape
    assert (pieces[:, 1] - whole[:, 4]).abs().max() > 1e-2


# -- precision, errors, files


def test_a_compiled_decoder_streams_the_same_frames(small):
    """Exactness E1, with the stream's state inside one graph. Tracing alone takes the compiler's way too."""
    vae = VAE(VAEConfig(4, 4, (1, 2), 1, (True,), (0.0,) * 4, (1.0,) * 4))  # all kinds of layers, few of them
    fill(vae)
    vae.requires_grad_(False)
    whole, _ = vae.decode(small)
    compile_decoder(vae, "aot_eager")
    frames = in_pieces(vae, small, 3)
    assert torch.allclose(frames, whole, atol=1e-13)
    assert torch.equal(frames, vae.decode(small)[0])
    assert all(p.is_contiguous(memory_format=torch.channels_last_3d) for p in vae.decoder.parameters() if p.ndim == 5)


def test_bfloat16_runs_and_answers_in_float32(latents, frames):
    vae = VAE(CONFIG)
    fill(vae)
    vae.bfloat16().requires_grad_(False)
    decoded, state = vae.decode(latents)
    assert decoded.dtype == vae.encode(frames).dtype == torch.float32
    assert state.tails[0].dtype == torch.bfloat16
    assert difference(decoded, GOLDEN["vae_decode"].clip(-1, 1)) < 0.3


def test_errors_name_the_culprit(vae, small):
    with pytest.raises(ValueError, match="30 x 48"):
        vae.encode(torch.zeros(1, 1, 3, 30, 48))
    with pytest.raises(ValueError, match="b f 4 h w"):
        vae.decode(torch.zeros(1, 1, 16, 2, 2))
    _, state = vae.decode(small[:, :1])
    with pytest.raises(ValueError, match="pass state=None"):
        vae.decode(torch.zeros(1, 1, 4, 4, 6), state)
    with pytest.raises(ValueError, match="latent_mean needs 4 entries"):
        VAEConfig(latent_channels=4)


def test_wan_has_194_tensors_and_loads_from_the_meta_device(frames):
    with torch.device("meta"):
        wan, tiny = VAE(VAEConfig()), VAE(CONFIG)
    assert len(wan.state_dict()) == 194
    assert sum(p.numel() for p in wan.parameters()) == 126_892_531
    source = VAE(CONFIG)
    fill(source)
    tiny.load_state_dict(source.state_dict(), strict=True, assign=True)
    with torch.no_grad():
        assert torch.equal(tiny.encode(frames[:, :1]), source.encode(frames[:, :1]))


def test_parity_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    theirs.double().requires_grad_(False)
    config = VAEConfig(base_dim=8, latent_channels=4, latent_mean=(0.0,) * 4, latent_std=(1.0,) * 4)
    ours = VAE(config).double().requires_grad_(False)
    weights, names = theirs.state_dict(), diffusers_names(config)
    assert set(names.values()) == set(weights)
    ours.load_state_dict({name: weights[other] for name, other in names.items()}, strict=True)

    clip = uniform(3000, (2, 5, 3, 16, 24)).clamp(-1, 1)
    mean = theirs.encode(clip.transpose(1, 2)).latent_dist.mean
    assert torch.allclose(ours.encode(clip), mean.transpose(1, 2), atol=1e-6)
    latents = 3 * uniform(3001, (2, 3, 4, 2, 3))
    decoded = theirs.decode(latents.transpose(1, 2)).sample
    assert torch.allclose(ours.decode(latents)[0], decoded.transpose(1, 2), atol=1e-6)


def test_diffusers_names_at_full_size():
    names = diffusers_names(VAEConfig())
    assert len(set(names.values())) == 194
    assert names["decoder.upsamples.7.time_conv.weight"] == "decoder.up_blocks.1.upsamplers.0.time_conv.weight"
    assert names["encoder.middle.1.to_qkv.bias"] == "encoder.mid_block.attentions.0.to_qkv.bias"
