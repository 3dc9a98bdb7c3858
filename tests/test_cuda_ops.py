"""The CUDA kernels behind the public functions, against float64 and the definitions.

On a GPU these tests run as they stand. Everywhere the same tests, the largest sizes aside, also run on an emulation:
csrc/cuda and the bindings, compiled as C++ with the headers of tests/cuda_emulation, on CPU tensors. What needs the
device itself (graphs, no synchronisation, compute-sanitizer) is in tests/test_cuda_device.py.
"""

from __future__ import annotations

import itertools
import math
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from op_cases import (
    CASES,
    EVERY_CASE,
    SCHEDULES,
    STRIDED,
    Case,
    Recorder,
    assert_accurate,
    check_compiled,
    check_ops,
    dtype_lists,
    fake_case,
    normal,
    pseudo_huber_case,
    results,
    steps,
    tdm_case,
)
from torch import Tensor

from tdm_fast import ops
from tdm_fast.ops import _dispatch
from tdm_fast.philox import Purpose, randn

ROOT = Path(__file__).resolve().parents[1]
# Around a thread's pack (8), a block's tile (2048) and chunk (4096); whole packs and others; more samples than warps.
SIZES = ((1, 1), (3, 7), (2, 1023), (2, 4, 514), (1, 4097), (2, 8232), (5,), (37, 8))
LARGE = ((3, 40000), (2, 16, 13, 60, 90), (1, (1 << 22) + 3), (300, 5))
DRAWS = 3


def compile_emulation(folder: Path) -> Path:
    """csrc/cuda and its bindings as the library tdm_fast_emulated, on CPU tensors; by setup.py's own means."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        script = runpy.run_path(str(ROOT / "setup.py"))
    cxx, include = script["find_cxx"](), script["find_torch"](folder).include
    bindings = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "build_info.cpp"]
    sources = {
        # In one file each, since parsing torch's headers is most of the work.
        "bindings.cpp": [*bindings, ROOT / "tests/cuda_emulation/stream.cpp"],
        "kernels.cpp": sorted((ROOT / "csrc/cuda").glob("*.cu")),
    }
    defines = ["-DTDM_FAST_CUDA_LIBRARY", "-DUSE_CUDA", "-DTDM_FAST_NAMESPACE=tdm_fast_emulated", "-DTDM_FAST_KEY=CPU"]
    defines += [f"-DTORCH_TARGET_VERSION={script['TORCH_TARGET']}"]
    flags = [*script["CXX_FLAGS"], "-O1", "-fno-strict-aliasing", "-Wno-unknown-pragmas", *defines]
    flags += ["-I", ROOT / "tests/cuda_emulation", "-isystem", include]
    commands = []
    for name, included in sources.items():
        (folder / name).write_text("".join(f'#include "{path}"\n' for path in included))
        commands.append([*cxx.split(), *flags, "-c", folder / name, "-o", folder / f"{name}.o"])
    script["run_all"](commands)
    library = folder / "emulated.so"
    # Symbolic: its own stand-ins for torch's CUDA functions come before torch's.
    script["link"](cxx, [folder / f"{name}.o" for name in sources], ["torch_cpu"], folder, library, "-Wl,-Bsymbolic")
    return library


@pytest.fixture(scope="session")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.ops.load_library(str(compile_emulation(tmp_path_factory.mktemp("emulation"))))


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where the tensors are for which backend="cuda" runs."""
    if request.param == "cuda":
        return "cuda"
    request.getfixturevalue("emulation")
    reason = _dispatch.unavailable
    monkeypatch.setattr(_dispatch, "unavailable", lambda name, on: None if name == "cuda" else reason(name, on))
    monkeypatch.setattr(torch.ops, "tdm_fast_cuda", torch.ops.tdm_fast_emulated, raising=False)
    return "cpu"


@pytest.fixture
def poisoned_memory(device: str) -> Iterator[None]:
    """Fresh memory is NaN, so that an element which a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=device).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@EVERY_CASE
def test_against_float64(case: Case, device: str, poisoned_memory: None) -> None:
    for shape in SIZES if device == "cpu" else SIZES + LARGE:
        for dtypes in dtype_lists(case.latents):
            draws = ([normal(shape, dtype, 10 * d + i) for i, dtype in enumerate(dtypes)] for d in range(DRAWS))
            assert_accurate(case, device, "cuda", *draws)
    # Latents that nearly agree, where the pseudo-Huber loss is a parabola.
    common, near = normal((2, 1023), torch.float32, 9), []
    for draw in range(DRAWS):
        near.append([common + 1e-3 * normal((2, 1023), torch.float32, 10 * draw + i) for i in range(case.latents)])
    assert_accurate(case, device, "cuda", *near)


@EVERY_CASE
@pytest.mark.parametrize("change", STRIDED.values(), ids=STRIDED.keys())
def test_strided(case: Case, change: Callable[[Tensor], Tensor], device: str) -> None:
    """The same bits as from copies; all latents strided, and each second one beside others that are not."""
    for dtypes in ([torch.bfloat16] * case.latents, dtype_lists(case.latents)[-1]):
        full = [normal((4, 6, 5, 8), dtype, seed).to(device) for seed, dtype in enumerate(dtypes)]
        copies = [change(latent).contiguous() for latent in full]
        expected = results(case, copies, "cuda")
        for which in (range(case.latents), range(0, case.latents, 2), range(1, case.latents, 2)):
            latents = [change(latent) if i in which else copies[i] for i, latent in enumerate(full)]
            ours = results(case, latents, "cuda")
            assert all(torch.equal(mine, wanted) for mine, wanted in zip(ours, expected, strict=True))


@EVERY_CASE
def test_samples_far_apart(case: Case, device: str) -> None:
    """2^31 elements from one sample to the next: memory that is never touched in between takes none on the CPU."""
    apart, latents = 1 << 31, []
    for i in range(2 if device == "cuda" else case.latents):
        base = torch.empty(apart + 64, dtype=torch.float16, device=device)
        base[:64], base[apart:] = normal((64,), torch.float16, i), normal((64,), torch.float16, i + 10)
        latents.append(base.as_strided((2, 64), (apart, 1)))
    latents += [normal((2, 64), torch.float16, i).to(device) for i in range(len(latents), case.latents)]
    expected = results(case, [latent.contiguous() for latent in latents], "cuda")
    ours = results(case, latents, "cuda")
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(ours, expected, strict=True))


@EVERY_CASE
def test_infinite_and_undefined_numbers(case: Case, device: str) -> None:
    for special, position in itertools.product((math.inf, -math.inf, math.nan), range(case.latents)):
        latents = [normal((3, 56), torch.float32, seed) for seed in range(case.latents)]
        latents[position][1, 7] = special
        ours = results(case, [latent.to(device) for latent in latents], "cuda")
        for mine, wanted in zip(ours, results(case, latents, "torch"), strict=True):
            torch.testing.assert_close(mine.cpu(), wanted, rtol=1e-4, atol=1e-4, equal_nan=True)


@EVERY_CASE
def test_empty(case: Case, device: str) -> None:
    for shape in ((0, 5), (2, 0), (0,)):
        latents = [torch.zeros(shape) for _ in range(case.latents)]
        ours = results(case, [latent.to(device) for latent in latents], "cuda")
        for mine, wanted in zip(ours, results(case, latents, "torch"), strict=True):
            torch.testing.assert_close(mine.cpu(), wanted, rtol=0, atol=0, equal_nan=True)


@EVERY_CASE
def test_same_bits_every_time(case: Case, device: str) -> None:
    shape = (3, 9001) if device == "cpu" else (3, 1 << 20)
    latents = [normal(shape, torch.bfloat16, seed).to(device) for seed in range(case.latents)]
    first, second = results(case, latents, "cuda"), results(case, latents, "cuda")
    assert all(torch.equal(mine, again) for mine, again in zip(first, second, strict=True))


@pytest.mark.parametrize("huber_c", [1e-3, None])
def test_all_equal_batch(huber_c: float | None, device: str) -> None:
    latent = normal((2, 37), torch.float32, 0).to(device)
    for case in (tdm_case(False, huber_c), fake_case(True, 5.0), pseudo_huber_case(True, 1e-3, "mean")):
        assert all(not value.any() for value in results(case, [latent] * case.latents, "cuda"))


INTERVALS: tuple[dict[str, Any], ...] = (
    {"num_steps": 4, "total_steps": 900, "seed": 1, "iteration": 2},
    {"num_steps": 4, "total_steps": 900, "randmid": True, "seed": -1, "iteration": (1 << 32) + 5, "stream": 65535},
    {"num_steps": 1, "total_steps": 1000, "separate": False, "seed": 1 << 31, "iteration": 0, "sample_offset": 1 << 32},
    {"num_steps": 4, "total_steps": 1000, "nodes": [999, 856, 665, 399], "seed": (1 << 63) - 7, "iteration": 1 << 31},
)


@pytest.mark.parametrize("settings", INTERVALS, ids=str)
def test_intervals_are_the_definitions(settings: dict[str, Any], device: str) -> None:
    for batch in (0, 1, 300):
        expected = ops.sample_intervals(batch, **settings, device="cpu", backend="torch")
        as_tensors = {name: torch.tensor(settings[name], device=device) for name in ("seed", "iteration")}
        for given in (settings, {**settings, **as_tensors}):
            drawn = ops.sample_intervals(batch, **given, device=device, backend="cuda")
            assert all(torch.equal(mine.cpu(), wanted) for mine, wanted in zip(drawn, expected, strict=True))


def test_normals_are_the_definitions(device: str) -> None:
    """Without signal, noisy is beta times the noise: within 1e-6 of float64, whatever the draw's numbers are."""
    schedule, draws = SCHEDULES["flow"], {"seed": (1 << 62) + 3, "iteration": 7, "stream": 3, "sample_offset": 11}
    tensors = {name: torch.tensor(draws[name], device=device) for name in ("seed", "iteration")}
    for shape in ((3, 4099), (2, 8232)):
        zeros = torch.zeros(shape, device=device)
        named = steps(zeros, "t_gen", "t_mid", "t")
        named["t"] = named["t_gen"]
        exact = randn(shape[0], shape[1:], purpose=Purpose.RENOISE, dtype=torch.float64, **draws)
        # Given as noise, the very numbers pass through the same arithmetic.
        wanted, _, wanted_weight = ops.renoise(
            zeros.double().cpu(), zeros.double().cpu(), schedule=schedule, noise=exact, backend="torch", **draws,
            **{name: value.cpu() for name, value in named.items()},
        )  # fmt: skip
        for given in (draws, {**draws, **tensors}):
            noisy, _, weight = ops.renoise(zeros, zeros, schedule=schedule, backend="cuda", **named, **given)
            assert (noisy.cpu() - wanted).abs().max() < 1e-6
            torch.testing.assert_close(weight.cpu().double(), wanted_weight, rtol=1e-6, atol=1e-6)


@EVERY_CASE
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(case: Case, dynamic: bool, device: str) -> None:
    check_compiled(case, device, "cuda", dynamic)


@EVERY_CASE
def test_opcheck(case: Case, device: str) -> None:
    check_ops(case, device, "cuda")


@pytest.mark.parametrize("name", [name for name in CASES if "step" in name or "renoise" in name or "outputs" in name])
def test_timesteps_outside_the_tables_give_nan(name: str, device: str) -> None:
    """Past the public functions, which refuse them on the CPU; the GPU's memory there is nobody's."""
    latents = [normal((3, 40), torch.float32, seed).to(device) for seed in range(CASES[name].latents)]
    with Recorder() as recorder, torch.no_grad():
        CASES[name].run(*latents, backend="cuda")
    ((function, args),) = recorder.calls
    run = getattr(torch.ops.tdm_fast_cuda, function._schema.name.split("::")[1])
    timesteps = [i for i, value in enumerate(args) if isinstance(value, Tensor) and value.dtype == torch.int64]
    assert timesteps
    for i, outside in itertools.product(timesteps, (1000, 1 << 40, -7, -(1 << 40))):
        # The last argument is the backend's name.
        outputs = run(*args[:i], torch.full_like(args[i], outside), *args[i + 1 : -1])
        value = outputs if isinstance(outputs, Tensor) else outputs[0]
        assert value.isnan().all()
