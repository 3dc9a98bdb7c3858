"""The Triton kernels against float64 and the definitions.

On a GPU these tests run as they stand. Without one they run through Triton's interpreter on CPU tensors, the same code
at smaller sizes: `TRITON_INTERPRET=1 pytest tests/test_triton.py`, which tests/test_triton_interpreter.py starts.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tdm_fast import ops
from tdm_fast.philox import Purpose, randn
from tdm_fast.schedule import Schedule

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd sizes around a program's block (1024) and chunk (4096); nine samples are more than a tile of the second pass.
SIZES: tuple[tuple[int, ...], ...] = ((1, 1), (9, 7), (2, 1023), (1, 4097), (2, 3, 5, 7), (3,))
if not INTERPRETED:
    SIZES += ((3, 40000), (2, 16, 13, 60, 90), (1, (1 << 22) + 3), (300, 5))
SCHEDULES = {
    "epsilon": Schedule.ddpm(prediction_type="epsilon"),
    "v_prediction": Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": Schedule.flow(shift=3.0),
}
SCHEDULE = SCHEDULES["v_prediction"]


def kernel(name: str) -> Callable[..., Any]:
    """The host function of an op. Imported when used: TRITON_INTERPRET is read when kernels are defined."""
    return getattr(importlib.import_module(f"tdm_fast.kernels.{name.removesuffix('_from_outputs')}"), name)


def tables(schedule: Schedule, *names: str) -> list[Tensor]:
    return [getattr(schedule.to(DEVICE), name) for name in names]


def timesteps(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(t_gen, t_mid, t) of the trajectory's steps in turn, t = t_mid included."""
    t_gen, t_mid, t = (
        torch.tensor(values, device=DEVICE)
        for values in ([899, 674, 449, 224], [675, 450, 225, 0], [880, 450, 300, 20])
    )
    which = torch.arange(batch, device=DEVICE) % 4
    return t_gen[which], t_mid[which], t[which]


def numbers(batch: int, seed: int) -> Tensor:
    """float32 `[B]` around 1."""
    return normal((batch,), torch.float32, seed).mul(0.3).exp()


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


GRAD_OUTPUT = 3.25


@dataclass(frozen=True)
class Case:
    """An op with its settings, `settings(batch)`; losses come with their gradient to the first latent."""

    op: Callable[..., Any]
    latents: int
    settings: Callable[[int], dict[str, Any]]
    is_loss: bool = True

    def __call__(self, latents: Sequence[Tensor], backend: str) -> tuple[Tensor, ...]:
        settings = {**self.settings(len(latents[0])), "backend": backend}
        if not self.is_loss:
            results = self.op(*latents, **settings)
            return results if isinstance(results, tuple) else (results,)
        first = latents[0].detach().requires_grad_()
        value = self.op(first, *latents[1:], **settings)
        (gradient,) = torch.autograd.grad(value, first, torch.full_like(value, GRAD_OUTPUT))
        return value.detach(), gradient


def ode_step_case(schedule: Schedule) -> Case:
    def settings(batch: int) -> dict[str, Any]:
        t_next = torch.tensor([674, 449, -1, 0], device=DEVICE)[torch.arange(batch, device=DEVICE) % 4]
        return {"schedule": schedule, "t": timesteps(batch)[0], "t_next": t_next}

    return Case(ops.ode_step, 2, settings, is_loss=False)


def _renoise(sample: Tensor, model_output: Tensor, noise: Tensor, **settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    return ops.renoise(sample, model_output, noise=noise, seed=0, iteration=0, **settings)


def renoise_case(schedule: Schedule) -> Case:
    def settings(batch: int) -> dict[str, Any]:
        return {"schedule": schedule, **dict(zip(("t_gen", "t_mid", "t"), timesteps(batch), strict=True))}

    return Case(_renoise, 3, settings, is_loss=False)


def fake_case(weighted: bool, snr_gamma: float) -> Case:
    def settings(batch: int) -> dict[str, Any]:
        log_weight = numbers(batch, 2) - 1 if weighted else None
        return {"snr": 4 * numbers(batch, 1), "log_weight": log_weight, "snr_gamma": snr_gamma}

    return Case(ops.fake_score_loss, 2, settings)


def fake_from_outputs_case(schedule: Schedule, weighted: bool) -> Case:
    def settings(batch: int) -> dict[str, Any]:
        log_weight = numbers(batch, 2) - 1 if weighted else None
        return {"schedule": schedule, "t": timesteps(batch)[2], "log_weight": log_weight}

    return Case(ops.fake_score_loss_from_outputs, 3, settings)


def tdm_case(cfg_per_sample: bool, huber_c: float | None) -> Case:
    def settings(batch: int) -> dict[str, Any]:
        return {"cfg": 4 * numbers(batch, 3) if cfg_per_sample else 4.5, "huber_c": huber_c}

    return Case(ops.tdm_loss, 4, settings)


def tdm_from_outputs_case(schedule: Schedule, cfg_per_sample: bool, huber_c: float | None) -> Case:
    def settings(batch: int) -> dict[str, Any]:
        t_gen, _, t = timesteps(batch)
        cfg = 4 * numbers(batch, 3) if cfg_per_sample else 4.5
        return {"schedule": schedule, "t_gen": t_gen, "t": t, "cfg": cfg, "huber_c": huber_c}

    return Case(ops.tdm_loss_from_outputs, 6, settings)


def pseudo_huber_case(weighted: bool, c: float, reduction: str) -> Case:
    def settings(batch: int) -> dict[str, Any]:
        return {"c": c, "weight": numbers(batch, 4) if weighted else None, "reduction": reduction}

    return Case(ops.pseudo_huber, 2, settings)


CASES = {
    **{f"ode_step-{name}": ode_step_case(schedule) for name, schedule in SCHEDULES.items()},
    **{f"renoise-{name}": renoise_case(schedule) for name, schedule in SCHEDULES.items()},
    "fake_score_loss": fake_case(False, 5.0),
    "fake_score_loss-weighted": fake_case(True, math.inf),
    "fake_score_loss_from_outputs": fake_from_outputs_case(SCHEDULE, False),
    "fake_score_loss_from_outputs-weighted": fake_from_outputs_case(SCHEDULES["epsilon"], True),
    "tdm_loss": tdm_case(False, 1e-3),
    "tdm_loss-squared-cfg": tdm_case(True, None),
    "tdm_loss_from_outputs": tdm_from_outputs_case(SCHEDULE, True, 1e-3),
    "tdm_loss_from_outputs-squared": tdm_from_outputs_case(SCHEDULES["flow"], False, None),
    "pseudo_huber-mean": pseudo_huber_case(False, 1e-3, "mean"),
    "pseudo_huber-sum": pseudo_huber_case(True, 0.5, "sum"),
    "pseudo_huber-none": pseudo_huber_case(True, 0.5, "none"),
    "pseudo_huber-per_sample": pseudo_huber_case(False, 1e-3, "per_sample"),
    "pseudo_huber-mean-weighted": pseudo_huber_case(True, 1e-3, "mean"),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that an element which a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


DRAWS = 8


def assert_accurate(case: Case, draw: Callable[[int], list[Tensor]]) -> None:
    """Error at most twice the plain same-precision version's largest one plus one ulp of the output dtype.

    The kernels run on the first draw of inputs, the plain version on all: a scalar's error is one number, 0 by luck.
    """
    plain_error = [0.0] * 3
    for index in reversed(range(DRAWS)):
        latents = draw(index)
        plain, exact = case(latents, "torch"), case([latent.double() for latent in latents], "torch")
        for i, (same, wanted) in enumerate(zip(plain, exact, strict=True)):
            plain_error[i] = max(plain_error[i], float((same.double() - wanted).abs().max()))
    for ours, same, wanted, largest in zip(case(latents, "triton"), plain, exact, plain_error, strict=False):
        assert ours.dtype == same.dtype and ours.shape == same.shape and ours.is_contiguous()
        numbers = torch.finfo(ours.dtype)
        error = (ours.double() - wanted).abs()
        bound = 2 * largest + numbers.eps * wanted.abs().clamp(min=numbers.tiny)
        assert torch.all(error <= bound), f"{error.max():.3e}, plain {largest:.3e}, value {wanted.abs().max():.3e}"


@EVERY_CASE
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_against_float64(case: Case, shape: tuple[int, ...], poisoned_memory: None) -> None:
    alike = [[dtype] * case.latents for dtype in DTYPES]
    mixed = [[DTYPES[(first + i) % 3] for i in range(case.latents)] for first in range(3)]
    # The interpreter takes milliseconds per program: one combination per size, but for the size of several blocks.
    combinations = [*alike, *mixed] if not INTERPRETED or shape == (1, 4097) else mixed[math.prod(shape) % 3 :][:1]
    for dtypes in combinations:
        assert_accurate(
            case, lambda draw, dtypes=dtypes: [normal(shape, dtypes[i], 10 * draw + i) for i in range(case.latents)]
        )


@EVERY_CASE
def test_latents_that_nearly_agree(case: Case) -> None:
    """There the pseudo-Huber loss is a parabola, and differences lose digits."""
    common = normal((2, 1023), torch.float32, 9)
    assert_accurate(
        case,
        lambda draw: [common + 1e-3 * normal((2, 1023), torch.float32, 10 * draw + i) for i in range(case.latents)],
    )


# Latents [2, 3, 5, 7] out of a larger tensor [4, 6, 7, 7].
STRIDED: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x[:2, :3, :5].contiguous(),
    lambda x: x[:2].flatten(1)[:, :105].unflatten(1, (3, 5, 7)),  # the first half of the channels
    lambda x: x[::2].flatten(1)[:, 3:108].unflatten(1, (3, 5, 7)),  # an odd offset
    lambda x: x[:1, :3, :5].contiguous().expand(2, -1, -1, -1),  # one sample for all
    lambda x: x[:2, :1, :1, :1].expand(-1, 3, 5, 7),  # one number per sample
    lambda x: x[:1, :1, :1, :1].expand(2, 3, 5, 7),  # one number
    lambda x: x[:2, :3, :, :5].transpose(2, 3),
    lambda x: x[:2, ::2, 2:],
    lambda x: x[:2, :3, :5].contiguous(memory_format=torch.channels_last),
)


@EVERY_CASE
def test_strided(case: Case) -> None:
    """The same bits as from contiguous latents, each latent strided in each way beside others strided otherwise."""
    full = [normal((4, 6, 7, 7), DTYPES[seed % 3], seed) for seed in range(case.latents)]
    for first in range(0, len(STRIDED), 2 if INTERPRETED else 1):
        latents = [STRIDED[(first + i) % len(STRIDED)](latent) for i, latent in enumerate(full)]
        assert all(latent.shape == (2, 3, 5, 7) for latent in latents)
        expected = case([latent.contiguous() for latent in latents], "triton")
        for ours, wanted in zip(case(latents, "triton"), expected, strict=True):
            assert ours.is_contiguous() and torch.equal(ours, wanted)


@EVERY_CASE
def test_infinite_and_undefined_numbers(case: Case) -> None:
    for special, position in itertools.product((math.inf, -math.inf, math.nan), range(case.latents)):
        latents = [normal((2, 50), torch.float32, seed) for seed in range(case.latents)]
        latents[position][1, 7] = special
        for ours, wanted in zip(case(latents, "triton"), case(latents, "torch"), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


@EVERY_CASE
def test_empty(case: Case) -> None:
    for shape in ((0, 5), (2, 0), (0,)):
        latents = [torch.zeros(shape, device=DEVICE) for _ in range(case.latents)]
        for ours, wanted in zip(case(latents, "triton"), case(latents, "torch"), strict=True):
            assert ours.dtype == wanted.dtype
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


@EVERY_CASE
def test_same_bits_every_time(case: Case) -> None:
    latents = [normal((2, 9001), torch.bfloat16, seed) for seed in range(case.latents)]
    first, second = case(latents, "triton"), case(latents, "triton")
    assert all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))


@pytest.mark.parametrize("huber_c", [1e-3, None])
def test_all_equal_batch(huber_c: float | None) -> None:
    latent = normal((2, 37), torch.float32, 0)
    for loss, residual, _ in (
        kernel("tdm_loss")(latent, latent, latent, latent, None, 4.5, huber_c, True),
        kernel("fake_score_loss")(latent, latent, torch.ones(2, device=DEVICE), None, 5.0, True),
        kernel("pseudo_huber")(latent, latent, 1e-3, None, "mean", True),
    ):
        assert float(loss) == 0.0 and torch.equal(residual, torch.zeros_like(latent))


@pytest.mark.parametrize("case", [name for name in CASES if "loss" in name or "huber" in name])
def test_without_gradient(case: str) -> None:
    """The value is the same, the residual is empty."""
    name = case.split("-")[0]
    x = [normal((2, 1500), torch.float16, seed) for seed in range(CASES[case].latents)]
    t_gen, _, t = timesteps(2)
    known, snr = tables(SCHEDULE, "a", "b"), numbers(2, 0)
    settings: tuple[Any, ...] = {
        "tdm_loss": (None, 4.5, None),
        "tdm_loss_from_outputs": (*known, t_gen, t, None, 4.5, 1e-3),
        "fake_score_loss": (snr, None, 5.0),
        "fake_score_loss_from_outputs": (*known, *tables(SCHEDULE, "snr"), t, None, 5.0),
        "pseudo_huber": (1e-3, None, "mean"),
    }[name]
    with_gradient, without = kernel(name)(*x, *settings, True), kernel(name)(*x, *settings, False)
    assert torch.equal(with_gradient[0], without[0]) and without[1].numel() == 0
    bounded = name in ("tdm_loss_from_outputs", "pseudo_huber")
    assert with_gradient[1].dtype == (torch.float16 if bounded else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_gradient(dtype: torch.dtype) -> None:
    """Against the product in float64, for one upstream gradient, one per sample and one per element."""
    scale = numbers(3, 0)
    for residual_type, shape in itertools.product((dtype, torch.float32), ((3, 1025), (3,), (3, 2, 3))):
        residual = normal(shape, residual_type, 1)
        per_element = normal(shape, torch.float32, 2)
        upstreams = [
            torch.tensor(-2.5, device=DEVICE),
            numbers(3, 3),
            per_element.flatten()[0].expand(shape),
            per_element,
        ]
        if len(shape) > 1:
            upstreams.append(per_element.transpose(0, -1).contiguous().transpose(0, -1))
        for upstream in upstreams:
            ours = kernel("scale_gradient")(residual, scale, upstream, dtype)
            assert ours.dtype == dtype and ours.is_contiguous()
            view = (-1, *[1] * (len(shape) - 1))
            wide = upstream.double().reshape(view) if upstream.ndim == 1 else upstream.double()
            exact = residual.double() * scale.double().reshape(view) * wide
            bound = torch.finfo(dtype).eps * exact.abs() + 2**-22 * exact.abs() + torch.finfo(dtype).tiny
            assert torch.all((ours.double() - exact).abs() <= bound)


def test_timesteps_outside_the_tables_give_nan() -> None:
    x = torch.ones(6, 9, device=DEVICE)
    outside = torch.tensor([1000, -1, 1 << 40, -(1 << 40), 1001, -7], device=DEVICE)
    inside, beyond = torch.full_like(outside, 5), outside.where(outside != -1, 1000)
    known = tables(SCHEDULE, "a", "b", "c", "d", "alpha", "sigma")
    a, b = known[:2]
    (snr,) = tables(SCHEDULE, "snr")
    for t, t_next in ((outside, inside), (inside, beyond)):
        assert kernel("ode_step")(x, x, *known, t, t_next).isnan().all()
    for steps in ((outside, inside, inside), (inside, beyond, inside), (inside, inside, beyond)):
        noisy, x0, log_weight = kernel("renoise")(x, x, *known, *steps, None, None, 0, 0, 0, 0, x)
        assert noisy.isnan().all() and log_weight.isnan().all()
        assert x0.isnan().all() or steps[0] is inside
    loss, _, scale = kernel("fake_score_loss_from_outputs")(x, x, x, a, b, snr, outside, None, 5.0, True)
    assert loss.isnan() and scale.isnan().all()
    for t_gen, t in ((outside, inside), (inside, outside)):
        loss, _, scale = kernel("tdm_loss_from_outputs")(*[x] * 6, a, b, t_gen, t, None, 4.5, 1e-3, True)
        assert loss.isnan() and scale.isnan().all()


INTERVALS: tuple[dict[str, Any], ...] = (
    {"num_steps": 4, "total_steps": 900},
    {"num_steps": 4, "total_steps": 900, "randmid": True, "seed": -1, "iteration": (1 << 32) + 5, "stream": 65535},
    {"num_steps": 1, "total_steps": 1000, "separate": False, "seed": 1 << 31, "sample_offset": (1 << 32) - 3},
    {"num_steps": 4, "total_steps": 1000, "nodes": [999, 856, 665, 399], "seed": (1 << 63) - 7, "iteration": 1 << 31},
    {"num_steps": 2, "total_steps": 800, "separate": False, "randmid": True, "min_timestep": 30, "margin": 7},
    {"num_steps": 4, "total_steps": 900, "seed": (1 << 64) - 3, "sample_offset": 1 << 40, "mid_gap": 50},
)


def drawn(settings: dict[str, Any], as_tensors: bool) -> dict[str, Any]:
    """The settings with seed and iteration, as tensors on the device if wanted."""
    given = {"seed": 0, "iteration": 0, **settings}
    if as_tensors:
        for name in ("seed", "iteration"):
            signed = (given[name] + (1 << 63)) % (1 << 64) - (1 << 63)
            given[name] = torch.tensor(signed, dtype=torch.int64, device=DEVICE)
    return given


AS_TENSORS = pytest.mark.parametrize("as_tensors", [False, True], ids=["ints", "tensors"])


@AS_TENSORS
@pytest.mark.parametrize("settings", INTERVALS, ids=str)
def test_the_same_integers(settings: dict[str, Any], as_tensors: bool) -> None:
    for batch in (0, 1, 1023):
        ours = ops.sample_intervals(batch, **drawn(settings, as_tensors), device=DEVICE, backend="triton")
        wanted = ops.sample_intervals(batch, **drawn(settings, False), backend="torch")
        assert torch.equal(torch.stack(ours).cpu(), torch.stack(wanted))


def fresh_noise(shape: tuple[int, ...], settings: dict[str, Any], as_tensors: bool = False) -> Tensor:
    """The normals that renoise makes: at flow's last timestep nothing but them is left of a sample."""
    flow, zeros = SCHEDULES["flow"], torch.zeros(shape, device=DEVICE)
    assert float(flow.alpha[-1]) == 0.0 and float(flow.sigma[-1]) == 1.0
    last = torch.full(shape[:1], flow.num_train_timesteps - 1, device=DEVICE)
    steps: dict[str, Any] = {"schedule": flow, "t_gen": last, "t_mid": last - 300, "t": last}
    return ops.renoise(zeros, zeros, **steps, **drawn(settings, as_tensors), backend="triton")[0]


DRAWN: tuple[dict[str, Any], ...] = (
    {"seed": 0, "iteration": 7, "stream": 1},
    {"seed": 1 << 31, "iteration": 1 << 31, "stream": 65535, "sample_offset": 5},
    {"seed": (1 << 32) + 1, "iteration": (1 << 32) - 1, "sample_offset": (1 << 32) - 1},
    {"seed": -1, "iteration": 1 << 40, "sample_offset": 1 << 40},
    {"seed": -(1 << 63)},
    {"seed": 3},
)


@AS_TENSORS
def test_normals_are_those_of_philox(as_tensors: bool) -> None:
    sizes = ((1, 1), (3, 7), (2, 1023), (2, 4099), (2, 3, 5, 7), (2, 5) if INTERPRETED else (10, 1000003))
    for shape, settings in zip(sizes, DRAWN, strict=True):
        given = drawn(settings, False)
        exact = randn(shape[0], shape[1:], purpose=Purpose.RENOISE, dtype=torch.float64, **given)
        error = (fresh_noise(shape, settings, as_tensors).cpu().double() - exact).abs().max()
        assert error <= 1e-6, f"{error:.2e} at {shape}"


def test_noise_does_not_depend_on_the_split() -> None:
    whole = fresh_noise((3, 2051), {"sample_offset": 10})
    parts = [fresh_noise((size, 2051), {"sample_offset": offset}) for size, offset in ((2, 10), (1, 12))]
    assert torch.equal(whole, torch.cat(parts))


def test_box_muller_at_the_edges() -> None:
    """The words where logarithm, square root and octant are hardest, against float64."""
    import triton
    import triton.language as tl

    global box_muller  # where a kernel looks names up
    box_muller = importlib.import_module("tdm_fast.kernels._philox").box_muller

    @triton.jit
    def pairs(radius_words, angle_words, results, n, BLOCK: tl.constexpr):
        index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = index < n
        radius_word = tl.load(radius_words + index, mask=mask, other=0).to(tl.uint32)
        angle_word = tl.load(angle_words + index, mask=mask, other=0).to(tl.uint32)
        first, second = box_muller(radius_word, angle_word)
        tl.store(results + index, first, mask=mask)
        tl.store(results + n + index, second, mask=mask)

    top, root = (1 << 32) - 1, 0xB504F333
    radius = [0, 1, 2, 3, 7, 100, 1 << 23, (1 << 31) - 1, 1 << 31, root - 1, root, root + 1, root + 2, top - 1, top]
    angle = [(octant << 29) + step for octant in range(8) for step in (0, 1, 1 << 28, (1 << 29) - 2, (1 << 29) - 1)]
    drawn = torch.randint(0, 1 << 32, (3000,), generator=torch.Generator().manual_seed(0)).tolist()
    both = torch.cartesian_prod(torch.tensor(radius), torch.tensor(angle + drawn))
    results = torch.empty(2, len(both), device=DEVICE)
    block = 1 << 16 if INTERPRETED else 1024
    pairs[(triton.cdiv(len(both), block),)](*both.t().contiguous().to(DEVICE), results, len(both), BLOCK=block)

    distance = (top - both[:, 0]).double().add(0.5) * 2.0**-32
    r = (-2 * torch.log1p(-distance)).sqrt()
    a = 2 * math.pi * both[:, 1].double().add(0.5) * 2.0**-32
    exact = torch.stack((r * a.cos(), r * a.sin()))
    assert (results.cpu().double() - exact).abs().max() <= 1e-6
