"""The rows of `tdm-fast check` about an installation: devices, native code, ops, attention, small models that run."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextConfig, PreTrainedModel

from tdm_fast import attention, native, ops
from tdm_fast.check import Row, Rows, attempt
from tdm_fast.encoders import CLASSES, Encoder
from tdm_fast.memory import device_memory, gigabytes
from tdm_fast.models import registry
from tdm_fast.models.vae import CausalVAEWrapper, VAEWrapper, WFVAEWrapper
from tdm_fast.ops import _dispatch
from tdm_fast.philox import randn
from tdm_fast.schedule import Schedule
from tdm_fast.text import word_tokenizer

REINSTALL = "pip install --force-reinstall --no-deps ."
LOW_DISK = 5e9
"""Bytes below which free disk is worth a word: a checkpoint of a small model, and what is written beside it."""
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Of torch's scaled_dot_product_attention, by the names that it gives them."""
RTOL, ATOL = 1e-4, 1e-5
"""Between implementations of an op in float32, which add in different orders."""


def device_types() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


# ---- devices and disk


def device_rows() -> Rows:
    """The CPU, every GPU, and why there is none; free disk where a run would be."""
    capability = torch.backends.cpu.get_cpu_capability()
    memory = gigabytes(device_memory("cpu"))
    yield Row("cpu", "ok", f"{torch.get_num_threads()} threads, {capability}, {memory} of memory free")
    yield _cuda_row()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        yield Row(f"cuda:{index}", "ok", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}")
    free = shutil.disk_usage(Path.cwd()).free
    says = f"{gigabytes(free)} free in {Path.cwd()}"
    if free > LOW_DISK:
        yield Row("disk", "ok", says)
    else:
        yield Row("disk", "warn", says, "free some, or name an --output_dir on another disk")


def _cuda_row() -> Row:
    """Whether torch can use a GPU, and if it cannot, whether it ought to."""
    build, count = torch.version.cuda, torch.cuda.device_count()
    says = f"torch is built for CUDA {build}" if build else "torch is a CPU build"
    if count:
        return Row("CUDA", "ok", f"{says}; {count} device{'s' if count > 1 else ''}")
    if shutil.which("nvidia-smi") is None:
        return Row("CUDA", "ok", f"{says}; there is no device, so training runs on the CPU")
    fix = "a driver for torch's CUDA" if build else "a CUDA build of torch, see https://pytorch.org/get-started/locally"
    return Row("CUDA", "warn", f"{says} and finds no device, but this machine has nvidia-smi", fix)


# ---- native code and ops


def build_rows() -> Rows:
    """What the build of the native libraries said, and whether they load."""
    for backend in _dispatch.BACKENDS:
        if backend == "torch":
            continue
        device = "cpu" if backend == "cpp" else "cuda"
        reason = _dispatch.unavailable(backend, device)
        if reason is None:
            yield Row(backend, "ok", f"runs on {device} tensors")
        elif reason == _dispatch.NO_CUDA_DEVICE:
            yield Row(backend, "ok", f"unavailable: {reason}, so nothing needs it")
        else:
            yield Row(backend, "warn", f"unavailable: {reason}", _dispatch.INSTALL_COMMANDS[backend])
    for name in ("cpu", "cuda", "build_info"):
        yield Row(f"build of {name}", "ok", native.build_status(name))
    for key, value in (native.build_info() or {}).items():
        if value:
            yield Row(f"  {key}", "ok", value)


def op_rows() -> Rows:
    """For each op what runs on each kind of tensors, and how far from its definition in torch that is."""
    for op in ops.__all__:
        yield attempt(op, partial(_compared, op), _fix(op))


def _fix(op: str) -> str:
    backends = [backend for backend in _dispatch.registered().get(op, ()) if backend in native.BUILD_COMMANDS]
    return f"TDM_FAST_BACKEND=torch runs the definition; {REINSTALL} builds {' and '.join(backends) or 'all'} anew"


def chosen(op: str, device: str) -> str:
    """The backend that would run."""
    if op not in _dispatch.registered():
        return "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the table itself says what these would
        return _dispatch.choose(op, device)


def _compared(op: str) -> str:
    return "; ".join(_compared_on(op, device) for device in device_types())


def _compared_on(op: str, device: str) -> str:
    """What runs an op on a device and what it is off by. Raises ValueError for too much, and for what is not finite."""
    backend = chosen(op, device)
    ours, wanted = results(op, device, backend), results(op, device, "torch")
    if not all(bool(result.isfinite().all()) for result in ours):
        raise ValueError(f"{device} tensors run {backend}, which gives numbers that are not finite")
    pairs = [(mine.double(), its.double()) for mine, its in zip(ours, wanted, strict=True)]
    error = max(float((mine - its).abs().max()) for mine, its in pairs)
    if not all(torch.allclose(mine, its, rtol=RTOL, atol=ATOL) for mine, its in pairs):
        raise ValueError(f"{device} tensors run {backend}, whose numbers are {error:.1e} from those of the definition")
    if backend == "torch":
        return f"{device} tensors run {backend}, the definition"
    return f"{device} tensors run {backend}, {f'within {error:.0e} of' if error else 'equal to'} the definition"


def results(op: str, device: str, backend: str) -> list[Tensor]:
    """What an op gives for small latents, and the gradients of those that get one."""
    latents = [randn(2, (3, 4, 5), seed=seed, device=device).requires_grad_() for seed in range(6)]
    outputs = _calls(device)[op](latents, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    trained = [output.sum() for output in outputs if output.requires_grad]
    gradients = torch.autograd.grad(trained, latents, allow_unused=True) if trained else ()
    return [output.detach() for output in outputs] + [gradient for gradient in gradients if gradient is not None]


def _calls(device: str) -> dict[str, Callable[..., Any]]:
    """Each public function with settings as a training has them, of latents and a backend."""
    schedule = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)

    def at(*timesteps: int) -> Tensor:
        return torch.tensor(timesteps, device=device)

    t_gen, t_mid, t = at(899, 674), at(674, 449), at(744, 519)
    return {
        "ode_step": lambda x, **k: ops.ode_step(*x[:2], schedule=schedule, t=t_gen, t_next=t_mid, **k),
        "renoise": lambda x, **k: ops.renoise(
            *x[:2], schedule=schedule, t_gen=t_gen, t_mid=t_mid, t=t, seed=0, iteration=0, **k
        ),
        "pseudo_huber": lambda x, **k: ops.pseudo_huber(*x[:2], c=1e-3, **k),
        "fake_score_loss": lambda x, **k: ops.fake_score_loss(*x[:2], snr=at(1, 9).float(), **k),
        "fake_score_loss_from_outputs": lambda x, **k: ops.fake_score_loss_from_outputs(
            *x[:3], schedule=schedule, t=t, **k
        ),
        "tdm_loss": lambda x, **k: ops.tdm_loss(*x[:4], cfg=4.5, **k),
        "tdm_loss_from_outputs": lambda x, **k: ops.tdm_loss_from_outputs(
            *x, schedule=schedule, t_gen=t_gen, t=t, cfg=4.5, **k
        ),
        "sample_intervals": lambda _, **k: ops.sample_intervals(
            8, num_steps=4, total_steps=900, seed=0, iteration=0, device=device, **k
        ),
    }


# ---- attention


def attention_rows() -> Rows:
    """Which kernels of torch's attention run on each device, and what other backends lack to run."""
    for device in device_types():
        running = [name for name, kernel in KERNELS.items() if _runs(kernel, device)]
        fix = "" if running else "a build of torch with scaled_dot_product_attention for this device"
        yield Row(f"SDPA, {device}", "ok" if running else "failed", ", ".join(running) or "no kernel runs", fix)
    for backend, needs in attention.NEEDS.items():
        version = f"{needs.package} {attention.installed(needs.package) or 'not installed'}" if needs.package else ""
        missing = attention.lacks(backend, torch.device(device_types()[-1]), torch.bfloat16)
        says = [version, f"needs {'; '.join(missing)}" if missing else "runs bfloat16 on cuda"]
        yield Row(backend, "ok", ": ".join(filter(None, says)))


def _runs(kernel: SDPBackend, device: str) -> bool:
    q = torch.zeros(1, 2, 16, 64, dtype=torch.bfloat16, device=device)
    try:
        with warnings.catch_warnings(), sdpa_kernel(kernel):
            warnings.simplefilter("ignore")  # torch says of every kernel why it was not taken
            F.scaled_dot_product_attention(q, q, q)
    except RuntimeError:
        return False
    return True


# ---- models


def model_rows() -> Rows:
    """The registry's names, and a small VAE and a small text encoder of each kind, random weights, run once."""
    yield attempt("registry", _registry, REINSTALL)
    yield attempt("WFVAEModel", partial(_round_trip, WFVAEWrapper, SMALL_WFVAE), REINSTALL)
    yield attempt("CausalVAEModel", partial(_round_trip, CausalVAEWrapper, SMALL_CAUSALVAE), REINSTALL)
    for model_type in CLASSES:
        if model_type != "clip_text_model":  # the same class under its newer name
            yield attempt(f"{model_type} encoder", partial(_encoded, model_type), "pip install --upgrade transformers")


SMALL_WFVAE: dict[str, Any] = {
    "latent_dim": 8, "base_channels": 4, "encoder_num_resblocks": 1, "encoder_energy_flow_hidden_size": 4,
    "decoder_num_resblocks": 1, "decoder_energy_flow_hidden_size": 4, "norm_type": "layernorm",
    "scale": [1.0] * 8, "shift": [0.0] * 8,
}  # fmt: skip
SMALL_CAUSALVAE: dict[str, Any] = {"hidden_size": 32, "z_channels": 4, "embed_dim": 4, "num_res_blocks": 1}


def _registry() -> str:
    """Every transformer is made on the meta device, and every VAE's name is in every table."""
    sizes = []
    for name in registry.Diffusion_models_class:
        with torch.device("meta"):
            model = registry.Diffusion_models[name](in_channels=8, out_channels=8)
        assert isinstance(model, registry.Diffusion_models_class[name])
        sizes.append(f"{name} ({sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion parameters)")
    tables = (registry.ae_stride_config, registry.ae_channel_config, registry.ae_norm, registry.ae_denorm)
    assert all(table.keys() == registry.ae_wrapper.keys() for table in tables)
    return f"{', '.join(sizes)}; {', '.join(registry.ae_wrapper)}"


@torch.no_grad()
def _round_trip(wrapper: type[VAEWrapper], config: dict[str, Any]) -> str:
    """Encode and decode a video of 5 x 16 x 16 with a VAE of random weights. Raises ValueError for a wrong shape."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae: Any = wrapper(wrapper.model_class(**config)).eval()  # type: ignore[call-arg]
    video = randn(1, (3, 5, 16, 16), seed=0).clamp(-1, 1)
    latents = vae.encode(video, sample_posterior=False)
    decoded = vae.decode(latents)
    time, height, width = vae.strides
    wanted = (1, vae.channels, 4 // time + 1, 16 // height, 16 // width), (1, 5, 3, 16, 16)
    if (tuple(latents.shape), tuple(decoded.shape)) != wanted or not decoded.isfinite().all():
        raise ValueError(f"5 x 16 x 16 became {tuple(latents.shape)}, then {tuple(decoded.shape)}; right is {wanted}")
    return f"5 x 16 x 16 to latents {'x'.join(map(str, latents.shape[1:]))} and back"


def _encoded(model_type: str) -> str:
    """Encode two prompts with an encoder of random weights. Raises ValueError for states that are wrong in shape."""
    tokenizer = word_tokenizer("a small red circle moving left".split())
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    if model_type == "clip":
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        config: Any = CLIPTextConfig(**shape, **sizes, projection_dim=8, bos_token_id=2)
    else:
        config = CLASSES[model_type].config_class(**shape, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = CLASSES[model_type](config).eval()
    encoder = Encoder.of(tokenizer, model)
    states = encoder.states(encoder.tokenize(["a red circle", ""]))
    lengths = [1, 1] if model_type == "clip" else [4, 1]
    if [tuple(state.shape) for state in states] != [(length, encoder.width) for length in lengths]:
        raise ValueError(f"prompts of {lengths} tokens became states of {[tuple(state.shape) for state in states]}")
    if not all(math.isfinite(float(state.sum())) for state in states):
        raise ValueError("its states are not finite")
    return f"{type(model).__name__}: states {encoder.width} wide"


SECTIONS: dict[str, Callable[[], Rows]] = {
    "Devices": device_rows,
    "Native code": build_rows,
    "Ops": op_rows,
    "Attention": attention_rows,
    "Models": model_rows,
}
"""What `tdm-fast check` shows, in this order."""
