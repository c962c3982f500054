"""8-bit linears: what rounding may move, the same numbers on every path, and what a whole pass loses."""

import dataclasses

import numpy as np
import pytest
import torch
from golden_weights import uniform
from torch import Tensor, nn

from shotstream.config import PRESETS
from shotstream.models.dit import DiT
from shotstream.models.fp8 import FP8, Fp8Linear, has_kernel, in_fp8, quantised, to_fp8
from shotstream.models.rope import rotation
from shotstream.pipeline import load

WORST = 16  # times as much as bfloat16 may move a number: four bits fewer


def rows() -> Tensor:
    """Rows of very different sizes, with numbers of very different sizes in each."""
    sizes = torch.logspace(-6, 6, 40).double()[:, None]
    return (uniform(1, (40, 96)) ** 5 * sizes).float()


def rounded(x: np.ndarray) -> np.ndarray:
    """To e4m3 by arithmetic: three bits after the leading one, even on a tie, and steps of 2^-9 near zero."""
    exponent = np.floor(np.log2(np.maximum(np.abs(x), 2.0**-6)))
    step = 2.0 ** (exponent - 3)
    return np.round(x / step) * step


# -- numbers


def test_rounding_moves_a_number_by_a_sixteenth_at_most():
    x = rows()
    values, scale = quantised(x)
    moved = (values.double() * scale - x.double()).abs()
    assert (moved <= torch.maximum(x.abs().double() / 16, scale.double() * 2**-10) * (1 + 1e-5)).all()
    assert (moved > x.abs() / 18).any()  # the bound is tight


def test_the_largest_of_a_row_is_the_largest_there_is():
    values, scale = quantised(rows())
    assert values.dtype == FP8 and scale.dtype == torch.float32 and scale.shape == (40, 1)
    assert (values.float().abs().amax(1) == 448).all()
    assert not values.float().isnan().any()


def test_each_row_has_a_scale_of_its_own():
    x = rows()
    values, scale = quantised(x)
    larger = x * torch.tensor([1.0, 1024.0]).repeat(20)[:, None]
    again, other = quantised(larger)
    assert torch.equal(values.float(), again.float())
    assert torch.equal(other, scale * torch.tensor([1.0, 1024.0]).repeat(20)[:, None])


def test_zeros_stay_zeros():
    values, scale = quantised(torch.zeros(2, 8))
    assert not values.float().any() and scale.isfinite().all() and (scale > 0).all()


# -- the layer


@pytest.fixture(scope="module")
def linear() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(96, 32).requires_grad_(False)
    layer.weight *= torch.logspace(-2, 2, 32)[:, None]  # rows that one scale for all would lose
    return layer


@pytest.fixture(scope="module")
def x() -> Tensor:
    return rows()[:12].reshape(2, 6, 96)


def reference(linear: nn.Linear, x: Tensor) -> np.ndarray:
    """The layer, in float64 and by arithmetic alone."""

    def parts(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scale = (np.abs(matrix).max(-1, keepdims=True) / np.float32(448)).astype(np.float32)
        return rounded((matrix / scale).astype(np.float32).astype(np.float64)), scale.astype(np.float64)

    weight, of_rows = parts(linear.weight.numpy())
    values, of_tokens = parts(x.flatten(0, -2).numpy())
    y = (values @ weight.T) * of_tokens * of_rows.T + linear.bias.double().numpy()
    return y.reshape(*x.shape[:-1], -1)


def test_the_layer_is_the_reference(linear, x):
    y, expected = Fp8Linear(linear, kernel=False)(x), reference(linear, x)
    assert y.shape == (2, 6, 32) and y.dtype == torch.float32
    assert np.abs(y.double().numpy() - expected).max() < 1e-6 * np.abs(expected).max()
    exact = linear(x).numpy()
    assert np.abs(expected - exact).max() > 1e-3 * np.abs(exact).max()  # it is another layer than the exact one


def test_the_kernel_is_called_with_the_same_numbers(linear, x):
    """What a GPU is told, answered by torch's CPU version of the same operator: only the last rounding differs."""
    layer = Fp8Linear(linear, kernel=True)
    assert layer.weight.dtype == FP8
    expected = reference(linear, x)
    close = 2.0**-8 * (np.abs(expected) + np.abs(linear.bias.numpy()))  # both are rounded to bfloat16
    assert (np.abs(layer(x).double().numpy() - expected) <= close).all()


def test_a_bfloat16_network_keeps_its_type(linear, x):
    layer = Fp8Linear(nn.Linear(96, 32).bfloat16(), kernel=False)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", [True, False])
def test_the_compiler_takes_it_in_one_piece(linear, x, kernel):
    layer = Fp8Linear(linear, kernel)
    compiled = torch.compile(layer, dynamic=False, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))


def test_sides_that_no_kernel_takes_are_refused():
    with pytest.raises(AssertionError, match="sixteens"):
        Fp8Linear(nn.Linear(24, 32), kernel=False)


@pytest.mark.skipif(not has_kernel(torch.device("cuda")) if torch.cuda.is_available() else True, reason="needs a GPU")
def test_a_gpu_computes_what_is_simulated(linear, x):
    layer = Fp8Linear(linear.cuda(), kernel=True)
    expected = reference(linear.cpu(), x)
    assert np.abs(layer(x.cuda()).cpu().double().numpy() - expected).max() < 2.0**-7 * np.abs(expected).max()


# -- the network


def test_the_rule_names_what_every_token_passes():
    with torch.device("meta"):
        dit = DiT(dataclasses.replace(PRESETS["wan-1.3b"].dit, layers=3))
    linears = {name for name, layer in dit.named_modules() if isinstance(layer, nn.Linear)}
    chosen = set(filter(in_fp8, linears))
    assert len(chosen) == 3 * 8
    kept = {name for name in linears - chosen if not name.startswith("blocks.")}
    assert kept == {
        *("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"),
        *("time_projection.1", "head.head"),
    }
    assert linears - chosen - kept == {f"blocks.{i}.cross_attn.{part}" for i in range(3) for part in "kv"}


def velocity(dtype: torch.dtype, fp8: bool = False) -> Tensor:
    """What the trained network makes of noise: random weights would let little through their blocks."""
    pipeline = load("storybook")
    dit = pipeline.dit.to(dtype)
    if fp8:
        to_fp8(dit)
        assert sum(isinstance(layer, Fp8Linear) for layer in dit.modules()) == 6 * 8
    torch.manual_seed(0)
    latents, size = torch.randn(1, 3, *pipeline.config.latent_shape), pipeline.config.latent_shape[1:]
    states = pipeline.text.encode(["a wide shot of a green bear in the forest"]).to(dtype)
    text = dit.read(states, torch.zeros(1, 3, dtype=torch.long))
    height, width = (side // dit.config.patch for side in size)
    places = rotation(((0.0, 0.0), (1.0, 0.0), (2.0, 0.0)), height, width, dit.config.head_dim, dit.device, dtype)
    return dit(latents.to(dtype), torch.full((1, 3), 750.0), text, places).double()


def test_a_whole_pass_loses_what_four_bits_fewer_explain():
    exact = velocity(torch.float64)
    rough, fast = (float((other - exact).norm()) for other in (velocity(torch.bfloat16), velocity(torch.float32, True)))
    assert 2 < fast / rough < 1.2 * WORST
    assert fast < 0.1 * float(exact.norm())
