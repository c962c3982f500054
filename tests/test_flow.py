"""The noise maths: the released numbers exactly, and the identities between x, x0, noise and velocity."""

from pathlib import Path

import numpy as np
import pytest
import torch
from golden_weights import uniform

from shotstream.flow import (
    TIMESTEPS,
    add_noise,
    euler_sigmas,
    grid_loss_weights,
    guide,
    shift_sigma,
    spread,
    to_x0,
    training_grid,
)
from shotstream.memory.schedule import SCHEDULES, sigma_table

GOLDEN = np.load(Path(__file__).parent / "golden" / "dit.npz")
SHAPE = (2, 3, 4, 2, 3)  # b f c h w


def test_the_released_training_grid_is_met_exactly():
    grid = training_grid(8.0)
    assert grid.dtype == torch.float32
    assert np.array_equal(grid.numpy(), GOLDEN["sigmas"])
    assert np.array_equal((grid * TIMESTEPS).numpy(), GOLDEN["timesteps"])


def test_the_released_loss_weights():
    weights = grid_loss_weights(training_grid(8.0))  # machines differ in the last bit of `exp`
    assert np.abs(weights.numpy() - GOLDEN["loss_weights"]).max() < 1e-6
    assert weights[0] == 0
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    known = {957.9: 0.320, 888.9: 0.832, 737.6: 1.802, 500.0: 2.473, 7.9: 0.061}
    timesteps = training_grid(8.0) * TIMESTEPS
    for timestep, weight in known.items():
        assert weights[(timesteps - timestep).abs().argmin()] == pytest.approx(weight, abs=1e-3)


def test_the_teachers_sampling_grid_is_met_exactly():
    sigmas = euler_sigmas(50, 8.0)
    assert len(sigmas) == 51
    assert sigmas[-1] == 0
    assert np.array_equal((sigmas[:-1] * TIMESTEPS).numpy(), GOLDEN["teacher_sampling_timesteps"])


def test_the_few_steps_are_entries_of_the_training_grid():
    schedule = SCHEDULES["shotstream"]
    exact = ("0x1.f4p+9", "0x1.def6e2p+9", "0x1.bc71c8p+9", "0x1.70cb58p+9")
    assert schedule.timesteps() == tuple(map(float.fromhex, exact))
    entries = [1000 - step for step in schedule.steps]
    assert schedule.timesteps() == tuple(GOLDEN["timesteps"][entries].tolist())
    assert schedule.sigmas() == tuple(GOLDEN["sigmas"][entries].tolist())


def test_steps_0_13_25_37_of_the_teacher_are_the_students_timesteps():
    teacher = euler_sigmas(50, 8.0)[[0, 13, 25, 37]]
    assert teacher.tolist() == pytest.approx(SCHEDULES["shotstream"].sigmas(), abs=1e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_the_table_without_torch_is_the_grid(shift):
    assert list(sigma_table(shift)) == training_grid(shift).tolist()


def test_a_shift_of_one_changes_nothing_and_the_ends_stay():
    sigma = torch.linspace(0, 1, 11)
    assert torch.equal(shift_sigma(sigma, 1.0), sigma)
    for shift in (3.0, 8.0):
        moved = shift_sigma(sigma, shift)
        assert moved[0] == 0
        assert moved[-1] == 1
        assert (moved[1:-1] > sigma[1:-1]).all()


@pytest.mark.parametrize("sigma", [torch.tensor(0.3), torch.tensor([0.9, 0.2]), torch.rand(2, 3) * 0.9 + 0.1])
def test_noise_then_x0_returns_the_clean_latents(sigma):
    x0, noise = uniform(1, SHAPE), uniform(2, SHAPE)
    x = add_noise(x0, noise, sigma)
    assert torch.allclose(to_x0(x, noise - x0, sigma), x0, atol=1e-14)
    assert not torch.allclose(to_x0(x, x0 - noise, sigma), x0, atol=1e-2)


def test_sigma_zero_is_clean_and_sigma_one_is_noise():
    x0, noise = uniform(1, SHAPE), uniform(2, SHAPE)
    assert torch.equal(add_noise(x0, noise, torch.tensor(0.0)), x0)
    assert torch.equal(add_noise(x0, noise, torch.tensor(1.0)), noise)


def test_each_latent_frame_gets_its_own_sigma():
    x0, noise = uniform(1, SHAPE), uniform(2, SHAPE)
    sigma = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.25]]).double()
    whole = add_noise(x0, noise, sigma)
    for sample in range(2):
        for frame in range(3):
            alone = add_noise(x0[sample, frame], noise[sample, frame], sigma[sample, frame])
            assert torch.equal(whole[sample, frame], alone)
    assert spread(sigma[:, 0], x0).shape == (2, 1, 1, 1, 1)
    assert spread(sigma, x0).shape == (2, 3, 1, 1, 1)


def test_bf16_latents_are_rounded_once():
    x0, noise = uniform(1, SHAPE).bfloat16(), uniform(2, SHAPE).bfloat16()
    sigma = torch.tensor(0.73758864402771)
    x = add_noise(x0, noise, sigma)
    assert x.dtype == torch.bfloat16
    assert torch.equal(x, ((1 - sigma) * x0.float() + sigma * noise.float()).bfloat16())
    estimate = to_x0(x, noise, sigma)
    assert estimate.dtype == torch.bfloat16
    assert torch.equal(estimate, (x.double() - sigma.double() * noise.double()).bfloat16())


def test_guidance_moves_from_the_null_text_through_the_text():
    text, null = uniform(1, SHAPE), uniform(2, SHAPE)
    assert torch.equal(guide(text, null, 0.0), null)
    assert torch.allclose(guide(text, null, 1.0), text, atol=1e-15)
    assert torch.allclose(guide(text, null, 3.0) - text, 2 * (text - null), atol=1e-14)
