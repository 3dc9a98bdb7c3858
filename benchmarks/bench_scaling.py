"""What a rank of many holds, sends and computes, found on fake tensors in one process: no other rank is there.

A fake process group stands for the cluster: collectives have their sizes and send nothing. The trainer's own iteration
runs on it, sharded as `--sharding` says, so the bytes are counted, not computed; `tdm_fast.traffic.least_bytes` has to
say the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from bench_step import SCHEDULE, Model, Rung, make_config, make_prompts

from tdm_fast.config import TrainConfig
from tdm_fast.distill import rolled_samples
from tdm_fast.memory import estimate, fill
from tdm_fast.models import OpenSoraT2V_v1_3
from tdm_fast.models.context import Context
from tdm_fast.models.denoiser import Denoiser
from tdm_fast.models.opensora_denoiser import OpenSoraDenoiser
from tdm_fast.ranks import mesh_shape, pretended
from tdm_fast.sizing import measure_costs
from tdm_fast.step import State, make_batch, make_state, update
from tdm_fast.traffic import Sizes, Tokens, Traffic, least_bytes, sizes_of

GPUS_PER_NODE = 8


def shared_rung(**flags: Any) -> Rung:
    """A rung of bench_step.py with these flags: bfloat16 compute, AdamW of 32 bits."""
    groups: dict[str, dict[str, Any]] = {"tdm": {}, "networks": {}, "optimiser": {}}
    for name, value in ({"mixed_precision": "bf16", "use_8bit_adam": False} | flags).items():
        group = next(group for group in groups if hasattr(getattr(TrainConfig(), group), name))
        groups[group][name] = value
    return Rung("", **groups)


def config_of(rung: Rung, model: Model, data_ranks: int, per_rank: int = 1) -> TrainConfig:
    return make_config(rung, replace(model, batch=data_ranks * per_rank), ema=True)


def on_meta(model: Model) -> Denoiser:
    """The network without values, as a rank has it that is going to load its own shards."""
    with torch.device("meta"):
        return OpenSoraDenoiser(OpenSoraT2V_v1_3(**model.network), SCHEDULE)


def trained_whole(state: State) -> int:
    """Numbers that train but are not sharded: an adapter, an embedding of K."""
    return sum(p.numel() for p in state.networks.trainable("student").values() if not hasattr(p, "device_mesh"))


def tokens_of(model: Model, context: int) -> Tokens:
    """Of one sample in a network without a batch: as `OpenSoraT2V_v1_3.forward` splits it."""
    network, (_, frames, height, width) = model.network, model.latents
    patch = network["patch_size"]
    tokens = frames * (height // patch) * (width // patch)
    sparse = network["sparse_n"] if network["sparse1d"] and network["num_layers"] > 2 else 1
    rows = Context("", 0, context).rows(tokens, sparse**2)
    dim = network["num_attention_heads"] * network["attention_head_dim"]
    return Tokens(rows, dim, network["num_layers"], patch**2 * network["out_channels"])


def count(rung: Rung, model: Model, world: int, per_rank: int = 1) -> dict[str, Any]:
    """Of the first of `world` ranks: the most it holds, and what its iteration communicates, counted and computed.

    The rollout is of one step, which takes as much memory as four do.
    """
    rung = replace(rung, tdm=rung.tdm | {"num_steps": 1})
    context = rung.networks.get("context_parallel", 1)
    config = config_of(rung, model, world // context, per_rank)
    n = config.networks
    shape = mesh_shape(world, min(GPUS_PER_NODE, world), n.sharding, n.shard_size, n.context_parallel)
    with pretended(world, shape, torch.device("cpu"), n.sharding) as ranks:
        batch = make_batch(0, make_prompts(model), config, [model.latents], ranks=ranks)
        teacher, counted, whole = on_meta(model), {}, 0
        shards = 1 if n.sharding == "none" else shape[1] * shape[2]
        sizes = sizes_of(teacher.model, shards)

        def build() -> State:
            nonlocal whole
            state = make_state(copy.deepcopy(teacher), config, ranks)
            whole = trained_whole(state)
            fill(state.fake_optimizer)
            fill(state.student_optimizer)
            return state

        def step(state: State, phase: Callable[[str], AbstractContextManager[None]]) -> None:
            with Traffic(state.networks.roles) as traffic:

                @contextmanager
                def both(name: str) -> Iterator[None]:
                    with phase(name), traffic.phase(name):
                        yield

                update(state, batch, config, both)
            counted.update(traffic.bytes)

        found = estimate(build, step, device="cpu", iterations=1)
    computed = least_bytes(
        config, Sizes(*sizes[:2], whole), shape, bf16=True, samples=per_rank,
        rolled=rolled_samples(config.tdm, batch.draws), tokens=tokens_of(model, context),
    )  # fmt: skip
    return {
        "mesh": list(shape), "peak_bytes": found.peak, "phase": found.phase, "state_bytes": found.state,
        "counted": {" ".join(key): size for key, size in sorted(counted.items())},
        "computed": {" ".join(key): size for key, size in sorted(computed.items())},
        "sizes": list(Sizes(*sizes[:2], whole)),
    }  # fmt: skip


def operations(model: Model, roles: str) -> dict[str, int]:
    """Model FLOPs of one sample's forward, and of a forward with its backward."""
    config = config_of(shared_rung(roles=roles, activation_checkpointing="none"), model, 1)
    costs = measure_costs(config, on_meta(model), make_prompts(model), [model.latents])[0]
    return {"forward": costs.teacher.forward, "trained": costs.student.trained}
