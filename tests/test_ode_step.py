"""ode_step: every implementation against float64, its gradients, its registration, and how it is chosen."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tdm_fast import native
from tdm_fast.ops import _dispatch, ode_step
from tdm_fast.ops.ode_step import _ode_step
from tdm_fast.schedule import Schedule

SCHEDULES = {
    "epsilon": Schedule.ddpm(prediction_type="epsilon"),
    "v_prediction": Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": Schedule.flow(shift=3.0),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Odd sizes around the vector widths (8, 16) and the kernels' chunks (1024, 2048); 40000 is past the grain of a thread.
SIZES = ((1, 1), (3, 7), (2, 1023), (2, 4097), (5, 2, 3, 5), (3, 40000), (4,), (0, 5), (2, 0))
BACKENDS = ("torch", "cpp")


def _timesteps(batch: int, device: str = "cpu") -> dict[str, Tensor]:
    """The trajectory's steps in turn, the one to x0 included."""
    t = torch.tensor([899, 674, 449, 224, 999])[torch.arange(batch) % 5]
    t_next = torch.tensor([674, 449, 224, -1, 0])[torch.arange(batch) % 5]
    return {"t": t.to(device), "t_next": t_next.to(device)}


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, output_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(shape, generator=generator)
    return sample.to(dtype), torch.randn(shape, generator=generator).to(output_dtype)


def _double(sample: Tensor, model_output: Tensor, schedule: Schedule, t: Tensor, t_next: Tensor) -> Tensor:
    """The formula sample by sample in float64, through x0 and eps."""
    result = torch.empty(sample.shape, dtype=torch.float64)
    for i, (now, following) in enumerate(zip(t.tolist(), t_next.tolist(), strict=True)):
        x, out = sample[i].double(), model_output[i].double()
        a, b, c, d = (float(table[now]) for table in (schedule.a, schedule.b, schedule.c, schedule.d))
        x0, eps = a * x + b * out, c * x + d * out
        if following >= 0:
            x0 = float(schedule.alpha[following]) * x0 + float(schedule.sigma[following]) * eps
        result[i] = x0
    return result


def _plain(sample: Tensor, model_output: Tensor, schedule: Schedule, t: Tensor, t_next: Tensor) -> Tensor:
    """The same-precision version that a trainer would write: x0 and eps in float32, then rounded to sample's dtype."""
    x0, eps = schedule.predict(sample, model_output, t)
    alpha, sigma = schedule.alpha_sigma(t_next, sample.ndim)
    return (alpha * x0 + sigma * eps).to(sample.dtype)


def _assert_accurate(result: Tensor, sample: Tensor, model_output: Tensor, schedule: Schedule, **steps: Tensor) -> None:
    """Error against float64 at most twice the plain version's largest one plus one ulp of the output dtype."""
    assert result.dtype == sample.dtype and result.shape == sample.shape and result.is_contiguous()
    exact = _double(sample, model_output, schedule, **steps)
    if exact.numel() == 0:
        return
    plain_error = (_plain(sample, model_output, schedule, **steps).double() - exact).abs().max()
    ulp = torch.finfo(sample.dtype).eps * exact.abs().clamp(min=torch.finfo(sample.dtype).tiny)
    error = (result.double() - exact).abs()
    assert torch.all(error <= 2 * plain_error + ulp), f"{error.max():.3e}, plain {plain_error:.3e}"


@pytest.fixture
def poisoned_memory():
    """Fresh memory is NaN, so that an element which a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_against_float64(backend: str, name: str, poisoned_memory: None) -> None:
    for shape, dtype, output_dtype in itertools.product(SIZES, DTYPES, DTYPES):
        sample, model_output = _inputs(shape, dtype, output_dtype)
        steps = _timesteps(shape[0])
        result = ode_step(sample, model_output, schedule=SCHEDULES[name], **steps, backend=backend)
        _assert_accurate(result, sample, model_output, SCHEDULES[name], **steps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend: str) -> None:
    schedule = SCHEDULES["v_prediction"]
    sample, model_output = _inputs((3, 6, 5, 7), torch.float32, torch.bfloat16)
    steps = _timesteps(3)
    for change in (
        lambda x: x.transpose(1, 3),
        lambda x: x[:, ::2, :, 1:],
        lambda x: x[:, :1].expand(3, 4, 5, 7),
        lambda x: x.contiguous(memory_format=torch.channels_last),
    ):
        x, out = change(sample), change(model_output)
        result = ode_step(x, out, schedule=schedule, **steps, backend=backend)
        _assert_accurate(result, x, out, schedule, **steps)


def test_rounds_like_the_definition() -> None:
    """The C++ loops keep the definition's roundings: the same bits, special values included."""
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-45, 65504.0, 3e38, 1.0])
    pairs = torch.cartesian_prod(special, special)
    for dtype, output_dtype in itertools.product(DTYPES, DTYPES):
        sample, model_output = pairs[:, 0].expand(5, -1).to(dtype), pairs[:, 1].expand(5, -1).to(output_dtype)
        for schedule in SCHEDULES.values():
            results = [
                ode_step(sample, model_output, schedule=schedule, **_timesteps(5), backend=backend)
                for backend in ("cpp", "torch")
            ]
            torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


def test_same_bits_for_every_thread_count() -> None:
    sample, model_output = _inputs((3, 50001), torch.bfloat16, torch.float32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ode_step(sample, model_output, schedule=SCHEDULES["flow"], **_timesteps(3), backend="cpp"))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


_EVERY_CASE = """
import sys, torch
import test_ode_step as cases

backend, instruction_set = sys.argv[1:]
assert instruction_set in ("", cases.native.build_info()["instruction_set"])
# The interpreter of Triton is slow: there, without the largest.
shapes = [shape for shape in cases.SIZES if backend == "cpp" or 40000 not in shape]
for shape, dtype, output_dtype in cases.itertools.product(shapes, cases.DTYPES, cases.DTYPES):
    sample, model_output = cases._inputs(shape, dtype, output_dtype)
    steps, schedule = cases._timesteps(shape[0]), cases.SCHEDULES["v_prediction"]
    result = cases.ode_step(sample, model_output, schedule=schedule, **steps, backend=backend)
    cases._assert_accurate(result, sample, model_output, schedule, **steps)

tables = (schedule.a, schedule.b, schedule.c, schedule.d, schedule.alpha, schedule.sigma)
outside = torch.tensor([1000, -1, 5, 5]), torch.tensor([3, 3, -2, 1000])
run = cases._dispatch.implementation("ode_step", backend)
assert run(torch.ones(4, 9), torch.ones(4, 9), *tables, *outside).isnan().all()
print("all accurate")
"""


def _run_every_case(backend: str, instruction_set: str, **environment: str) -> None:
    """In a process of its own, since the environment is read once; on the package that this process imported."""
    paths = os.pathsep.join([str(Path(native.__file__).parents[1]), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", _EVERY_CASE, backend, instruction_set],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "all accurate\n", done.stdout + done.stderr


@pytest.mark.parametrize("instruction_set", ["default", "avx2", "avx512"])
def test_every_instruction_set(instruction_set: str) -> None:
    info = native.build_info()
    assert info is not None
    order = ["default", "avx2", "avx512"]
    # What this processor lacks cannot be run here, nor asked of torch; the best that it has is then tested again.
    best = order[min(order.index(instruction_set), order.index(info["instruction_set"]))]
    _run_every_case("cpp", best, ATEN_CPU_CAPABILITY=best)


def test_triton_through_the_interpreter() -> None:
    _run_every_case("triton", "", TRITON_INTERPRET="1")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_match_the_definition(backend: str, dtype: torch.dtype) -> None:
    """Linear: the gradients are those of the float64 formula, weighted with an upstream gradient other than 1."""
    schedule, steps = SCHEDULES["v_prediction"], _timesteps(3)
    sample, model_output = (x.requires_grad_() for x in _inputs((3, 2, 37), dtype, torch.float32))
    upstream = torch.linspace(-2, 3, 3 * 2 * 37).reshape(3, 2, 37).to(dtype)
    ode_step(sample, model_output, schedule=schedule, **steps, backend=backend).backward(upstream)

    double_sample, double_output = (x.detach().double().requires_grad_() for x in (sample, model_output))
    _plain_double(double_sample, double_output, schedule, **steps).backward(upstream.double())
    for ours, exact in ((sample, double_sample), (model_output, double_output)):
        assert ours.grad is not None and exact.grad is not None and ours.grad.dtype == ours.dtype
        # One product: rounding of the float32 factor, which is a difference of numbers up to 1, and of the result.
        bound = torch.finfo(ours.dtype).eps * exact.grad.abs() + 4 * torch.finfo(torch.float32).eps * upstream.abs()
        assert torch.all((ours.grad.double() - exact.grad).abs() <= bound)


def _plain_double(sample: Tensor, model_output: Tensor, schedule: Schedule, t: Tensor, t_next: Tensor) -> Tensor:
    x0, eps = schedule.predict(sample, model_output, t)
    alpha, sigma = schedule.alpha_sigma(t_next, sample.ndim)
    return alpha.double() * x0 + sigma.double() * eps


def test_gradcheck() -> None:
    schedule, steps = SCHEDULES["flow"], _timesteps(3)
    sample, model_output = (x.requires_grad_() for x in _inputs((3, 5), torch.float64, torch.float64))

    def step(sample: Tensor, model_output: Tensor) -> Tensor:
        return ode_step(sample, model_output, schedule=schedule, **steps)

    assert torch.autograd.gradcheck(step, (sample, model_output))
    assert torch.autograd.gradgradcheck(step, (sample, model_output))


def test_gradient_reaches_only_what_asks_for_it() -> None:
    sample, model_output = _inputs((2, 9), torch.float32, torch.float32)
    model_output.requires_grad_()
    ode_step(sample, model_output, schedule=SCHEDULES["flow"], **_timesteps(2)).sum().backward()
    assert sample.grad is None and model_output.grad is not None


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    schedule = SCHEDULES["v_prediction"]
    tables = (schedule.a, schedule.b, schedule.c, schedule.d, schedule.alpha, schedule.sigma)
    for dtype in (torch.float32, torch.bfloat16):
        sample, model_output = (x.requires_grad_() for x in _inputs((3, 2, 11), dtype, torch.float32))
        steps = _timesteps(3)
        torch.library.opcheck(_ode_step, (sample, model_output, *tables, steps["t"], steps["t_next"], backend))
        strided = (sample.transpose(1, 2), model_output.transpose(1, 2))
        torch.library.opcheck(_ode_step, (*strided, *tables, steps["t"], steps["t_next"], backend))


@pytest.mark.parametrize("dynamic", [False, True])
def test_no_graph_break(dynamic: bool) -> None:
    schedule = SCHEDULES["v_prediction"]

    def step(sample: Tensor, model_output: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
        return ode_step(2 * sample, model_output, schedule=schedule, t=t, t_next=t_next) + 1

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (2, 3):
        sample, model_output = _inputs((batch, 5), torch.float32, torch.float32)
        torch.testing.assert_close(
            compiled(sample, model_output, **_timesteps(batch)), step(sample, model_output, **_timesteps(batch))
        )


def test_autocast_keeps_the_dtypes_given() -> None:
    sample, model_output = _inputs((2, 33), torch.float32, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = ode_step(sample, model_output, schedule=SCHEDULES["flow"], **_timesteps(2))
    _assert_accurate(result, sample, model_output, SCHEDULES["flow"], **_timesteps(2))


def test_float64_runs_the_definition() -> None:
    sample, model_output = _inputs((2, 33), torch.float64, torch.float32)
    steps = _timesteps(2)
    result = ode_step(sample, model_output, schedule=SCHEDULES["flow"], **steps, backend="cpp")
    torch.testing.assert_close(
        result, _double(sample, model_output, SCHEDULES["flow"], **steps), rtol=1e-14, atol=1e-14
    )


def _wrong(**change: object) -> dict[str, object]:
    sample, model_output = _inputs((2, 3), torch.float32, torch.float32)
    right = {"sample": sample, "model_output": model_output, "schedule": SCHEDULES["flow"], **_timesteps(2)}
    return {**right, **change}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_output": torch.zeros(2, 4)}, r"model_output has shape \(2, 4\)"),
        ({"sample": torch.zeros(2, 3, dtype=torch.int32)}, "sample has dtype torch.int32"),
        ({"t": torch.zeros(3, dtype=torch.int64)}, r"t has shape \(3,\)"),
        ({"t_next": torch.zeros(2)}, "t_next has dtype torch.float32"),
        ({"t": torch.tensor([0, 1000])}, r"t is \[0, 1000\]; timesteps must be from 0 to 999"),
        ({"t": torch.tensor([-1, 0])}, r"t is \[-1, 0\]"),
        ({"t_next": torch.tensor([0, -2])}, r"t_next is \[0, -2\]; timesteps must be from -1 to 999"),
        ({"t": torch.zeros(2, dtype=torch.int64, device="meta")}, "t is on meta"),
        ({"backend": "fastest"}, "backend is 'fastest'; it takes one of cpp, cuda, triton, torch"),
        ({"backend": "cuda"}, "backend='cuda' cannot run ode_step on cpu tensors: it runs on CUDA tensors"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    arguments = _wrong(**change)
    with pytest.raises(ValueError, match=message):
        ode_step(arguments.pop("sample"), arguments.pop("model_output"), **arguments)  # type: ignore[arg-type]


def test_forced_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_FAST_BACKEND", "torch")
    assert _dispatch.choose("ode_step", "cpu") == "torch"
    assert _dispatch.choose("ode_step", "cpu", "cpp") == "cpp"
    monkeypatch.setenv("TDM_FAST_BACKEND", "fastest")
    with pytest.raises(ValueError, match="TDM_FAST_BACKEND is 'fastest'"):
        _dispatch.choose("ode_step", "cpu")
    monkeypatch.delenv("TDM_FAST_BACKEND")
    assert _dispatch.choose("ode_step", "cpu") == "cpp"


def test_a_wish_that_cannot_be_met_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_FAST_BACKEND", "cuda")
    _dispatch._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="TDM_FAST_BACKEND=cuda cannot be met on cpu tensors"):
        assert _dispatch.choose("ode_step", "cpu") == "cpp"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _dispatch.choose("ode_step", "cpu") == _dispatch.choose("tdm_loss", "cpu") == "cpp"


def test_missing_library_gives_one_warning_and_the_definition(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As on a machine without a compiler: everything runs, and one warning names the command that builds the rest."""
    monkeypatch.setattr(native, "library_path", lambda backend: tmp_path / f"{backend}.so")
    native.load_library.cache_clear()
    _dispatch._warn_once.cache_clear()
    sample, model_output = _inputs((2, 9), torch.float32, torch.float32)
    try:
        with pytest.warns(RuntimeWarning, match="TDM_FAST_BUILD=cpu pip install") as caught:
            results = [ode_step(sample, model_output, schedule=SCHEDULES["flow"], **_timesteps(2)) for _ in range(2)]
        assert len(caught) == 1
        with pytest.raises(
            ValueError, match=r"backend='cpp' cannot run ode_step on cpu tensors: cpp\.so was not built"
        ):
            ode_step(sample, model_output, schedule=SCHEDULES["flow"], **_timesteps(2), backend="cpp")
    finally:
        monkeypatch.undo()
        native.load_library.cache_clear()
    expected = ode_step(sample, model_output, schedule=SCHEDULES["flow"], **_timesteps(2), backend="torch")
    assert all(torch.equal(result, expected) for result in results)


def test_library_that_does_not_load_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    monkeypatch.setattr(native, "library_path", lambda backend: broken)
    native.load_library.cache_clear()
    try:
        assert re.search(
            "broken.so does not load under torch .*: .*(too short|invalid)", str(native.load_library("cpp"))
        )
    finally:
        monkeypatch.undo()
        native.load_library.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
def test_on_the_gpu(backend: str) -> None:
    for shape, dtype, output_dtype in itertools.product(SIZES, DTYPES, DTYPES):
        sample, model_output = _inputs(shape, dtype, output_dtype)
        steps, schedule = _timesteps(shape[0]), SCHEDULES["v_prediction"]
        result = ode_step(
            sample.cuda(), model_output.cuda(), schedule=schedule, **_timesteps(shape[0], "cuda"), backend=backend
        )
        _assert_accurate(result.cpu(), sample, model_output, schedule, **steps)
    assert _dispatch.choose("ode_step", "cuda") == "cuda"
