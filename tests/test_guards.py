"""Updates that are not finite change nothing, are counted, and do not make the host wait."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

from tdm_fast.guards import Guard, average_, name_samples

POISONS = ["nan loss", "inf loss", "nan gradient", "inf gradient", "overflowing norm"]


class Momentum(torch.optim.Optimizer):
    """An optimiser that knows nothing of `found_inf`: decayed weights, momentum, a counter of steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            state.setdefault("momentum", torch.zeros_like(parameter)).mul_(0.9).add_(parameter.grad)
            state["step"] = state.get("step", 0) + 1
            parameter.mul_(0.99).sub_(0.1 * state["momentum"])


def make(kind: str, device: str = "cpu") -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size, generator=generator).to(device)) for size in ((3, 5), (7,), (2, 1, 3))]
    if kind == "momentum":
        return parameters, Momentum(parameters)
    return parameters, torch.optim.AdamW(parameters, lr=0.1, betas=(0.3, 0.9), fused=kind == "fused", foreach=False)


def backward(parameters: list[nn.Parameter], number: int, poison: str | None = None) -> Tensor:
    """Gradients and a loss that depend on `number`, spoilt by `poison`."""
    generator = torch.Generator().manual_seed(number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    loss = torch.tensor(1.5)
    if poison in ("nan loss", "inf loss"):
        loss = torch.tensor(math.nan if poison == "nan loss" else -math.inf)
    elif poison is not None:
        value = {"nan gradient": math.nan, "inf gradient": math.inf, "overflowing norm": 3e38}[poison]
        parameters[1].grad[3] = parameters[2].grad[0] = value
    return loss


def everything(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """A copy of all that a step may change."""
    states = [value for p in parameters for value in optimizer.state[p].values()]
    return [torch.as_tensor(value).detach().clone() for value in (*parameters, *states)]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()


@pytest.mark.parametrize("kind", ["fused", "plain", "momentum"])
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_update_changes_nothing(kind: str, max_norm: float | None, poison: str) -> None:
    parameters, optimizer = make(kind)
    guard = Guard(("student",))
    for number in (1, 2):
        update = guard.step("student", optimizer, backward(parameters, number), max_norm=max_norm)
        assert update.applied == 1 and update.norm.isfinite()
    before = everything(parameters, optimizer)
    assert len(before) > len(parameters)
    update = guard.step("student", optimizer, backward(parameters, 3, poison), max_norm=max_norm)
    assert update.applied == 0
    assert_same_bits(everything(parameters, optimizer), before)

    # And nothing of it is left: the next step is the one that a run without the poisoned update takes.
    others, other = make(kind)
    undisturbed = Guard(("student",))
    for number in (1, 2, 4):
        undisturbed.step("student", other, backward(others, number), max_norm=max_norm)
    guard.step("student", optimizer, backward(parameters, 4), max_norm=max_norm)
    assert_same_bits(everything(parameters, optimizer), everything(others, other))
    assert not torch.equal(before[0], parameters[0])


def test_the_very_first_update_may_be_poisoned() -> None:
    (parameters, optimizer), (others, other) = make("fused"), make("fused")
    guard = Guard(("fake",))
    guard.step("fake", optimizer, backward(parameters, 1, "nan gradient"))
    for network, stepper in ((parameters, optimizer), (others, other)):
        guard.step("fake", stepper, backward(network, 2))
    assert_same_bits(everything(parameters, optimizer), everything(others, other))
    assert not hasattr(optimizer, "found_inf") and not hasattr(optimizer, "grad_scale")


def test_a_finite_update_is_torchs_own() -> None:
    (parameters, optimizer), (others, other) = make("fused"), make("fused")
    norm = Guard(("fake",)).step("fake", optimizer, backward(parameters, 1), max_norm=0.5).norm
    backward(others, 1)
    squares = sum(float((p.grad.double() ** 2).sum()) for p in others)
    assert float(norm) == pytest.approx(math.sqrt(squares), rel=1e-6)
    nn.utils.clip_grad_norm_(others, 0.5)
    other.step()
    assert_same_bits(everything(parameters, optimizer), everything(others, other))


def test_the_average_stands_still_where_nothing_was_applied() -> None:
    generator = torch.Generator().manual_seed(1)
    targets = [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator).bfloat16()]
    averages = [torch.randn_like(target.float()).to(target.dtype) for target in targets]
    before = copy.deepcopy(averages)
    average_(averages, targets, 0.25, torch.tensor(0.0))
    assert all(torch.equal(average, old) for average, old in zip(averages, before, strict=True))
    average_(averages, targets, 0.25, torch.tensor(1.0))
    for average, old, target in zip(averages, before, targets, strict=True):
        wanted = 0.75 * old.double() + 0.25 * target.double()
        eps = torch.finfo(average.dtype).eps
        torch.testing.assert_close(average.double(), wanted, rtol=2 * eps, atol=2 * eps)


def test_skips_are_counted_by_role_and_in_a_row() -> None:
    guard = Guard(("fake", "student"))
    networks = {role: make("fused") for role in ("fake", "student")}

    def step(role: str, poison: str | None) -> None:
        parameters, optimizer = networks[role]
        guard.step(role, optimizer, backward(parameters, 1, poison))

    rows = []
    for poison in (None, "nan loss", "inf gradient", None, "nan loss"):
        step("student", poison)
        step("fake", None)
        rows.append({name: int(value) for name, value in guard.row().items()})
    assert [row["skipped_student"] for row in rows] == [0, 1, 1, 0, 1]
    assert [row["skipped_student_in_all"] for row in rows] == [0, 1, 2, 2, 3]
    assert all(row["skipped_fake"] == row["skipped_fake_in_all"] == 0 for row in rows)
    assert guard.counts["student"].tolist() == [3, 1, 2, 0]

    resumed = Guard(("fake", "student"))
    resumed.restore(copy.deepcopy(guard.tensors()))
    step("student", "nan loss")
    step("student", "nan loss")
    assert guard.counts["student"].tolist() == [5, 3, 3, 2]
    assert resumed.counts["student"].tolist() == [3, 1, 1, 0]  # the row of two is over


def test_a_run_that_only_skips_is_stopped() -> None:
    guard = Guard(("fake", "student"))
    parameters, optimizer = make("fused")
    for number in range(10):
        guard.raise_if_stuck(10, Path("run/checkpoint-40"))
        if number == 5:  # one good update begins the count anew
            guard.step("fake", optimizer, backward(parameters, 1))
        guard.step("fake", optimizer, backward(parameters, 1, "nan loss"))
    for _ in range(5):
        guard.step("fake", optimizer, backward(parameters, 1, "nan loss"))
    # What happened between two looks counts, even if an update has been applied since.
    guard.step("fake", optimizer, backward(parameters, 1))
    guard.raise_if_stuck(11)
    with pytest.raises(
        ValueError, match=r"10 updates of the fake in a row \(15 in all\).*run/checkpoint-40: --resume_from_checkpoint "
    ):
        guard.raise_if_stuck(10, Path("run/checkpoint-40"))
    with pytest.raises(ValueError, match="last good checkpoint is none"):
        guard.raise_if_stuck(10)


def test_the_host_does_not_wait_for_the_device() -> None:
    """On fake CUDA tensors there are no values: whatever looks at one raises."""
    with FakeTensorMode():
        parameters, optimizer = make("fused", "cuda")
        averages = [parameter.detach().clone() for parameter in parameters]
        guard = Guard(("student",), "cuda")
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            update = guard.step("student", optimizer, torch.ones((), device="cuda"), max_norm=1.0)
            average_(averages, parameters, 0.1, update.applied)
            row = guard.row()
        assert {value.device.type for value in (*update, *row.values(), *averages)} == {"cuda"}
        # The test can fail: an optimiser that does not know `found_inf` has to look, and so does who counts.
        parameters, optimizer = make("momentum", "cuda")
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        with pytest.raises(DataDependentOutputException):
            guard.step("student", optimizer, torch.ones((), device="cuda"))
        with pytest.raises(DataDependentOutputException):
            guard.raise_if_stuck()


@pytest.mark.gpu
def test_a_cuda_step_is_skipped_without_a_wait() -> None:
    parameters, optimizer = make("fused", "cuda")
    guard = Guard(("student",), "cuda")

    def step(value: float) -> None:
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
        torch.cuda.set_sync_debug_mode("error")
        try:
            guard.step("student", optimizer, parameters[0].grad[0, 0] * 2, max_norm=1.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    step(0.5)
    before = [value.cpu() for value in everything(parameters, optimizer)]
    step(math.nan)
    assert_same_bits([value.cpu() for value in everything(parameters, optimizer)], before)
    assert guard.counts["student"].tolist() == [1, 1, 1, 1]


def test_rows_name_the_samples_of_a_skipped_update() -> None:
    row = {"step": 7, "skipped_fake": 0, "skipped_fake_in_all": 3, "skipped_student": 0, "skipped_student_in_all": 1}
    untouched = dict(row)
    assert name_samples(row, range(24, 28), [5, 9, 5, 2]) is None
    assert row == untouched
    row["skipped_student"] = 1
    message = name_samples(row, range(24, 28), [5, 9, 5, 2])
    assert message == (
        "iteration 7: update of student skipped, because a loss or gradient is not finite; samples 24 to 27,"
        " prompts 5, 9, 5, 2"
    )
    assert row["samples"] == [24, 28] and row["prompts"] == [5, 9, 5, 2]
