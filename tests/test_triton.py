"""The Triton kernels behind the public functions, against float64 and the definitions.

On a GPU these tests run as they stand. Without one they run through Triton's interpreter on CPU tensors, the same code
at smaller sizes: `TRITON_INTERPRET=1 pytest tests/test_triton.py`, which tests/test_triton_interpreter.py starts. What
needs the device itself (graphs, no synchronisation, more than 2^31 elements) is in tests/test_triton_device.py.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import (
    DTYPES,
    EVERY_CASE,
    SCHEDULE,
    SCHEDULES,
    Case,
    assert_accurate,
    check_compiled,
    check_ops,
    dtype_lists,
    fake_case,
    normal,
    numbers,
    pseudo_huber_case,
    results,
    tdm_case,
)
from torch import Tensor

from tdm_fast import ops
from tdm_fast.philox import Purpose, randn

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]

# Odd sizes around a program's block (1024) and chunk (4096); nine samples are more than a tile of the second pass.
SIZES: tuple[tuple[int, ...], ...] = ((1, 1), (9, 7), (2, 1023), (1, 4097), (2, 3, 5, 7), (3,))
if not INTERPRETED:
    SIZES += ((3, 40000), (2, 16, 13, 60, 90), (1, (1 << 22) + 3), (300, 5))
DRAWS = 8


def kernel(name: str) -> Callable[..., Any]:
    """The host function of an op. Imported when used: TRITON_INTERPRET is read when kernels are defined."""
    return getattr(importlib.import_module(f"tdm_fast.kernels.{name.removesuffix('_from_outputs')}"), name)


def latents_of(case: Case, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    return [normal(shape, dtype, seed + i).to(DEVICE) for i in range(case.latents)]


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that an element which a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@EVERY_CASE
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_against_float64(case: Case, shape: tuple[int, ...], poisoned_memory: None) -> None:
    combinations = dtype_lists(case.latents)
    if INTERPRETED and shape != (1, 4097):
        # The interpreter takes milliseconds per program: the mixed dtypes in turn, all of them at one size.
        combinations = [combinations[3 + math.prod(shape) % 3]]
    for dtypes in combinations:
        draws = ([normal(shape, dtype, 10 * draw + i) for i, dtype in enumerate(dtypes)] for draw in range(DRAWS))
        assert_accurate(case, DEVICE, "triton", *draws)


@EVERY_CASE
def test_latents_that_nearly_agree(case: Case) -> None:
    """There the pseudo-Huber loss is a parabola, and differences lose digits."""
    common, draws = normal((2, 1023), torch.float32, 9), []
    for draw in range(DRAWS):
        draws.append([common + 1e-3 * normal((2, 1023), torch.float32, 10 * draw + i) for i in range(case.latents)])
    assert_accurate(case, DEVICE, "triton", *draws)


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
    full = [normal((4, 6, 7, 7), DTYPES[seed % 3], seed).to(DEVICE) for seed in range(case.latents)]
    for first in range(0, len(STRIDED), 2 if INTERPRETED else 1):
        latents = [STRIDED[(first + i) % len(STRIDED)](latent) for i, latent in enumerate(full)]
        assert all(latent.shape == (2, 3, 5, 7) for latent in latents)
        expected = results(case, [latent.contiguous() for latent in latents], "triton")
        for ours, wanted in zip(results(case, latents, "triton"), expected, strict=True):
            assert ours.is_contiguous() and torch.equal(ours, wanted)


@EVERY_CASE
def test_infinite_and_undefined_numbers(case: Case) -> None:
    for special, position in itertools.product((math.inf, -math.inf, math.nan), range(case.latents)):
        latents = latents_of(case, (2, 50), torch.float32)
        latents[position][1, 7] = special
        for ours, wanted in zip(results(case, latents, "triton"), results(case, latents, "torch"), strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


@EVERY_CASE
def test_empty(case: Case) -> None:
    for shape in ((0, 5), (2, 0), (0,)):
        latents = [torch.zeros(shape, device=DEVICE) for _ in range(case.latents)]
        for ours, wanted in zip(results(case, latents, "triton"), results(case, latents, "torch"), strict=True):
            assert ours.dtype == wanted.dtype
            torch.testing.assert_close(ours, wanted, rtol=0, atol=0, equal_nan=True)


@EVERY_CASE
def test_same_bits_every_time(case: Case) -> None:
    latents = latents_of(case, (2, 9001), torch.bfloat16)
    first, second = results(case, latents, "triton"), results(case, latents, "triton")
    assert all(torch.equal(ours, again) for ours, again in zip(first, second, strict=True))


@pytest.mark.parametrize("huber_c", [1e-3, None])
def test_all_equal_batch(huber_c: float | None) -> None:
    latent = normal((2, 37), torch.float32, 0).to(DEVICE)
    for case in (tdm_case(False, huber_c), fake_case(True, 5.0), pseudo_huber_case(True, 1e-3, "mean")):
        assert all(not value.any() for value in results(case, [latent] * case.latents, "triton"))


@EVERY_CASE
def test_without_gradient(case: Case) -> None:
    """The same values where nobody asks for a gradient, and no residual is stored."""
    latents = latents_of(case, (2, 1500), torch.float16)
    with torch.no_grad():
        values = case.run(*latents, backend="triton")
    assert all(
        torch.equal(value, wanted) for value, wanted in zip(values, results(case, latents, "triton"), strict=False)
    )


@pytest.mark.parametrize("huber_c", [1e-3, None])
def test_a_squared_residual_does_not_overflow_float16(huber_c: float | None) -> None:
    latents = [torch.full((2, 9), value, dtype=torch.float16, device=DEVICE) for value in (0.0, 6e4, -6e4, 6e4)]
    for with_gradient in (True, False):
        _, residual, scale = kernel("tdm_loss")(*latents, None, 4.5, huber_c, with_gradient)
        stored = torch.float16 if huber_c is not None and with_gradient else torch.float32
        assert residual.dtype == stored and residual.numel() == 18 * with_gradient
        assert bool(residual.isfinite().all()) and scale.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_gradient(dtype: torch.dtype) -> None:
    """Against the product in float64, for one upstream gradient, one per sample and one per element."""
    scale = numbers(torch.empty(3, device=DEVICE), 0)
    for residual_type, shape in itertools.product((dtype, torch.float32), ((3, 1025), (3,), (3, 2, 3))):
        residual = normal(shape, residual_type, 1).to(DEVICE)
        per_element = normal(shape, torch.float32, 2).to(DEVICE)
        upstreams = [
            torch.tensor(-2.5, device=DEVICE),
            numbers(scale, 3),
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
    here = SCHEDULE.to(DEVICE)
    known = (here.a, here.b, here.c, here.d, here.alpha, here.sigma)
    for t, t_next in ((outside, inside), (inside, beyond)):
        assert kernel("ode_step")(x, x, *known, t, t_next).isnan().all()
    for steps in ((outside, inside, inside), (inside, beyond, inside), (inside, inside, beyond)):
        noisy, x0, log_weight = kernel("renoise")(x, x, *known, *steps, None, None, 0, 0, 0, 0, x)
        assert noisy.isnan().all() and log_weight.isnan().all()
        assert x0.isnan().all() or steps[0] is inside
    loss, _, scale = kernel("fake_score_loss_from_outputs")(x, x, x, here.a, here.b, here.snr, outside, None, 5.0, True)
    assert loss.isnan() and scale.isnan().all()
    for t_gen, t in ((outside, inside), (inside, outside)):
        loss, _, scale = kernel("tdm_loss_from_outputs")(*[x] * 6, here.a, here.b, t_gen, t, None, 4.5, 1e-3, True)
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


@EVERY_CASE
def test_opcheck(case: Case) -> None:
    check_ops(case, DEVICE, "triton")


@EVERY_CASE
def test_compiled(case: Case) -> None:
    check_compiled(case, DEVICE, "triton", dynamic=True)
