"""Every op at several settings, on latents of any shape, dtype and device, and what a test asks of its results.

For tests of implementations behind the public functions: `results(case, latents, backend)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdm_fast import ops
from tdm_fast.schedule import Schedule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEDULES = {
    "epsilon": Schedule.ddpm(prediction_type="epsilon"),
    "v_prediction": Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    "flow": Schedule.flow(shift=3.0),
}
SCHEDULE = SCHEDULES["v_prediction"]
Results = list[Tensor]
FEW = 256


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def numbers(like: Tensor, seed: int) -> Tensor:
    """float32 `[B]` around 1, on the latents' device."""
    return torch.arange(len(like), device=like.device).mul(0.7).add(seed).sin().mul(0.5).exp()


def steps(like: Tensor, *names: str) -> dict[str, Any]:
    """Timesteps of the trajectory's steps in turn, t = t_mid included; made on the device, without waiting for it."""
    step = torch.arange(len(like), device=like.device) % 4
    t_gen, t_mid = 899 - 225 * step, 675 - 225 * step
    every = {"t_gen": t_gen, "t_mid": t_mid, "t": t_mid + 70 * (step != 1) + step, "t_next": t_gen - 225}
    return {name: every[name] for name in names}


@dataclass(frozen=True)
class Case:
    """An op with its settings: `run(*latents, backend=...)` gives the op's results as a tuple."""

    latents: int
    run: Callable[..., tuple[Tensor, ...]]


def _single(op: Callable[..., Tensor], settings: Callable[[Tensor], dict[str, Any]]) -> Callable[..., tuple[Tensor]]:
    return lambda *x, backend: (op(*x, **settings(x[0]), backend=backend),)


def ode_step_case(schedule: Schedule) -> Case:
    def settings(x: Tensor) -> dict[str, Any]:
        named = steps(x, "t_gen", "t_next")
        return {"schedule": schedule, "t": named["t_gen"], "t_next": named["t_next"]}

    return Case(2, _single(ops.ode_step, settings))


def renoise_case(schedule: Schedule) -> Case:
    def run(sample: Tensor, output: Tensor, noise: Tensor, backend: str) -> tuple[Tensor, ...]:
        settings = {**steps(sample, "t_gen", "t_mid", "t"), "schedule": schedule, "noise": noise}
        return ops.renoise(sample, output, seed=0, iteration=0, **settings, backend=backend)

    return Case(3, run)


def fake_case(weighted: bool, gamma: float) -> Case:
    def settings(x: Tensor) -> dict[str, Any]:
        return {"snr": 4 * numbers(x, 1), "log_weight": numbers(x, 2) - 1 if weighted else None, "snr_gamma": gamma}

    return Case(2, _single(ops.fake_score_loss, settings))


def fake_from_outputs_case(schedule: Schedule, weighted: bool) -> Case:
    def settings(x: Tensor) -> dict[str, Any]:
        return {"schedule": schedule, "log_weight": numbers(x, 2) - 1 if weighted else None, **steps(x, "t")}

    return Case(3, _single(ops.fake_score_loss_from_outputs, settings))


def tdm_case(per_sample: bool, huber_c: float | None) -> Case:
    def settings(x: Tensor) -> dict[str, Any]:
        return {"cfg": 4 * numbers(x, 3) if per_sample else 4.5, "huber_c": huber_c}

    return Case(4, _single(ops.tdm_loss, settings))


def tdm_from_outputs_case(schedule: Schedule, per_sample: bool, huber_c: float | None) -> Case:
    def settings(x: Tensor) -> dict[str, Any]:
        cfg = 4 * numbers(x, 3) if per_sample else 4.5
        return {"cfg": cfg, "huber_c": huber_c, "schedule": schedule, **steps(x, "t_gen", "t")}

    return Case(6, _single(ops.tdm_loss_from_outputs, settings))


def pseudo_huber_case(weighted: bool, c: float, reduction: str) -> Case:
    def settings(x: Tensor) -> dict[str, Any]:
        return {"c": c, "weight": numbers(x, 4) if weighted else None, "reduction": reduction}

    return Case(2, _single(ops.pseudo_huber, settings))


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
    "pseudo_huber-mean": pseudo_huber_case(True, 1e-3, "mean"),
    "pseudo_huber-sum": pseudo_huber_case(True, 0.5, "sum"),
    "pseudo_huber-none": pseudo_huber_case(True, 0.5, "none"),
    "pseudo_huber-per_sample": pseudo_huber_case(False, 1e-3, "per_sample"),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def results(case: Case, latents: Sequence[Tensor], backend: str) -> Results:
    """The op's outputs, then the gradients of those latents that get one, for upstream gradients other than 1."""
    leaves = [latent.detach().requires_grad_() for latent in latents]
    outputs = case.run(*leaves, backend=backend)
    differentiable = [output for output in outputs if output.requires_grad]
    upstream = [3.25 - torch.arange(x.numel(), device=x.device).remainder(5).reshape(x.shape) for x in differentiable]
    given = [gradient.to(x.dtype) for gradient, x in zip(upstream, differentiable, strict=True)]
    gradients = torch.autograd.grad(differentiable, leaves, given, allow_unused=True)
    return [output.detach() for output in outputs] + [gradient for gradient in gradients if gradient is not None]


def assert_accurate(case: Case, device: str, backend: str, *draws: Sequence[Tensor]) -> None:
    """Error at most twice the plain same-precision version's largest one plus one ulp of the output dtype.

    Of a few numbers, such as a scalar, the plain one may be 0 by luck: there it is the largest of the draws,
    of which the kernels run on the first.
    """
    there = [[latent.to(device) for latent in latents] for latents in draws]
    exact = [results(case, [latent.double() for latent in latents], "torch") for latents in there]
    plain = [results(case, latents, "torch") for latents in there]
    ours = results(case, there[0], backend)
    for i, (mine, wanted) in enumerate(zip(ours, exact[0], strict=True)):
        assert mine.dtype == plain[0][i].dtype and mine.shape == wanted.shape and mine.is_contiguous()
        compared = range(len(there)) if mine.numel() < FEW else range(1)
        plain_error = max((plain[draw][i].double() - exact[draw][i]).abs().max() for draw in compared)
        error, info = (mine.double() - wanted).abs(), torch.finfo(mine.dtype)
        bound = 2 * plain_error + info.eps * wanted.abs().clamp(min=info.tiny)
        assert torch.all(error <= bound), f"result {i}: {error.max():.3e}, plain {plain_error:.3e}"


class Recorder(TorchDispatchMode):
    """Keeps the calls of this project's ops, to be checked one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if function.namespace == "tdm_fast":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def check_ops(case: Case, device: str, backend: str) -> None:
    """opcheck of every op that a case calls, the backward's among them, with latents that are strided too."""
    latents = [normal((3, 4, 6), torch.bfloat16, seed).to(device) for seed in range(case.latents)]
    for change in (STRIDED["first half of the channels"], lambda x: x.transpose(1, 2)):
        with Recorder() as recorder:
            results(case, [change(latent) for latent in latents], backend)
        assert recorder.calls
        for function, args in recorder.calls:
            first = args[0].detach().requires_grad_("scale_gradient" not in str(function))
            torch.library.opcheck(function, (first, *args[1:]))


def check_compiled(case: Case, device: str, backend: str, dynamic: bool) -> None:
    """torch.compile without a graph break; on the CPU without inductor, which costs a C++ compiler's run per case."""
    # All cases compile the same line, whose recompilations are limited.
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *x: case.run(*x, backend=backend),
        fullgraph=True,
        dynamic=dynamic,
        backend="aot_eager" if device == "cpu" else "inductor",
    )
    whole = Case(case.latents, lambda *x, backend: compiled(*x))
    for batch in (2, 3):
        latents = [normal((batch, 40), torch.bfloat16, seed).to(device) for seed in range(case.latents)]
        for mine, wanted in zip(results(whole, latents, backend), results(case, latents, backend), strict=True):
            torch.testing.assert_close(mine, wanted)


def dtype_lists(count: int) -> list[list[torch.dtype]]:
    """Dtypes of the latents: all alike, and mixed."""
    alike = [[dtype] * count for dtype in DTYPES]
    return [*alike, *([DTYPES[(first + i) % 3] for i in range(count)] for first in range(3))]


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "first half of the channels": lambda x: x[:, :3],
    "every other sample": lambda x: x[::2],
    "one sample for all": lambda x: x[:1].expand(4, -1, -1, -1),
    "one number per sample": lambda x: x[:, :1, :1, :1].expand(-1, 6, 5, 8),
    "one number": lambda x: x[:1, :1, :1, :1].expand(4, 6, 5, 8),
    "not on 16 bytes": lambda x: x.flatten()[1:241].reshape(1, 240),
    "transposed": lambda x: x.transpose(1, 3),
    "every other channel": lambda x: x[:, ::2, :, 1:],
}
