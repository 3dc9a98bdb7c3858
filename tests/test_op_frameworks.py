"""The ops under torch.compile, opcheck, autocast and loss scaling, and in a model under DDP and FSDP2 on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_cases import CASES, EVERY_CASE, SCHEDULES, Case, check_compiled, check_ops, normal, results
from torch import Tensor, nn

import tdm_fast
from tdm_fast import ops
from tdm_fast.ops.sample_intervals import _sample_intervals

BACKENDS = pytest.mark.parametrize("backend", ["torch", "cpp"])
FLOW = SCHEDULES["flow"]


@EVERY_CASE
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(case: Case, dynamic: bool) -> None:
    check_compiled(case, "cpu", "cpp", dynamic)


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", None)])
def test_one_iteration_compiled(compiler: str, dynamic: bool | None) -> None:
    """Draw, renoise and both losses in one graph; the seed a tensor, the iteration an int that counts."""
    torch.compiler.reset()

    def iteration(
        sample: Tensor, output: Tensor, scores: list[Tensor], seed: Tensor, number: int
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"seed": seed, "iteration": number}
        _, t_gen, t_mid, t = ops.sample_intervals(len(sample), num_steps=4, total_steps=900, **options)
        noisy, x0, weight = ops.renoise(sample, output, schedule=FLOW, t_gen=t_gen, t_mid=t_mid, t=t, **options)
        fake = ops.fake_score_loss_from_outputs(scores[2], noisy, x0, schedule=FLOW, t=t, log_weight=weight)
        student = ops.tdm_loss_from_outputs(
            output, sample, noisy, *scores, schedule=FLOW, t_gen=t_gen, t=t, cfg=4.5
        )  # fmt: skip
        return fake, student

    compiled = torch.compile(iteration, fullgraph=True, dynamic=dynamic, backend=compiler)
    for number, batch in enumerate((2, 3, 3, 3)):
        sample, *scores = (normal((batch, 4, 9), torch.float32, seed) for seed in range(4))
        output, seed = normal((batch, 4, 9), torch.float32, 5).requires_grad_(), torch.tensor(11)
        losses = [run(sample, output, scores, seed, number) for run in (iteration, compiled)]
        gradients = [torch.autograd.grad(student, output)[0] for _, student in losses]
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(gradients[1], gradients[0])


@BACKENDS
@EVERY_CASE
def test_opcheck(case: Case, backend: str) -> None:
    check_ops(case, "cpu", backend)


@BACKENDS
def test_opcheck_of_the_intervals(backend: str) -> None:
    options = (4, 900, [899, 674, 449, 224], 0, True, True, 20, 10, 20, torch.device("cpu"), backend)
    torch.library.opcheck(_sample_intervals, (None, torch.tensor(3), 7, 0, 5, 0, *options))


@BACKENDS
def test_autocast_keeps_the_dtypes_given(backend: str) -> None:
    latents = [normal((2, 33), torch.float32, seed) for seed in range(6)]
    for case in CASES.values():
        plain = results(case, latents[: case.latents], backend)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = results(case, latents[: case.latents], backend)
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(cast, plain, strict=True))


@BACKENDS
def test_a_scaler_scales_and_unscales(backend: str) -> None:
    """Mixed precision as trainers have it: network and latents in bfloat16 under autocast, the loss scaled."""
    torch.manual_seed(0)
    model, scaler = nn.Linear(16, 16), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    latents = [normal((4, 16), torch.float32, seed) for seed in range(4)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.tdm_loss(model(latents[0]), *latents[1:], cfg=4.5, backend=backend)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaled = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    ops.tdm_loss(model(latents[0]), *latents[1:], cfg=4.5, backend=backend).backward()
    for mine, parameter in zip(scaled, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=0.05, atol=2e-3)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.SiLU(), nn.Linear(20, 12))


def model_loss(model: nn.Module, part: slice) -> Tensor:
    latents = [normal((4, 12), torch.float32, seed)[part] for seed in range(4)]
    return ops.tdm_loss(model(latents[0]), *latents[1:], cfg=4.5)


_RANK = """
import os, sys, torch, torch.distributed as dist
import test_op_frameworks as tests
from torch.distributed.fsdp import fully_shard

how, rank, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = tests.small_model()
if how == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model)
else:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
loss = tests.model_loss(model, slice(2 * rank, 2 * rank + 2))
loss.backward()
whole = tests.small_model()
expected = tests.model_loss(whole, slice(0, 4))
expected.backward()
dist.all_reduce(loss.detach().div_(2))
torch.testing.assert_close(loss.detach(), expected.detach())
for mine, wanted in zip(model.parameters(), whole.parameters(), strict=True):
    gradient = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
    torch.testing.assert_close(gradient, wanted.grad)
dist.destroy_process_group()
print("the same", flush=True)
os._exit(0)  # gloo's threads may outlive the group, and a regular exit then ends in std::terminate
"""


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_ranks_give_the_gradient_of_one_process(how: str, tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(tdm_fast.__file__).parents[1]), str(Path(__file__).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    ranks = []
    for rank in range(2):
        command = [sys.executable, "-c", _RANK, how, str(rank), str(tmp_path / "store")]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks.append(subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes))
    outputs = [rank.communicate(timeout=600)[0] for rank in ranks]
    assert all(output.endswith("the same\n") for output in outputs), "\n".join(outputs)
