"""ode_step at the latents of real models: plain torch, torch.compile, ours; beside the device's own copy.

pytest benchmarks/ --benchmark-only --benchmark-json=benchmarks/results/<device>_<date>.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tdm_fast.ops import _dispatch, ode_step
from tdm_fast.schedule import Schedule

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = {
    "opensora-93x640x640": (1, 8, 24, 80, 80),
    "opensora-29x480x640": (1, 8, 8, 60, 80),
    "pixart-512-batch16": (16, 4, 64, 64),
    "cogvideox-49x480x720": (1, 16, 13, 60, 90),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SCHEDULE = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True).to(DEVICE)


def _plain(sample: Tensor, model_output: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """As a trainer writes it: the prediction in float32, then the next latents from it."""
    x0, eps = SCHEDULE.predict(sample, model_output, t)
    alpha, sigma = SCHEDULE.alpha_sigma(t_next, sample.ndim)
    return (alpha * x0 + sigma * eps).to(sample.dtype)


def _ours(backend: str) -> Callable[..., Tensor]:
    return lambda sample, model_output, t, t_next: ode_step(
        sample, model_output, schedule=SCHEDULE, t=t, t_next=t_next, backend=backend
    )


def _copy(sample: Tensor, model_output: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    return sample.clone()


def _providers() -> dict[str, Callable[..., Tensor]]:
    ours = [name for name in ("cpp", "cuda", "triton") if _dispatch.unavailable(name, DEVICE) is None]
    return {"copy": _copy, "torch": _plain, "compile": torch.compile(_plain), **{name: _ours(name) for name in ours}}


PROVIDERS = _providers()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_ode_step(benchmark: Any, provider: str, shape: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    sample, model_output = (torch.randn(SHAPES[shape], generator=generator).to(DEVICE, DTYPES[dtype]) for _ in range(2))
    t = torch.full((len(sample),), 899, device=DEVICE)
    run = PROVIDERS[provider]

    def once() -> None:
        run(sample, model_output, t, t - 225)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(once, rounds=50, warmup_rounds=10)
    streams = 2 if provider == "copy" else 3  # what must be moved: inputs read once, the output written once
    moved = streams * sample.numel() * sample.element_size()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    benchmark.extra_info.update(device=name, torch=torch.__version__, threads=torch.get_num_threads(), bytes=moved)
    benchmark.extra_info["gb_per_s"] = round(moved / benchmark.stats["median"] / 1e9, 2)
