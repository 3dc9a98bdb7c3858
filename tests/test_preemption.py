"""Told to leave: one rank hears it, all save the same iteration and end; where a rank is lost, nobody saves."""

from __future__ import annotations

import functools
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import checkpoint_jobs as jobs
import few_ranks
import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig

from tdm_fast import cli
from tdm_fast.files import latest_checkpoint, locked
from tdm_fast.preemption import EXIT_CODE, ORPHANED, Preempted, Preemption

TORCHRUN_JOB = Path(__file__).with_name("torchrun_job.py")


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_flag(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert preemption.agreed() == (None, False) and preemption.agreed(failing=True) == (None, True)
        os.kill(os.getpid(), number)
        assert preemption.agreed() == preemption.agreed() == (number, False)
    assert signal.getsignal(number) == before
    with Preemption() as preemption:
        assert preemption.agreed().stop is None


def test_only_the_main_thread_hears() -> None:
    agreed = []

    def elsewhere() -> None:
        with Preemption() as preemption:
            agreed.append(preemption.agreed())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert agreed == [(None, False)]


def test_a_rank_without_torchrun_is_told_to_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    for variables, stop in (({}, None), ({"TORCHELASTIC_RUN_ID": "run"}, ORPHANED)):
        with monkeypatch.context() as patch:
            patch.delenv("TORCHELASTIC_RUN_ID", raising=False)
            for name, value in variables.items():
                patch.setenv(name, value)
            with Preemption() as preemption:
                assert preemption.agreed().stop is None
                patch.setattr(os, "getppid", lambda: 1)
                assert preemption.agreed().stop == stop
                os.kill(os.getpid(), signal.SIGTERM)
                assert preemption.agreed().stop == signal.SIGTERM


def test_leaving_is_one_line_and_code_143(capsys: pytest.CaptureFixture[str]) -> None:
    def leave() -> int:
        raise Preempted(signal.SIGUSR1, 7, Path("run/checkpoint-7"))

    assert cli.guarded(leave) == EXIT_CODE == 143
    assert capsys.readouterr().err == (
        "tdm-fast: stopped by SIGUSR1 after iteration 7, which is saved in run/checkpoint-7; the same command goes on"
        " from there\n"
    )


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 1)])
def test_all_ranks_leave_at_the_same_iteration(tmp_path: Path, number: signal.Signals, rank: int) -> None:
    folder, total = tmp_path / "run", 40
    job = few_ranks.start(functools.partial(jobs.train, every=0.05), 2, tmp_path / "first", folder, total)
    wait_for(lambda: latest_checkpoint(folder))
    os.kill(job.processes[rank].pid, number)
    assert job.wait() == [143, 143], job.errors()
    last = latest_checkpoint(folder)
    step = int(last.name.removeprefix("checkpoint-"))
    assert step < total
    for other in range(2):
        assert job.errors(other).strip() == (
            f"tdm-fast: stopped by {number.name} after iteration {step}, which is saved in {last}; the same command"
            " goes on from there"
        )
    again = few_ranks.start(jobs.train, 2, tmp_path / "again", folder, step + 2)
    assert again.wait() == [0, 0], again.errors()
    whole = few_ranks.start(jobs.train, 2, tmp_path / "whole", tmp_path / "undisturbed", step + 2)
    assert whole.wait() == [0, 0], whole.errors()
    ours, theirs = (torch.load(path / "result.pt") for path in (folder, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_is_not_waited_for_long(tmp_path: Path) -> None:
    job = few_ranks.start(
        functools.partial(jobs.train, every=0.02, limit=timedelta(seconds=1)),
        2,
        tmp_path / "job",
        tmp_path / "run",
        10**6,
    )
    wait_for(lambda: latest_checkpoint(tmp_path / "run"))
    os.kill(job.processes[1].pid, signal.SIGSTOP)
    time.sleep(1)  # a save that both had written already may be finished
    there = {*(tmp_path / "run").iterdir()}
    os.kill(job.processes[0].pid, signal.SIGTERM)  # as torchrun does; it must not try to save
    job.processes[0].join(40)
    code, left = job.processes[0].exitcode, {*(tmp_path / "run").iterdir()}
    job.processes[1].kill()
    assert code == 1, job.errors()
    assert "tdm-fast: another rank has died, or has not answered for 1 s" in job.errors(0)
    assert "Traceback" not in job.errors(0)
    assert {path.name for path in left - there} <= {path.name for path in left if path.suffix == ".partial"}


Torchrun = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def torchrun() -> Iterator[Torchrun]:
    """torchrun(*arguments, **environment) with two ranks; what a failed test leaves running is killed."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    started = []

    def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        job = subprocess.Popen(
            [*command, *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(job)
        return job

    yield start
    for job in started:
        job.kill()  # of which its ranks end, too
        job.communicate()


@pytest.mark.slow
def test_torchrun_hands_the_signal_on(torchrun: Torchrun, tmp_path: Path) -> None:
    signals = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    run = tmp_path / "run"
    known = "signals_to_handle" in inspect.signature(LaunchConfig).parameters
    flags = ["--signals-to-handle", signals] if known else []
    job = torchrun(*flags, TORCHRUN_JOB, run, 10**6, TORCHELASTIC_SIGNALS_TO_HANDLE=signals)
    wait_for(lambda: latest_checkpoint(run), 120)
    job.send_signal(signal.SIGUSR1)
    _, errors = job.communicate(timeout=60)
    assert job.returncode != 0
    said = set(re.findall(r"tdm-fast: stopped by SIGUSR1 after iteration (\d+)", errors))
    assert {f"checkpoint-{step}" for step in said} == {latest_checkpoint(run).name}, errors


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_ranks_save_and_leave_when_torchrun_dies(torchrun: Torchrun, tmp_path: Path, number: signal.Signals) -> None:
    """Of kill -9, or of a signal that it has not been told to hand on."""
    run = tmp_path / "run"
    job = torchrun(TORCHRUN_JOB, run, 10**6)
    wait_for(lambda: latest_checkpoint(run), 120)
    job.send_signal(number)
    _, errors = job.communicate(timeout=120)  # to the end of the ranks, which have the same stderr
    assert job.returncode == -number
    said = re.findall(r"tdm-fast: (?:rank 1: )?stopped because torchrun has died after iteration (\d+), which", errors)
    assert len(said) == 2 and len(set(said)) == 1, errors
    assert latest_checkpoint(run).name == f"checkpoint-{said[0]}"
    with locked(run):  # nobody is left in it
        assert not list(run.glob(".*.partial"))


@pytest.mark.slow
def test_torchrun_starts_again_from_the_last_checkpoint(torchrun: Torchrun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = torchrun("--max_restarts=1", TORCHRUN_JOB, run, 6, "writing")
    _, errors = job.communicate(timeout=240)
    assert job.returncode == 0, errors
    assert "going on from 2" in errors
    whole = few_ranks.start(jobs.train, 2, tmp_path / "whole", tmp_path / "undisturbed", 6)
    assert whole.wait() == [0, 0], whole.errors()
    ours, theirs = (torch.load(path / "result.pt") for path in (run, tmp_path / "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not list(run.glob(".*.partial"))
