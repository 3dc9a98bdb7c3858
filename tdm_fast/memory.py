"""Memory: what a training step holds and when, what it will hold before it runs, and the largest batch that fits.

A tracker counts the storages of tensors as operators make them. It does so for real tensors and for fake ones alike
(`torch._subclasses.FakeTensorMode`: shapes without data), so that one function, run under both, says what a step takes
and what it will take.
"""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

S = TypeVar("S")

KINDS = ("none", "selective", "block")
"""Kinds of activation checkpointing, from the fastest, which holds most, to the one that holds least."""
MARGIN = 0.1
"""Part of a device's memory that stays free: allocators break memory into pieces, kernels take some while they run."""
MOST_SAMPLES = 64

OTHER = "other"
CUDA_GRANULARITY = 512
CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))  # v2, v1


class _Alive(NamedTuple):
    """A storage that is counted: what tells of its end, its bytes in the allocator's units, the phase that made it."""

    reference: weakref.ref[Any]
    size: int
    phase: str
    granularity: int


class TensorMemory(TorchDispatchMode):
    """Bytes of the tensors that are alive, as operators make and drop them inside the `with` block.

    Storages are counted, so a view costs nothing, a parameter, its gradient, an optimiser's moments and what autograd
    saved for the backward cost what they take, whoever holds them; each until it is freed. What was made before counts
    by `add`, or once an operator returns a view of it. Works on real and on fake tensors. What an operator takes for
    itself while it runs is not seen. Storages that are resized are, as FSDP2 does with gathered weights that it drops.

    `device` restricts it to tensors there; for CUDA every storage is rounded up to 512 bytes, as its caching allocator
    does. `torch.distributed._tools.mem_tracker.MemTracker` counts the same bytes, but refuses a network that is called
    more than once, as in a rollout.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.device = None if device is None else torch.device(device).type
        self.current = 0
        self.peak = 0
        self.peaks: dict[str, int] = {}
        """The most that was alive during each phase."""
        self.at_peak: dict[str, int] = {}
        """Of the peak, the bytes that each phase had made."""
        self.peak_phase = OTHER
        self._phase = OTHER
        self._born: Counter[str] = Counter()
        self._alive: dict[int, _Alive] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> TensorMemory:
        resize = self._resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resized = resize(storage, size)
            self._resized(storage)
            return resized

        # No operator, which this would see; torch.distributed's own tracker of memory does the same.
        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign, assignment]
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Attribute what the block makes, and the peaks within it, to `name`; an inner phase takes over for a while."""
        outer, self._phase = self._phase, name
        self._look()
        try:
            yield
        finally:
            self._phase = outer

    def add(self, *things: nn.Module | torch.optim.Optimizer | Tensor) -> None:
        """Count what was made before the tracker was: parameters, buffers, gradients, an optimiser's state, tensors."""
        for thing in things:
            if isinstance(thing, Tensor):
                self._see(thing)
            elif isinstance(thing, nn.Module):
                self.add(*thing.buffers())
                for parameter in thing.parameters():
                    self.add(parameter, *(() if parameter.grad is None else (parameter.grad,)))
            else:
                self.add(*(leaf for leaf in tree_leaves(list(thing.state.values())) if isinstance(leaf, Tensor)))
        self._look()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        self._look()
        return result

    def _see(self, tensor: Tensor) -> None:
        # A fake tensor's storage is on "meta"; asking for the device itself would be an operator.
        device = getattr(tensor, "fake_device", None) or tensor.device
        if self.device is not None and device.type != self.device:
            return
        granularity = CUDA_GRANULARITY if device.type == "cuda" else 1
        for storage in _storages(tensor):
            if storage._cdata in self._alive:
                self._resized(storage)
            else:
                self._count(storage, granularity)

    def _count(self, storage: torch.UntypedStorage, granularity: int) -> None:
        size = -(-storage.nbytes() // granularity) * granularity
        reference = weakref.ref(storage, partial(self._forget, storage._cdata))
        self._alive[storage._cdata] = _Alive(reference, size, self._phase, granularity)
        self._born[self._phase] += size
        self.current += size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage anew, in this phase, if it is known and has another size now."""
        known = self._alive.get(storage._cdata)
        if known is not None and not known.size - known.granularity < storage.nbytes() <= known.size:
            self._forget(storage._cdata)
            self._count(storage, known.granularity)
            self._look()

    def _forget(self, key: int, _: object = None) -> None:
        gone = self._alive.pop(key)
        self._born[gone.phase] -= gone.size
        self.current -= gone.size

    def _look(self) -> None:
        self.peaks[self._phase] = max(self.peaks.get(self._phase, 0), self.current)
        if self.current > self.peak:
            self.peak, self.peak_phase, self.at_peak = self.current, self._phase, dict(+self._born)


def _storages(tensor: Tensor) -> Iterator[Any]:
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            inner = getattr(tensor, name)
            if isinstance(inner, Tensor):  # a sharded tensor also names its mesh
                yield from _storages(inner)
    elif tensor.layout == torch.strided:
        yield tensor.untyped_storage()


@dataclass(frozen=True)
class Estimate:
    """What a run holds on one device, in bytes of tensors."""

    peak: int
    """The most at any time."""
    state: int
    """Between two iterations: weights, optimisers' states, averages."""
    phase: str
    """The phase that the peak is in."""
    phases: dict[str, int]
    """The most during each phase."""

    def __str__(self) -> str:
        rest = self.peak - self.state
        return (
            f"{gigabytes(self.peak)} per device at most, in the {self.phase} phase: {gigabytes(self.state)} of weights"
            f" and optimisers' states, {gigabytes(rest)} of gradients and activations"
        )


class _FakeTensors(FakeTensorMode):
    """Fake tensors whose mode remembers none of them, and which are 0 to a host that must look.

    `Module.to` swaps a fake parameter for the converted one, which torch refuses while anything refers to either
    weakly, and that is what the mode's memory does. A host looks, for example, whether an update is to be skipped.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            result = super().__torch_dispatch__(func, types, args, kwargs)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return 0
        self.fake_tensor_converter.meta_converter.tensor_memo.clear()
        return result


class _FakeCopies(TorchFunctionMode):
    """`copy.deepcopy` of a real tensor gives a fake one; torch does so for parameters, and fails for other tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        if id(tensor) not in memo:
            memo[id(tensor)] = tensor.detach().clone().requires_grad_(tensor.requires_grad)
        return memo[id(tensor)]


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made in the block have no data: nothing is allocated, nothing computed. Real tensors may go in.

    `copy.deepcopy` makes fake networks of real ones, and only fake ones should change: a backward through a real one
    would leave it fake gradients, and a counter of one number may really be counted up.
    """
    with _FakeTensors(allow_non_fake_inputs=True), _FakeCopies():
        yield


def estimate(
    build: Callable[[], S],
    step: Callable[[S, Callable[[str], AbstractContextManager[None]]], object],
    *,
    held: Sequence[nn.Module | Tensor] = (),
    device: torch.device | str | None = None,
    iterations: int = 2,
) -> Estimate:
    """What a run will hold, found by running its code on fake tensors: nothing is allocated, nothing computed.

    `build()` makes networks and optimisers (`copy.deepcopy` of a real network gives a fake one); `step(state, phase)`
    makes one whole iteration, its parts inside `with phase("rollout"):` and the like. Two `iterations`, because the
    first update makes the optimisers' states; one is enough, in half the time, where `build` calls `fill`. What the
    host looks at (draws, schedules) must be made outside, the draws such that they need most. `held` is what is in
    memory already and stays. `device` restricts the count, as in `TensorMemory`.

    A CUDA run can be estimated on a machine without CUDA by letting `build` and `step` make CPU tensors: the CPU's
    flash attention saves what CUDA's does (queries, keys, values, output, one number per query and head). What CUDA's
    takes besides while its backward runs (4 bytes per element of the queries) is left to the margin.
    """
    # An optimiser of torchao compiles its step, whose temporaries then are the eager one's.
    with torch.compiler.set_stance("force_eager"), fake_tensors(), TensorMemory(device) as memory:
        with memory.phase("build"):
            memory.add(*held)
            state = build()
        for _ in range(iterations):
            step(state, memory.phase)
        # Autograd's graph and modules hold each other; what such circles hold is not there to stay.
        gc.collect()
        return Estimate(memory.peak, memory.current, memory.peak_phase, dict(memory.peaks))


def fill(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimiser make its states now, by a step on gradients of zeros, which are dropped again.

    For estimates, where the weights' values do not matter: weight decay changes them.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def device_memory(device: torch.device | str) -> int:
    """Bytes that this process can have on a device besides the tensors that it has there.

    On a CPU: what the machine and, in a container, the control groups have left; files that are only cached count as
    free.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return min([_machine_left(), *(left for folder in _control_groups() for left in _group_left(folder))])


def _machine_left() -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        return int(found[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _control_groups(root: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> Iterator[Path]:
    """The folders that may limit this process's memory: its own control group's and all around it."""
    for line in mine.read_text().splitlines() if mine.exists() else ():
        _, controllers, path = line.split(":", 2)
        if not controllers or "memory" in controllers.split(","):
            top = root / "memory" if controllers else root
            own = top / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(top))


def _group_left(folder: Path) -> Iterator[int]:
    for limit, used in CGROUP_FILES:
        if not (folder / limit).exists() or not (most := (folder / limit).read_text().strip()).isdigit():
            continue
        stat = (folder / "memory.stat").read_text()
        cached = re.search(r"^(?:total_)?inactive_file (\d+)$", stat, re.MULTILINE)
        yield int(most) - int((folder / used).read_text()) + (int(cached[1]) if cached else 0)


def refuse_if_too_large(
    estimate: Estimate,
    available: int,
    alternatives: Sequence[tuple[str, Callable[[], Estimate]]] = (),
    margin: float = MARGIN,
) -> None:
    """Raise ValueError for a run whose estimate does not fit `available` bytes, `margin` of them kept free.

    `alternatives` are flags, such as "--roles lora --train_batch_size 4", and what estimates a run with them. They are
    tried only when the run is refused, so that the message can say which of them would fit.
    """
    usable = round((1 - margin) * available)
    if estimate.peak <= usable:
        return
    tried = [(flags, alternative()) for flags, alternative in alternatives]
    fitting = [f"{flags} ({gigabytes(found.peak)})" for flags, found in tried if found.peak <= usable]
    if fitting:
        advice = f"what would fit: {', or '.join(fitting)}"
    elif tried:
        flags, least = min(tried, key=lambda one: one[1].peak)
        advice = f"the least of what was tried, {flags}, takes {gigabytes(least.peak)}; it takes a larger device"
    else:
        advice = "a smaller batch, more checkpointing or --roles lora takes less"
    raise ValueError(
        f"the run would take {estimate}; {gigabytes(usable)} can be used ({gigabytes(available)} are free, {margin:.0%}"
        f" of which is kept for what no estimate sees); {advice}"
    )


class Choice(NamedTuple):
    """What `largest_batch` found."""

    batch_size: int
    checkpointing: str


def largest_batch(
    fits: Callable[[int, str], bool], *, kinds: Sequence[str] = KINDS, most: int = MOST_SAMPLES
) -> Choice:
    """The largest batch that fits with any of `kinds` of checkpointing, and the first of them with which it fits.

    So the batch comes first: what a kind saves is spent on samples, and a kind that is not needed for that batch is
    not used. `kinds` go from fast and large to slow and small; one kind alone asks for its largest batch. `most` bounds
    the batch, because a small model would fill a device with more samples than a sensible batch has. `fits(batch_size,
    kind)` is asked about 2 log2(most) times at most: doubling, then halving what is between. The same answers give the
    same choice.

    Raises ValueError when not even one sample fits with the last kind.
    """
    least = kinds[-1]
    if not fits(1, least):
        raise ValueError(f"--train_batch_size auto: not even one sample fits with checkpointing {least!r}")
    low, high = 1, most + 1  # low fits, high does not or may not be tried
    while low < most and high > most:
        candidate = min(2 * low, most)
        low, high = (candidate, high) if fits(candidate, least) else (low, candidate)
    while high - low > 1 and high <= most:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle, least) else (low, middle)
    return Choice(low, next((kind for kind in kinds[:-1] if fits(low, kind)), least))


def fits_by_estimate(
    estimate_of: Callable[[int, str], Estimate], available: int, margin: float = MARGIN
) -> Callable[[int, str], bool]:
    """For `largest_batch` on a CPU, where a step that does not fit would end the process."""
    return lambda batch_size, kind: estimate_of(batch_size, kind).peak <= (1 - margin) * available


def fits_by_trial(
    trial: Callable[[int, str], object], device: torch.device | str, margin: float = MARGIN
) -> Callable[[int, str], bool]:
    """For `largest_batch` on a CUDA device: `trial(batch_size, kind)` makes whole iterations, and drops all it made.

    Two iterations at least: the second has the optimisers' states. While it runs, `margin` of the device's memory is
    out of its reach.
    """

    def fits(batch_size: int, kind: str) -> bool:
        torch.cuda.set_per_process_memory_fraction(1 - margin, device)
        fitted = True
        try:
            trial(batch_size, kind)
            torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            fitted = False
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        # Only now is the error's traceback gone, which held the step's tensors.
        gc.collect()
        torch.cuda.empty_cache()
        return fitted

    return fits


def gigabytes(size: int) -> str:
    """Bytes as text, in units of 10⁹."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
