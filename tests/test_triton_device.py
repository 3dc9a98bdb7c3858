"""The Triton kernels on a GPU: no waiting for the device, CUDA graphs, more than 2^31 elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from op_cases import CASES, EVERY_CASE, SCHEDULE, SCHEDULES, Case, normal, results
from torch import Tensor

from tdm_fast import ops
from tdm_fast.philox import Purpose, philox4x32

pytestmark = pytest.mark.gpu


def _latents(case: Case, seed: int = 0) -> list[Tensor]:
    return [normal((3, 5000), torch.bfloat16, seed + i).cuda() for i in range(case.latents)]


@pytest.fixture
def waiting() -> Iterator[Callable[[str], None]]:
    """Sets what a host that waits for the device is: "error", or "default" again."""
    yield torch.cuda.set_sync_debug_mode
    torch.cuda.set_sync_debug_mode("default")


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `function()`, which has run before so that nothing is compiled in it, and what a replay fills anew."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function()
    return graph, outputs


@EVERY_CASE
def test_does_not_wait_for_the_device(case: Case, waiting: Callable[[str], None]) -> None:
    latents = _latents(case)
    results(case, latents, "triton")
    waiting("error")
    results(case, latents, "triton")


@EVERY_CASE
def test_in_a_graph(case: Case) -> None:
    """Forward and backward, captured once and replayed on other latents: the bits of a plain call."""
    latents = _latents(case)
    graph, outputs = captured(lambda: results(case, latents, "triton"))
    for seed in (10, 20):
        others = _latents(case, seed)
        for latent, other in zip(latents, others, strict=True):
            latent.copy_(other)
        graph.replay()
        for mine, wanted in zip(outputs, results(case, others, "triton"), strict=True):
            assert torch.equal(mine, wanted)


def test_draws_do_not_wait_and_a_graph_does_not_freeze_them(waiting: Callable[[str], None]) -> None:
    seed, iteration = (torch.tensor(value, device="cuda") for value in (5, 0))
    sample, output = (normal((3, 5000), torch.float32, i).cuda() for i in range(2))

    def draw(seed: int | Tensor, iteration: int | Tensor) -> list[Tensor]:
        settings: dict[str, Any] = {"seed": seed, "iteration": iteration, "stream": 1, "backend": "triton"}
        drawn = ops.sample_intervals(3, num_steps=4, total_steps=900, device="cuda", **settings)
        named = dict(zip(("t_gen", "t_mid", "t"), drawn[1:], strict=True))
        return [*drawn, *ops.renoise(sample, output, schedule=SCHEDULE, **named, **settings)]

    draw(5, 0)
    graph, outputs = captured(lambda: draw(seed, iteration))
    waiting("error")
    draw(seed, iteration)
    draw(5, 0)
    waiting("default")
    noised = []
    for numbers in ((5, 1), (5, 2), (-7, 1 << 33)):
        seed.fill_(numbers[0])
        iteration.fill_(numbers[1])
        graph.replay()
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(outputs, draw(*numbers), strict=True))
        noised.append(outputs[4].clone())
    assert not torch.equal(noised[0], noised[1]) and not torch.equal(noised[0], noised[2])


@pytest.mark.parametrize("name", CASES)
def test_more_than_2_to_the_31_elements(name: str) -> None:
    """Latents of one repeated number each: what a single element gives, everywhere, on average and summed."""
    case, elements = CASES[name], (1 << 31) + 9
    single = [normal((1, 1), torch.bfloat16, seed) for seed in range(case.latents)]
    wide = [latent.cuda().expand(1, elements) for latent in single]
    with torch.no_grad():
        expected = case.run(*single, backend="torch")
        for mine, wanted in zip(case.run(*wide, backend="triton"), expected, strict=True):
            if name == "pseudo_huber-sum":
                wanted = wanted * elements
            ends = (mine[:, :9], mine[:, -9:]) if mine.ndim == 2 else (mine,)
            assert mine.ndim < 2 or mine.shape == (1, elements)
            rtol = 1e-5 if mine.dtype == torch.float32 else torch.finfo(mine.dtype).eps
            for end in ends:
                torch.testing.assert_close(end.cpu(), wanted.expand(end.shape), rtol=rtol, atol=1e-6)


def test_noise_past_2_to_the_31_elements() -> None:
    """The last element's noise is that of its own counter; at flow's last timestep nothing else is in it."""
    elements, last = (1 << 31) + 4097, torch.tensor([999], device="cuda")
    zeros = torch.zeros(1, 1, dtype=torch.float16, device="cuda").expand(1, elements)
    named: dict[str, Any] = {"schedule": SCHEDULES["flow"], "t_gen": last, "t_mid": last - 300, "t": last}
    noisy, _, _ = ops.renoise(zeros, zeros, seed=1, iteration=2, backend="triton", **named)
    # Element 4i takes the block's first two words.
    assert (elements - 1) % 4 == 0
    counter = torch.tensor([(elements - 1) // 4, 0, 2, int(Purpose.RENOISE) << 16])
    first, second = ((word + 0.5) / 2**32 for word in philox4x32(counter, (1, 0)).tolist()[:2])
    expected = math.sqrt(-2 * math.log(first)) * math.cos(2 * math.pi * second)
    assert float(noisy[0, -1]) == pytest.approx(expected, rel=2**-10, abs=1e-6)
