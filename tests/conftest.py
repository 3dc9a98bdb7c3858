"""What all tests share: GPU tests are left out where there is no GPU; a tiny teacher; commands as processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

# What a child process of `Commands` runs: its output goes to files, its exit code is the command's.
CHILD = """
import os, resource, sys
for number, path in ((1, stdout), (2, stderr)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
if file_limit is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
from pathlib import Path
sys.path.insert(0, tests)
import known_estimates
known_estimates.remember(Path(known))
from tdm_fast import cli
sys.exit(cli.main(arguments))
"""


def pytest_configure() -> None:
    """Hear Ctrl-C: a shell's background jobs ignore it, and the processes that tests start would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # share the cores instead of fighting for them
        threads = max(1, (os.cpu_count() or 1) // int(workers))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect tests marked `gpu` on a machine without a CUDA device, and `compute_sanitizer` without that tool."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    there = {"gpu": torch.cuda.is_available(), "compute_sanitizer": sanitizer is not None}
    missing = {marker for marker, available in there.items() if not available}
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in missing)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    # What one worker has most of a minute with does not come last, when the others have nothing left.
    items.sort(key=lambda item: "test_triton_interpreter.py" not in item.nodeid)


TOGETHER = ("cuda_ops", "faults", "guide", "ranks", "train")
"""Modules whose tests share what takes many seconds to make; a worker runs all tests of one."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests go to workers one by one, when a worker has none left, and those of some modules all to the same."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.split("::")[0]
            return module if Path(module).stem.removeprefix("test_") in TOGETHER else nodeid

    return Scheduling(config, log)


def build_teacher(folder: Path, *, frames: int, size: int) -> Path:
    """A teacher of random weights in a pipeline's folder: latents `[8, frames, size, size]`, every part tiny."""
    from diffusers import DDIMScheduler
    from transformers import T5Config, T5EncoderModel

    from tdm_fast import tiny_shapes
    from tdm_fast.models import OpenSoraT2V_v1_3, WFVAEModel
    from tdm_fast.text import word_tokenizer

    generator = torch.Generator().manual_seed(0)

    def randomise(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) + (parameter.ndim == 1))

    transformer = OpenSoraT2V_v1_3(
        num_layers=3, attention_head_dim=6, num_attention_heads=2, cross_attention_dim=12, caption_channels=8,
        in_channels=8, out_channels=8, patch_size_t=1, patch_size=2, sparse1d=True, sparse_n=2,
        sample_size_t=frames, sample_size_h=size, sample_size_w=size, activation_fn="gelu-approximate",
    )  # fmt: skip
    vae = WFVAEModel(
        latent_dim=8, base_channels=4, encoder_num_resblocks=1, encoder_energy_flow_hidden_size=4,
        decoder_num_resblocks=1, decoder_energy_flow_hidden_size=4, norm_type="layernorm",
    )  # fmt: skip
    tokenizer = word_tokenizer(word for prompt in tiny_shapes.all_prompts() for word in prompt.split())
    encoder = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0)
    )
    scheduler = DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False,
        beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
    )  # fmt: skip
    parts = {"transformer": transformer, "vae": vae, "text_encoder": encoder}
    for name, model in parts.items():
        randomise(model)
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")
    scheduler.save_pretrained(folder / "scheduler")
    index = {name: ["", type(part).__name__] for name, part in {**parts, "scheduler": scheduler}.items()}
    (folder / "model_index.json").write_text(json.dumps({**index, "tokenizer": ["transformers", "Tokenizer"]}))
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of 5 frames of 32 × 32 pixels; to be read only, copy it to change it."""
    return build_teacher(tmp_path_factory.mktemp("teacher"), frames=2, size=4)


@pytest.fixture(scope="session")
def tiny_shapes_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of the size of tiny-shapes, with an evaluator, all of random weights; to be read only."""
    from tdm_fast.evaluator import ShapesEvaluator

    folder = build_teacher(tmp_path_factory.mktemp("shapes"), frames=5, size=8)
    torch.manual_seed(0)
    ShapesEvaluator(width=4, feature_dim=6).save_pretrained(folder / "evaluator")
    return folder


@dataclass
class Command:
    """A running command, and the files that its output goes to."""

    process: ForkServerProcess
    stdout: Path
    stderr: Path

    def wait(self, timeout: float = 120) -> int:
        """Wait for its end; returns the exit code, minus the signal's number where a signal ended it."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, f"still running after {timeout} s: {self.errors()}"
        return self.process.exitcode

    def errors(self) -> str:
        return self.stderr.read_text() if self.stderr.exists() else ""


@pytest.fixture(scope="session")
def estimates(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where runs of tests keep what `known_estimates` has them share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "estimates"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture
def known_estimates(estimates: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process share what they find out about their memory and operations."""
    import known_estimates as module

    from tdm_fast import sizing, train

    monkeypatch.setattr(sizing, "estimate_run", sizing.estimate_run)  # to be put back
    monkeypatch.setattr(train, "measure_costs", train.measure_costs)
    module.remember(estimates)


@pytest.fixture(scope="session")
def start_command(tmp_path_factory: pytest.TempPathFactory, estimates: Path) -> Iterator[Callable[..., Command]]:
    """`tdm-fast` in processes of its own: start_command(*arguments, file_limit=None) -> Command.

    They are forks of one process that has imported it already, because importing takes longer than such a run; each
    computes with one thread, so that all of them round alike. No file can grow beyond `file_limit` bytes.
    """
    from rank_runs import forkserver

    folder, before = tmp_path_factory.mktemp("commands"), os.environ.get("OMP_NUM_THREADS")
    context = forkserver()
    started: list[ForkServerProcess] = []

    def start(*arguments: object, file_limit: int | None = None) -> Command:
        name = f"{len(started):03d}"
        stdout, stderr = folder / f"{name}.out", folder / f"{name}.err"
        names = {
            "arguments": [str(argument) for argument in arguments],
            "stdout": str(stdout),
            "stderr": str(stderr),
            "tests": str(Path(__file__).parent),
            "known": str(estimates),
            "file_limit": file_limit,
        }
        process = context.Process(target=exec, args=(CHILD, names))
        process.start()
        started.append(process)
        return Command(process, stdout, stderr)

    os.environ["OMP_NUM_THREADS"] = "1"
    yield start
    for process in started:
        if process.is_alive():
            process.kill()
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
