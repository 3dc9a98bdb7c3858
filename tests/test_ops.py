"""The ops against closed forms and float64 formulas that are written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tdm_fast.ops import (
    fake_score_loss,
    fake_score_loss_from_outputs,
    ode_step,
    pseudo_huber,
    renoise,
    tdm_loss,
    tdm_loss_from_outputs,
)
from tdm_fast.philox import Purpose, randn
from tdm_fast.schedule import Schedule

SCHEDULES = {
    "epsilon": Schedule.ddpm(prediction_type="epsilon"),
    "v_prediction": Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "sample": Schedule.ddpm(prediction_type="sample"),
    "flow": Schedule.flow(shift=3.0),
}
EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
DOUBLE = torch.float64


def noise_like(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    return torch.randn(*shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def per(values: Tensor, like: Tensor) -> Tensor:
    return values.double().reshape(-1, *[1] * (like.ndim - 1))


def renoise_in_float64(
    schedule: Schedule, sample: Tensor, output: Tensor, t_gen: Tensor, t_mid: Tensor, t: Tensor, noise: Tensor
) -> dict[str, Tensor]:
    """The method's formulas, from alpha and sigma alone."""
    alpha_g, sigma_g = per(schedule.alpha[t_gen], sample), per(schedule.sigma[t_gen], sample)
    x0, eps = {
        "epsilon": lambda: ((sample - sigma_g * output) / alpha_g, output),
        "v_prediction": lambda: (alpha_g * sample - sigma_g * output, sigma_g * sample + alpha_g * output),
        "sample": lambda: (output, (sample - alpha_g * output) / sigma_g),
        "flow": lambda: (sample - sigma_g * output, sample + (1 - sigma_g) * output),
    }[schedule.prediction_type]()
    alpha_m, sigma_m = per(schedule.alpha[t_mid], sample), per(schedule.sigma[t_mid], sample)
    alpha, sigma = per(schedule.alpha[t], sample), per(schedule.sigma[t], sample)
    beta = torch.maximum(sigma**2 - (alpha * sigma_m / alpha_m) ** 2, torch.zeros_like(sigma)).sqrt()
    noisy = alpha / alpha_m * (alpha_m * x0 + sigma_m * eps) + beta * noise
    mixed = (alpha * sigma_m / alpha_m * eps + beta * noise) / sigma
    log_weight = 0.5 * ((noise**2).flatten(1).mean(1) - (mixed**2).flatten(1).mean(1))
    return {"noisy": noisy, "x0": x0, "log_weight": log_weight}


T_GEN, T_MID, T = torch.tensor([899, 674, 224]), torch.tensor([675, 450, 0]), torch.tensor([880, 450, 20])


@EVERY_SCHEDULE
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_renoise_is_the_formula(schedule: Schedule, dtype: torch.dtype) -> None:
    sample, output, noise = (noise_like(3, 4, 5, 7, seed=seed, dtype=dtype) for seed in range(3))
    got = renoise(sample, output, schedule=schedule, t_gen=T_GEN, t_mid=T_MID, t=T, seed=0, iteration=0, noise=noise)
    wanted = renoise_in_float64(schedule, sample.double(), output.double(), T_GEN, T_MID, T, noise.double())
    assert (got[0].dtype, got[1].dtype) == (dtype, dtype)
    assert got[2].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Per result: a few roundings of its largest term; and of beta, where beta^2 cancels (t = t_mid), sqrt(ulp) remains.
    ulp, largest = 2.0**-23, float(torch.stack([sample, output, noise]).double().abs().max())
    of_x0, of_eps = (
        8 * ulp * largest * float(torch.stack(tables)[:, T_GEN].abs().max())
        for tables in ((schedule.a, schedule.b), (schedule.c, schedule.d))
    )
    of_beta = math.sqrt(4 * ulp) * largest
    of_mixed = (of_eps + of_beta) / float(schedule.sigma[T].min())
    bounds = {"noisy": of_x0 + of_eps + of_beta, "x0": of_x0, "log_weight": 3 * of_mixed}
    if dtype == torch.float64:
        bounds["x0"] = 2 * ulp * of_x0 / (8 * ulp)
    for value, (name, exact) in zip(got, wanted.items(), strict=True):
        stored = 2 * ulp if name == "log_weight" else torch.finfo(dtype).eps
        torch.testing.assert_close(value.double(), exact, rtol=stored, atol=bounds[name])


@EVERY_SCHEDULE
@pytest.mark.parametrize("below", [0, 1])
def test_renoise_never_takes_the_root_of_a_negative_number(schedule: Schedule, below: int) -> None:
    """At t = t_mid, beta^2 is 0 but for rounding; just below it is negative. Either way nothing is added."""
    t_mid = torch.arange(below, 1000)
    t = t_mid - below
    if below and schedule.alpha[-1] == 0:
        t_mid, t = t_mid[:-1], t[:-1]
    sample, output, noise = (noise_like(len(t), 3, seed=seed, dtype=torch.float32) for seed in range(3))
    options: dict[str, Any] = {"schedule": schedule, "t_gen": t_mid, "t_mid": t_mid, "t": t, "seed": 0, "iteration": 0}
    results = renoise(sample, output, noise=noise, **options)
    assert all(bool(value.isfinite().all()) for value in results)
    other, _, _ = renoise(sample, output, noise=-noise, **options)
    # sqrt of what two roundings leave of 1 - 1, times the noise, on either side.
    bound = 2 * math.sqrt(2.0**-22) * float(noise.abs().max())
    torch.testing.assert_close(results[0], other, rtol=0, atol=bound)
    if not below:
        x0, eps = schedule.predict(sample.double(), output.double(), t)
        # x0 and eps of one timestep make up its sample again, terms of opposite sign and a's size included.
        bound += 8 * 2.0**-23 * float((schedule.alpha * schedule.b.abs()).max()) * float(output.abs().max())
        torch.testing.assert_close(results[0].double(), schedule.add_noise(x0, eps, t), rtol=2.0**-20, atol=bound)


def test_renoise_noise_is_the_documented_draw() -> None:
    schedule = SCHEDULES["flow"]
    sample, output = noise_like(3, 2, 5, dtype=torch.float32), noise_like(3, 2, 5, seed=1, dtype=torch.float32)
    options: dict[str, Any] = {"schedule": schedule, "t_gen": T_GEN, "t_mid": T_MID, "t": T}
    drawn = renoise(sample, output, seed=7, iteration=2, stream=1, sample_offset=10, **options)
    noise = randn(3, (2, 5), seed=7, iteration=2, stream=1, purpose=Purpose.RENOISE, sample_offset=10)
    given = renoise(sample, output, seed=0, iteration=0, noise=noise, **options)
    for value, wanted in zip(drawn, given, strict=True):
        # Normals made in the kernel agree within 1e-6, and no factor here is above 1.
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=2e-6)
    on_device = renoise(
        sample, output, seed=torch.tensor(7), iteration=torch.tensor(2), stream=1, sample_offset=10, **options
    )
    assert torch.equal(drawn[0], on_device[0])
    last = {name: value[2:] for name, value in options.items() if isinstance(value, Tensor)}
    alone = renoise(sample[2:], output[2:], schedule=schedule, seed=7, iteration=2, stream=1, sample_offset=12, **last)
    assert torch.equal(alone[0], drawn[0][2:])


@EVERY_SCHEDULE
def test_renoise_gives_a_gradient_through_x0_only(schedule: Schedule) -> None:
    sample, output = noise_like(3, 4).requires_grad_(), noise_like(3, 4, seed=1).requires_grad_()
    options: dict[str, Any] = {"schedule": schedule, "t_gen": T_GEN, "t_mid": T_MID, "t": T, "seed": 0, "iteration": 0}
    noisy, x0, log_weight = renoise(sample, output, **options)
    assert not noisy.requires_grad and not log_weight.requires_grad
    (x0 * 3).sum().backward()
    assert sample.grad is None and output.grad is not None
    torch.testing.assert_close(output.grad, 3 * per(schedule.b[T_GEN], output).expand(3, 4))
    assert torch.autograd.gradcheck(lambda value: renoise(sample.detach(), value, **options)[1], (output,))


def test_a_stray_step_of_renoise_keeps_the_marginal() -> None:
    """With the true eps, x_t has variance sigma_t^2 around alpha_t x0 whatever t_mid is."""
    for schedule in (SCHEDULES["v_prediction"], SCHEDULES["flow"]):
        x0, eps = torch.full((3, 20_000), 2.0, dtype=DOUBLE), noise_like(3, 20_000)
        sample, output = schedule.add_noise(x0, eps, T_GEN), schedule.training_target(x0, eps, T_GEN)
        t = torch.tensor([880, 600, 210])
        noisy, _, _ = renoise(sample, output, schedule=schedule, t_gen=T_GEN, t_mid=T_MID, t=t, seed=1, iteration=0)
        rest = noisy - per(schedule.alpha[t], x0) * x0
        variance = rest.var(dim=1) / schedule.sigma[t].double() ** 2
        assert float((variance - 1).abs().max()) < 5 * math.sqrt(2 / 20_000)


def test_fake_score_loss_is_the_formula_with_its_gradient() -> None:
    x0_fake, x0 = noise_like(3, 4, 5).requires_grad_(), noise_like(3, 4, 5, seed=1).requires_grad_()
    snr, log_weight = torch.tensor([0.25, 5.0, 40.0]), torch.tensor([0.5, -1.0, 0.0])
    weight = torch.tensor([0.25 * math.exp(0.5), 5 * math.exp(-1), 5], dtype=DOUBLE)
    loss = fake_score_loss(x0_fake, x0, snr=snr, log_weight=log_weight)
    wanted = (
        sum(
            float(w) * float(((f - x) ** 2).mean())
            for w, f, x in zip(weight, x0_fake.detach(), x0.detach(), strict=True)
        )
        / 3
    )
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-12)
    (2 * loss).backward()
    assert x0.grad is None
    torch.testing.assert_close(x0_fake.grad, 2 * per(weight, x0) * 2 * (x0_fake - x0).detach() / x0.numel())
    plain = fake_score_loss(x0_fake, x0, snr=snr, snr_gamma=math.inf)
    wanted = (
        sum(
            s * float(((f - x) ** 2).mean())
            for s, f, x in zip(snr.tolist(), x0_fake.detach(), x0.detach(), strict=True)
        )
        / 3
    )
    assert float(plain.detach()) == pytest.approx(wanted, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda value: fake_score_loss(value, x0, snr=snr, log_weight=log_weight), (x0_fake,)
    )


@EVERY_SCHEDULE
def test_fake_score_loss_from_outputs_agrees(schedule: Schedule) -> None:
    output, noisy, x0 = (noise_like(3, 4, 5, seed=seed).requires_grad_() for seed in range(3))
    log_weight = torch.tensor([0.5, -1.0, 0.0])
    loss = fake_score_loss_from_outputs(output, noisy, x0, schedule=schedule, t=T, log_weight=log_weight)
    x0_fake = schedule.predict(noisy, output, T)[0]
    torch.testing.assert_close(loss, fake_score_loss(x0_fake, x0, snr=schedule.snr[T], log_weight=log_weight))
    loss.backward()
    assert noisy.grad is None and x0.grad is None and output.grad is not None
    assert torch.autograd.gradcheck(
        lambda value: fake_score_loss_from_outputs(value, noisy, x0, schedule=schedule, t=T), (output,)
    )


def plain_tdm_loss(
    x0: Tensor, teacher: Tensor, uncond: Tensor, fake: Tensor, cfg: Tensor, huber_c: float | None
) -> Tensor:
    """The loss literally, target and all."""
    target = (x0 + (teacher - fake) + (cfg - 1) * (teacher - uncond)).detach()
    guided = teacher + (cfg - 1) * (teacher - uncond)
    weight = (x0 - guided).abs().flatten(1).mean(1).detach().clamp(min=1e-8)
    squared = (x0 - target) ** 2
    values = squared if huber_c is None else (squared + huber_c**2).sqrt() - huber_c
    return (values / per(weight, x0)).mean()


@pytest.mark.parametrize("huber_c", [1e-3, 0.3, None])
@pytest.mark.parametrize("cfg", [4.5, 1.0, torch.tensor([1.0, 4.5, 7.0])], ids=["4.5", "1", "tensor"])
def test_tdm_loss_value_and_gradient(cfg: float | Tensor, huber_c: float | None) -> None:
    x0, teacher, uncond, fake = (noise_like(3, 4, 5, seed=seed).requires_grad_() for seed in range(4))
    loss = tdm_loss(x0, teacher, uncond, fake, cfg=cfg, huber_c=huber_c)
    scale = per(cfg, x0) if isinstance(cfg, Tensor) else torch.tensor(cfg, dtype=DOUBLE)
    expected = plain_tdm_loss(x0, teacher.detach(), uncond.detach(), fake.detach(), scale, huber_c)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(expected, x0)
    (3 * loss).backward()
    torch.testing.assert_close(x0.grad, 3 * gradient, rtol=1e-10, atol=1e-14)
    assert teacher.grad is None and uncond.grad is None and fake.grad is None

    with torch.no_grad():
        d = (teacher - fake) + (scale - 1) * (teacher - uncond)
        weight = per((x0 - teacher - (scale - 1) * (teacher - uncond)).abs().flatten(1).mean(1), x0)
        root = 0.5 if huber_c is None else (d**2 + huber_c**2).sqrt()
        torch.testing.assert_close(x0.grad, -3 * d / (root * weight * x0.numel()))


@EVERY_SCHEDULE
@pytest.mark.parametrize("huber_c", [1e-3, None])
def test_tdm_loss_from_outputs_agrees(schedule: Schedule, huber_c: float | None) -> None:
    tensors = [noise_like(3, 2, 3, 4, seed=seed).requires_grad_() for seed in range(6)]
    output, sample, noisy, out_teacher, out_uncond, out_fake = tensors
    options: dict[str, Any] = {"cfg": 4.5, "huber_c": huber_c}
    loss = tdm_loss_from_outputs(*tensors, schedule=schedule, t_gen=T_GEN, t=T, **options)
    x0 = schedule.predict(sample, output, T_GEN)[0]
    scores = (schedule.predict(noisy, out, T)[0].detach() for out in (out_teacher, out_uncond, out_fake))
    expected = tdm_loss(x0, *scores, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    (gradient,) = torch.autograd.grad(expected, output)
    loss.backward()
    # For epsilon x0 is a few hundred times its inputs; that much of float64 is lost in differences of x0s.
    torch.testing.assert_close(output.grad, gradient, rtol=1e-8, atol=1e-12)
    assert all(tensor.grad is None for tensor in tensors[1:])


def test_tdm_loss_gradient_by_finite_differences_with_the_stopped_parts_held() -> None:
    x0, teacher, uncond, fake = (noise_like(2, 3, seed=seed) for seed in range(4))
    guided = teacher + 3.5 * (teacher - uncond)
    target, weight = x0 + guided - fake, per((x0 - guided).abs().mean(1), x0)

    def held(value: Tensor) -> float:
        return float(((((value - target) ** 2 + 1e-6).sqrt() - 1e-3) / weight).mean())

    steps = 1e-5 * torch.eye(6, dtype=DOUBLE).view(6, 2, 3)
    numerical = torch.tensor([(held(x0 + step) - held(x0 - step)) / 2e-5 for step in steps], dtype=DOUBLE)
    x0.requires_grad_()
    (ours,) = torch.autograd.grad(tdm_loss(x0, teacher, uncond, fake, cfg=4.5), x0)
    torch.testing.assert_close(ours.flatten(), numerical, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("huber_c", [1e-3, None])
def test_an_all_equal_batch_has_loss_zero_and_a_finite_gradient(huber_c: float | None) -> None:
    x0 = noise_like(2, 3, dtype=torch.float32).requires_grad_()
    same = x0.detach()
    loss = tdm_loss(x0, same, same, same, cfg=4.5, huber_c=huber_c)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert x0.grad is not None and torch.equal(x0.grad, torch.zeros_like(x0))


def test_the_normaliser_has_its_floor() -> None:
    x0 = torch.zeros(1, 4, dtype=DOUBLE, requires_grad=True)
    tdm_loss(
        x0, torch.zeros_like(x0), torch.zeros_like(x0), torch.full_like(x0, 1e-3), cfg=1.0, huber_c=None
    ).backward()
    # d = -1e-3 everywhere and w = 1e-8: gradient -2 d / (w N).
    torch.testing.assert_close(x0.grad, torch.full_like(x0, 2 * 1e-3 / (1e-8 * 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_are_float32_scalars_and_gradients_in_their_inputs_dtype(dtype: torch.dtype) -> None:
    schedule = SCHEDULES["flow"]
    tensors = [noise_like(3, 5, seed=seed, dtype=dtype).requires_grad_() for seed in range(6)]
    losses = [
        (tdm_loss(*tensors[:4], cfg=4.5), tensors[0]),
        (tdm_loss_from_outputs(*tensors, schedule=schedule, t_gen=T_GEN, t=T, cfg=4.5), tensors[0]),
        (fake_score_loss(tensors[0], tensors[1], snr=schedule.snr[T]), tensors[0]),
        (fake_score_loss_from_outputs(*tensors[:3], schedule=schedule, t=T), tensors[0]),
        (pseudo_huber(tensors[0], tensors[1]), tensors[0]),
    ]
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    wanted = [
        tdm_loss(*exact[:4], cfg=4.5),
        tdm_loss_from_outputs(*exact, schedule=schedule, t_gen=T_GEN, t=T, cfg=4.5),
        fake_score_loss(exact[0], exact[1], snr=schedule.snr[T]),
        fake_score_loss_from_outputs(*exact[:3], schedule=schedule, t=T),
        pseudo_huber(exact[0], exact[1]),
    ]
    for (loss, leaf), value in zip(losses, wanted, strict=True):
        assert loss.dtype == torch.float32 and loss.shape == ()
        assert value.dtype == torch.float64
        # Arithmetic is float32 whatever the inputs are: a dozen roundings, not the half type's.
        torch.testing.assert_close(loss.double(), value, rtol=16 * 2.0**-23, atol=0)
        (gradient,) = torch.autograd.grad(loss, leaf)
        (exact_gradient,) = torch.autograd.grad(value, exact[0])
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2 * torch.finfo(dtype).eps + 2e-5, atol=1e-7)


def test_pseudo_huber_reductions_and_weights() -> None:
    left, right = noise_like(3, 4, 5).requires_grad_(), noise_like(3, 4, 5, seed=1).requires_grad_()
    weight = torch.tensor([1.0, 0.5, 3.0])
    values = torch.tensor(
        [
            [
                math.sqrt((a - b) ** 2 + 0.01) - 0.1
                for a, b in zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
            ]
            for x, y in zip(left, right, strict=True)
        ],
        dtype=DOUBLE,
    )
    weighted = values * weight.double()[:, None]
    for given, expected in ((None, values), (weight, weighted)):
        options: dict[str, Any] = {"c": 0.1, "weight": given}
        torch.testing.assert_close(pseudo_huber(left, right, **options), expected.mean())
        torch.testing.assert_close(pseudo_huber(left, right, reduction="sum", **options), expected.sum())
        torch.testing.assert_close(pseudo_huber(left, right, reduction="none", **options), expected.view(3, 4, 5))
        torch.testing.assert_close(pseudo_huber(left, right, reduction="per_sample", **options), expected.mean(1))
    assert torch.autograd.gradcheck(lambda a, b: pseudo_huber(a, b, c=0.1, weight=weight), (left, right))


def test_strided_and_one_dimensional_latents_and_empty_batches() -> None:
    strided = noise_like(4, 5, 3).permute(2, 0, 1)
    torch.testing.assert_close(pseudo_huber(strided, strided * 0), pseudo_huber(strided.contiguous(), strided * 0))
    flat = noise_like(3)
    column = flat[:, None]
    wanted = plain_tdm_loss(column, column + 1, column - 1, column * 2, torch.tensor(2.0), 1e-3)
    torch.testing.assert_close(tdm_loss(flat, flat + 1, flat - 1, flat * 2, cfg=2.0), wanted)
    empty, none = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert bool(tdm_loss(empty, empty, empty, empty, cfg=2.0).isnan())
    options: dict[str, Any] = {"schedule": SCHEDULES["flow"], "t_gen": none, "t_mid": none, "t": none}
    assert [value.shape for value in renoise(empty, empty, seed=0, iteration=0, **options)] == [(0, 3), (0, 3), (0,)]


def test_bad_arguments_name_themselves() -> None:
    schedule, x, y = SCHEDULES["flow"], torch.zeros(3, 4), torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"x0_fake has shape \(3, 5\) and x0 \(3, 4\)"):
        tdm_loss(x, x, x, y, cfg=1.0)
    with pytest.raises(ValueError, match=r"huber_c is 0"):
        tdm_loss(x, x, x, x, cfg=1.0, huber_c=0.0)
    with pytest.raises(ValueError, match=r"cfg has shape \(2,\)"):
        tdm_loss(x, x, x, x, cfg=torch.ones(2))
    with pytest.raises(ValueError, match=r"out_fake has shape \(3, 5\)"):
        tdm_loss_from_outputs(x, x, x, x, x, y, schedule=schedule, t_gen=T, t=T, cfg=1.0)
    with pytest.raises(ValueError, match=r"t has dtype torch.float32"):
        tdm_loss_from_outputs(x, x, x, x, x, x, schedule=schedule, t_gen=T, t=T.float(), cfg=1.0)
    with pytest.raises(ValueError, match=r"snr has shape \(2,\)"):
        fake_score_loss(x, x, snr=torch.ones(2))
    with pytest.raises(ValueError, match=r"log_weight has shape \(3, 1\)"):
        fake_score_loss(x, x, snr=torch.ones(3), log_weight=torch.ones(3, 1))
    with pytest.raises(ValueError, match=r"snr_gamma is -1"):
        fake_score_loss(x, x, snr=torch.ones(3), snr_gamma=-1)
    with pytest.raises(ValueError, match=r"model_output has shape \(3, 5\)"):
        fake_score_loss_from_outputs(y, x, x, schedule=schedule, t=T)
    with pytest.raises(ValueError, match=r"noise has shape \(3, 5\)"):
        renoise(x, x, schedule=schedule, t_gen=T, t_mid=T, t=T, seed=0, iteration=0, noise=y)
    with pytest.raises(ValueError, match=r"t_mid has shape \(2,\)"):
        renoise(x, x, schedule=schedule, t_gen=T, t_mid=T[:2], t=T, seed=0, iteration=0)
    with pytest.raises(ValueError, match=r"reduction is 'max'"):
        pseudo_huber(x, x, reduction="max")  # type: ignore[arg-type]
    for c in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"c is {c}; it must be a finite number above 0"):
            pseudo_huber(x, x, c=c)
    with pytest.raises(ValueError, match=r"huber_c is inf"):
        tdm_loss(x, x, x, x, cfg=1.0, huber_c=math.inf)
    with pytest.raises(ValueError, match=r"seed is 1.5; it must be an int"):
        renoise(x, x, schedule=schedule, t_gen=T, t_mid=T, t=T, seed=1.5, iteration=0)  # type: ignore[arg-type]
    for op in (ode_step, fake_score_loss_from_outputs):
        keywords = {"t": T, "t_next": T} if op is ode_step else {"x0": x, "t": T}
        with pytest.raises(ValueError, match=r"schedule is a DDIMScheduler; it must be a tdm_fast.Schedule"):
            op(x, x, schedule=DDIMScheduler(), **keywords)  # type: ignore[operator]


@EVERY_SCHEDULE
def test_ode_step_and_renoise_agree_on_the_deterministic_part(schedule: Schedule) -> None:
    """Renoising to t = t_mid adds nothing, so it is the ODE's sub-step to t_mid."""
    sample, output, noise = (noise_like(3, 6, seed=seed) for seed in range(3))
    options: dict[str, Any] = {"t_gen": T_GEN, "t_mid": T_MID, "t": T_MID, "seed": 0, "iteration": 0}
    noisy, _, _ = renoise(sample, output, schedule=schedule, noise=noise, **options)
    torch.testing.assert_close(noisy, ode_step(sample, output, schedule=schedule, t=T_GEN, t_next=T_MID))
