"""Bytes counted against allocators, fake against real; batches and refusals against brute force."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_step import MODELS, Model, Rung, make_config, make_prompts, make_teacher
from rank_runs import run_ranks
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint

from tdm_fast import memory
from tdm_fast.config import TrainConfig
from tdm_fast.memory import (
    KINDS,
    Choice,
    Estimate,
    TensorMemory,
    device_memory,
    estimate,
    fake_tensors,
    fill,
    fits_by_estimate,
    fits_by_trial,
    largest_batch,
    refuse_if_too_large,
)
from tdm_fast.models.denoiser import Conditioning
from tdm_fast.ranks import joined
from tdm_fast.sizing import estimate_run, with_flags
from tdm_fast.step import Batch, State, make_batch, make_state, update

SHAPE = (8, 3, 10, 12)
SIZES = MODELS["tiny"].network | {
    "num_layers": 3, "num_attention_heads": 2, "cross_attention_dim": 48, "caption_channels": 16,
}  # fmt: skip
MODEL = Model("memory", SIZES, SHAPE, tokens=9, batch=2)
FLOAT = 4


def no_phase(name: str) -> AbstractContextManager[None]:
    return nullcontext()


def configure(roles: str, kind: str, precision: str = "bf16") -> TrainConfig:
    rung = Rung("", networks={"roles": roles, "activation_checkpointing": kind, "mixed_precision": precision},
                tdm={"num_steps": 1})  # fmt: skip
    return make_config(rung, MODEL, ema=False)


class Run:
    """The trainer's own iteration with a given configuration; its batch is made of real numbers."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.batch = make_batch(0, make_prompts(MODEL), config, [SHAPE])

    def inputs(self) -> list[Tensor]:
        """What an iteration looks at without making it."""
        return inputs_of(self.batch)

    def build(self) -> State:
        """Networks and optimisers that have their moments."""
        state = make_state(make_teacher(MODEL, "cpu"), self.config)
        fill(state.fake_optimizer)
        fill(state.student_optimizer)
        return state

    def iterate(self, state: State, phase: Callable[[str], AbstractContextManager[None]] = no_phase) -> None:
        update(state, self.batch, self.config, phase)


def tensors_of(state: State) -> list[Any]:
    return [*state.networks.models(), state.fake_optimizer, state.student_optimizer, *state.guard.counts.values()]


def state_bytes(state: State) -> int:
    """Weights, optimisers' states and the guard's counters, each once."""
    tensors = {id(p): p for model in state.networks.models() for p in model.parameters()}
    for optimizer in (state.fake_optimizer, state.student_optimizer):
        for values in optimizer.state.values():
            tensors |= {id(value): value for value in values.values()}
    tensors |= {id(counts): counts for counts in state.guard.counts.values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def tables_of(state: State) -> list[Tensor]:
    """What the networks keep from one call to the next: positions and masks."""
    layouts = [
        layout
        for model in state.networks.models()
        for kinds in model._layout_cache.values()  # type: ignore[union-attr, operator]
        for layout in kinds.values()
    ]
    return [table for layout in layouts for table in (layout.cos, layout.sin, layout.mask) if table is not None]


def test_a_storage_counts_once_and_until_it_is_freed() -> None:
    with TensorMemory() as tracker:
        x = torch.zeros(1000)
        assert tracker.current == 1000 * FLOAT
        views = [x[10:], x.view(10, 100).T, x.detach()]
        x.add_(1)
        x[3:].mul_(2)
        assert tracker.current == 1000 * FLOAT
        y = x + 1
        assert tracker.current == tracker.peak == 2000 * FLOAT
        del x
        assert tracker.current == 2000 * FLOAT  # the views hold it
        del views
        assert tracker.current == 1000 * FLOAT
        z = copy.deepcopy(y)
        assert tracker.current == 2000 * FLOAT
        y.resize_(3000)
        assert tracker.current == 4000 * FLOAT
        del y, z
        assert tracker.current == 0 and tracker.peak == 4000 * FLOAT
    assert len(torch.zeros(7)) == 7 and tracker.peak == 4000 * FLOAT  # outside the block nothing counts


def test_gradients_moments_and_saved_activations_count() -> None:
    weight = nn.Parameter(torch.ones(10, 20))
    optimizer = torch.optim.AdamW([weight], fused=True)
    x = torch.ones(30, 10)
    with TensorMemory() as tracker:
        tracker.add(weight, optimizer, x)
        held = (200 + 300) * FLOAT
        assert tracker.current == held
        y = (x @ weight).exp()  # saves its result
        assert tracker.current == held + 600 * FLOAT
        loss = y.exp().sum()  # and so does this one
        del y
        assert tracker.current == held + (1200 + 1) * FLOAT
        loss.backward()
        del loss
        assert tracker.current == held + 200 * FLOAT
        optimizer.step()
        assert tracker.current == held + 3 * 200 * FLOAT + FLOAT
        optimizer.zero_grad()
        assert tracker.current == held + 2 * 200 * FLOAT + FLOAT
    again = TensorMemory()
    again.add(nn.ParameterList([weight]), optimizer, weight)
    assert again.current == 3 * 200 * FLOAT + FLOAT


def test_peaks_are_known_by_phase() -> None:
    with TensorMemory() as tracker:
        with tracker.phase("build"):
            held = torch.zeros(100)
        with tracker.phase("student"):
            kept = held + 1
            with tracker.phase("fake"):
                torch.cat([held, kept, kept])
            torch.cat([held, kept])
        with tracker.phase("optimiser"):
            held.add_(kept)
    assert tracker.peaks == {
        "build": 100 * FLOAT, "student": 400 * FLOAT, "fake": 500 * FLOAT, "optimiser": 200 * FLOAT,
    }  # fmt: skip
    assert tracker.peak == 500 * FLOAT and tracker.peak_phase == "fake"
    assert tracker.at_peak == {"build": 100 * FLOAT, "student": 100 * FLOAT, "fake": 300 * FLOAT}


def test_only_the_device_asked_for_counts_and_in_its_allocator_s_units() -> None:
    with fake_tensors():
        with TensorMemory("cuda") as tracker:
            here, there = torch.zeros(3), torch.zeros(3, device="cuda")
            there = there.to(torch.bfloat16), there + 1
            assert tracker.current == 2 * 512 and tracker.peak == 3 * 512
            assert here.device.type == "cpu"
        with TensorMemory() as both:
            kept = torch.zeros(3), torch.zeros(129, device="cuda")
            assert both.current == 3 * FLOAT + 1024 and len(kept) == len(there) == 2


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Operators take scratch memory for each thread, which only the allocator sees."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_allocator_says_the_same(kind: str, one_thread: None) -> None:
    """Torch's own CPU allocator reports every allocation to the profiler, those inside of operators included."""
    run = Run(configure("full", kind, "no"))  # in fp32 the CPU's operators take little for themselves
    state = run.build()
    run.iterate(state)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run.iterate(state)
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    with TensorMemory() as tracker:
        tracker.add(*tensors_of(state), *tables_of(state), *run.inputs())
        before = tracker.current
        run.iterate(state)
    # The difference is what operators take for themselves.
    assert 1e6 < 0.98 * most <= tracker.peak - before <= most


def test_torch_s_own_tracker_says_the_same_where_it_can() -> None:
    """One call of one network; it refuses an iteration, which makes several."""
    state = Run(configure("full", "none", "no")).build()
    student, x, t = state.networks.roles.student, torch.ones(2, *SHAPE), torch.tensor([3, 500])
    conditioning = Conditioning({"encoder_hidden_states": torch.ones(2, 9, 16)})

    def run() -> None:
        student(x, t, conditioning).square().mean().backward()
        student.zero_grad()

    run()
    known = (*tensors_of(state), x, t, *tables_of(state), *conditioning.tensors.values())
    theirs, ours = MemTracker(), TensorMemory()
    theirs.track_external(*known)
    with theirs:
        run()
    with ours:
        ours.add(*known)
        run()
    assert ours.peak == theirs.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    with pytest.raises(NotImplementedError, match="multiple iterative calls"), theirs:
        run()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("roles", ["full", "lora"])
def test_an_estimate_is_what_a_run_takes(roles: str, kind: str) -> None:
    run = Run(configure(roles, kind))
    found = estimate(run.build, run.iterate, iterations=1)
    with TensorMemory() as tracker:
        with tracker.phase("build"):
            state = run.build()
        run.iterate(state, tracker.phase)
        for model in state.networks.models():
            model._layout_cache.clear()  # type: ignore[union-attr, operator]  # a real network keeps its tables
        inputs = sum(tensor.nbytes for tensor in run.inputs())  # real ones, which an estimate does not count
        assert found.state == tracker.current - inputs == state_bytes(state)
    assert found.peak == pytest.approx(tracker.peak, rel=0.02)
    assert found.phases.keys() == tracker.peaks.keys() >= {"build", "rollout", "fake", "student", "optimiser"}
    del tracker.peaks["other"]  # between the phases: a real network's tables, the inputs
    for phase, peak in tracker.peaks.items():
        assert found.phases[phase] == pytest.approx(peak, rel=0.03)
    assert found.phase == max(found.phases, key=lambda phase: found.phases[phase])


def inputs_of(batch: Batch) -> list[Tensor]:
    return [batch.latents, *batch.conditioning.tensors.values(), *batch.unconditional.tensors.values()]


HYBRID = {"sharding": "hybrid", "shard_size": 2, "gradient_accumulation_steps": 2, "roles": "lora"}


def held_by_a_rank(config: TrainConfig) -> Any:
    """What this rank will hold, asked of the first alone, and what it then does hold."""
    n, cache = config.networks, make_prompts(MODEL)
    with joined(torch.device("cpu"), n.sharding, n.shard_size, n.context_parallel) as ranks:
        teacher = make_teacher(MODEL, "cpu").to("meta")
        found = estimate_run(config, teacher, cache, [SHAPE], ranks) if ranks.is_main else None
        batches = [make_batch(iteration, cache, config, [SHAPE], ranks=ranks) for iteration in range(2)]
        with TensorMemory("cpu") as tracker:
            with tracker.phase("build"):
                state = make_state(teacher, config, ranks)
            for batch in batches:
                update(state, batch, config, tracker.phase)
        # A real network keeps its tables, and an estimate does not count inputs; of one as small as this they are much.
        known = [*tables_of(state), *(tensor for batch in batches for tensor in inputs_of(batch))]
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in known}
        kept = sum(storage.nbytes() for storage in storages.values())
        peaks = {phase: peak - kept for phase, peak in tracker.peaks.items()}
        return found, tracker.peak - kept, tracker.current - kept, peaks


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (2, {}),
        pytest.param(2, {"context_parallel": 2, "activation_checkpointing": "selective"}, marks=pytest.mark.slow),
        pytest.param(4, HYBRID, marks=pytest.mark.slow),
    ],
    ids=["full", "context", "hybrid, parts, lora"],
)
def test_an_estimate_of_ranks_is_what_each_holds(world: int, flags: dict[str, Any]) -> None:
    config = with_flags(configure("full", "none"), train_batch_size=8, **flags)
    results = run_ranks(world, held_by_a_rank, config)
    found = results[0][0]
    for _, peak, held, peaks in results:
        assert found.peak == pytest.approx(peak, rel=0.05)
        assert found.state == pytest.approx(held, rel=0.05)
        for phase in ("rollout", "fake", "student", "optimiser"):
            assert found.phases[phase] == pytest.approx(peaks[phase], rel=0.05), phase


def test_a_storage_that_is_resized_counts_as_it_is() -> None:
    before = torch.UntypedStorage.resize_
    for device in ("cpu", "cuda"):
        with fake_tensors(), TensorMemory() as tracker:
            x = torch.zeros(1000, device=device)
            size = tracker.current
            storage = x.untyped_storage()
            storage.resize_(0)
            assert tracker.current == 0
            storage.resize_(4000)
            assert tracker.current == size and tracker.peak == size
            del x, storage
            assert tracker.current == 0
    assert torch.UntypedStorage.resize_ is before


def test_checkpointing_takes_less_and_the_first_update_makes_the_moments() -> None:
    activations = {}
    for kind in ("none", "block"):
        run = Run(configure("full", kind))
        found = estimate(run.build, run.iterate, iterations=1)
        activations[kind] = found.peak - found.state
    assert activations["block"] < 0.6 * activations["none"]

    def build() -> tuple[nn.Linear, torch.optim.Optimizer]:
        network = nn.Linear(100, 100)
        return network, torch.optim.AdamW(network.parameters())

    def step(state: tuple[nn.Linear, torch.optim.Optimizer], phase: Any) -> None:
        state[0](torch.ones(1000, 100)).square().sum().backward()
        state[1].step()
        state[1].zero_grad()

    def filled() -> tuple[nn.Linear, torch.optim.Optimizer]:
        state = build()
        fill(state[1])
        assert all(parameter.grad is None for parameter in state[0].parameters())
        return state

    twice = estimate(build, step)
    assert twice.state == 3 * 10100 * FLOAT + 2 * FLOAT
    once = estimate(filled, step, iterations=1)
    assert (once.state, once.peak) == (twice.state, twice.peak)
    assert estimate(build, step, iterations=1).peak < twice.peak


def test_attention_does_not_grow_with_the_square_of_the_tokens() -> None:
    """The operator that a fake run chooses is the one with a flash kernel's memory, masked or not."""

    def peak(tokens: int, masked: bool) -> int:
        def step(query: Tensor, phase: Any) -> None:
            mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool) if masked else None
            heads = query.view(1, tokens, 2, 24).transpose(1, 2)
            F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask).sum().backward()

        return estimate(lambda: torch.ones(tokens, 48, dtype=torch.bfloat16, requires_grad=True), step).peak

    for masked in (False, True):
        assert peak(40_000, masked) == pytest.approx(10 * peak(4000, masked), rel=0.01)


def test_an_estimate_touches_nothing_real() -> None:
    teacher = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    teacher.table = torch.arange(6.0)  # a tensor that is neither parameter nor buffer, as a schedule's tables are
    before = copy.deepcopy(teacher.state_dict())

    def build() -> nn.Module:
        student = copy.deepcopy(teacher).to(torch.float64)
        assert student[0].weight.dtype == torch.float64
        return student

    def step(student: nn.Module, phase: Any) -> None:
        with torch.no_grad():
            target = teacher(torch.ones(5, 6))
        block = checkpoint(student, target.double(), use_reentrant=False)
        (block * student.table).sum().backward()

    found = estimate(build, step, held=[teacher])
    double = 8
    weights = sum(parameter.numel() for parameter in teacher.parameters())
    assert found.state >= weights * (FLOAT + double + double)  # the teacher's, the student's, the student's gradients
    assert all(p.grad is None and type(p) is nn.Parameter for p in teacher.parameters())
    assert type(teacher.table) is Tensor
    after = teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_memory_of_this_machine() -> None:
    assert 1e8 < device_memory("cpu") < 1e14


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_control_groups_limit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.write_text("4:memory:/jobs/a\n2:cpu,cpuacct:/jobs/a\n0::/slice/b\n")
    groups = list(memory._control_groups(tmp_path, mine))
    names = ["memory/jobs/a", "memory/jobs", "memory", "slice/b", "slice", "."]
    assert groups == [tmp_path / name for name in names]
    assert list(memory._control_groups(tmp_path, tmp_path / "absent")) == []

    v2 = {"memory__max": "9000\n", "memory__current": "8000", "memory__stat": "anon 5\ninactive_file 3000\nfile 9"}
    write(tmp_path / "slice" / "b", **v2)
    write(tmp_path / "slice", **v2 | {"memory__max": "max\n"})
    write(
        tmp_path / "memory" / "jobs",
        memory__limit_in_bytes="7000", memory__usage_in_bytes="5000",
        memory__stat="inactive_file 7\ntotal_inactive_file 100",
    )  # fmt: skip
    left = [list(memory._group_left(folder)) for folder in groups]
    assert left == [[], [2007], [], [4000], [], []]
    monkeypatch.setattr(memory, "_control_groups", lambda: groups)
    assert device_memory("cpu") == 2007


def sized(peak: float) -> Estimate:
    return Estimate(round(peak * 1e9), 2 * 10**9, "student", {"student": round(peak * 1e9)})


def test_a_run_that_cannot_fit_is_told_what_would() -> None:
    asked: list[str] = []

    def alternative(flags: str, peak: float) -> tuple[str, Callable[[], Estimate]]:
        return flags, lambda: (asked.append(flags), sized(peak))[1]

    options = [alternative("--train_batch_size 2", 8), alternative("--roles lora", 9.1), alternative("--x", 3)]
    refuse_if_too_large(sized(9), 10 * 10**9, options)
    assert asked == []
    with pytest.raises(ValueError) as caught:
        refuse_if_too_large(sized(12), 10 * 10**9, options)
    assert str(caught.value) == (
        "the run would take 12.0 GB per device at most, in the student phase: 2.0 GB of weights and optimisers' states,"
        " 10.0 GB of gradients and activations; 9.0 GB can be used (10.0 GB are free, 10% of which is kept for what no"
        " estimate sees); what would fit: --train_batch_size 2 (8.0 GB), or --x (3.0 GB)"
    )
    with pytest.raises(ValueError, match=r"the least of what was tried, --roles lora, takes 9.1 GB; it takes a larger"):
        refuse_if_too_large(sized(12), 10 * 10**9, options[1:2])
    with pytest.raises(ValueError, match=r"a smaller batch, more checkpointing or --roles lora takes less"):
        refuse_if_too_large(sized(12), 10 * 10**9)


@pytest.mark.parametrize("most", [1, 2, 7, 64])
def test_the_largest_batch_is_found(most: int) -> None:
    for limits in (
        (0, 0, 1),
        (1, 1, 1),
        (3, 5, 9),
        (63, 64, 65),
        (64, 200, 300),
        (0, 40, 100),
        (6, 6, 7),
        (32, 33, 34),
    ):
        limit = dict(zip(KINDS, limits, strict=True))
        asked: list[tuple[int, str]] = []

        def fits(batch_size: int, kind: str, limit: dict[str, int] = limit, asked: list = asked) -> bool:
            asked.append((batch_size, kind))
            return batch_size <= limit[kind]

        batch_size = min(most, limit["block"])
        wanted = Choice(batch_size, next(kind for kind in KINDS if limit[kind] >= batch_size))
        assert largest_batch(fits, most=most) == wanted
        assert max(Counter(asked).values()) == 1 and len(asked) <= 2 * most.bit_length() + 2
        assert max(size for size, _ in asked) <= most


def test_one_kind_of_checkpointing_may_be_given() -> None:
    assert largest_batch(lambda batch_size, kind: batch_size <= 5 and kind == "none", kinds=["none"]) == (5, "none")
    with pytest.raises(
        ValueError, match="--train_batch_size auto: not even one sample fits with checkpointing 'block'"
    ):
        largest_batch(lambda batch_size, kind: False)


def test_estimates_decide_with_a_margin() -> None:
    fits = fits_by_estimate(lambda batch_size, kind: sized(batch_size), 10 * 10**9, margin=0.2)
    assert largest_batch(fits) == (8, "none")


def test_trials_decide_by_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def trial(batch_size: int, kind: str) -> None:
        assert fractions[-1] == 0.75
        if batch_size > {"none": 2, "selective": 3, "block": 3}[kind]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert largest_batch(fits_by_trial(trial, "cuda:0", margin=0.25)) == (3, "selective")
    assert fractions[-1] == 1.0

    def broken(batch_size: int, kind: str) -> None:
        raise RuntimeError("not a matter of memory")

    with pytest.raises(RuntimeError, match="not a matter"):
        fits_by_trial(broken, "cuda:0")(1, "none")
    assert fractions[-1] == 1.0
