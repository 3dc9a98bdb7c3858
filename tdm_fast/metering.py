"""Seeing a run: its log, where the time goes, how much of the device's arithmetic is used, traces, reports.

Nothing here waits for the device until a log or a timer is flushed: values and times of an iteration stay where they
are made, and come to the host many iterations at once.
"""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import json
import math
import os
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerAction, ProfilerActivity, record_function
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from tdm_fast import host
from tdm_fast.files import SaveError, write_atomically
from tdm_fast.memory import fake_tensors

PHASES = ("data", "rollout", "fake", "student", "optimiser", "communication")
OTHER = "other"
REPORTS = ("tensorboard", "wandb", "all", "none")
RUN_ID_FILE = "wandb-run-id"

Row = dict[str, Any]


class Log:
    """The rows of a run: what the host knows of an iteration at once, what the device computes when it is flushed."""

    def __init__(self) -> None:
        self._pending: list[tuple[Row, dict[str, bool], Tensor]] = []

    def __len__(self) -> int:
        return len(self._pending)

    @torch.no_grad()
    def add(self, step: int, values: Mapping[str, Tensor], **known: Any) -> None:
        """Keep a row: `values` are scalar tensors on one device, copied into one small tensor there."""
        whole = {name: not value.is_floating_point() for name, value in values.items()}
        scalars = torch.stack([value.detach().double() for value in values.values()])
        self._pending.append(({"step": step, **known}, whole, scalars))

    def flush(self) -> list[Row]:
        """The rows since the last call, oldest first, as plain numbers. One transfer; it waits for the device.

        Through no pinned buffer: there is nothing to do meanwhile, and the wait would be the same.
        """
        pending, self._pending = self._pending, []
        numbers = iter(torch.cat([scalars for _, _, scalars in pending]).tolist() if pending else ())
        for row, whole, _ in pending:
            for name, is_whole in whole.items():
                row[name] = int(next(numbers)) if is_whole else next(numbers)
        return [row for row, _, _ in pending]


def json_line(row: Row) -> str:
    """A row as a line of JSON, which knows no nan and no infinity: they become null."""
    finite = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


class StepTimer:
    """Splits the time of every iteration by phase.

        with timer.step():
            with timer("rollout"):
                ...

    On CUDA a phase begins and ends with an event on the current stream, so the times are the device's: a wait for the
    host shows in the phase that makes the device wait. On a CPU they are the wall clock's. Inside a phase another one
    may begin (communication in a backward): its time is its own, and the phases' times always add up to the
    iteration's. Each phase is a range of its name in a profiler's trace.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._on_cuda = torch.device(device).type == "cuda"
        self._phase = OTHER
        self._marks: list[tuple[Any, str]] | None = None
        self._steps: list[list[tuple[Any, str]]] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """One iteration. What is in no phase counts as "other"; an iteration that fails leaves no row."""
        self._phase, self._marks = OTHER, [(self._now(), OTHER)]
        try:
            yield
            self._steps.append([*self._marks, (self._now(), OTHER)])
        finally:
            self._marks = None

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's time to `phase`."""
        outer = self._phase
        with record_function(phase):
            self._begin(phase)
            try:
                yield
            finally:
                self._begin(outer)

    def flush(self) -> list[dict[str, float]]:
        """Of every iteration since the last call, oldest first: `seconds`, and `seconds_<phase>` of each phase in it.

        On CUDA this waits for the last of them.
        """
        steps, self._steps = self._steps, []
        if steps and self._on_cuda:
            steps[-1][-1][0].synchronize()
        return [self._split(marks) for marks in steps]

    def _split(self, marks: Sequence[tuple[Any, str]]) -> dict[str, float]:
        split: defaultdict[str, float] = defaultdict(float)
        for (begin, phase), (end, _) in pairwise(marks):
            split[f"seconds_{phase}"] += self._seconds(begin, end)
        return {"seconds": sum(split.values()), **split}

    def _begin(self, phase: str) -> None:
        self._phase = phase
        if self._marks is not None:
            self._marks.append((self._now(), phase))

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._on_cuda else end - begin


class Cost(NamedTuple):
    """Floating-point operations of one call of a network: forward alone, and forward with backward."""

    forward: int
    trained: int


def measure_cost(network: nn.Module, *inputs: Any) -> Cost:
    """Count the operations of `network(*inputs)`, which returns one tensor, on fake copies: nothing is computed.

    torch.utils.flop_counter's count: two operations per multiplication and addition of matrix products, convolutions
    and attention, nothing for the rest. Attention is counted as the two products that it is, whatever kernel will run
    it. A network with activation checkpointing would have its recomputation counted: model FLOPs are without.
    """
    with fake_tensors():
        return count_operations(copy.deepcopy(network), *inputs)


def count_operations(network: nn.Module, *inputs: Any) -> Cost:
    """What `measure_cost` counts, of a network that is fake already; a real one would compute."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            network(*inputs)
        with FlopCounterMode(display=False) as trained:
            output = network(*inputs)
            if output.requires_grad:
                output.sum().backward()
    return Cost(forward.get_total_flops(), trained.get_total_flops())


@functools.cache
def measured_matmul_rate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s of this device's own matrix product: the denominator of the utilisation, measured once per process.

    The best of square products of growing size, 2 n³ operations over their time, of normally distributed numbers,
    with this process's threads and precision settings, each repeated for about a fifth of a second. So it is what
    torch.matmul reaches in a short burst, not a data sheet's peak, nor what a hot GPU keeps up for hours.
    """
    device, best = torch.device(device), 0.0
    for size in (512, 1024, 2048, 4096, 8192):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = _seconds_of(functools.partial(torch.matmul, left, right), device)
        best = max(best, 2 * size**3 / seconds)
        if seconds > 0.1:  # a larger one would take eight times as long, and be no faster
            break
    return best


def _seconds_of(call: Callable[[], Tensor], device: torch.device) -> float:
    """Mean seconds of a call, over as many as take about a fifth of a second."""
    call()
    once = _seconds_of_calls(call, 1, device)
    calls = max(1, min(1000, round(0.2 / max(once, 1e-6))))
    return once if calls == 1 else _seconds_of_calls(call, calls, device)


def _seconds_of_calls(call: Callable[[], Tensor], calls: int, device: torch.device) -> float:
    timer = StepTimer(device)
    with timer.step():
        for _ in range(calls):
            call()
    return timer.flush()[0]["seconds"] / calls


def speed(seconds: float, samples: int, flops: int, rate: float) -> dict[str, float]:
    """Of an iteration: samples per second, and model FLOPs utilisation, `flops` over what `rate` does meanwhile."""
    return {"samples_per_second": samples / seconds, "mfu": flops / seconds / rate}


def peak_bytes(device: torch.device | str) -> int:
    """The most memory that this process has used: tensors on a CUDA device, else all of the process."""
    device = torch.device(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host.peak_memory()


def parse_profile(text: str) -> tuple[int, int]:
    """`A:B`, the first and the last iteration of a trace, counted from 1. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(f"--profile {text}: it takes A:B, the first and the last iteration to trace, such as 10:12")
    return int(match[1]), int(match[2])


@contextmanager
def profile(window: tuple[int, int] | None, folder: Path, start: int = 1) -> Iterator[Callable[[], None]]:
    """Trace the iterations of `window`, both ends included, into `folder/trace-A-B.json.gz`, for Perfetto.

    Yields a function to call at the end of every iteration; the first of them is iteration `start`. The iteration
    before the window warms the profiler up. The file appears when it is whole; SaveError when it cannot be written.
    """
    if window is None or window[1] < start:
        yield lambda: None
        return
    first, last = window

    def schedule(number: int) -> ProfilerAction:
        iteration = start + number
        if first <= iteration <= last:
            return ProfilerAction.RECORD_AND_SAVE if iteration == last else ProfilerAction.RECORD
        return ProfilerAction.WARMUP if iteration == first - 1 else ProfilerAction.NONE

    def save(profiler: torch.profiler.profile) -> None:
        name = f"trace-{first}-{last}"
        partial, target = folder / f".{name}.partial.json.gz", folder / f"{name}.json.gz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(partial))
            os.replace(partial, target)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise SaveError(f"could not write {target}: {error.strerror or error}") from error

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=save) as profiler:
        yield profiler.step


def check_report_to(report_to: str) -> None:
    """Raise ValueError for a report that is not known, or that this installation cannot make."""
    if report_to not in REPORTS:
        raise ValueError(f"--report_to {report_to}: it takes one of {', '.join(REPORTS)}")
    if report_to in ("wandb", "all") and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"--report_to {report_to}: Weights & Biases is not installed; `pip install wandb`, or use"
            " --report_to tensorboard"
        )


@contextmanager
def report(
    report_to: str, folder: Path, *, start: int = 1, config: Mapping[str, Any] | None = None
) -> Iterator[Callable[[Row], None]]:
    """Yields a function that takes a row of the log and shows its numbers in TensorBoard, Weights & Biases, or both.

    `start` is the run's first iteration. A run that goes on in `folder` goes on in both: in TensorBoard what was shown
    from `start` on is replaced; Weights & Biases takes no step twice and keeps what it has. Raises ValueError as
    `check_report_to` does.
    """
    check_report_to(report_to)
    with ExitStack() as stack:
        sinks: list[Callable[[int, dict[str, float]], None]] = []
        if report_to in ("tensorboard", "all"):
            board = stack.enter_context(SummaryWriter(str(folder / "tensorboard"), purge_step=start))

            def to_board(step: int, numbers: dict[str, float]) -> None:
                for name, number in numbers.items():
                    board.add_scalar(name, number, step)

            sinks.append(to_board)
        if report_to in ("wandb", "all"):
            run = stack.enter_context(_wandb_run(folder, config or {}))
            sinks.append(lambda step, numbers: run.log(numbers, step=step))

        def show(row: Row) -> None:
            numbers = {k: v for k, v in row.items() if k != "step" and isinstance(v, int | float)}
            for sink in sinks:
                sink(row["step"], numbers)

        yield show


def _wandb_run(folder: Path, config: Mapping[str, Any]) -> Any:
    wandb: Any = importlib.import_module("wandb")
    file = folder / RUN_ID_FILE
    if not file.exists():
        write_atomically(file, secrets.token_hex(4).encode())
    try:
        return wandb.init(
            project="tdm-fast", name=folder.name, id=file.read_text(), resume="allow", dir=str(folder), config=config
        )
    except wandb.Error as error:
        raise ValueError(
            f"--report_to wandb: {error}; `wandb login`, or set WANDB_MODE=offline, or use --report_to tensorboard"
        ) from error
