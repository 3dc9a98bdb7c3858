"""What a run shows of itself: log, times, operations, traces, reports."""

from __future__ import annotations

import gzip
import json
import math
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.utils._python_dispatch import TorchDispatchMode

from tdm_fast import metering
from tdm_fast.files import SaveError
from tdm_fast.guards import Guard
from tdm_fast.metering import (
    Cost,
    Log,
    StepTimer,
    check_report_to,
    json_line,
    measure_cost,
    measured_matmul_rate,
    parse_profile,
    peak_bytes,
    profile,
    report,
    speed,
)


class ToHost(TorchDispatchMode):
    """Counts the operators that bring a device's tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.device.type == "cpu":
            self.copies += any(isinstance(arg, Tensor) and arg.device.type == "cuda" for arg in args)
        return result


def test_rows_come_back_as_they_were() -> None:
    log, losses = Log(), [1 / 3, math.nan, -math.inf]
    for step, loss in enumerate(losses, start=5):
        values = {"loss": torch.tensor(loss), "count": torch.tensor(2**40 + step), "rate": torch.tensor(0.5)}
        log.add(step, values, lr=0.1 * step, prompts=[step])
        values["loss"].fill_(7.0)  # the row keeps what was given
    assert len(log) == 3
    rows = log.flush()
    for step, (row, loss) in enumerate(zip(rows, losses, strict=True), start=5):
        assert list(row) == ["step", "lr", "prompts", "loss", "count", "rate"]
        assert row["loss"] == pytest.approx(float(torch.tensor(loss)), rel=0, abs=0, nan_ok=True)
        assert (row["step"], row["lr"], row["prompts"], row["rate"]) == (step, 0.1 * step, [step], 0.5)
        assert row["count"] == 2**40 + step and type(row["count"]) is int
    assert log.flush() == [] and len(log) == 0
    lines = [json.loads(json_line(row)) for row in rows]
    assert [line["loss"] for line in lines] == [rows[0]["loss"], None, None]
    assert json_line({"step": 1, "samples": [0, 2]}) == '{"step": 1, "samples": [0, 2]}\n'


def test_nothing_of_an_iteration_comes_to_the_host_before_the_flush() -> None:
    """On fake CUDA tensors a look at a value raises, and a copy to the host is seen."""
    with FakeTensorMode(), ToHost() as to_host:
        parameters = [nn.Parameter(torch.ones(3, 4, device="cuda"))]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        guard, log = Guard(("student",), "cuda"), Log()
        for step in range(3):
            loss = torch.ones((), device="cuda", requires_grad=True)
            parameters[0].grad = torch.ones_like(parameters[0])
            update = guard.step("student", optimizer, loss, max_norm=1.0)
            log.add(step, {"loss": loss, "grad_norm": update.norm, **guard.row()}, lr=0.1)
        assert to_host.copies == 0
        with pytest.raises(DataDependentOutputException):
            log.flush()
        torch.ones(2, device="cuda").cpu()
        assert to_host.copies == 1


class Clock:
    """A clock that moves by hand; also stands in for `torch.cuda.Event`, whose times it gives."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 100.0, 0
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = clock.now

            def synchronize(self) -> None:
                clock.waits += 1

            def elapsed_time(self, end: Event) -> float:
                assert clock.waits, "nobody waited for the events"
                return (end.time - self.time) * 1000

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_iteration_s_time_is_split_by_phase(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    timer = StepTimer(device)

    def spend(seconds: float) -> None:
        clock.now += seconds

    with timer("rollout"):  # outside an iteration nothing is counted
        spend(50)
    for factor in (1, 2):
        with timer.step():
            spend(1 * factor)
            with timer("rollout"):
                spend(2 * factor)
            with timer("student"):
                spend(4 * factor)
                with timer("communication"):
                    spend(8 * factor)
                spend(16 * factor)
            with timer("rollout"):
                spend(32 * factor)
        spend(64)
    with pytest.raises(RuntimeError), timer.step(), timer("fake"):
        spend(1)
        raise RuntimeError
    with timer.step():
        spend(3)
    assert clock.waits == 0
    rows = timer.flush()
    assert clock.waits == (1 if device == "cuda" else 0)
    for factor, row in zip((1, 2), rows, strict=False):
        assert row == pytest.approx(
            {
                "seconds": 63 * factor,
                "seconds_other": 1 * factor,
                "seconds_rollout": 34 * factor,
                "seconds_student": 20 * factor,
                "seconds_communication": 8 * factor,
            }
        )
    assert rows[2] == {"seconds": 3, "seconds_other": 3}
    assert len(rows) == 3 and timer.flush() == []


def test_operations_are_counted_and_not_done() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(6, 10), nn.Linear(10, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.outer(self.inner(x).relu()).unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(hidden, hidden, hidden)

    network = Network()
    before = [parameter.clone() for parameter in network.parameters()]
    cost = measure_cost(network, torch.randn(3, 5, 6))
    linear, attention = 2 * 3 * 5 * (6 * 10 + 10 * 8), 2 * (2 * 3 * 2 * 5 * 5 * 4)
    # A backward is two products for each of the forward's, but for the gradient of the inputs.
    assert cost == Cost(linear + attention, 3 * (linear + attention) - 2 * 3 * 5 * 6 * 10)
    assert all(
        torch.equal(old, new) and new.grad is None for old, new in zip(before, network.parameters(), strict=True)
    )
    frozen = measure_cost(network.requires_grad_(False), torch.randn(3, 5, 6))
    assert frozen == Cost(linear + attention, linear + attention)


def test_the_matmul_rate_is_the_best_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def seconds_of(call: Callable[[], Tensor], device: torch.device) -> float:
        result = call()
        assert result.dtype == torch.float64 and bool(result.any())
        asked.append(len(result))
        return {512: 0.01, 1024: 0.02, 2048: 0.5}[len(result)]

    measured_matmul_rate.cache_clear()
    monkeypatch.setattr(metering, "_seconds_of", seconds_of)
    rate = measured_matmul_rate("cpu", torch.float64)
    assert rate == measured_matmul_rate("cpu", torch.float64) == 2 * 1024**3 / 0.02
    assert asked == [512, 1024, 2048]
    measured_matmul_rate.cache_clear()
    assert speed(2.0, samples=8, flops=3 * 10**9, rate=6e9) == {"samples_per_second": 4.0, "mfu": 0.25}


def test_a_measured_call_takes_time_and_so_does_memory() -> None:
    assert metering._seconds_of(lambda: torch.ones(100).cumsum(0), torch.device("cpu")) > 0
    assert peak_bytes("cpu") > 10**8


def test_a_trace_holds_the_iterations_asked_for(tmp_path: Path) -> None:
    timer = StepTimer()
    with profile((3, 4), tmp_path / "new", start=2) as advance:
        for iteration in range(2, 7):
            assert (tmp_path / "new" / "trace-3-4.json.gz").exists() == (iteration > 4)
            with timer.step(), timer("student"):
                torch.ones(4) @ torch.ones(4)
            advance()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["trace-3-4.json.gz"]
    with gzip.open(tmp_path / "new" / "trace-3-4.json.gz") as file:
        events = json.load(file)["traceEvents"]
    ranges = [event for event in events if event.get("name") == "student" and event.get("ph") == "X"]
    assert len(ranges) == 2
    assert sum(event.get("name") == "aten::dot" for event in events) == 2


def test_no_trace_is_made_of_nothing(tmp_path: Path) -> None:
    for window in (None, (3, 4)):
        with profile(window, tmp_path, start=5) as advance:
            advance()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match=r"could not write .*trace-1-1"), profile((1, 1), tmp_path / "file") as advance:
        advance()
    # A run that ends within the window leaves what there was.
    with profile((1, 9), tmp_path) as advance:
        advance()
    assert (tmp_path / "trace-1-9.json.gz").exists()


def test_profile_takes_a_window() -> None:
    assert parse_profile("10:12") == (10, 12) and parse_profile("1:1") == (1, 1)
    for text in ("", "5", "5:", "0:3", "4:3", "a:b", "1:2:3", "-1:2"):
        with pytest.raises(ValueError, match=r"it takes A:B, .* such as 10:12"):
            parse_profile(text)


ROWS = [{"step": 4, "loss": 0.5, "skipped": 0, "samples": [1, 2]}, {"step": 5, "loss": math.nan, "skipped": 1}]


def test_tensorboard_shows_the_rows(tmp_path: Path) -> None:
    for start in (4, 5):  # the second run goes on before the first's last row
        with report("tensorboard", tmp_path, start=start) as show:
            for row in ROWS[start - 4 :]:
                show(row)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "skipped"]
    assert {event.step: event.value for event in events.Scalars("skipped")} == {4: 0.0, 5: 1.0}
    assert len(events.Scalars("skipped")) == 2


class FakeWandb(types.ModuleType):
    """Weights & Biases as far as it is used."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.exits: list[Any] = []
        self.offline = True

    def init(self, **keywords: Any) -> FakeWandb:
        if not self.offline:
            raise self.Error("api_key not configured")
        self.runs.append(keywords)
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def __enter__(self) -> FakeWandb:
        return self

    def __exit__(self, *error: Any) -> None:
        self.exits.append(error[0])


def test_weights_and_biases_goes_on_with_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    check_report_to("wandb")
    for _ in range(2):
        with report("wandb", tmp_path, config={"cfg": 4.5}) as show:
            show(ROWS[0])
    with pytest.raises(RuntimeError), report("all", tmp_path) as show:
        show(ROWS[0])
        raise RuntimeError
    assert wandb.logged == 3 * [(4, {"loss": 0.5, "skipped": 0})]
    assert len({run["id"] for run in wandb.runs}) == 1 and len(wandb.runs[0]["id"]) == 8
    assert wandb.runs[0] | {"id": ""} == {
        "project": "tdm-fast", "name": tmp_path.name, "id": "", "resume": "allow", "dir": str(tmp_path),
        "config": {"cfg": 4.5},
    }  # fmt: skip
    assert wandb.exits == [None, None, RuntimeError]
    assert (tmp_path / "tensorboard").is_dir()
    wandb.offline = False
    with pytest.raises(ValueError, match=r"api_key not configured; .wandb login., or set WANDB_MODE=offline"):
        report("wandb", tmp_path).__enter__()


def test_reports_that_cannot_be_made_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--report_to mlflow: it takes one of tensorboard, wandb, all, none"):
        check_report_to("mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    for report_to in ("wandb", "all"):
        with pytest.raises(ValueError, match="Weights & Biases is not installed; `pip install wandb`"):
            report(report_to, tmp_path).__enter__()
    with report("none", tmp_path) as show:
        show(ROWS[0])
    assert not list(tmp_path.iterdir())
