"""Runs of tests do not estimate their memory and count their operations again where an equal run has done so.

Both take seconds, most of what a run of a tiny network takes, and are tested where they are made (test_memory.py).
"""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tdm_fast import sizing, train


def remember(folder: Path) -> None:
    """Have this process, and those forked from it, share what runs find out by files in `folder`."""
    sizing.estimate_run = _remembered(folder, sizing.estimate_run)
    train.measure_costs = _remembered(folder, train.measure_costs)


def _remembered(folder: Path, function: Callable[..., Any]) -> Callable[..., Any]:
    if hasattr(function, "remembers"):
        return function

    def call(config: Any, teacher: Any, cache: Any, shapes: Any, ranks: Any = None) -> Any:
        kinds = [(name, tuple(p.shape), p.dtype, p.device.type) for name, p in teacher.named_parameters()]
        about = [function.__name__, config.networks, config.tdm, config.optimiser, type(teacher.model).__name__]
        about += [sorted(teacher.model.config.items()), kinds, list(map(tuple, shapes)), sorted(cache.lengths)]
        about += [None if ranks is None else (ranks.world, ranks.data_ranks, ranks.context, str(ranks.device))]
        path = folder / f"{hashlib.sha256(repr(about).encode()).hexdigest()}.pickle"
        if path.exists():
            return pickle.loads(path.read_bytes())
        found = function(config, teacher, cache, shapes, ranks)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_bytes(pickle.dumps(found))
        partial.replace(path)
        return found

    call.remembers = True  # type: ignore[attr-defined]
    return call
