"""The C++ kernels behind the public functions against float64 and the definitions: values, gradients, strides, bits."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import (
    CASES,
    DTYPES,
    EVERY_CASE,
    SCHEDULES,
    STRIDED,
    Case,
    assert_accurate,
    dtype_lists,
    fake_case,
    normal,
    pseudo_huber_case,
    results,
    steps,
    tdm_case,
)
from torch import Tensor

from tdm_fast import native, ops
from tdm_fast.ops import _dispatch, _residual
from tdm_fast.ops._rows import as_rows

# Around the vector widths (8, 16), a block (512) and a chunk (4096); past the grain of a thread; rank 1.
SIZES = ((1, 1), (3, 7), (2, 519), (2, 1023), (1, 4097), (2, 3, 5, 7), (2, 40001), (5,), (37, 8))
DRAWS = 3
_KNOWN = ("default", "avx2", "avx512")
INSTRUCTION_SETS = _KNOWN[
    : 1 + _KNOWN.index((native.build_info() or {"instruction_set": "default"})["instruction_set"])
]
BOTH = pytest.mark.parametrize("backend", ["torch", "cpp"])


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is NaN, so that an element which a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads until the end of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """The same bits, NaN where the other has NaN."""
    pairs = zip(left, right, strict=True)
    return all(torch.equal(mine.nan_to_num(7.0), other.nan_to_num(7.0)) for mine, other in pairs)


def check_accuracy(case: Case, sizes: tuple[tuple[int, ...], ...]) -> None:
    for shape in sizes:
        for dtypes in dtype_lists(case.latents):
            draws = ([normal(shape, dtype, 10 * d + i) for i, dtype in enumerate(dtypes)] for d in range(DRAWS))
            assert_accurate(case, "cpu", "cpp", *draws)
    # Latents that nearly agree, where the pseudo-Huber loss is a parabola.
    common, near = normal((2, 1023), torch.float32, 9), []
    for draw in range(DRAWS):
        near.append([common + 1e-3 * normal((2, 1023), torch.float32, 10 * draw + i) for i in range(case.latents)])
    assert_accurate(case, "cpu", "cpp", *near)


@EVERY_CASE
def test_against_float64(case: Case, poisoned_memory: None) -> None:
    check_accuracy(case, SIZES)


_ACCURACY = """
import sys, test_native_ops as tests

assert tests.native.build_info()["instruction_set"] == sys.argv[1]
for case in tests.CASES.values():
    tests.check_accuracy(case, ((3, 7), (1, 4097)))
tests.check_normals()
print("all accurate")
"""


def check_normals() -> None:
    """Normals of this process's instruction set against the definition's, by way of noisy = x0 + noise."""
    drawn, wanted = (exposed_normals(2, 4099, 3, backend) for backend in ("cpp", "torch"))
    assert (drawn - wanted).abs().max() < 1e-6


def exposed_normals(batch: int, size: int, iteration: int, backend: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """The noise that renoise makes: without signal, noisy is beta * noise, and at flow's last timestep beta is 1."""
    schedule, latents = SCHEDULES["flow"], torch.zeros(batch, size, dtype=dtype)
    t = torch.full((batch,), 999)
    times = {"t_gen": t, "t_mid": torch.zeros_like(t) - 1, "t": t}
    return ops.renoise(latents, latents, schedule=schedule, **times, seed=5, iteration=iteration, backend=backend)[0]


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_every_instruction_set(instruction_set: str) -> None:
    """Those that this processor has, each in a process of its own: which one runs is decided once."""
    paths = os.pathsep.join([str(Path(native.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "ATEN_CPU_CAPABILITY": instruction_set}
    command = [sys.executable, "-c", _ACCURACY, instruction_set]
    done = subprocess.run(command, env=environment, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert done.stdout == "all accurate\n", done.stdout + done.stderr


@EVERY_CASE
@pytest.mark.parametrize("change", STRIDED.values(), ids=STRIDED.keys())
def test_strided(case: Case, change: Callable[[Tensor], Tensor]) -> None:
    """The same bits as from copies; all latents strided, and each second one beside others that are not."""
    for dtypes in ([torch.bfloat16] * case.latents, dtype_lists(case.latents)[-1]):
        full = [normal((4, 6, 5, 8), dtype, seed) for seed, dtype in enumerate(dtypes)]
        copies = [change(latent).contiguous() for latent in full]
        expected = results(case, copies, "cpp")
        for which in (range(case.latents), range(0, case.latents, 2), range(1, case.latents, 2)):
            latents = [change(latent) if i in which else copies[i] for i, latent in enumerate(full)]
            assert same(results(case, latents, "cpp"), expected)


@pytest.mark.parametrize("change", STRIDED)
def test_which_strided_latents_are_copied(change: str) -> None:
    """Halves of 2C channels, chunks of a batch and expanded latents go to the kernel as they are."""
    latents = STRIDED[change](normal((4, 6, 5, 8), torch.float32, 0))
    assert (as_rows(latents) is latents) == (change not in ("transposed", "every other channel"))


@EVERY_CASE
def test_same_bits_for_every_thread_count(case: Case, threads: Callable[[int], None]) -> None:
    latents = [normal((3, 50_001), torch.bfloat16, seed) for seed in range(case.latents)]
    runs = []
    for count in (1, 2, 3, 1):
        threads(count)
        runs.append(results(case, latents, "cpp"))
    assert all(same(run, runs[0]) for run in runs[1:])
    assert all(value.isfinite().all() for value in runs[0])


def test_noise_made_in_the_kernel(threads: Callable[[int], None], poisoned_memory: None) -> None:
    """For any strides and number of threads the same bits, and the definition's numbers."""

    def run(sample: Tensor, output: Tensor, backend: str) -> list[Tensor]:
        settings = {**steps(sample, "t_gen", "t_mid", "t"), "schedule": SCHEDULES["flow"], "seed": 3, "iteration": 9}
        return list(ops.renoise(sample, output, **settings, sample_offset=5, backend=backend))

    for dtype, tolerance in ((torch.float32, 4e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
        for shape in ((1, 1), (3, 7), (2, 1023), (1, 4097), (3, 50_001)):
            latents = normal(shape, dtype, 0), normal(shape, dtype, 1)
            for mine, wanted in zip(run(*latents, "cpp"), run(*latents, "torch"), strict=True):
                torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)
        runs = []
        for count in (1, 2, 3):
            threads(count)
            runs.append(run(*latents, "cpp"))
        assert all(same(other, runs[0]) for other in runs[1:])
        full = [normal((4, 6, 5, 8), dtype, seed) for seed in range(2)]
        for change in STRIDED.values():
            strided = [change(latent) for latent in full]
            copies = [latent.contiguous() for latent in strided]
            assert same(run(strided[0], strided[1], "cpp"), run(copies[0], copies[1], "cpp"))


@EVERY_CASE
def test_infinite_and_undefined_numbers(case: Case) -> None:
    """They spread as they do in the definition, into the sums of their own sample as well."""
    for special, position in itertools.product((math.inf, -math.inf, math.nan), range(case.latents)):
        latents = [normal((3, 57), torch.float32, seed) for seed in range(case.latents)]
        latents[position][1, 7] = special
        for mine, wanted in zip(results(case, latents, "cpp"), results(case, latents, "torch"), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


SPECIAL = (0.0, -0.0, 1e-45, 1e-39, 1e-30, 1e-23, 1.0, -1e18, 2e19, 1e38, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("c", [1e-3, 1e-30, 1e30])
def test_huber_at_the_ends_of_the_numbers(c: float) -> None:
    """At every place in a run of registers and in the rest after it, the definition's values and gradients.

    c = 1e-30, whose square is 0 in float32, makes roots of 0; the errors' squares overflow and vanish.
    """
    for special in SPECIAL:
        for size in (1, 77):
            # One row for each place of the special number.
            error = normal((size, size), torch.float32, 0)
            error.fill_diagonal_(special)
            runs = []
            for backend in ("cpp", "torch"):
                leaf = error.clone().requires_grad_()
                values = ops.pseudo_huber(leaf, torch.zeros_like(leaf), c=c, reduction="none", backend=backend)
                runs.append([values.detach(), *torch.autograd.grad(values, leaf, torch.ones_like(values))])
            for mine, wanted in zip(*runs, strict=True):
                # torch's roots of many numbers come from a library that does not round all of them to the nearest.
                torch.testing.assert_close(mine, wanted, rtol=3e-7, atol=0, equal_nan=True)


def test_ode_step_twice_differentiable_and_one_gradient_alone() -> None:
    """The backward is a kernel of its own, or the definition's where its result is differentiated again."""
    for dtypes in itertools.product(DTYPES, DTYPES):
        latents = [normal((3, 4, 41), dtype, seed) for seed, dtype in enumerate(dtypes)]
        case, upstream = CASES["ode_step-v_prediction"], normal((4, 41, 3), dtypes[0], 5).permute(2, 0, 1)
        for wanted in ((0,), (1,), (0, 1)):
            runs = []
            for backend in ("cpp", "torch"):
                given = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(latents)]
                leaves = [given[i] for i in wanted]
                factor = upstream.clone().requires_grad_()
                (step,) = case.run(*given, backend=backend)
                plain = torch.autograd.grad(step, leaves, factor, retain_graph=True)
                linked = torch.autograd.grad(step, leaves, factor, create_graph=True)
                again = torch.autograd.grad([gradient.float().sum() for gradient in linked], factor)
                assert same(list(plain), [gradient.detach() for gradient in linked])
                runs.append([*plain, *again])
            assert same(*runs)


@EVERY_CASE
def test_empty_and_single(case: Case) -> None:
    for shape in ((0, 5), (2, 0), (0,), (1,), (1, 1)):
        latents = [torch.full(shape, 0.5 + i) for i in range(case.latents)]
        for mine, wanted in zip(results(case, latents, "cpp"), results(case, latents, "torch"), strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6, equal_nan=True)


@BOTH
@pytest.mark.parametrize("huber_c", [1e-3, None])
def test_all_equal_batch(huber_c: float | None, backend: str) -> None:
    latent = normal((2, 37), torch.float32, 0)
    for case in (tdm_case(False, huber_c), fake_case(True, 5.0), pseudo_huber_case(True, 1e-3, "mean")):
        assert all(not value.any() for value in results(case, [latent] * case.latents, backend))


LOSSES = {name: case for name, case in CASES.items() if "step" not in name and "renoise" not in name}


@pytest.mark.parametrize("case", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_gradients_are_autograds_of_the_definition(case: Case, dtype: torch.dtype) -> None:
    """What the forward leaves for the backward, in definition and kernel, against autograd of the formula."""
    latents = [normal((3, 4, 41), dtype, seed) for seed in range(case.latents)]
    exact = autograd_gradient(case, [latent.double() for latent in latents])
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = 2 * torch.finfo(dtype).eps * exact.abs() + 2e-6 * exact.abs().max() + 2 * least
    for backend in ("torch", "cpp"):
        leaf = latents[0].clone().requires_grad_()
        (loss,) = case.run(leaf, *latents[1:], backend=backend)
        # Twice over, with another factor: the first backward must not have touched what the second needs.
        (first,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0), retain_graph=True)
        (second,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, -0.5))
        assert first.dtype == dtype and first.shape == leaf.shape
        assert torch.all((first.double() - 3 * exact).abs() <= 3 * bound)
        assert torch.all((second.double() + 0.5 * exact).abs() <= bound)


def autograd_gradient(case: Case, latents: list[Tensor]) -> Tensor:
    """The sum of the results, differentiated by autograd through the definition's own torch operations."""
    leaf = latents[0].clone().requires_grad_()

    def definition(op: Any, run: Callable[..., Any], *inputs: Any) -> Tensor:
        # Without the backend's name, an op's arguments are the definition's.
        return _dispatch.implementation(run.__name__.removeprefix("_run_"), "torch")(*inputs[1:-1])[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_residual, "loss", definition)
        patch.setattr(_residual, "loss_of_difference", definition)
        (loss,) = case.run(leaf, *latents[1:], backend="torch")
    kind = type(loss.grad_fn).__name__.removesuffix("0")
    assert kind in ("MeanBackward", "SumBackward", "MulBackward", "CloneBackward")
    return torch.autograd.grad(loss.sum(), leaf)[0]


def test_gradients_survive_half_precision_and_loss_scaling() -> None:
    """A million elements: the gradient is below float16's least number, the residual is not."""
    latents = [normal((1, 1_000_003), torch.float16, seed) for seed in range(4)]
    leaf, scale = latents[0].clone().requires_grad_(), 2.0**16
    (ops.tdm_loss(leaf, *latents[1:], cfg=4.5, backend="cpp") * scale).backward()
    exact = latents[0].double().requires_grad_()
    (ops.tdm_loss(exact, *(x.double() for x in latents[1:]), cfg=4.5) * scale).backward()
    assert leaf.grad is not None and exact.grad is not None
    assert exact.grad.abs().median() / scale < torch.finfo(torch.float16).smallest_normal
    assert torch.all((leaf.grad.double() - exact.grad).abs() <= 2 * 2.0**-10 * exact.grad.abs() + 2.0**-20)


def test_squared_errors_that_overflow_half_precision() -> None:
    left, right = torch.full((1, 8), 6e4, dtype=torch.float16), torch.full((1, 8), -6e4, dtype=torch.float16)
    leaf = left.clone().requires_grad_()
    (1e-6 * ops.fake_score_loss(leaf, right, snr=torch.ones(1), backend="cpp")).backward()
    torch.testing.assert_close(leaf.grad, torch.full_like(left, 1e-6 * 2 * 1.2e5 / 8), rtol=1e-3, atol=0)


def test_no_gradient_is_made_that_nobody_wants() -> None:
    latents = [normal((2, 9), torch.float32, seed) for seed in range(4)]
    leaf = latents[0].clone().requires_grad_()
    with torch.no_grad():
        assert not ops.tdm_loss(leaf, *latents[1:], cfg=2.0).requires_grad
    others = [latent.requires_grad_() for latent in latents[1:]]
    assert not ops.tdm_loss(latents[0], *others, cfg=2.0).requires_grad
    residual = torch.ops.tdm_fast_cpu.tdm_loss(*(latent.detach() for latent in latents), None, 2.0, None, False)[1]
    assert residual.numel() == 0


INTERVALS: tuple[dict[str, Any], ...] = (
    {"num_steps": 4, "total_steps": 900, "seed": 1, "iteration": 2},
    {"num_steps": 4, "total_steps": 900, "randmid": True, "seed": -1, "iteration": (1 << 32) + 5, "stream": 65535},
    {"num_steps": 1, "total_steps": 1000, "separate": False, "seed": 1 << 63, "iteration": 0, "sample_offset": 1 << 32},
    {"num_steps": 4, "total_steps": 1000, "nodes": [999, 856, 665, 399], "seed": (1 << 63) - 7, "iteration": 1 << 31},
    {"num_steps": 300, "total_steps": 30_000, "seed": 3, "iteration": 4},
)


@pytest.mark.parametrize("settings", INTERVALS, ids=str)
def test_intervals_are_the_definitions(settings: dict[str, Any]) -> None:
    wrapped = {"seed": (settings["seed"] + (1 << 63)) % (1 << 64) - (1 << 63), "iteration": settings["iteration"]}
    as_tensors = {name: torch.tensor(value) for name, value in wrapped.items()}
    for batch in (0, 1, 300):
        expected = ops.sample_intervals(batch, **settings, backend="torch")
        for given in (settings, {**settings, **as_tensors}):
            drawn = ops.sample_intervals(batch, **given, backend="cpp")
            assert all(torch.equal(mine, wanted) for mine, wanted in zip(drawn, expected, strict=True))


def test_intervals_are_drawn_anew() -> None:
    """What is remembered between calls is neither the draw nor a device; a number of another type is refused."""
    settings: dict[str, Any] = {"num_steps": 4, "total_steps": 900, "seed": 1}
    first = ops.sample_intervals(8, iteration=0, **settings)
    kept = [values.clone() for values in first]
    second = ops.sample_intervals(8, iteration=1, **settings)
    assert same(list(first), kept) and not torch.equal(first[3], second[3])
    assert len({values.data_ptr() for values in (*first, *second)}) == 8
    with pytest.raises((TypeError, ValueError)):
        ops.sample_intervals(8, iteration=0, **{**settings, "num_steps": 4.0})
    with pytest.raises(ValueError, match="stream is 65536"):
        ops.sample_intervals(8, iteration=0, stream=65536, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpp"])
def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """Expanded half-precision latents against the closed form; the definition would need 16 GiB for each."""
    size = (1 << 31) + 5
    one, two, three, four = (torch.full((1, 1), value, dtype=torch.float16).expand(1, size) for value in (1, 2, 3, 4))
    # guided = 2 + (2 - 3) = 1.5 with cfg 1.5; d = 1.5 - 4, w = |1 - 1.5|.
    loss = ops.tdm_loss(one, two, three, four, cfg=1.5, huber_c=1e-3, backend=backend)
    assert float(loss) == pytest.approx((math.sqrt(2.5**2 + 1e-6) - 1e-3) / 0.5, rel=1e-6)
    loss = ops.fake_score_loss(one, three, snr=torch.tensor([2.0]), backend=backend)
    assert float(loss) == pytest.approx(2 * 4, rel=1e-6)
    assert float(ops.pseudo_huber(one, three, c=1e-3, reduction="sum", backend=backend)) == pytest.approx(
        size * (math.sqrt(4 + 1e-6) - 1e-3), rel=1e-6
    )
    # pseudo_huber's gradient and its scaling, of which every element is the same.
    leaf = one.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(ops.pseudo_huber(leaf, three, reduction="sum", backend=backend), leaf)
    ends = gradient[0, [0, size // 2, size - 1]]
    torch.testing.assert_close(ends, torch.full_like(ends, -1), rtol=1e-3, atol=0)
    assert torch.equal(gradient[0].min(), gradient[0].max())
    del gradient
    # From raw outputs with flow: x0 = sample - sigma * output. All scores see the same latents.
    t, flow = torch.tensor([500]), SCHEDULES["flow"]
    sigma = float(flow.sigma[500])
    times: dict[str, Any] = {"schedule": flow, "t": t, "backend": backend}
    loss = ops.tdm_loss_from_outputs(one, two, two, two, three, four, t_gen=t, cfg=1.5, huber_c=None, **times)
    # guided = 2 - 1.5 s, d = s * (4 - 1.5), x0 = 2 - s, w = |x0 - guided|.
    assert float(loss) == pytest.approx((2.5 * sigma) ** 2 / (0.5 * sigma), rel=1e-5)
    loss = ops.fake_score_loss_from_outputs(one, two, four, **times)
    weight = min(float(flow.snr[500]), 5.0)
    assert float(loss) == pytest.approx(weight * (2 - sigma - 4) ** 2, rel=1e-5)
    # The noise of the last elements is theirs, not that of an index that has wrapped.
    zero = torch.zeros((1, 1), dtype=torch.float16).expand(1, size)
    last = {"t_gen": t - t + 999, "t": t - t + 999, "t_mid": t - t - 1}
    noise = ops.renoise(zero, zero, schedule=flow, **last, seed=5, iteration=1, backend=backend)[0]
    assert noise[0, -5:].unique().numel() == 5 and not torch.equal(noise[0, -5:], noise[0, :5])
    assert abs(float(noise[0, -1_000_000:].float().std()) - float(flow.sigma[999])) < 5e-3
    del noise
    moved = ops.ode_step(one, two, schedule=flow, t=t, t_next=t - 200, backend=backend)
    wanted = 1 + 2 * float(flow.sigma[300] - flow.sigma[500])
    ends = moved[0, [0, size // 2, size - 1]]
    torch.testing.assert_close(ends, torch.full_like(ends, wanted), rtol=2e-3, atol=0)
    assert torch.equal(moved[0].min(), moved[0].max())
