"""Runs of several ranks under torchrun and accelerate: one run, whatever its ranks; and how it ends when one fails."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import free_port, run_ranks, what_ranks_know
from safetensors.torch import load_file

from tdm_fast.ranks import check_batch, joined, mesh_shape
from tdm_fast.step import resolve_device

FLAGS = (
    "--max_train_steps 4 --train_batch_size 4 --num_eval_videos 0 --checkpointing_steps 2 --validation_steps 3"
    " --lr_warmup_steps 1 --learning_rate 1e-4 --report_to none"
).split()


def start(launcher: list[str], model: Path, output: Path, *flags: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", *launcher, "-m", "tdm_fast.train", "--model", model, "--output_dir", output]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(word) for word in (*command, *FLAGS, *flags)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def torchrun(ranks: int, *flags: str) -> list[str]:
    return ["torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port()), *flags]


def ended(process: subprocess.Popen[str], timeout: float = 120) -> str:
    """What it said, when it has ended."""
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        process.kill()


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows for name in ("loss_fake", "loss_student")]


@pytest.fixture(scope="module")
def alone(tiny_teacher: Path, start_command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process."""
    output = tmp_path_factory.mktemp("alone") / "run"
    command = start_command("train", "--model", tiny_teacher, "--output_dir", output, *FLAGS)
    assert command.wait() == 0, command.errors()
    return output


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_same(first: Path, second: Path) -> None:
    assert losses(first) == pytest.approx(losses(second), rel=1e-5)
    ours, theirs = student(first), student(second)
    assert ours.keys() == theirs.keys()
    # Adam without momentum can turn a gradient's rounding into a step of its rate.
    assert all(torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-4) for name in ours)
    assert [p.name for p in sorted((first / "samples").iterdir())] == [
        p.name for p in sorted((second / "samples").iterdir())
    ]


def test_torchrun_makes_the_run_of_one_process(alone: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    process = start(torchrun(2), tiny_teacher, tmp_path / "run")
    said = ended(process)
    assert process.returncode == 0, said
    assert_same(tmp_path / "run", alone)
    assert said.count("memory:") == 1  # only the first rank speaks


@pytest.mark.slow
def test_two_agents_are_two_nodes(alone: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """Two machines of two ranks each, weights sharded inside a machine and copied across."""
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", "run"]
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", *nodes, "--local-addr", "127.0.0.1"]
    agents = [start(launcher, tiny_teacher, tmp_path / "run", "--sharding", "hybrid") for _ in range(2)]
    said = [ended(agent) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(said)
    assert_same(tmp_path / "run", alone)


@pytest.mark.slow
def test_accelerate_launches_it_too(alone: Path, tiny_teacher: Path, tmp_path: Path) -> None:
    """As for GPUs, which starts processes as torchrun does, GPUs or not; here two machines of one process each."""
    where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(free_port())]
    machines = [accelerate("--multi_gpu", "--num_machines", "2", "--machine_rank", str(n), *where) for n in range(2)]
    processes = [start(launcher, tiny_teacher, tmp_path / "run", "--sharding", "none") for launcher in machines]
    said = [ended(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert_same(tmp_path / "run", alone)


def accelerate(*flags: str) -> list[str]:
    plain = ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return ["accelerate.commands.launch", *plain, *flags]


MPIRUN = """#!/bin/sh
# What Open MPI does for `mpirun --hostfile FILE --npernode 2 -n 2 --bind-to socket COMMAND...`.
[ "$1" = --version ] && echo "mpirun (Open MPI) 5.0" && exit
shift 8
for rank in 0 1; do
    OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$rank \\
        "$@" & pids="$pids $!"
done
for pid in $pids; do wait $pid || exit 1; done
"""


@pytest.mark.slow
def test_accelerate_starts_processes_on_cpus_by_mpi(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mpirun").write_text(MPIRUN)
    (tmp_path / "mpirun").chmod(0o755)
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    mpi = ["--mpirun_hostfile", str(tmp_path / "hosts"), "--main_process_port", str(free_port())]
    launcher = accelerate("--cpu", "--num_machines", "1", *mpi)
    process = start(launcher, tiny_teacher, tmp_path / "run", "--max_train_steps", "1")
    said = ended(process)
    assert process.returncode == 0, said
    assert len(losses(tmp_path / "run")) == 2
    assert len(list((tmp_path / "run" / "checkpoint-1").glob("__*.distcp"))) == 2, "each rank writes its shard"


def test_one_process_in_place_of_several_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """What `accelerate launch --cpu --num_processes 2` starts where no hosts are named; it takes the CPU, too."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device = resolve_device("auto")
    with joined(device) as ranks:
        assert (ranks.world, ranks.device) == (1, torch.device("cpu"))
    assert "`accelerate launch --cpu` has started one process" in capsys.readouterr().err


@pytest.mark.slow
def test_another_number_of_ranks_goes_on(alone: Path, tiny_teacher: Path, tmp_path: Path, start_command: Any) -> None:
    """Two ranks in shards make half of the run, one process the rest."""
    output = tmp_path / "run"
    process = start(torchrun(2), tiny_teacher, output, "--checkpointing_steps", "2")
    said = ended(process)
    assert process.returncode == 0, said
    again = ("--resume_from_checkpoint", "checkpoint-2")
    command = start_command("train", "--model", tiny_teacher, "--output_dir", output, *FLAGS, *again)
    assert command.wait() == 0, command.errors()
    assert_same(output, alone)


@pytest.mark.slow
def test_a_users_mistake_is_what_is_seen(tiny_teacher: Path, tmp_path: Path) -> None:
    process = start(torchrun(2), tiny_teacher, tmp_path / "run", "--train_batch_size", "5")
    said = ended(process)
    assert process.returncode == 1  # torchrun's; the ranks' is 2
    assert "tdm-fast: --train_batch_size 5: it is the number of samples of all ranks together" in said
    assert "4 or 6 would do" in said and re.search(r"exitcode\s*: 2", said)
    assert "Root Cause" in said and said.split("Root Cause")[1].count("4 or 6 would do") >= 1


def children(process: subprocess.Popen[str], output: Path) -> dict[int, int]:
    """Process ids of the ranks, by rank, once they train."""
    end = time.monotonic() + 90
    while not (output / "metrics.jsonl").exists() or not (output / "metrics.jsonl").read_text():
        assert time.monotonic() < end and process.poll() is None, "waited in vain"
        time.sleep(0.05)
    found = {}
    for line in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        variables = Path(f"/proc/{line}/environ").read_text().split("\0")
        found |= {int(v.removeprefix("RANK=")): int(line) for v in variables if v.startswith("RANK=")}
    return found


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_down(tiny_teacher: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    process = start(torchrun(2), tiny_teacher, output, "--max_train_steps", "100000")
    ranks = children(process, output)
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    said = ended(process, timeout=60)
    assert process.returncode == 1 and time.monotonic() - began < 60
    assert "Signal 9 (SIGKILL)" in said and re.search(r"rank\s*: 1 ", said.split("Root Cause")[1])
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


# ---- without a run


@pytest.mark.parametrize(
    ("arguments", "shape"),
    [
        ((8, 4, "full", None, 1), (1, 8, 1)),
        ((8, 4, "full", None, 2), (1, 4, 2)),
        ((8, 4, "none", None, 2), (4, 1, 2)),
        ((8, 4, "hybrid", None, 2), (2, 2, 2)),
        ((8, 4, "hybrid", 2, 1), (4, 2, 1)),
        ((1, 1, "full", None, 1), (1, 1, 1)),
    ],
)
def test_ranks_lie_on_a_mesh(arguments: Any, shape: tuple[int, int, int]) -> None:
    assert mesh_shape(*arguments) == shape


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((8, 4, "full", None, 3), "--context_parallel 3: it must divide the number of ranks, 8; 1, 2, 4, 8 do"),
        ((8, 4, "hybrid", 3, 1), "--shard_size 3: it must divide the number of ranks, 8.* 1, 2, 4, 8 would do"),
        ((8, 4, "hybrid", 2, 4), "--shard_size 2: .* a multiple of --context_parallel 4; 4, 8 would do"),
        ((1, 1, "full", None, 2), "--context_parallel 2: it must divide the number of ranks, 1; 1 do"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(arguments: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        mesh_shape(*arguments)


def test_a_batch_is_cut_into_equal_slices() -> None:
    check_batch(8, 2, 4)
    with pytest.raises(ValueError, match=r"--train_batch_size 12: .* a multiple of 8 \(4 ranks .* 8 or 16 would do"):
        check_batch(12, 2, 4)
    with pytest.raises(ValueError, match=r"--train_batch_size 3: .*; 8 would do"):
        check_batch(3, 2, 4)


def test_ranks_know_their_place() -> None:
    for rank, found in enumerate(run_ranks(4, what_ranks_know)):
        first = rank // 2 * 2
        assert found == (rank, rank // 2, 2, rank == 0, [first, first + 1], 0.5, (True, False), 2)
