"""What ranks of one context are asked to do, in a module that processes started by the tests can import."""

from __future__ import annotations

import copy
import datetime
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tdm_fast.models import OpenSoraT2V_v1_3
from tdm_fast.models.context import Context, gather_tokens, heads_to_tokens, tokens_to_heads
from tdm_fast.models.denoiser import Roles
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.models.roles import make_networks
from tdm_fast.parallel import Compilations, apply_checkpointing, compile_blocks, compile_bound
from tdm_fast.schedule import Schedule

EVEN, ODD, FEW = (4, 8, 8), (3, 6, 10), (1, 4, 6)
"""Latent sizes: 64 tokens, a whole number for every rank and order; 45, for none; 6, fewer than ranks have rows."""
HEADS, DIM, PATCH_FEATURES = 4, 24, 16


def model(**changes: Any) -> OpenSoraT2V_v1_3:
    """Two dense layers and two sparse ones, of either order; every weight matters, in float64."""
    settings: dict[str, Any] = {
        "num_layers": 4, "num_attention_heads": HEADS, "attention_head_dim": DIM // HEADS, "in_channels": 4,
        "patch_size": 2, "patch_size_t": 1, "caption_channels": 8, "activation_fn": "gelu-approximate",
        "sparse1d": True, "sparse_n": 2,
    }  # fmt: skip
    made = OpenSoraT2V_v1_3(**settings | changes).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return made


def call(batch: int, size: tuple[int, int, int], masks: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    given = {
        "hidden_states": torch.randn(batch, 4, *size, **options),
        "timestep": torch.rand(batch, **options) * 999,
        "encoder_hidden_states": torch.randn(batch, 1, 5, 8, **options),
    }
    if masks:
        given["encoder_attention_mask"] = torch.rand(batch, 1, 5, generator=generator) > 0.4
        # Whole patches, and of the last sample so many that some subsequence has no key left.
        keep = torch.rand(batch, size[0], size[1] // 2, size[2] // 2, generator=generator) > 0.3
        keep[-1].flatten()[1::2] = False
        given["attention_mask"] = keep.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return given


def outcome(network: OpenSoraT2V_v1_3, given: dict[str, Tensor]) -> list[Tensor]:
    """The output, and the gradients of all parameters of a loss that depends on every element."""
    output = network(**given).sample
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad((weights * output.square()).sum(), parameters, allow_unused=True)
    zeros = (torch.zeros_like(parameter) for parameter in parameters)
    return [output.detach(), *(zero if mine is None else mine for mine, zero in zip(gradients, zeros, strict=True))]


def assert_one_ranks(mine: list[Tensor], expected: list[Tensor], relative: float = 1e-12) -> None:
    """This rank's output is one rank's, the sum of the ranks' gradients is its gradient."""
    # Sums that cancel, such as the gradients of keys' biases, round relative to what they are sums of.
    overall = max(float(wanted.abs().max()) for wanted in expected[1:] or expected)
    for index, (tensor, wanted) in enumerate(zip(mine, expected, strict=True)):
        if index:
            dist.all_reduce(tensor)
        largest = max(float(wanted.abs().max()), 1e-2 * overall if index else 0)
        difference = float((tensor - wanted).abs().max())
        assert difference <= relative * largest, f"tensor {index}: {difference} of {largest}"


class Sent(TorchDispatchMode):
    """Counts what this rank sends to others."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = {"all_to_all": 0, "all_gather": 0}
        self.calls = dict.fromkeys(self.bytes, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, ranks = func._opname, dist.get_world_size()
        if name in self.bytes:
            share = (ranks - 1) / ranks if name == "all_to_all" else ranks - 1
            self.bytes[name] += round(args[0].nbytes * share)
            self.calls[name] += 1
        assert func.namespace not in ("c10d", "_c10d_functional"), f"{func} is not counted"
        return func(*args, **kwargs or {})


# ---- what the ranks do: each function runs on all of them


def same(batch: int, size: tuple[int, int, int], masks: bool, **changes: Any) -> None:
    one = model(**changes)
    many = copy.deepcopy(one)
    many.set_context_group(dist.group.WORLD)
    given = call(batch, size, masks)
    assert_one_ranks(outcome(many, given), outcome(one, given))


def set_and_taken_off() -> None:
    one, given = model(), call(2, ODD, masks=True)
    expected = outcome(one, given)
    many = copy.deepcopy(one)
    many.set_context_group(dist.group.WORLD)
    twin = copy.deepcopy(many)
    assert_one_ranks(outcome(twin, given), expected)
    many(**given)
    many.set_context_group(None)
    assert all(map(torch.equal, outcome(many, given), expected))
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    many.set_context_group(alone)
    with Sent() as sent:
        assert all(map(torch.equal, outcome(many, given), expected))
    assert not any(sent.calls.values())
    not_mine = dist.new_group([0])
    if dist.get_rank():
        with pytest.raises(ValueError, match="not in the context group"):
            many.set_context_group(not_mine)


def refused() -> None:
    ranks = dist.get_world_size()
    network = model(num_attention_heads=9, attention_head_dim=6)
    message = f"a context group of {ranks} ranks cannot share 9 attention heads evenly; sizes that do: 1, 3, 9"
    with pytest.raises(ValueError, match=message):
        network.set_context_group(dist.group.WORLD)
    given = call(1, EVEN)
    assert network(**given).sample.isfinite().all()  # and nothing was set


def checkpointed(kind: str) -> None:
    one = model()
    many = copy.deepcopy(one)
    many.set_context_group(dist.group.WORLD)
    if kind == "diffusers":
        many.train().enable_gradient_checkpointing()
    else:
        apply_checkpointing(many, kind)  # type: ignore[arg-type]
    given = call(2, ODD, masks=True)
    expected = outcome(one, given)
    with Sent() as sent:
        found = outcome(many, given)
    assert sent.calls["all_to_all"] == 4 * {"none": 4, "selective": 4, "block": 6, "diffusers": 6}[kind]
    assert_one_ranks(found, expected)


def compiled(kind: str, *batches: int, **changes: Any) -> None:
    one = model(**changes)
    many = copy.deepcopy(one)
    many.set_context_group(dist.group.WORLD)
    denoiser = OpenSoraDenoiser(many, Schedule.ddpm(prediction_type="v_prediction"))
    compilations = Compilations(compile_bound(Roles(denoiser, denoiser, denoiser)), "aot_eager")
    apply_checkpointing(many, kind)  # type: ignore[arg-type]
    compile_blocks(many, compilations)
    for batch in batches:
        given = call(batch, ODD)
        assert_one_ranks(outcome(many, given), outcome(one, given))
    # A kind of block is one program for every batch above one, with a group as without, and for either sparse order,
    # because ODD's tokens make subsequences of 23 and of 22 in both.
    kinds = len({subsequences for subsequences, _ in many._layout_kinds})
    assert compilations.count == len({min(batch, 2) for batch in batches}) * kinds


def whole_model_compiled() -> None:
    one = model(num_layers=3)
    many = copy.deepcopy(one)
    many.set_context_group(dist.group.WORLD)
    given = call(2, ODD)
    expected = outcome(one, given)
    many.forward = torch.compile(many.forward, fullgraph=True, backend="aot_eager")  # type: ignore[method-assign]
    assert_one_ranks(outcome(many, given), expected)


def roles(kind: str) -> None:
    """Student and fake made after the teacher has a group; LoRA adapters in use."""
    found = []
    for group in (None, dist.group.WORLD):
        teacher = OpenSoraDenoiser(model(), Schedule.ddpm(prediction_type="v_prediction"))
        teacher.model.set_context_group(group)
        networks = make_networks(teacher, kind=kind, lora_rank=2, teacher_dtype=None)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for name, parameter in networks.roles.student.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        for network in networks.models():
            apply_checkpointing(network, "block")
        with networks.roles.student.context or torch.enable_grad():
            given = call(2, ODD)
            found.append(outcome(networks.roles.student.model, given))
        with torch.no_grad():
            found[-1].insert(0, teacher.model(**given).sample)
    expected, mine = found
    assert_one_ranks(mine[:1], expected[:1])
    assert_one_ranks(mine[1:], expected[1:])
    assert any(bool((tensor - expected[0]).any()) for tensor in expected[1:2]) == (kind == "lora")


def counted() -> None:
    ranks = dist.get_world_size()
    for batch, size, rows in ((1, EVEN, 64 // ranks), (3, ODD, {2: 24, 4: 12}[ranks])):
        network = model()
        network.set_context_group(dist.group.WORLD)
        given = call(batch, size)
        block = 4 * batch * rows * DIM * (ranks - 1) // ranks * 8
        gathered = (ranks - 1) * batch * rows * PATCH_FEATURES * 8
        with Sent() as sent, torch.no_grad():
            network(**given)
        assert sent.calls == {"all_to_all": 2 * 4, "all_gather": 1}
        assert sent.bytes == {"all_to_all": 4 * block, "all_gather": gathered}
        with Sent() as sent:
            outcome(network, given)
        assert sent.calls == {"all_to_all": 4 * 4, "all_gather": 1}
        assert sent.bytes == {"all_to_all": 4 * 2 * block, "all_gather": gathered}


def kept(network: OpenSoraT2V_v1_3, given: dict[str, Tensor]) -> int:
    """Bytes of distinct storages that the blocks keep for backward, weights apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    alive: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            alive[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network(**given)
    return sum(tensor.untyped_storage().nbytes() for tensor in alive.values())


def memory(kind: str) -> None:
    """1 / R of one rank's, but for what is no token's: text and modulation, and the patches of the whole video."""
    ranks = dist.get_world_size()
    network, given = model(), call(2, (8, 16, 16))
    given["encoder_hidden_states"] = given["encoder_hidden_states"][:, :, :1]
    apply_checkpointing(network, kind)  # type: ignore[arg-type]
    one = kept(network, given)
    network.set_context_group(dist.group.WORLD)
    many = kept(network, given)
    assert many <= 1.1 * one / ranks + given["hidden_states"].nbytes, f"{many} of {one}"


def exchanges() -> None:
    """The functions by themselves: where every element goes, and their derivatives."""
    context = Context.of(dist.group.WORLD)
    ranks, batch, rows, heads, s = context.size, 2, 8, 4, 2
    whole = torch.arange(3 * batch * ranks * rows * heads * 3, dtype=torch.float64)
    whole = whole.view(3, batch, ranks * rows, heads, 3)
    own = whole[:, :, context.rank * rows : (context.rank + 1) * rows].clone().requires_grad_()
    together = tokens_to_heads(*own, context, s)
    part = heads // ranks
    mine = whole[..., context.rank * part : (context.rank + 1) * part, :]
    assert torch.equal(together, mine.reshape(3, batch, ranks * rows // s, s * part, 3).movedim(0, 2))
    assert torch.equal(heads_to_tokens(together[:, :, 1], context, s), own[1])
    weights = torch.randn(own.shape, dtype=torch.float64)
    back = torch.stack([heads_to_tokens(x, context, s) for x in together.unbind(2)])
    assert torch.equal(torch.autograd.grad((weights * back).sum(), own)[0], weights)

    tokens = ranks * rows - 3
    held = whole[0, :, context.own(tokens, rows), 0].clone().requires_grad_()
    gathered = gather_tokens(held, context, tokens, rows)
    assert torch.equal(gathered, whole[0, :, :tokens, 0])
    weights = torch.arange(gathered.numel(), dtype=torch.float64).view_as(gathered)
    (gradient,) = torch.autograd.grad((weights * gathered).sum(), held)
    assert torch.equal(gradient, weights[:, context.own(tokens, rows)])

    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    x = torch.randn(ranks, 2, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.tdm_fast.all_to_all.default, (x, context.group), test_utils=checks)
    arguments = (x, context.rank, ranks, context.group)
    torch.library.opcheck(torch.ops.tdm_fast.all_gather.default, arguments, test_utils=checks)
    for dtype in (torch.bfloat16, torch.float16):
        half = own.to(dtype)
        assert torch.equal(heads_to_tokens(tokens_to_heads(*half, context, s)[:, :, 0], context, s), half[0])


Job = tuple[Callable[..., None], tuple[Any, ...], dict[str, Any]]


def job(function: Callable[..., None], *arguments: Any, **settings: Any) -> Job:
    return function, arguments, settings


QUICK: dict[str, Job] = {
    "exchanges": job(exchanges),
    "set and taken off": job(set_and_taken_off),
    "refused": job(refused),
    **{
        f"{name}, batch {batch}, {'masks' if masks else 'no masks'}": job(same, batch, size, masks)
        for name, size in (("even", EVEN), ("odd", ODD), ("few tokens", FEW))
        for batch in (1, 3)
        for masks in (False, True)
    },
    "sparse in fours": job(same, 2, ODD, True, sparse_n=4, num_layers=5),
    "all layers dense": job(same, 2, ODD, False, sparse1d=False),
    "all layers dense, masks": job(same, 2, ODD, True, sparse1d=False),
    **{f"checkpointing {kind}": job(checkpointed, kind) for kind in ("none", "block", "selective", "diffusers")},
    "roles full": job(roles, "full"),
    "roles lora": job(roles, "lora"),
    "bytes": job(counted),
    **{f"memory, {kind}": job(memory, kind) for kind in ("none", "block")},
}

COMPILED: dict[str, Job] = {
    "none": job(compiled, "none", 1, 2, 3),
    "block": job(compiled, "block", 2, sparse1d=False),
    "selective": job(compiled, "selective", 2, sparse1d=False),
    "as a whole": job(whole_model_compiled),
}

JOBS: dict[str, dict[str, Job]] = {"2 ranks": QUICK, "2 ranks, compiled": COMPILED, "4 ranks": QUICK}
"""By a name that begins with the number of ranks."""


def run_jobs(rank: int, ranks: int, name: str, folder: str) -> None:
    """The `JOBS` of a name, in order, on one rank; what came of each goes to a file.

    A failure ends the rank, and so the others.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=150),
    )
    results = {}
    for job_name, (function, arguments, settings) in JOBS[name].items():
        torch.manual_seed(0)
        torch.compiler.reset()
        try:
            function(*arguments, **settings)
            results[job_name] = "passed"
        except BaseException:
            results[job_name] = traceback.format_exc()
            break
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    if all(result == "passed" for result in results.values()):
        dist.barrier()
    os._exit(0)  # gloo's threads may outlive the group, and a regular exit then ends in std::terminate
