"""The storybook autoencoder: exact linear part, streaming laws, the context picture."""

import pytest
import torch
from golden_weights import uniform
from torch import Tensor

from shotstream.config import PatchVAEConfig
from shotstream.models.patch_vae import STRIDE, PatchVAE

CONFIG = PatchVAEConfig(channels=6, patch=8, widths=(12, 8, 8), blocks=1)
PIXELS = STRIDE * 3 * CONFIG.patch**2
DEVIATIONS = torch.tensor([9.0, 4.0, 2.0, 1.0, 0.5, 0.25]).double()


@pytest.fixture(scope="module")
def basis() -> Tensor:
    """Six orthonormal patches [pixels 6]."""
    return torch.linalg.qr(uniform(1, (PIXELS, 6)))[0]


def clips_in(basis: Tensor, count: int = 40, height: int = 3, width: int = 4) -> Tensor:
    """Clips of five frames whose second latent frame mixes `basis`, the i-th with deviation DEVIATIONS[i]."""
    mix = uniform(2, (count * height * width, 6))
    mix = (mix - mix.mean(0)) @ torch.linalg.cholesky(torch.cov(mix.T, correction=0).inverse()) * DEVIATIONS
    patches = (mix @ basis.T + 0.1).view(count, height, width, STRIDE, 3, CONFIG.patch, CONFIG.patch)
    frames = patches.permute(0, 3, 4, 1, 5, 2, 6).reshape(count, STRIDE, 3, height * CONFIG.patch, width * CONFIG.patch)
    return torch.cat((frames[:, :1], frames), dim=1).float()


@pytest.fixture(scope="module")
def vae() -> PatchVAE:
    """Fitted to noise, with a decoder that draws something."""
    torch.manual_seed(0)
    vae = PatchVAE(CONFIG)
    vae.fit(uniform(3, (8, 5, 3, 24, 32)).float() * 0.5)
    for name, parameter in vae.named_parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
            assert "leave" in name or "conv2" in name
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def linear(basis) -> PatchVAE:
    """Fitted to clips of which six components are everything there is."""
    vae = PatchVAE(CONFIG)
    # A clip's first frame, standing still for four, is another kind of patch: fit on the others alone.
    vae.patches = lambda frames: PatchVAE.patches(vae, frames)[:, 1:]
    vae.fit(clips_in(basis))
    del vae.patches
    return vae.requires_grad_(False)


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return uniform(4, (2, 21, 3, 24, 32)).clamp(-1, 1).float()


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return uniform(5, (2, 7, 6, 3, 4)).float()


# -- shapes and time


def test_frames_and_latent_frames(vae, frames):
    latents = vae.encode(frames)
    assert latents.shape == (2, 6, CONFIG.channels, 3, 4)
    decoded, state = vae.decode(latents)
    assert decoded.shape == frames.shape
    assert torch.equal(state.last, latents[:, -1])
    assert vae.decode(latents[:, :1], state)[0].shape[1] == STRIDE


def test_frames_past_4k_plus_1_are_dropped(vae, frames):
    assert torch.equal(vae.encode(frames[:, :12]), vae.encode(frames[:, :9]))
    assert torch.equal(vae.encode(frames[:, :4]), vae.encode(frames[:, :1]))


def test_encoding_the_beginning_is_the_beginning_of_the_encoding(vae, frames):
    whole = vae.encode(frames)
    for count in (1, 5, 13):
        part = vae.encode(frames[:, :count])
        assert torch.allclose(part, whole[:, : part.shape[1]], atol=1e-6)


def test_one_frame_alone_is_the_first_latent_of_a_clip(vae, frames):
    alone = vae.context_latents(frames[:, 8])
    assert torch.allclose(alone, vae.encode(frames[:, 8:])[:, 0], atol=1e-6)
    assert torch.allclose(alone, vae.encode(frames[:, 8:9].expand(-1, 5, -1, -1, -1))[:, 1], atol=1e-6)
    assert not torch.allclose(alone, vae.encode(frames)[:, 2], atol=1e-1)


# -- streaming


@pytest.mark.parametrize("size", [1, 2, 3])
def test_in_pieces_is_whole(vae, latents, size):
    whole = vae.decode(latents)[0]
    state, pieces = None, []
    for piece in latents.split(size, dim=1):
        decoded, state = vae.decode(piece, state)
        pieces.append(decoded)
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_new_latents_never_change_earlier_frames(vae, latents):
    whole = vae.decode(latents)[0]
    for count in range(1, 7):
        changed = latents.clone()
        changed[:, count:] = 5
        seen = 1 + STRIDE * (count - 1)
        assert torch.equal(vae.decode(changed)[0][:, :seen], whole[:, :seen])
        assert torch.equal(vae.decode(latents[:, :count])[0], whole[:, :seen])
        assert not torch.equal(vae.decode(changed)[0][:, seen : seen + 1], whole[:, seen : seen + 1])


def test_the_latent_before_is_seen(vae, latents):
    """Four frames are drawn from two latent frames; the state is the earlier one."""
    _, state = vae.decode(latents[:, :1])
    _, other = vae.decode(latents[:, 1:2])
    ours, theirs = (vae.decode(latents[:, 2:3], s)[0] for s in (state, other))
    assert (ours - theirs).abs().max() > 1e-2


def test_streams_do_not_share_state(vae, latents):
    first = vae.decode(latents[:1, :3])
    second = vae.decode(latents[1:, :3])
    ours = vae.decode(latents[:1, 3:], first[1])[0]
    theirs = vae.decode(latents[1:, 3:], second[1])[0]
    both = vae.decode(latents)[0][:, 9:]
    assert torch.allclose(torch.cat((ours, theirs)), both, atol=1e-6)


# -- the linear part


def test_patches_and_drawing_are_inverse(vae):
    """Pixels are put back where they were cut out: row, column, colour and time."""
    still = PatchVAE(CONFIG)
    clip = uniform(6, (2, 5, 3, 24, 32)).float()
    patches = still.patches(clip)
    assert patches.shape == (2, 2, 3, 4, PIXELS)
    assert torch.equal(patches[:, 0, 1, 2, :].view(2, STRIDE, 3, 8, 8)[:, 3], clip[:, 0, :, 8:16, 16:24])
    assert torch.equal(patches[:, 1, 2, 3, :].view(2, STRIDE, 3, 8, 8)[:, 1], clip[:, 2, :, 16:24, 24:32])
    still.unproject = torch.eye(PIXELS)
    assert torch.equal(still.linear_draw(patches[:, 1].movedim(-1, 1)), clip[:, 1:])


def test_what_the_components_span_comes_back(linear, basis):
    clips = clips_in(basis)[:4]
    latents = linear.encode(clips)
    assert torch.allclose(linear.linear_draw(latents[:, 1]), clips[:, 1:], atol=2e-4)
    z = uniform(8, (3, 6, 3, 4)).float()
    moving = linear.linear_draw(z)
    again = linear.encode(torch.cat((moving[:, :1], moving), dim=1))[:, 1]
    assert torch.allclose(again, z, atol=2e-4)


def test_channels_are_half_whitened(linear, basis):
    """The deviation of a channel is the square root of its component's, scaled to a mean variance of 1."""
    latents = linear.encode(clips_in(basis))[:, 1].movedim(1, -1).flatten(0, -2).double()
    assert torch.allclose(latents.mean(0), torch.zeros(6).double(), atol=1e-4)
    assert torch.allclose(latents.std(0, correction=0), (DEVIATIONS / DEVIATIONS.mean()).sqrt(), rtol=1e-3)
    covariance = torch.cov(latents.T, correction=0)
    assert torch.allclose(covariance, covariance.diagonal().diag(), atol=1e-3)


def test_an_untrained_decoder_is_the_linear_one(linear):
    """Its last layer starts at zero but for a bias: training starts from the linear decode."""
    z = uniform(9, (1, 2, 6, 3, 4)).float()
    detail = linear.decode(z)[0][:, 1:] - linear.linear_draw(z[:, 1])
    assert torch.allclose(detail, linear.decode(-z)[0][:, 1:] - linear.linear_draw(-z[:, 1]), atol=1e-5)
