"""Schedule tables against float64 formulas written here, and against diffusers' own."""

from __future__ import annotations

import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from tdm_fast.schedule import Schedule

ULP = 2.0**-23


def rescaled_linear_alpha() -> np.ndarray:
    """sqrt(alpha_bar) of linear betas with zero-terminal SNR, by arXiv 2305.08891's algorithm 1 in float64."""
    root = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    return (root - root[-1]) * root[0] / (root[0] - root[-1])


def all_schedules() -> dict[str, Schedule]:
    return {
        "epsilon": Schedule.ddpm(prediction_type="epsilon"),
        "v_prediction": Schedule.ddpm(prediction_type="v_prediction"),
        "zero_snr": Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        "sample": Schedule.ddpm(prediction_type="sample", beta_schedule="scaled_linear"),
        "flow": Schedule.flow(),
        "flow_shifted": Schedule.flow(shift=3.0),
    }


def test_ddpm_tables_are_the_float64_formula_rounded_once() -> None:
    alpha = np.sqrt(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    schedule = Schedule.ddpm(prediction_type="epsilon")
    for table, exact in (
        (schedule.alpha, alpha),
        (schedule.sigma, np.sqrt(1 - alpha**2)),
        (schedule.a, 1 / alpha),
        (schedule.b, -np.sqrt(1 - alpha**2) / alpha),
        (schedule.snr, alpha**2 / (1 - alpha**2)),
    ):
        assert table.dtype == torch.float32
        # Half an ulp of rounding, and float64's own noise where 1 - alpha^2 cancels.
        np.testing.assert_allclose(table.double().numpy(), exact, rtol=0.51 * ULP)
    assert schedule.timesteps.dtype == torch.int64
    assert schedule.timesteps.tolist() == list(range(1000))


def test_zero_terminal_snr_is_exact_and_finite() -> None:
    schedule = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    np.testing.assert_allclose(schedule.alpha.double().numpy(), rescaled_linear_alpha(), rtol=0.51 * ULP)
    assert (float(schedule.alpha[-1]), float(schedule.sigma[-1]), float(schedule.snr[-1])) == (0.0, 1.0, 0.0)
    assert float(schedule.snr[-2]) > 0
    for table in (schedule.a, schedule.b, schedule.c, schedule.d, schedule.snr):
        assert bool(table.isfinite().all())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_tables(shift: float) -> None:
    schedule = Schedule.flow(shift=shift)
    uniform = np.arange(1, 1001) / 1000
    sigma = shift * uniform / (1 + (shift - 1) * uniform)
    np.testing.assert_allclose(schedule.sigma.double().numpy(), sigma, rtol=0.51 * ULP)
    np.testing.assert_allclose(schedule.alpha.double().numpy(), 1 - sigma, rtol=0.51 * ULP, atol=1e-16)
    np.testing.assert_allclose(schedule.timesteps.double().numpy(), 1000 * sigma, rtol=0.51 * ULP)
    assert schedule.timesteps.dtype == torch.float32
    assert float(schedule.alpha[-1]) == 0.0


@pytest.mark.parametrize("name", list(all_schedules()))
def test_noise_ascends(name: str) -> None:
    schedule = all_schedules()[name]
    assert bool((schedule.sigma.diff() >= 0).all())
    assert bool((schedule.snr.diff() < 0).all())


@pytest.mark.parametrize("name", list(all_schedules()))
def test_predict_inverts_add_noise_and_training_target_at_every_timestep(name: str) -> None:
    schedule = all_schedules()[name]
    t = torch.arange(schedule.num_train_timesteps)
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(t), 3, 2, dtype=torch.float64, generator=generator).unbind()
    x_t, target = schedule.add_noise(x0, noise, t), schedule.training_target(x0, noise, t)
    for got, wanted, on_sample, on_output in zip(
        schedule.predict(x_t, target, t), (x0, noise), (schedule.a, schedule.c), (schedule.b, schedule.d), strict=True
    ):
        # Every table is off by half an ulp; a large coefficient makes that visible.
        size = (on_sample.double().abs().view(-1, 1, 1) * (x0.abs() + noise.abs())) + (
            on_output.double().abs().view(-1, 1, 1) * target.abs()
        )
        assert bool(((got - wanted).abs() <= 2 * ULP * size).all())


@pytest.mark.parametrize("name", list(all_schedules()))
def test_training_target_is_the_definition(name: str) -> None:
    schedule = all_schedules()[name]
    t = torch.tensor([0, 321, 999])
    x0, noise = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    alpha, sigma = schedule.alpha[t].double()[:, None], schedule.sigma[t].double()[:, None]
    definition: dict[str, Tensor] = {
        "epsilon": noise,
        "sample": x0,
        "v_prediction": alpha * noise - sigma * x0,
        "flow": noise - x0,
    }
    torch.testing.assert_close(schedule.training_target(x0, noise, t), definition[schedule.prediction_type])
    torch.testing.assert_close(schedule.add_noise(x0, noise, t), alpha * x0 + sigma * noise)


def test_dtypes_and_shapes() -> None:
    schedule = Schedule.flow()
    t = torch.tensor([0, 999])
    half = torch.ones(2, 3, 4, dtype=torch.bfloat16)
    assert [value.dtype for value in schedule.predict(half, half, t)] == [torch.float32] * 2
    assert schedule.add_noise(half, half, t).dtype == torch.bfloat16
    assert schedule.predict(half, half.double(), t)[0].dtype == torch.float64
    assert [value.shape for value in schedule.coefficients(t, 5)] == [(2, 1, 1, 1, 1)] * 4
    alpha, sigma = schedule.alpha_sigma(torch.tensor([-1, 0]), 2)
    assert (float(alpha[0]), float(sigma[0])) == (1.0, 0.0)
    assert float(sigma[1]) == float(schedule.sigma[0])


def test_a_schedule_is_immutable_and_moves_once() -> None:
    schedule = Schedule.flow()
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.prediction_type = "epsilon"  # type: ignore[misc]
    moved = schedule.to("meta")
    assert moved is schedule.to(torch.device("meta"))
    assert moved.device.type == "meta" and moved.timesteps.device.type == "meta"
    assert schedule.to("cpu") is schedule


DDPM_LIKE = [
    diffusers.DDPMScheduler(),
    diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample"),
    diffusers.DDPMScheduler(trained_betas=np.linspace(1e-4, 0.03, 50).tolist()),
    diffusers.DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0),
    diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction", snr_shift_scale=1.0),
    diffusers.DPMSolverMultistepScheduler(),
]


@pytest.mark.parametrize("scheduler", DDPM_LIKE, ids=lambda scheduler: type(scheduler).__name__)
def test_from_ddpm_type_scheduler(scheduler: diffusers.SchedulerMixin) -> None:
    schedule = Schedule.from_scheduler(scheduler)
    assert schedule.prediction_type == scheduler.config.prediction_type
    # Their product runs in float32 for most: N roundings of relative size 2^-24 in alpha^2, and 1 ulp of the betas.
    alpha_bar = torch.as_tensor(scheduler.alphas_cumprod).double()
    length = len(alpha_bar)
    assert schedule.num_train_timesteps == length
    torch.testing.assert_close(schedule.alpha.double() ** 2, alpha_bar, rtol=length * ULP, atol=length * ULP / 10)


def test_from_scheduler_has_alpha_exactly_zero_where_theirs_is_patched() -> None:
    euler = diffusers.EulerAncestralDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert float(euler.alphas_cumprod[-1]) > 0
    schedule = Schedule.from_scheduler(euler)
    assert float(schedule.alpha[-1]) == 0.0
    np.testing.assert_allclose(schedule.alpha.double().numpy(), rescaled_linear_alpha(), rtol=0.51 * ULP)


def test_from_flow_matching_schedulers() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = Schedule.from_scheduler(theirs)
    torch.testing.assert_close(ours.sigma, theirs.sigmas.flip(0), rtol=4 * ULP, atol=0)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.flip(0), rtol=4 * ULP, atol=0)

    for kind in ("exponential", "linear"):
        dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
        shifted = dynamic.time_shift(1.15, 1.0, torch.arange(1, 1001, dtype=torch.float64) / 1000)
        torch.testing.assert_close(Schedule.from_scheduler(dynamic, mu=1.15).sigma, shifted.float(), rtol=ULP, atol=0)

    solver = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    torch.testing.assert_close(Schedule.from_scheduler(solver).sigma, Schedule.flow(shift=5.0).sigma)


def test_from_scheduler_refuses_by_name() -> None:
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        Schedule.from_scheduler(diffusers.EDMEulerScheduler())
    with pytest.raises(ValueError, match="scheduler is a str"):
        Schedule.from_scheduler("DDPM")
    with pytest.raises(ValueError, match=r"mu is None.*is needed"):
        Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    with pytest.raises(ValueError, match=r"mu is 0\.5"):
        Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(), mu=0.5)
    with pytest.raises(ValueError, match=r"mu is 0\.5"):
        Schedule.from_scheduler(diffusers.DDPMScheduler(), mu=0.5)
    with pytest.raises(ValueError, match="invert_sigmas"):
        Schedule.from_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True))
    with pytest.raises(ValueError, match="beta_schedule is 'sigmoid'"):
        Schedule.from_scheduler(diffusers.DDPMScheduler(beta_schedule="sigmoid"))
    with pytest.raises(ValueError, match="use_flow_sigmas with prediction_type 'epsilon'"):
        Schedule.from_scheduler(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True))
    with pytest.raises(ValueError, match=r"'epsilon'.*zero-terminal"):
        Schedule.from_scheduler(diffusers.DDPMScheduler(rescale_betas_zero_snr=True))


def test_bad_arguments_name_themselves() -> None:
    with pytest.raises(ValueError, match=r"prediction_type is 'noise'.*v_prediction"):
        Schedule.ddpm(prediction_type="noise")
    with pytest.raises(ValueError, match="prediction_type is 'flow'"):
        Schedule.ddpm(prediction_type="flow")
    with pytest.raises(ValueError, match=r"'epsilon'.*zero-terminal"):
        Schedule.ddpm(prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match=r"beta_schedule is 'cosine'.*scaled_linear"):
        Schedule.ddpm(beta_schedule="cosine")
    with pytest.raises(ValueError, match="betas are"):
        Schedule.ddpm(beta_end=1.5)
    with pytest.raises(ValueError, match="num_train_timesteps is 1"):
        Schedule.ddpm(num_train_timesteps=1)
    for shift in (0.0, float("nan")):
        with pytest.raises(ValueError, match="shift is"):
            Schedule.flow(shift=shift)
    x, t = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"model_output has shape \(2, 4\)"):
        Schedule.flow().predict(x, torch.zeros(2, 4), t)
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        Schedule.flow().add_noise(x, x, torch.zeros(3, dtype=torch.int64))
