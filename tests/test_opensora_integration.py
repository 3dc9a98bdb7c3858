"""Open-Sora Plan as its users meet it, part by part. Runs under pytest, and as a plain script without it:

    python tests/test_opensora_integration.py

prints a line per part and a sum, and ends with code 1 if one of them does not work. Models are tiny, of random weights,
and made on the spot; nothing is downloaded.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from guide_parts import NAME, build_parts, guide_flags
from tiny_encoders import clip_folder, t5_folder
from torch import Tensor

CAUSAL_VAE = {"hidden_size": 32, "z_channels": 4, "embed_dim": 4, "num_res_blocks": 1}
LATENTS = (2, 8, 2, 4, 4)


def normal(seed: int, shape: tuple[int, ...] = LATENTS) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_imports() -> None:
    """The drop-in surface, and everything that the guide's commands import."""
    surface = importlib.import_module("tdm_fast")
    assert all(callable(getattr(surface, name)) for name in surface.__all__)
    for name in ("train", "sample", "encode", "evaluate", "compat", "pipeline", "models.registry", "models.upstream"):
        importlib.import_module(f"tdm_fast.{name}")
    models = importlib.import_module("tdm_fast.models")
    assert {"OpenSoraT2V_v1_3", "WFVAEModel", "CausalVAEModel"} <= set(models.__all__)


@torch.no_grad()
def test_vae(tmp_path: Path) -> None:
    """Both VAEs by name: from a folder, pixels to latents of the name's strides and channels, and back."""
    from tdm_fast.models import CausalVAEModel
    from tdm_fast.models.registry import ae_channel_config, ae_denorm, ae_norm, ae_stride_config, ae_wrapper

    torch.manual_seed(0)
    CausalVAEModel(**CAUSAL_VAE).save_pretrained(tmp_path / "causal")
    folders = {
        "WFVAEModel_D8_4x8x8": build_parts(tmp_path / "parts") / "vae",
        "CausalVAEModel_D4_4x8x8": tmp_path / "causal",
    }
    pixels = normal(0, (1, 3, 5, 16, 24)).sigmoid()
    for name, folder in folders.items():
        vae: Any = ae_wrapper[name](folder)
        time, height, width = ae_stride_config[name]
        latents = vae.encode(ae_norm[name](pixels), sample_posterior=False)
        assert latents.shape == (1, ae_channel_config[name], 4 // time + 1, 16 // height, 24 // width), name
        moments = vae.vae.encode(2 * pixels - 1).latent_dist.mean
        scale, shift = (0.18215, 0.0) if name.startswith("Causal") else (vae.vae.config.scale, vae.vae.config.shift)
        wanted = (moments - torch.tensor(shift).view(-1, 1, 1, 1)) * torch.tensor(scale).view(-1, 1, 1, 1)
        torch.testing.assert_close(latents, wanted)
        video = ae_denorm[name](vae.decode(latents))
        assert video.shape == (1, 5, 3, 16, 24) and video.isfinite().all(), name


def test_text_encoders(tmp_path: Path) -> None:
    """T5, mT5, UMT5 and CLIP from folders, and the widths that the published weights take."""
    from tdm_fast.encoders import check_width, load_encoder

    for model_type in ("t5", "mt5", "umt5"):
        encoder = load_encoder(t5_folder(tmp_path / model_type, model_type), flag="--text_encoder_name_1", kind="t5")
        long, empty = encoder.states(encoder.tokenize(["a small red circle", ""]))
        assert (encoder.limit, encoder.width, long.shape[1], empty.shape) == (512, 8, 8, (1, 8)), model_type
        check_width(encoder, 8)
    clip = load_encoder(clip_folder(tmp_path / "clip"), flag="--text_encoder_name_2", kind="clip")
    assert clip.limit == 77 and clip.states(clip.tokenize(["red"]))[0].shape == (1, clip.width)
    try:
        check_width(encoder, 4096)
    except ValueError as error:
        assert "google/mt5-xxl" in str(error)
    else:
        raise AssertionError("an encoder 8 wide was taken for a teacher of 4096")


def test_registry() -> None:
    """The guide's names, and the published transformer: 687 keys, 2,771,981,600 parameters."""
    from tdm_fast.models import OpenSoraT2V_v1_3, registry

    assert registry.preset(NAME) == (93, 640, 640) and registry.Diffusion_models_class[NAME] is OpenSoraT2V_v1_3
    with torch.device("meta"):
        published = registry.Diffusion_models["OpenSoraT2V_v1_3-2B/122"](in_channels=8, out_channels=8)
    assert sum(parameter.numel() for parameter in published.parameters()) == 2_771_981_600
    assert len(published.state_dict()) == 687
    strides = {"2x8x8": [2, 8, 8], "4x8x8": [4, 8, 8], "8x8x8": [8, 8, 8]}
    for name in ("CausalVAEModel_D4_2x8x8", "CausalVAEModel_D8_4x8x8", "WFVAEModel_D16_4x8x8", "WFVAEModel_D32_8x8x8"):
        channels = int(name.split("_D")[1].split("_")[0])
        assert registry.ae_stride_config[name] == strides[name[-5:]] and registry.ae_channel_config[name] == channels


def test_tdm_functions() -> None:
    """The losses and samplers against their formulas in float64."""
    from tdm_fast import Schedule, fake_score_loss, ode_step, renoise, sample_intervals, tdm_loss

    x0, teacher, uncond, fake = (normal(seed).requires_grad_(seed == 0) for seed in range(4))
    loss = tdm_loss(x0, teacher, uncond, fake, cfg=4.5, huber_c=1e-3)
    wide = [x.detach().double() for x in (x0, teacher, uncond, fake)]
    guided = wide[1] + 3.5 * (wide[1] - wide[2])
    weight = (wide[0] - guided).abs().mean((1, 2, 3, 4), keepdim=True)
    difference = guided - wide[3]
    wanted = (((difference**2 + 1e-6).sqrt() - 1e-3) / weight).mean()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(loss, x0)
    by_hand = -difference / (difference**2 + 1e-6).sqrt() / weight / x0.numel()
    torch.testing.assert_close(gradient.double(), by_hand, rtol=1e-4, atol=1e-9)

    snr = torch.tensor([9.0, 0.5])
    weighted = torch.tensor([5.0, 0.5], dtype=torch.float64) * (wide[1] - wide[0]).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(
        fake_score_loss(teacher, x0.detach(), snr=snr, snr_gamma=5.0).double(), weighted.mean(), rtol=1e-5, atol=0
    )

    schedule = Schedule.ddpm(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    t, t_next = torch.tensor([899, 449]), torch.tensor([674, 224])
    alpha, sigma = (table.double()[t].view(-1, 1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma))
    clean, noise = alpha * wide[0] - sigma * wide[1], sigma * wide[0] + alpha * wide[1]
    alpha, sigma = (table.double()[t_next].view(-1, 1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma))
    stepped = ode_step(x0.detach(), teacher, schedule=schedule, t=t, t_next=t_next)
    torch.testing.assert_close(stepped.double(), alpha * clean + sigma * noise, rtol=1e-4, atol=1e-5)

    k, t_gen, t_mid, t = sample_intervals(64, num_steps=4, total_steps=900, seed=0, iteration=0)
    assert set(t_gen.tolist()) == {899, 674, 449, 224} and bool(((t_mid <= t) & (t < t_gen)).all())
    assert torch.equal(t_gen, k * 225 - 1)
    noisy, predicted, log_weight = renoise(
        x0.detach(), teacher, schedule=schedule, t_gen=t_gen[:2], t_mid=t_mid[:2], t=t[:2], seed=0, iteration=0
    )
    assert noisy.shape == predicted.shape == x0.shape and log_weight.shape == (2,)
    assert bool(noisy.isfinite().all() and log_weight.isfinite().all())


def test_ops_and_backends() -> None:
    """Every op gives what its definition gives, whatever runs it here."""
    from tdm_fast import ops
    from tdm_fast.installation import op_rows

    rows = list(op_rows())
    assert [row.name for row in rows] == ops.__all__
    assert all(row.state == "ok" for row in rows), [row.says for row in rows if row.state != "ok"]


def test_attention() -> None:
    """One of torch's kernels runs on every device, and gives softmax attention."""
    from tdm_fast.installation import attention_rows

    rows = [row for row in attention_rows() if row.name.startswith("SDPA")]
    assert rows and all(row.state == "ok" and "math" in row.says for row in rows)
    q, k, v = (normal(seed, (1, 2, 7, 6)) for seed in range(3))
    wide = [x.double() for x in (q, k, v)]
    wanted = torch.softmax(wide[0] @ wide[1].mT / 6**0.5, dim=-1) @ wide[2]
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v).double(), wanted, rtol=1e-4, atol=1e-5)


def test_cuda() -> None:
    """A GPU computes; where there is none, asking for it is refused with what would do."""
    from tdm_fast.step import resolve_device

    if torch.cuda.is_available():
        x = torch.arange(64.0, device="cuda").view(8, 8)
        assert torch.equal((x @ torch.eye(8, device="cuda")).cpu(), x.cpu())
        return
    assert resolve_device("auto") == torch.device("cpu")
    try:
        resolve_device("cuda")
    except ValueError as error:
        assert "0 CUDA devices; cpu would do" in str(error)
    else:
        raise AssertionError("a GPU was found that is not there")


def test_versions() -> None:
    """Every package that the installation asks for is there in a version that it takes."""
    from tdm_fast.check import version_rows

    failed = [f"{row.name} {row.says}" for row in version_rows() if row.state == "failed"]
    assert not failed, failed


def test_the_guides_command(tmp_path: Path) -> None:
    """What `tdm-fast check` says of the guide's flags, with folders in place of hub names."""
    from tdm_fast import preflight

    flags = [*guide_flags(build_parts(tmp_path)), "--output_dir", str(tmp_path / "run"), "--train_batch_size", "auto"]
    rows = list(preflight.rows(preflight.parse(flags)))
    assert [row for row in rows if row.state == "failed"] == [] and rows[-1].name == "disk"


def main() -> int:
    """Run all parts; returns the exit code."""
    parts: dict[str, Callable[..., None]] = {
        name.removeprefix("test_").replace("_", " "): part
        for name, part in globals().items()
        if name.startswith("test_")
    }
    failed = 0
    for name, part in parts.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                part(*([Path(folder)] if inspect.signature(part).parameters else []))
                print(f"ok      {name}", flush=True)
            except Exception as error:  # whatever breaks a part, the others are still tried
                failed += 1
                line = traceback.extract_tb(error.__traceback__)[-1]
                print(f"FAILED  {name}: {type(error).__name__}: {error} ({line.filename}:{line.lineno})", flush=True)
    print(f"{len(parts) - failed} of {len(parts)} parts work")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
