"""What is measured: latents of real models, dtypes, the bytes that each op must move, and each op on given tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import bench_plain as plain
import torch
from torch import Tensor

from tdm_fast import ops
from tdm_fast.ops import _dispatch
from tdm_fast.schedule import Schedule

# Latents of one sample, and the batch sizes: frames x height x width of the videos that they stand for.
LATENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "opensora-93x640x640": ((8, 24, 80, 80), (1, 8)),
    "opensora-29x480x640": ((8, 8, 60, 80), (1, 8)),
    "pixart-512": ((4, 64, 64), (16,)),
    "cogvideox-49x480x720": ((16, 13, 60, 90), (1, 8)),
    "tiny": ((4, 3, 5, 7), (2,)),
}
KEY_LATENTS = "opensora-93x640x640"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "forward+backward")
BASELINES = ("torch", "torch-fp32", "compile", "compile-fp32")
BACKENDS = ("cpp", "triton", "cuda")
INTERVAL_BATCHES = (1, 8, 64, 512)

T_GEN, T_MID, T = 899, 675, 780  # step 4 of (K, T) = (4, 900), and a timestep inside its interval
CFG, HUBER_C, SNR_GAMMA = 4.5, 1e-3, 5.0


@dataclass(frozen=True)
class Traffic:
    """Latents that an op must read and write: its inputs once, its results once; values per sample do not count.

    `*_both` is forward and backward together: the forward's inputs are read once, since the gradient can be computed
    in the same pass, an upstream gradient that is no scalar is read, and the gradients are written. What the forward
    writes counts where it is a result of its own (latents), not where it is kept for the backward.
    """

    reads: int
    writes: int
    reads_both: int
    writes_both: int

    def bytes(self, mode: str, elements: int, element_size: int) -> int:
        """Bytes for latents of `elements` elements in all."""
        count = self.reads + self.writes if mode == "forward" else self.reads_both + self.writes_both
        return count * elements * element_size


@dataclass(frozen=True)
class Op:
    """An op on `inputs` latents of one shape; `leaves` are the inputs that get a gradient, `output` its first result
    that has one. `plain` is the op as in reference.py, `plain_fp32` the same without that file's float64 normaliser.
    """

    traffic: Traffic
    inputs: int
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    leaves: tuple[int, ...] = (0,)
    output: int = 0
    plain_fp32: Callable[..., Any] | None = None


class PerSample(NamedTuple):
    """What an op is given beside latents, `[B]` each."""

    schedule: Schedule
    t_gen: Tensor
    t_mid: Tensor
    t: Tensor
    snr: Tensor
    log_weight: Tensor


def _ours_ode_step(x: list[Tensor], p: PerSample, backend: str) -> Tensor:
    return ops.ode_step(x[0], x[1], schedule=p.schedule, t=p.t_gen, t_next=p.t_mid - 1, backend=backend)


def _ours_renoise(x: list[Tensor], p: PerSample, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    times: dict[str, Any] = {"t_gen": p.t_gen, "t_mid": p.t_mid, "t": p.t}
    return ops.renoise(x[0], x[1], schedule=p.schedule, seed=0, iteration=0, **times, backend=backend)


def _ours_fake(x: list[Tensor], p: PerSample, backend: str) -> Tensor:
    return ops.fake_score_loss(x[0], x[1], snr=p.snr, log_weight=p.log_weight, snr_gamma=SNR_GAMMA, backend=backend)


def _ours_fake_outputs(x: list[Tensor], p: PerSample, backend: str) -> Tensor:
    rest: dict[str, Any] = {"log_weight": p.log_weight, "snr_gamma": SNR_GAMMA}
    return ops.fake_score_loss_from_outputs(*x, schedule=p.schedule, t=p.t, **rest, backend=backend)


def _ours_tdm(x: list[Tensor], p: PerSample, backend: str) -> Tensor:
    return ops.tdm_loss(*x, cfg=CFG, huber_c=HUBER_C, backend=backend)


def _ours_tdm_outputs(x: list[Tensor], p: PerSample, backend: str) -> Tensor:
    rest: dict[str, Any] = {"cfg": CFG, "huber_c": HUBER_C}
    return ops.tdm_loss_from_outputs(*x, schedule=p.schedule, t_gen=p.t_gen, t=p.t, **rest, backend=backend)


def _ours_huber(x: list[Tensor], p: PerSample, backend: str) -> Tensor:
    return ops.pseudo_huber(x[0], x[1], c=HUBER_C, backend=backend)


OPS: dict[str, Op] = {
    "tdm_loss": Op(
        Traffic(4, 0, 4, 1),
        inputs=4,
        plain=lambda x, p: plain.tdm_loss(*x, CFG, HUBER_C, torch.float64),
        plain_fp32=lambda x, p: plain.tdm_loss(*x, CFG, HUBER_C, torch.float32),
        ours=_ours_tdm,
    ),
    "tdm_loss_from_outputs": Op(
        Traffic(6, 0, 6, 1),
        inputs=6,
        plain=lambda x, p: plain.tdm_loss_from_outputs(*x, p.schedule, p.t_gen, p.t, CFG, HUBER_C, torch.float64),
        plain_fp32=lambda x, p: plain.tdm_loss_from_outputs(*x, p.schedule, p.t_gen, p.t, CFG, HUBER_C, torch.float32),
        ours=_ours_tdm_outputs,
    ),
    "fake_score_loss": Op(
        Traffic(2, 0, 2, 1),
        inputs=2,
        plain=lambda x, p: plain.fake_score_loss(*x, p.snr, p.log_weight, SNR_GAMMA),
        ours=_ours_fake,
    ),
    "fake_score_loss_from_outputs": Op(
        Traffic(3, 0, 3, 1),
        inputs=3,
        plain=lambda x, p: plain.fake_score_loss_from_outputs(*x, p.schedule, p.t, p.log_weight, SNR_GAMMA),
        ours=_ours_fake_outputs,
    ),
    "pseudo_huber": Op(
        Traffic(2, 0, 2, 1),
        inputs=2,
        plain=lambda x, p: plain.pseudo_huber(*x, HUBER_C),
        ours=_ours_huber,
    ),
    "renoise": Op(  # the noise is made, not read; backward reads x0's gradient and writes model_output's
        Traffic(2, 2, 3, 3),
        inputs=2,
        plain=lambda x, p: plain.renoise(*x, p.schedule, p.t_gen, p.t_mid, p.t),
        ours=_ours_renoise,
        leaves=(1,),
        output=1,
    ),
    "ode_step": Op(  # backward reads the result's gradient and writes both inputs'
        Traffic(2, 1, 3, 3),
        inputs=2,
        plain=lambda x, p: plain.ode_step(*x, p.schedule, p.t_gen, p.t_mid - 1),
        ours=_ours_ode_step,
        leaves=(0, 1),
    ),
}


@dataclass(frozen=True)
class Case:
    """One measurement."""

    op: str
    mode: str
    latents: str
    batch: int
    dtype: str
    provider: str

    def __str__(self) -> str:
        return f"{self.op}-{self.mode}-{self.latents}-B{self.batch}-{self.dtype}-{self.provider}"

    @property
    def shape(self) -> tuple[int, ...]:
        """`[B, ...]`."""
        return (self.batch, *LATENTS[self.latents][0])


def ours(op: str, device: str) -> list[str]:
    """The backends but "torch" that `op` is written for and that run on `device`."""
    written = _dispatch.registered().get(op, ())
    return [name for name in BACKENDS if name in written and _dispatch.unavailable(name, device) is None]


def latent_cases(matrix: str, device: str, op_names: Sequence[str], dtypes: Sequence[str]) -> list[Case]:
    """The cases of `matrix`: "full", "tiny" (seconds, to see that everything runs), or "default".

    The default is everything on a GPU. On a CPU, where it would take half an hour, it is all latents at B = 1 in the
    first dtype, and the key latents at B = 8 too and at B = 1 in all dtypes; torch.compile runs at these last.
    """
    cases = list(_all_cases(device, op_names, dtypes))
    if matrix == "tiny":
        cases = [case for case in cases if case.latents == "tiny" and _quick_to_compile(case)]
    else:
        cases = [case for case in cases if case.latents != "tiny"]
    if matrix == "default" and device == "cpu":
        cases = [case for case in cases if _in_cpu_default(case, dtypes[0])]
    if device == "cuda":
        # A kernel that faults ends all that follows in its process: ours come after the baselines.
        order = [*BASELINES, *BACKENDS]
        cases.sort(key=lambda case: order.index(case.provider))
    return cases


def _all_cases(device: str, op_names: Sequence[str], dtypes: Sequence[str]) -> Iterator[Case]:
    for op in (name for name in OPS if name in op_names):
        for latents, (_, batches) in LATENTS.items():
            forms = BASELINES if OPS[op].plain_fp32 and latents == KEY_LATENTS else ("torch", "compile")
            for batch, dtype, mode, provider in product(batches, dtypes, MODES, (*forms, *ours(op, device))):
                yield Case(op, mode, latents, batch, dtype, provider)


def _quick_to_compile(case: Case) -> bool:
    return case.provider != "compile" or (case.op, case.mode) == ("tdm_loss", MODES[1])


def _in_cpu_default(case: Case, first_dtype: str) -> bool:
    if case.latents == KEY_LATENTS and case.batch == 1:
        return True
    if case.provider.startswith("compile") or case.dtype != first_dtype:
        return False
    return case.batch != 8 or case.latents == KEY_LATENTS


@dataclass
class Prepared:
    """A case with its tensors: `run()` is what is measured, `result()` what it computes, to be compared."""

    case: Case
    device: str
    inputs: list[Tensor]
    per_sample: PerSample
    call: Callable[[list[Tensor], PerSample], Any]
    upstream: list[Tensor] = field(default_factory=list)

    def run(self) -> Any:
        if self.case.mode == "forward":
            return self._forward()
        leaves = [self.inputs[index] for index in OPS[self.case.op].leaves]
        return torch.autograd.grad(self.result(), leaves, self.upstream or None)

    def result(self) -> Tensor:
        """The first result that has a gradient."""
        value = self._forward()
        return value[OPS[self.case.op].output] if isinstance(value, tuple) else value

    def _forward(self) -> Any:
        # Always in the mode that is measured: torch.compile would compile the other one too.
        with torch.set_grad_enabled(self.case.mode != "forward"):
            return self.call(self.inputs, self.per_sample)


def prepare(case: Case, device: str) -> Prepared:
    """The tensors of a case, the same for every provider, and the call that the provider makes of them."""
    op, dtype = OPS[case.op], DTYPES[case.dtype]
    # With its index, as tensors name their device: else the tables would be looked up among copies at every call.
    schedule = SCHEDULE.to(torch.empty(0, device=device).device)
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(case.shape, generator=generator, device=device).to(dtype) for _ in range(op.inputs)]
    t_gen, t_mid, t = (torch.full((case.batch,), value, device=device) for value in (T_GEN, T_MID, T))
    log_weight = 0.1 * torch.randn(case.batch, generator=generator, device=device)
    per_sample = PerSample(schedule, t_gen, t_mid, t, schedule.snr[t], log_weight)
    prepared = Prepared(case, device, inputs, per_sample, _call(op, case.provider))
    if case.mode != "forward":
        for index in op.leaves:
            inputs[index].requires_grad_()
        if op.traffic.writes:
            prepared.upstream = [torch.randn(case.shape, generator=generator, device=device).to(dtype)]
    return prepared


def _call(op: Op, provider: str) -> Callable[[list[Tensor], PerSample], Any]:
    if provider in BACKENDS:
        return lambda x, p: op.ours(x, p, provider)
    written = op.plain_fp32 if provider.endswith("-fp32") else op.plain
    assert written is not None
    if not provider.startswith("compile"):
        return written
    # Shapes known at compile time are what torch.compile is fastest with; its limit on recompilations is per function.
    torch._dynamo.reset()
    return torch.compile(written, dynamic=False)


SCHEDULE = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
