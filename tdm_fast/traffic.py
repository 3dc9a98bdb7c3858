"""Bytes that a step communicates, counted as torch issues its collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tdm_fast.models.denoiser import Roles

PAYLOADS = {
    "_allgather_base_": ("gather", 0),
    "_reduce_scatter_base_": ("reduce", 1),
    "allreduce_": ("all-reduce", 0),
    "alltoall_base_": ("all-to-all", 1),
}
"""Collectives, and which argument holds all that is communicated."""


class Traffic(TorchDispatchMode):
    """Counts, inside the `with` block, the bytes of collectives by (phase, role, collective).

    A gather counts what it gives, a reduction (reduce-scatter) what it takes, an all-reduce its tensor: each the size
    of the whole tensor. Of n ranks each one sends and receives (n - 1) / n of it, and for an all-reduce twice that.
    Groups of one rank count nothing. The role is the network being called, or, in a backward, the one that trains.
    """

    def __init__(self, roles: Roles) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str, str]] = Counter()
        self._phase = self._role = "other"
        self._hooks = []
        for name, denoiser in zip(Roles._fields, roles, strict=True):
            self._hooks.append(denoiser.register_forward_pre_hook(lambda *_, name=name: self._enter(name)))
            self._hooks.append(denoiser.register_forward_hook(lambda *_: self._enter(None)))

    def _enter(self, role: str | None) -> None:
        self._role = role or {"rollout": "student"}.get(self._phase, self._phase)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's bytes to a phase of the step."""
        outer = self._phase, self._role
        self._phase = name
        self._enter(None)
        try:
            yield
        finally:
            self._phase, self._role = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and (name := func._schema.name.split("::")[1]) in PAYLOADS:
            collective, position = PAYLOADS[name]
            group = next(a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in a._type().name())  # type: ignore[attr-defined]
            if torch.distributed.ProcessGroup.unbox(group).size() > 1:
                tensors = [leaf for leaf in tree_leaves(args[position]) if isinstance(leaf, Tensor)]
                self.bytes[self._phase, self._role, collective] += sum(tensor.nbytes for tensor in tensors)
        return func(*args, **(kwargs or {}))

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)
