"""The CUDA kernels on a GPU: no waiting for the device, CUDA graphs, more than 2^31 elements, compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import CASES, EVERY_CASE, SCHEDULE, Case, normal, results, steps

from tdm_fast import ops

pytestmark = pytest.mark.gpu


def _latents(case: Case, seed: int = 0) -> list[torch.Tensor]:
    return [normal((3, 5000), torch.bfloat16, seed + i).cuda() for i in range(case.latents)]


@EVERY_CASE
def test_does_not_wait_for_the_device(case: Case) -> None:
    latents = _latents(case)
    results(case, latents, "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(case, latents, "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_intervals_do_not_wait_for_the_device() -> None:
    counters = {name: torch.tensor(3, device="cuda") for name in ("seed", "iteration")}
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in (counters, {"seed": 3, "iteration": 3}):
            ops.sample_intervals(9, num_steps=4, total_steps=900, **given, device="cuda", backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@EVERY_CASE
def test_in_a_graph(case: Case) -> None:
    """Forward and backward, captured once and replayed on other latents."""
    latents = _latents(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results(case, latents, "cuda")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(case, latents, "cuda")
    for seed in (10, 20):
        others = _latents(case, seed)
        for latent, other in zip(latents, others, strict=True):
            latent.copy_(other)
        graph.replay()
        for mine, wanted in zip(captured, results(case, others, "cuda"), strict=True):
            assert torch.equal(mine, wanted)


def test_a_graph_does_not_freeze_the_draws() -> None:
    seed, iteration = (torch.tensor(value, device="cuda") for value in (5, 0))
    sample, output = (normal((3, 5000), torch.float32, i).cuda() for i in range(2))

    def draw(seed: Any, iteration: Any) -> list[torch.Tensor]:
        settings = {"seed": seed, "iteration": iteration, "stream": 1}
        drawn = ops.sample_intervals(3, num_steps=4, total_steps=900, **settings, device="cuda", backend="cuda")
        named = steps(sample, "t_gen", "t_mid", "t")
        noised = ops.renoise(sample, output, schedule=SCHEDULE, **named, **settings, backend="cuda")
        return [*drawn, *noised]

    draw(seed, iteration)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = draw(seed, iteration)
    for numbers in ((5, 1), (-7, 1 << 33)):
        seed.fill_(numbers[0])
        iteration.fill_(numbers[1])
        graph.replay()
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(captured, draw(*numbers), strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if name != "pseudo_huber-sum"])
def test_more_than_2_to_the_31_elements(name: str) -> None:
    """Latents of one repeated number each: what a single element gives, everywhere and on average."""
    case, elements = CASES[name], (1 << 31) + 9
    single = [normal((1, 1), torch.bfloat16, seed) for seed in range(case.latents)]
    wide = [latent.cuda().expand(1, elements) for latent in single]
    with torch.no_grad():
        expected = case.run(*single, backend="torch")
        for mine, wanted in zip(case.run(*wide, backend="cuda"), expected, strict=True):
            ends = (mine[:, :9], mine[:, -9:]) if mine.ndim == 2 else (mine,)
            assert mine.ndim < 2 or mine.shape == (1, elements)
            rtol = 1e-5 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).eps
            for end in ends:
                torch.testing.assert_close(end.cpu(), wanted.expand(end.shape), rtol=rtol, atol=1e-6)


@pytest.mark.compute_sanitizer
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    """Strided latents, noise, intervals; without torch's cache, so that memory ends where a tensor does."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    tests = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_cuda_ops.py",
        "-k",
        "(test_strided or test_normals or test_intervals) and not emulated",
    ]
    # Only kernels of this project, whose mangled names have its namespace in them: torch's are torch's affair.
    options = ["--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=tdm_fast"]
    done = subprocess.run(
        [sanitizer, *options, sys.executable, *tests],
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
