"""A store for process groups that a restart by torchrun begins empty."""

from __future__ import annotations

import json
import time
import uuid

import torch.distributed as dist

PREFIX = "tdm_fast"


def fresh_store(limit: float = 600.0) -> tuple[dist.Store, int, int]:
    """The store that torchrun's environment names, without what an earlier start left in it; rank and world size.

        store, rank, world = fresh_store()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)

    torchrun --max-restarts keeps one store for all starts, and gloo finds there the addresses of processes that are
    dead: `init_process_group` and `new_group` fail after a restart, or not, as it happens. The number of the restart
    does not tell starts apart, as not all nodes count alike. So the ranks agree on a name that is new: each shows one
    of its own, and rank 0 gives its to those whose names it has seen, which only one that is alive can have done.
    Raises RuntimeError when that takes over `limit` seconds.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    mine, end = uuid.uuid4().hex, time.monotonic() + limit
    store.set(f"{PREFIX}/taken/{rank}", "none")
    store.set(f"{PREFIX}/shown/{rank}", mine)
    if rank == 0:
        shown, taken = ([f"{PREFIX}/{what}/{other}" for other in range(1, world)] for what in ("shown", "taken"))
        while True:
            store.set(f"{PREFIX}/offer", json.dumps([mine, *_read(store, shown)]))
            if all(name == mine for name in _read(store, taken)):
                break
            _pause(end)
        name = mine
    else:
        while mine not in (offer := json.loads(_read(store, [f"{PREFIX}/offer"])[0])):
            _pause(end)
        name = offer[0]
        store.set(f"{PREFIX}/taken/{rank}", name)
    return dist.PrefixStore(f"{PREFIX}/{name}", store), rank, world


def _read(store: dist.Store, keys: list[str]) -> list[str]:
    return [value.decode() for value in store.multi_get(keys)] if keys else []


def _pause(end: float) -> None:
    if time.monotonic() > end:
        raise RuntimeError("the ranks have not all started in time; torchrun's log of the missing ones says why")
    time.sleep(0.02)
