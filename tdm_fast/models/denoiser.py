"""What distillation knows of a teacher: `Denoiser`, a network and its schedule, and `Conditioning`, its side inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tdm_fast.schedule import Schedule

NUM_STEPS = "num_steps"
_STATES, _MASK = "_hidden_states", "_attention_mask"


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Tensors that go beside x_t into a network, by name, batch first.

    Token sequences are named `*_hidden_states` `[B, L, D]`; their optional masks `*_attention_mask` `[B, L]`, 1 = keep;
    `num_steps`, int64 `[B]`, is the student's number of steps K, for networks that are told it.
    Raises ValueError if the tensors' batch sizes differ or there is none.
    """

    tensors: dict[str, Tensor]

    def __post_init__(self) -> None:
        sizes = {name: tensor.shape[0] if tensor.ndim else None for name, tensor in self.tensors.items()}
        if len(set(sizes.values())) != 1 or None in sizes.values():
            raise ValueError(f"tensors have batch sizes {sizes}; at least one tensor, and one size for all, is needed")

    def __len__(self) -> int:
        return next(iter(self.tensors.values())).shape[0]

    def __getitem__(self, index: Tensor | slice | Sequence[int]) -> Conditioning:
        """The samples at `index`: a slice, an index or mask tensor, or a list of indices."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Conditioning:
        """Move to `device`; `dtype` is given to floating-point tensors only."""
        return Conditioning(
            {
                name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
                for name, tensor in self.tensors.items()
            }
        )

    def expand(self, batch_size: int) -> Conditioning:
        """One sample repeated (as a view) to `batch_size`; a conditioning that has this size already stays as it is."""
        if len(self) == batch_size:
            return self
        if len(self) != 1:
            raise ValueError(f"conditioning has {len(self)} samples; it must have 1 or {batch_size}")
        return Conditioning(
            {name: tensor.expand(batch_size, *tensor.shape[1:]) for name, tensor in self.tensors.items()}
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join batches. Sequences are padded with zeros to the longest; where that or a part's own mask makes one
        necessary, parts without a mask get one, so that a sample's result does not change.

        Raises ValueError if the parts' names, or shapes other than a sequence's length, differ.
        """
        tensors = [_with_masks(part.tensors, parts) for part in parts]
        names = tensors[0].keys() if tensors else ()
        for other in tensors:
            if other.keys() != names:
                raise ValueError(f"parts hold {sorted(names)} and {sorted(other)}; all must hold the same tensors")
        return Conditioning({name: _join(name, [part[name] for part in tensors]) for name in names})


def _with_masks(tensors: dict[str, Tensor], parts: Sequence[Conditioning]) -> dict[str, Tensor]:
    added = dict(tensors)
    for name, states in tensors.items():
        mask = name.removesuffix(_STATES) + _MASK
        if not name.endswith(_STATES) or mask in tensors:
            continue
        masks = [part.tensors[mask] for part in parts if mask in part.tensors]
        lengths = {part.tensors[name].shape[1] for part in parts if name in part.tensors}
        if masks or len(lengths) > 1:
            added[mask] = states.new_ones(states.shape[:2], dtype=masks[0].dtype if masks else torch.int64)
    return added


def _join(name: str, tensors: list[Tensor]) -> Tensor:
    if name.endswith((_STATES, _MASK)):
        longest = max(tensor.shape[1] for tensor in tensors)
        tensors = [_pad(tensor, longest) for tensor in tensors]
    shapes = {tuple(tensor.shape[1:]) for tensor in tensors}
    if len(shapes) > 1:
        raise ValueError(f"{name} has shapes {sorted(shapes)} behind the batch; all parts must agree")
    return torch.cat(tensors)


def _pad(tensor: Tensor, length: int) -> Tensor:
    missing = length - tensor.shape[1]
    if missing == 0:
        return tensor
    return torch.cat((tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])), dim=1)


class Denoiser(nn.Module):
    """A network with its schedule. A family of teachers overrides `call_model`, nothing else knows how it is called."""

    part: ClassVar[str] = "transformer"
    """The network's name in a pipeline's folder and in the files of its adapters."""
    takes_mask: ClassVar[bool] = True
    """Whether prompts of different lengths can go into one call, with an `encoder_attention_mask`."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.model = model
        self.schedule = schedule
        self.steps_embedding: nn.Module | None = None
        """`num_steps` int64 `[B]` to `[B, d]`, added to the time embedding; None for a network that is not told K."""
        self.context: AbstractContextManager[Any] = nullcontext()
        """What the network's calls run in. Where roles share one network, it turns this role's adapter on."""

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Raw output, with x_t's shape, for latents `x_t` `[B, C, ...]` at table indices `t` (int64 `[B]`).

        A sampler with steps between the indices gives a floating-point `t`, which the network is told as it is.
        The output has the network's dtype, whatever x_t's is: the ops take latents of mixed dtypes and compute in fp32.
        A network that also predicts variance (2C channels) has its first half taken. Raises ValueError if batch sizes
        differ, the network's output does not fit x_t, or `conditioning` lacks the `num_steps` that the network is told.
        """
        if t.shape != x_t.shape[:1] or len(conditioning) != x_t.shape[0]:
            raise ValueError(
                f"x_t has {x_t.shape[0]} samples, t has shape {tuple(t.shape)} and conditioning has {len(conditioning)}"
                " samples; all must describe one batch"
            )
        timestep = t if t.is_floating_point() else self.schedule.to(t.device).timesteps[t]
        with self.context:
            output = self.call_model(x_t, timestep, conditioning)
        if x_t.ndim > 1 and output.ndim == x_t.ndim and output.shape[1] == 2 * x_t.shape[1]:
            output = output[:, : x_t.shape[1]]
        if output.shape != x_t.shape:
            raise ValueError(f"model's output has shape {tuple(output.shape)}; it must have x_t's {tuple(x_t.shape)}")
        return output

    def call_model(self, x_t: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's own call; `timestep` `[B]` is what the network is told. Override for other signatures."""
        dtype = self.input_dtype(x_t)
        return self.model(x_t.to(dtype), timestep, **conditioning.to(dtype=dtype).tensors)

    def input_dtype(self, x_t: Tensor) -> torch.dtype:
        """What latents and text are cast to: the network's dtype; what diffusers keeps in fp32 does not count."""
        dtype = getattr(self.model, "dtype", None)
        if isinstance(dtype, torch.dtype):
            return dtype
        return next((parameter.dtype for parameter in self.model.parameters()), x_t.dtype)

    def unmasked_states(self, conditioning: Conditioning) -> Tensor:
        """`encoder_hidden_states` `[B, L, D]` for a network that takes no mask. Raises ValueError if there is one."""
        if "encoder_attention_mask" in conditioning.tensors:
            raise ValueError(
                f"conditioning has an encoder_attention_mask, and {type(self.model).__name__} takes none: its prompts"
                " are padded to one length by their tokenizer"
            )
        return conditioning.tensors["encoder_hidden_states"]

    def pooled_states(self, conditioning: Conditioning) -> Tensor:
        """The pooled embedding `[B, D2]`, from `encoder_2_hidden_states`. Raises ValueError if it is not there."""
        if "encoder_2_hidden_states" not in conditioning.tensors:
            raise ValueError(
                f"conditioning holds {', '.join(sorted(conditioning.tensors))}; {type(self.model).__name__} also takes"
                " a pooled embedding, encoder_2_hidden_states [B, 1, D2]"
            )
        return conditioning.tensors["encoder_2_hidden_states"][:, 0]

    def time_embedding(self) -> nn.Linear:
        """The last linear of the network's time embedding: what is told of K is added to its output, or to its bias.

        A family of networks whose `call_model` passes `added_time_embedding` on overrides it; others raise ValueError.
        """
        raise ValueError(f"unify: a {type(self.model).__name__} cannot be told its number of steps; leave it out")

    def added_time_embedding(self, conditioning: Conditioning) -> Tensor | None:
        """`[B, d]` to add to the time embedding's output, or None for a network that is not told K."""
        if self.steps_embedding is None:
            return None
        if NUM_STEPS not in conditioning.tensors:
            raise ValueError(
                f"conditioning holds {', '.join(sorted(conditioning.tensors))}; this network is told its number of"
                f" steps, so {NUM_STEPS}, int64 [B], is needed as well"
            )
        return self.steps_embedding(conditioning.tensors[NUM_STEPS])


class Roles(NamedTuple):
    """Three networks on one schedule. The student's and the fake score's parameters train, the teacher's do not."""

    student: Denoiser
    teacher: Denoiser
    fake: Denoiser


@dataclass
class ForwardCount:
    """What `count_forwards` saw: calls, samples in them, and samples whose output carries a gradient."""

    calls: int = 0
    samples: int = 0
    trained_samples: int = 0


@contextmanager
def count_forwards(denoiser: nn.Module) -> Iterator[ForwardCount]:
    """Count the forwards that `denoiser` makes inside the `with` block."""
    count = ForwardCount()

    def record(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        count.calls += 1
        count.samples += output.shape[0]
        count.trained_samples += output.shape[0] if output.requires_grad else 0

    handle = denoiser.register_forward_hook(record)
    try:
        yield count
    finally:
        handle.remove()
