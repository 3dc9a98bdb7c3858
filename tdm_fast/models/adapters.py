"""LoRA adapters (peft) of several roles on one frozen network: which one is on, what it adds, its file."""

from __future__ import annotations

import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from tdm_fast.models.blocks import named_blocks

LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTERS = "_tdm_adapters"

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class AdapterLinear(nn.Linear):
    """Half of an adapter: computes in its input's dtype from a weight of its own dtype, as autocast would.

    peft instead widens the input to an fp32 weight's dtype, which keeps an fp32 copy of every activation for backward.
    """

    @classmethod
    def like(cls, base: Tensor, weight: Tensor, device: torch.device | None = None) -> AdapterLinear:
        """With this weight, on `base`'s device or another, in its dtype or fp32, as bf16 rounds small updates away."""
        linear = cls(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight.to(device or base.device, torch.promote_types(base.dtype, torch.float32)))
        return linear

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype))


class Adapters:
    """Adapters of rank `rank`, one per name, on the attention and feed-forward linears of a network's blocks.

    `model` is frozen, changed in place, and shared by all of them; without an active adapter it computes what it did
    before, to the bit. A is random (a function of `seed`), B zero: at first no adapter changes anything.

    Switching sets peft's two flags of a layer and not `requires_grad`, unlike peft's `set_adapter` and
    `enable_adapters`: autograd looks at `requires_grad` when a gradient arrives, and drops in silence what comes for
    an adapter that was switched off between its forward and its backward. Compiled blocks see only the flags change.

    They are made on the model's device, or on `device`: a model on the meta device gets its weights later.
    Raises ValueError when the model has adapters already or no blocks with such linears.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        rank: int,
        alpha: float,
        seed: int,
        device: torch.device | None = None,
    ) -> None:
        # Importing peft takes more than a second, which networks without adapters need not wait for.
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        if getattr(model, "peft_config", None):
            raise ValueError(
                f"the network has adapters already ({', '.join(model.peft_config)}); merge them (fuse_lora, then"  # type: ignore[arg-type]
                " unload_lora) or start from a network without any"
            )
        self.model, self.rank, self.scaling = model, rank, alpha / rank
        self.active: str | None = None
        targets = block_linears(model)
        model.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is what is wanted
            for name in names:
                config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets)
                inject_adapter_in_model(config, model, name, low_cpu_mem_usage=True)  # empty: they are filled below
        self.layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            layer.cast_input_dtype_enabled = False
            layer._disable_adapters = True
            for name in names:
                down = torch.empty(rank, layer.in_features)
                nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)  # peft's own
                layer.lora_A[name] = AdapterLinear.like(layer.weight, down, device)
                layer.lora_B[name] = AdapterLinear.like(layer.weight, torch.zeros(layer.out_features, rank), device)
        setattr(model, _ADAPTERS, self)
        self._cooperate_with_checkpointing()

    def _cooperate_with_checkpointing(self) -> None:
        """Make diffusers' own activation checkpointing recompute a block with the adapter of its forward."""
        model: Any = self.model
        if not getattr(model, "_supports_gradient_checkpointing", False):
            return
        recompute = functools.partial(_checkpoint_block, model)
        model.enable_gradient_checkpointing = functools.partial(
            model.enable_gradient_checkpointing, gradient_checkpointing_func=recompute
        )
        if model.is_gradient_checkpointing:
            model.enable_gradient_checkpointing()

    def activate(self, name: str | None) -> None:
        """Turn the adapter `name` on and the others off; None turns all off."""
        if name == self.active:
            return
        flags = {"_disable_adapters": name is None} | ({} if name is None else {"_active_adapter": name})
        for layer in self.layers.values():
            vars(layer).update(flags)  # ten times as fast as __setattr__, and every recomputed block waits for it
        self.active = name

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters, named as in diffusers' and peft's files: without the adapter's name."""
        return {
            f"{path}.{half}.weight": getattr(layer, half)[name].weight
            for path, layer in self.layers.items()
            for half in ("lora_A", "lora_B")
        }

    def base_state(self) -> dict[str, Tensor]:
        """The frozen network's state dict as it was before it had adapters."""
        state = self.model.state_dict().items()
        return {name.replace(".base_layer.", "."): value for name, value in state if ".lora_" not in name}

    @torch.no_grad()
    def merged_state(
        self, weights: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """`base_state` with W + (alpha / rank) B A of the adapter `weights` in W's place, rounded once to W's dtype.

        `base` is what `base_state` gives if not given: a sharded network's has to be collected first.
        """
        state = self.base_state() if base is None else dict(base)
        for path in self.layers:
            name = f"{path}.weight"
            product = weights[f"{path}.lora_B.weight"] @ weights[f"{path}.lora_A.weight"]
            state[name] = (state[name] + self.scaling * product).to(state[name].dtype)
        return state


class RunWith:
    """A context in which one adapter is on; can be entered again and again, on any thread."""

    def __init__(self, adapters: Adapters, name: str | None) -> None:
        self.adapters, self.name = adapters, name
        self.before: str | None = None

    def __enter__(self) -> None:
        self.before = self.adapters.active
        self.adapters.activate(self.name)

    def __exit__(self, *_: object) -> None:
        self.adapters.activate(self.before)


def role_context(model: nn.Module, context_fn: Callable[[], Contexts] = noop_context_fn) -> Callable[[], Contexts]:
    """A `context_fn` for `torch.utils.checkpoint` with which a part of `model` is recomputed in its forward's role.

    Recomputation happens in backward, when another adapter of the model, or none, is on. `context_fn` is another one
    to combine it with, such as that of selective checkpointing. For eager mode only: a compiled block recomputes
    inside its own backward graph, whose adapter is fixed, and torch.compile takes no other context than a selective
    one, so ask `torch.compiler.is_compiling()` which of the two to pass. Models without adapters may be given too.
    """

    def contexts() -> Contexts:
        forward, recompute = context_fn()
        adapters: Adapters | None = getattr(model, _ADAPTERS, None)
        if adapters is None:
            return forward, recompute
        return forward, _Both(RunWith(adapters, adapters.active), recompute)

    return contexts


class _Both(ExitStack):
    """Two contexts as one that, like torch's own, can be entered more than once."""

    def __init__(self, *contexts: AbstractContextManager[Any]) -> None:
        super().__init__()
        self.contexts = contexts

    def __enter__(self) -> _Both:
        super().__enter__()
        for context in self.contexts:
            self.enter_context(context)
        return self


def _checkpoint_block(model: nn.Module, block: nn.Module, *args: Any) -> Any:
    return checkpoint(block, *args, use_reentrant=False, context_fn=role_context(model))


def block_linears(model: nn.Module) -> list[str]:
    """Names of the attention and feed-forward linears in the blocks of a network of diffusers' naming."""
    try:
        blocks = named_blocks(model)
    except ValueError:
        blocks = []
    names = [
        f"{path}.{name}"
        for path, block in blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("attn", "ff"))
    ]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no blocks with linears named attn… or ff…; adapters need a network in"
            " diffusers' naming, or full roles"
        )
    return names


def lora_file(
    weights: Mapping[str, Tensor],
    rank: int,
    scaling: float,
    bias: tuple[str, nn.Linear, Tensor] | None = None,
    part: str = "transformer",
) -> bytes:
    """An adapter as the content of a file that `load_lora_weights` of diffusers, and what reads its format, loads.

    `part` is the network's name in a pipeline, with which every tensor's name begins. A class without
    `load_lora_adapter`, such as PixArt's, takes the tensors by peft's `set_peft_model_state_dict`, without that name.
    `scaling` (alpha / rank) is multiplied into B and the file says alpha = rank, because readers differ in what they
    make of an alpha. `bias` is one more linear, with its name, and a vector that the adapter adds to its output.
    """
    tensors = {
        name: (scaling * value if name.endswith("lora_B.weight") else value).contiguous()
        for name, value in ((name, value.detach().cpu()) for name, value in weights.items())
    }
    if bias is not None:
        # peft gives all of an adapter's layers a bias or none.
        linears = {name.removesuffix(".lora_B.weight"): value for name, value in tensors.items() if "lora_B" in name}
        tensors |= {f"{path}.lora_B.bias": value.new_zeros(len(value)) for path, value in linears.items()}
        path, linear, vector = bias
        vector = vector.detach().cpu().contiguous()
        tensors |= {
            f"{path}.lora_A.weight": vector.new_zeros(rank, linear.in_features),
            f"{path}.lora_B.weight": vector.new_zeros(linear.out_features, rank),
            f"{path}.lora_B.bias": vector,
        }
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "lora_bias": bias is not None,
        "target_modules": sorted({name.split(".lora_")[0] for name in tensors}),
    }
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{part}.{name}": value for name, value in settings.items()}),
    }
    return safetensors.torch.save({f"{part}.{name}": value for name, value in tensors.items()}, metadata)
