"""Sharded networks: the same numbers as one process, the fewest bytes, no whole copy while loading."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_scaling import count, shared_rung
from bench_step import MODELS
from rank_runs import run_ranks
from safetensors.torch import save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tdm_fast import sizing, step
from tdm_fast.config import ModelConfig, OptimiserConfig, RunConfig, TrainConfig
from tdm_fast.distill import TDMConfig, rolled_samples
from tdm_fast.memory import Estimate, TensorMemory
from tdm_fast.models.loading import Weights, load_pipeline
from tdm_fast.models.roles import make_networks
from tdm_fast.parallel import Compilations
from tdm_fast.ranks import Ranks, joined
from tdm_fast.sharding import collect, fill_
from tdm_fast.sizing import with_flags
from tdm_fast.step import Batch, State, make_batch, make_state, update, uses_bf16
from tdm_fast.traffic import Tokens, Traffic, least_bytes, sizes_of
from tdm_fast.train import prompt_cache, prompts_of, train

CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_teacher: Path, tmp_path: Path) -> TrainConfig:
    config = TrainConfig(
        model=ModelConfig(model=tiny_teacher),
        tdm=TDMConfig(num_steps=4, seed=4),
        optimiser=OptimiserConfig(max_train_steps=20, train_batch_size=4, learning_rate=1e-3, lr_warmup_steps=1),
        run=RunConfig(output_dir=tmp_path / "run", num_eval_videos=0),
    )
    prompt_cache(config, load_pipeline(tiny_teacher), prompts_of(config))  # once, for all ranks
    return config


Seen = Callable[[int, State, Batch], None]


def iterate(config: TrainConfig, ranks: Ranks, iterations: int, before: Seen | None = None) -> tuple[State, list[Any]]:
    """Iterations of this rank, and what each said."""
    whole = load_pipeline(config.model.model)
    cache = prompt_cache(config, whole, prompts_of(config))
    sharded = ranks.world > 1 and config.networks.sharding != "none"
    teacher = load_pipeline(config.model.model, empty=("transformer",)) if sharded else whole
    state = make_state(teacher.denoiser, config, ranks, teacher.weights if sharded else None)
    rows = []
    for iteration in range(iterations):
        batch = make_batch(iteration, cache, config, [whole.latent_shape], ranks=ranks)
        if before is not None:
            before(iteration, state, batch)
        rows.append({name: value.item() for name, value in update(state, batch, config, nullcontext).items()})
    return state, rows


def rows_of(config: TrainConfig, iterations: int) -> list[Any]:
    n = config.networks
    with joined(CPU, n.sharding, n.shard_size, n.context_parallel) as ranks:
        state, rows = iterate(config, ranks, iterations)
        collected = collect(state.networks, state.student_weights, ranks)
        return [rows, collected and collected.weights]


def assert_same(found: list[Any], wanted: list[Any], rtol: float = 1e-5) -> None:
    for name in ("loss_fake", "loss_student"):
        ours, theirs = (torch.tensor([row[name] for row in rows], dtype=torch.float64) for rows in (found, wanted))
        assert torch.allclose(ours, theirs, rtol=rtol, atol=0), (
            name,
            (ours / theirs - 1).abs().max(),
            [f"{x:.1e}" for x in ours / theirs - 1],
        )


CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, parts, one index": {"gradient_accumulation_steps": 2, "index_per": "iteration"},
    "full, unify, shared index, kept": {"unify": (2, 4), "share_index": True, "reshard_after_forward": False},
    "full, shared index, parts, block": {
        "share_index": True, "gradient_accumulation_steps": 2, "activation_checkpointing": "block", "fake_updates": 2,
    },
    "lora": {"roles": "lora", "lora_rank": 2, "unify": (2, 4)},
    "lora, parts, block": {
        "roles": "lora", "lora_rank": 2, "gradient_accumulation_steps": 2, "activation_checkpointing": "block",
    },
    "none": {"sharding": "none"},
    "none, parts, lora": {"sharding": "none", "roles": "lora", "lora_rank": 2, "gradient_accumulation_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("flags", CASES.values(), ids=CASES.keys())
def test_two_ranks_are_one(flags: dict[str, Any], config: TrainConfig) -> None:
    """Losses, and the averaged student, of one rank and of two; the one makes no parts."""
    config = with_flags(config, learning_rate=2e-5, **flags)
    _, alone = iterate(with_flags(config, gradient_accumulation_steps=1), Ranks(), 4)
    results = run_ranks(2, rows_of, config, 4)
    for rows, _ in results:
        assert_same(rows, alone)
        assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in alone], rel=1e-4)
    assert results[0][0] == results[1][0]
    assert results[0][1] and results[1][1] is None


@pytest.mark.parametrize(
    "flags",
    [{}, *(pytest.param(f, marks=pytest.mark.slow) for f in ({"sharding": "none"}, {"context_parallel": 2}))],
    ids=["sharded", "batch split", "tokens split"],
)
def test_twenty_iterations(flags: dict[str, Any], config: TrainConfig) -> None:
    """At the default rates: Adam without momentum divides a gradient by its size, so rounding grows with the rate."""
    config = with_flags(config, learning_rate=2e-5)
    _, alone = iterate(config, Ranks(), 20)
    assert_same(run_ranks(2, rows_of, with_flags(config, **flags), 20)[0][0], alone)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"roles": "lora", "lora_rank": 2}], ids=["full", "lora"])
def test_copies_of_shards(flags: dict[str, Any], config: TrainConfig) -> None:
    """Two copies of two shards each: HSDP on four ranks."""
    config = with_flags(config, **flags)
    _, alone = iterate(config, Ranks(), 3)
    for rows, _ in run_ranks(4, rows_of, with_flags(config, sharding="hybrid", shard_size=2), 3):
        assert_same(rows, alone)


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, {}),
        (2, {"roles": "lora", "lora_rank": 2, "unify": (2, 4)}),
        (2, {"sharding": "none"}),
        pytest.param(4, {"sharding": "hybrid", "shard_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["full", "lora", "none", "hybrid"],
)
def test_ranks_that_share_a_sample(world: int, flags: dict[str, Any], config: TrainConfig) -> None:
    """Two ranks split the tokens of every sample; on four, two such pairs have samples of their own."""
    config = with_flags(config, **flags)
    _, alone = iterate(config, Ranks(), 3)
    for rows, _ in run_ranks(world, rows_of, with_flags(config, context_parallel=2), 3):
        assert_same(rows, alone)
        assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in alone], rel=1e-4)


@pytest.mark.parametrize("flags", [{}, {"roles": "lora", "lora_rank": 2}], ids=["full", "lora"])
def test_bf16_rounds_no_more_than_on_one_rank(flags: dict[str, Any], config: TrainConfig) -> None:
    """Two ranks' losses are at most twice as far from fp32's as one rank's are."""
    config = with_flags(config, mixed_precision="no", **flags)
    exact, alone = (iterate(with_flags(config, mixed_precision=kind), Ranks(), 3)[1] for kind in ("no", "bf16"))
    found = run_ranks(2, rows_of, with_flags(config, mixed_precision="bf16"), 3)[0][0]

    def errors(rows: list[Any]) -> torch.Tensor:
        names = ("loss_fake", "loss_student")
        return torch.tensor(
            [[row[name] / wanted[name] - 1 for name in names] for row, wanted in zip(rows, exact, strict=True)]
        )

    assert errors(found).abs().max() <= 2 * errors(alone).abs().max() < 0.2


def compiled(config: TrainConfig, iterations: int, backend: str) -> Any:
    """Iterations of sharded, compiled networks: what each said, and the graphs made before and after the warm-up."""
    step.Compilations = functools.partial(Compilations, backend=backend)  # type: ignore[misc, assignment]

    def warm_up(iteration: int, state: State, batch: Batch) -> None:
        if iteration == 0:
            cache = prompt_cache(config, load_pipeline(config.model.model), prompts_of(config))
            step.compile_now(state, cache, config, [tuple(batch.latents.shape[1:])])

    with joined(CPU) as ranks:
        state, rows = iterate(config, ranks, iterations, warm_up)
        assert state.compilations is not None
        return rows, state.compilations.at_warm_up, state.compilations.after_warm_up


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "flags", [{}, {"roles": "lora", "lora_rank": 2, "activation_checkpointing": "block"}], ids=["full", "lora, block"]
)
def test_compiled_blocks_in_shards(flags: dict[str, Any], backend: str, config: TrainConfig) -> None:
    config = with_flags(config, **flags)
    _, alone = iterate(config, Ranks(), 3)
    for rows, before, after in run_ranks(2, compiled, with_flags(config, compile="on"), 3, backend, timeout=900):
        assert before > 0 and after == 0
        assert_same(rows, alone)


def automatic(config: TrainConfig, fitting: tuple[int, int]) -> Any:
    """What ranks whose devices fit so many samples each resolve `auto` to, and once more when they go on from that."""

    def fits_by_estimate(estimate_of: Callable[[int, str], Estimate], available: int) -> Callable[[int, str], bool]:
        assert 0 < estimate_of(1, "none").peak < available
        return lambda size, _: size <= fitting[torch.distributed.get_rank()]

    sizing.fits_by_estimate = fits_by_estimate  # type: ignore[assignment]
    with joined(CPU) as ranks:
        teacher = load_pipeline(config.model.model)
        given = teacher.denoiser, prompt_cache(config, teacher, prompts_of(config)), [teacher.latent_shape]
        found = sizing.with_batch_size(config, *given, None, ranks)
        return found, sizing.with_batch_size(config, *given, found.flat(), ranks)


@pytest.mark.slow
def test_ranks_agree_on_the_batch_and_keep_it(config: TrainConfig) -> None:
    """Two parts of two samples on each of two ranks; a run that goes on asks nobody."""
    config = with_flags(config, train_batch_size="auto", gradient_accumulation_steps=2)
    for found, again in run_ranks(2, automatic, config, (3, 2)):
        assert (found.optimiser.train_batch_size, found.networks.activation_checkpointing) == (8, "none")
        assert again == found
    teacher = load_pipeline(config.model.model)
    with pytest.raises(ValueError, match=r"--train_batch_size 5: .* a multiple of 2 .* 4 or 6 would do"):
        sizing.with_batch_size(config, teacher.denoiser, [], [], {"train_batch_size": 5})  # type: ignore[arg-type]


# ---- bytes


def sizes(state: State, role: str) -> tuple[int, int, int]:
    """Of a role's network: parameters, those in blocks, and those that train but are whole on every rank."""
    model = getattr(state.networks.roles, role).model
    of_model = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    blocks = sum(p.numel() for name, p in of_model.items() if name.startswith("transformer_blocks."))
    trained = state.networks.trainable(role) if role != "teacher" else {}
    return (
        sum(p.numel() for p in of_model.values()),
        blocks,
        sum(p.numel() for p in trained.values() if not isinstance(p, DTensor)),
    )


def traffic_of(config: TrainConfig) -> Any:
    """The bytes of the second iteration, when everything has been made; the sizes of the networks; bytes computed."""
    n = config.networks
    with joined(CPU, n.sharding, n.shard_size, n.context_parallel) as ranks:
        state, _ = iterate(config, ranks, 1)
        whole = load_pipeline(config.model.model)
        cache = prompt_cache(config, whole, prompts_of(config))
        batch = make_batch(1, cache, config, [whole.latent_shape], ranks=ranks)
        roles = {role: sizes(state, role) for role in ("student", "teacher", "fake")}
        with Traffic(state.networks.roles) as traffic:
            update(state, batch, config, traffic.phase)
        assert batch.draws.needed
        assert ranks.mesh is not None and ranks.weights is not None
        replicate, shard, context = ranks.mesh.shape
        network, samples = whole.denoiser.model, len(batch.prompts)
        computed = least_bytes(
            config,
            sizes_of(network, ranks.weights.size(-1), roles["student"][2]),
            (replicate, shard, context),
            bf16=uses_bf16(config, CPU),
            samples=samples,
            rolled=rolled_samples(batch.tdm, batch.draws),
            tokens=tokens_of(network, whole.latent_shape, context),
        )
        return dict(traffic.bytes), roles, computed


def tokens_of(network: Any, latents: tuple[int, ...], context: int) -> Tokens:
    """Of a sparse network with patches of 2 x 2."""
    n, tokens = network.config.sparse_n, latents[1] * (latents[2] // 2) * (latents[3] // 2)
    rows = -(-tokens // (n * n * context)) * n * n
    dim = network.config.num_attention_heads * network.config.attention_head_dim
    return Tokens(rows, dim, network.config.num_layers, 4 * network.out_channels)


SUMS = {("optimiser", "optimiser", "all-reduce"): 2 * 2 * 4}
"""The norm and the loss of two updates."""


def test_the_bytes_of_full_roles(config: TrainConfig) -> None:
    """With P numbers in a network, B of them in blocks: what tdm_fast.sharding says, 4 bytes each."""
    found, roles, computed = run_ranks(2, traffic_of, config)[0]
    assert computed == found
    p, b, _ = roles["student"]
    assert found == {
        ("rollout", "student", "gather"): 4 * p,
        ("fake", "fake", "gather"): 4 * (p + b),
        ("fake", "fake", "reduce"): 4 * p,
        ("student", "student", "gather"): 4 * (p + b),
        ("student", "teacher", "gather"): 4 * p,
        ("student", "fake", "gather"): 4 * p,
        ("student", "student", "reduce"): 4 * p,
        **SUMS,
    }


def test_bf16_halves_the_gathers_and_not_the_reductions(config: TrainConfig) -> None:
    flags = {"mixed_precision": "bf16", "reshard_after_forward": False, "gradient_accumulation_steps": 2}
    found, roles, computed = run_ranks(2, traffic_of, with_flags(config, **flags))[0]
    assert computed == found
    p, _, _ = roles["student"]
    assert found == {
        ("rollout", "student", "gather"): 2 * p,
        ("fake", "fake", "gather"): 2 * p,
        ("fake", "fake", "reduce"): 4 * p,
        ("student", "student", "gather"): 3 * 2 * p,  # of all three roles, before the first of them is called
        ("student", "student", "reduce"): 4 * p,
        **SUMS,
    }


@pytest.mark.parametrize("parts", [1, 2])
def test_the_bytes_of_adapters(parts: int, config: TrainConfig) -> None:
    """The base is gathered once for the rollout and the student's update, for the fake's twice or, in parts, once."""
    config = with_flags(config, roles="lora", lora_rank=2, gradient_accumulation_steps=parts)
    found, roles, computed = run_ranks(2, traffic_of, config)[0]
    assert computed == found
    p, b, adapter = roles["student"]
    by_phase = {}
    for (phase, _, collective), size in found.items():
        by_phase[phase, collective] = by_phase.get((phase, collective), 0) + size
    assert by_phase == {
        ("rollout", "gather"): 4 * p,
        ("fake", "gather"): 4 * (p + (b if parts == 1 else 0)),
        ("student", "gather"): 4 * p,
        ("communication", "all-reduce"): 2 * 4 * adapter,
        ("optimiser", "all-reduce"): 2 * 2 * 4,
    }


def test_the_bytes_of_whole_weights(config: TrainConfig) -> None:
    """Nothing is gathered; every gradient is all-reduced once, whatever the parts."""
    flags = {"sharding": "none", "gradient_accumulation_steps": 2}
    found, roles, computed = run_ranks(2, traffic_of, with_flags(config, **flags))[0]
    assert computed == found
    p, _, _ = roles["student"]
    assert found == {("fake", "fake", "all-reduce"): 4 * p, ("student", "student", "all-reduce"): 4 * p, **SUMS}


@pytest.mark.slow
def test_the_bytes_of_copies_and_contexts(config: TrainConfig) -> None:
    """Two copies of the weights, each over the two ranks that share samples: reduced there, then across."""
    flags = {"sharding": "hybrid", "shard_size": 2, "context_parallel": 2, "activation_checkpointing": "block"}
    found, roles, computed = run_ranks(4, traffic_of, with_flags(config, **flags))[0]
    assert computed == found
    p, _, _ = roles["student"]
    for role in ("fake", "student"):
        assert found[role, role, "reduce"] == 4 * p and found[role, role, "all-reduce"] == 4 * p / 2
    # Blocks run forward, again to recompute, and backward, where they are trained; the teacher's twice, for guidance.
    exchanged = {key[:2]: size for key, size in found.items() if key[2] == "all-to-all"}
    once = exchanged["student", "fake"]
    assert exchanged["fake", "fake"] == exchanged["student", "student"] == 3 * once
    assert exchanged["student", "teacher"] == 2 * once


PRETENDED: dict[str, tuple[int, dict[str, Any], int]] = {
    "full": (3, {}, 1),
    "full, shared index, kept": (16, {"share_index": True, "reshard_after_forward": False}, 2),
    "full, shared index, parts": (8, {"share_index": True, "gradient_accumulation_steps": 2, "fake_updates": 2}, 4),
    "full, hybrid, context, no guidance": (64, {"sharding": "hybrid", "context_parallel": 2, "cfg": 1.0}, 1),
    "lora, hybrid, context, shared index": (
        16, {"roles": "lora", "sharding": "hybrid", "context_parallel": 2, "share_index": True,
             "activation_checkpointing": "block"}, 1,
    ),
    "none, context": (8, {"sharding": "none", "context_parallel": 2, "activation_checkpointing": "selective"}, 1),
}  # fmt: skip


@pytest.mark.parametrize(
    ("world", "flags", "per_rank"),
    [
        pytest.param(*case, id=name, marks=() if name == "full" or "hybrid" in name else pytest.mark.slow)
        for name, case in PRETENDED.items()
    ],
)
def test_the_bytes_of_ranks_that_are_not_there(world: int, flags: dict[str, Any], per_rank: int) -> None:
    """Many more ranks than this machine could run, odd numbers of shards: counted on fake tensors, in bfloat16."""
    found = count(shared_rung(**flags), MODELS["dry"], world, per_rank)
    assert found["computed"] == found["counted"] and found["counted"]


# ---- what is not finite


def poisoned(config: TrainConfig, poisoned_rank: int) -> Any:
    """Three iterations, of which one rank spoils the second's gradient of the student: weights after each, counters."""
    seen = []

    def spoil(iteration: int, state: State, _: Batch) -> None:
        seen.append([p.detach().clone() for p in state.networks.trainable("student").values()])
        if iteration == 1 and torch.distributed.get_rank() == poisoned_rank:
            handle = state.networks.roles.student.register_forward_hook(
                lambda *found: found[2] * float("nan") if found[2].requires_grad else found[2]
            )
            seen.append(handle)
        elif iteration == 2 and len(seen) > 3:
            seen.pop(2).remove()

    with joined(CPU, config.networks.sharding, config.networks.shard_size) as ranks:
        state, rows = iterate(config, ranks, 3, spoil)
        weights = [[p.full_tensor() if isinstance(p, DTensor) else p for p in part] for part in seen]
        last = [p.detach() for p in state.networks.trainable("student").values()]
        weights.append([p.full_tensor() if isinstance(p, DTensor) else p for p in last])
        return weights, rows


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, {}),
        pytest.param(4, {"sharding": "hybrid", "shard_size": 2}, marks=pytest.mark.slow),
        (2, {"roles": "lora", "lora_rank": 2}),
    ],
    ids=["full", "hybrid", "lora"],
)
def test_one_ranks_nan_skips_the_update_on_all(world: int, flags: dict[str, Any], config: TrainConfig) -> None:
    config = with_flags(config, lr_warmup_steps=0, **flags)
    for weights, rows in run_ranks(world, poisoned, config, world - 1):
        moved = [
            any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
            for before, after in itertools.pairwise(weights)
        ]
        assert moved == [True, False, True]
        assert [row["skipped_student"] for row in rows] == [0, 1, 0]
        assert [row["skipped_fake"] for row in rows] == [0, 0, 0]


# ---- loading


def loaded(config: TrainConfig) -> Any:
    """What making the networks takes: the most alive at once, the largest tensor made, and what stays."""
    with joined(CPU) as ranks:
        teacher = load_pipeline(config.model.model, empty=("transformer",))
        largest = Largest()
        with TensorMemory("cpu") as memory, largest:
            state = make_state(teacher.denoiser, config, ranks, teacher.weights)
        total = sum(p.nbytes for p in state.networks.roles.student.model.parameters())
        names = {n: p.full_tensor() for n, p in state.networks.roles.fake.model.named_parameters()}
        local = sum(p.to_local().nbytes for m in state.networks.models() for p in m.parameters())
        return memory.peak, memory.current, largest.bytes, total, local, names


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The largest tensor with memory of its own that an operator makes: safetensors' are views of a mapped file."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        view = func.is_view or func is torch.ops.aten.set_.source_Storage
        if isinstance(result, torch.Tensor) and not isinstance(result, DTensor) and not result.is_meta and not view:
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_no_rank_ever_holds_a_whole_copy(config: TrainConfig) -> None:
    """Three networks and the average, in shards, are all that two ranks hold, beside one shard that is being read."""
    config = with_flags(config, mixed_precision="no")
    original = dict(load_pipeline(config.model.model).denoiser.model.named_parameters())
    largest_shard = max(p.nbytes for p in original.values()) / 2
    for peak, held, largest, total, local, names in run_ranks(2, loaded, config):
        assert local == 3 * total / 2
        assert held <= 4 * total / 2 + 1000  # and a few counters
        assert peak <= 4 * total / 2 + 4 * largest_shard + 1000
        assert largest <= largest_shard
        assert all(torch.equal(names[name], p) for name, p in original.items())


def private_memory(folder: Path) -> Any:
    """Filling a network of one large weight: the most private memory that it takes, the rank's share, its rows."""
    seen: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.append(anonymous())

    with joined(CPU) as ranks:
        network = torch.nn.Linear(4096, 4096, bias=False, device="meta")
        fully_shard(network, mesh=ranks.weights)
        seen.append(anonymous())
        watcher = threading.Thread(target=watch)
        watcher.start()
        fill_([network], Weights(folder), CPU)
        done.set()
        watcher.join()
        rows = network.weight.to_local()
        return max(seen) - seen[0], rows.nbytes, rows.detach().clone()


def anonymous() -> int:
    """Bytes of this process's memory that are no file's."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def test_a_mapped_file_is_not_read_into_private_memory(tmp_path: Path) -> None:
    """Neither counter of the test above sees what safetensors does; the kernel sees it all, with some of other uses."""
    weight = torch.rand(4096, 4096)
    save_file({"weight": weight}, tmp_path / "weights.safetensors")
    for (peak, share, rows), wanted in zip(run_ranks(2, private_memory, tmp_path), weight.chunk(2), strict=True):
        assert 0.8 * share < peak < 1.3 * share  # some of it is memory that was there and free
        assert torch.equal(rows, wanted)


def test_a_students_folder_of_several_files_is_a_teacher(config: TrainConfig, tmp_path: Path) -> None:
    """What is beside its transformer, an adapter and biases of each number of steps, is added shard by shard."""
    teacher = load_pipeline(config.model.model).denoiser
    networks = make_networks(teacher, kind="lora", lora_rank=2, unify=(2, 4))
    for parameter in networks.trainable("student").values():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    nodes = {k: dataclasses.replace(config.tdm, num_steps=k).check() for k in (2, 4)}
    networks.save(tmp_path / "student", config.model.model, nodes, lora_save="adapter")
    theirs = with_flags(config, model=tmp_path / "student")
    _, alone = iterate(theirs, Ranks(), 2)
    assert alone[0]["loss_student"] != pytest.approx(iterate(config, Ranks(), 1)[1][0]["loss_student"], rel=1e-2)
    assert_same(run_ranks(2, rows_of, theirs, 2)[0][0], alone)
    with pytest.raises(ValueError, match=r"--lora_save adapter: .* an adapter or biases of its own .* merged would do"):
        train(with_flags(theirs, roles="lora", lora_save="adapter", cfg=1.0))
