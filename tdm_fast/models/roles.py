"""Student, teacher and fake score as networks: three copies (`full`), or one frozen base with two adapters (`lora`).

Either kind may be told the student's number of steps K (TDM-unify, arXiv 2503.06674): student and fake score then each
have an embedding that is added to their time embedding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tdm_fast.models.adapters import LORA_FILE, Adapters, RunWith, lora_file, role_context
from tdm_fast.models.denoiser import NUM_STEPS, Conditioning, Denoiser, Roles
from tdm_fast.models.sources import Sources
from tdm_fast.models.student import save_student

__all__ = ["Networks", "StepsEmbedding", "make_networks", "role_context", "tell"]

TRAINED = ("student", "fake")
STEPS_WEIGHT = "steps_embedding.weight"


class StepsEmbedding(nn.Module):
    """One learnt vector for each number of steps in `num_steps`, all zero at first: what a network is told changes
    nothing until it is trained."""

    known: Tensor

    def __init__(self, num_steps: Sequence[int], dim: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_steps = tuple(num_steps)
        self.weight = nn.Parameter(torch.zeros(len(self.num_steps), dim, dtype=dtype, device=device))
        self.register_buffer("known", torch.tensor(self.num_steps, device=device), persistent=False)

    def forward(self, num_steps: Tensor) -> Tensor:
        """`num_steps` int64 `[B]` to `[B, d]`, by comparison and a sum, whose gradient is the same on every run.

        Raises ValueError for a number that is not known, where looking does not stall a device; elsewhere gives NaN.
        """
        hit = num_steps[:, None] == self.known
        here = type(num_steps) is Tensor and num_steps.device.type == "cpu" and not torch.compiler.is_compiling()
        if here and not bool(hit.any(1).all()):
            check_known(min(set(num_steps.tolist()) - set(self.num_steps)), self.num_steps)
        vectors = torch.where(hit[:, :, None], self.weight, 0).sum(1)
        return torch.where(hit.any(1, keepdim=True), vectors, torch.nan)


def check_known(num_steps: int, known: Sequence[int]) -> None:
    """Raise ValueError for a number of steps that is not among the `known` ones."""
    if num_steps not in known:
        raise ValueError(f"num_steps is {num_steps}; this student was made for {', '.join(map(str, known))}")


def tell(conditioning: Conditioning, num_steps: int) -> Conditioning:
    """`conditioning` that tells every sample the same number of steps; made without waiting for the device."""
    device = next(iter(conditioning.tensors.values())).device
    told = torch.full((len(conditioning),), num_steps, dtype=torch.int64, device=device)
    return Conditioning({**conditioning.tensors, NUM_STEPS: told})


@dataclass
class Networks:
    """The three roles, what each of them trains, and the student as it leaves the run. Made by `make_networks`."""

    roles: Roles
    adapters: Adapters | None = None
    """The adapters of student and fake score, where the roles share one network."""
    unify: tuple[int, ...] | None = None
    """The numbers of steps that student and fake score are told, ascending."""

    def trainable(self, role: str) -> dict[str, nn.Parameter]:
        """What the optimiser of "student" or "fake" trains, by name; both roles have the same names.

        full: all of the network, by its own names. lora: the adapter, by the names in diffusers' files. Under unify
        also `steps_embedding.weight`. Raises ValueError for a role that does not train.
        """
        if role not in TRAINED:
            raise ValueError(f"role is {role!r}; {' and '.join(TRAINED)} train")
        denoiser: Denoiser = getattr(self.roles, role)
        parameters = self.adapters.parameters(role) if self.adapters else dict(denoiser.model.named_parameters())
        embedding = denoiser.steps_embedding
        return parameters if embedding is None else {**parameters, STEPS_WEIGHT: embedding.weight}  # type: ignore[dict-item]

    def models(self) -> list[nn.Module]:
        """The distinct networks: three (student, teacher, fake), or the one that they share."""
        return [role.model for role in self.roles] if self.adapters is None else [self.roles.teacher.model]

    @torch.no_grad()
    def load(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Copy named tensors into a role's parameters. Raises ValueError when they are another network's."""
        parameters = self.trainable(role)
        if parameters.keys() != weights.keys():
            odd = sorted(parameters.keys() ^ weights.keys())
            raise ValueError(f"the weights are of another {role}: {len(odd)} names differ, {odd[0]} first")
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])

    def student_network(
        self,
        weights: Mapping[str, Tensor] | None = None,
        num_steps: int | None = None,
        base: Mapping[str, Tensor] | None = None,
    ) -> nn.Module:
        """The student as a plain frozen network of the teacher's class: adapter merged, the vector of K folded in.

        `weights`, by the names of `trainable("student")`, are the student's own if not given. `num_steps` is K under
        unify, the greatest if not given. What needs no merging shares memory with the base or with `weights`. Where
        networks are sharded both `weights` and `base`, the network of the adapters, are given, as plain tensors.
        Raises ValueError for a K that the student was not told in training.
        """
        from accelerate import init_empty_weights

        own = self._student(weights)
        state = (
            self.adapters.merged_state(own, base) if self.adapters else {**self.roles.student.model.state_dict(), **own}
        )
        state = {name: value.detach() for name, value in state.items() if name != STEPS_WEIGHT}
        if self.unify:
            state[f"{self._time_embedding()}.bias"] = self.biases(own, base)[self._known(num_steps)]
        model: Any = self.roles.student.model
        with init_empty_weights():  # of the weights alone; what a network computes for itself it needs to have
            network = type(model).from_config(model.config)
        network.load_state_dict(state, assign=True)
        return network.to(next(iter(state.values())).device).requires_grad_(False).eval()

    @torch.no_grad()
    def biases(
        self, weights: Mapping[str, Tensor] | None = None, base: Mapping[str, Tensor] | None = None
    ) -> dict[int, Tensor]:
        """For each K of unify the bias `[d]` of the time embedding's last linear with the vector of K folded in."""
        own = self._student(weights)
        if self.unify is None:
            return {}
        name = f"{self._time_embedding()}.bias"
        bias = own.get(name, (base or {}).get(name, self.roles.student.time_embedding().bias))
        return {k: (bias + row).to(bias.dtype) for k, row in zip(self.unify, own[STEPS_WEIGHT], strict=True)}

    def lora_file(self, weights: Mapping[str, Tensor] | None = None, num_steps: int | None = None) -> bytes:
        """The student's adapter as a file that stock diffusers loads; arguments as in `student_network`.

        Under unify the vector of K is in it, as the bias of one more adapted linear. Raises ValueError for full roles.
        """
        if self.adapters is None:
            raise ValueError("lora_save is adapter, but the roles are full: there is no adapter; merged would do")
        own, bias = dict(self._student(weights)), None
        vectors = own.pop(STEPS_WEIGHT, None)
        if self.unify and vectors is not None:
            row = vectors[self.unify.index(self._known(num_steps))]
            bias = (self._time_embedding(), self.roles.student.time_embedding(), row)
        return lora_file(own, self.adapters.rank, self.adapters.scaling, bias, self.roles.student.part)

    def save(
        self,
        folder: Path,
        teacher: Sources | Path,
        timesteps: Sequence[int] | Mapping[int, Sequence[int]],
        *,
        weights: Mapping[str, Tensor] | None = None,
        lora_save: Literal["merged", "adapter"] = "merged",
        base: Mapping[str, Tensor] | None = None,
        size: Sequence[int] | None = None,
    ) -> None:
        """Write the student's folder, which samples by itself; `timesteps` are its nodes, under unify those of each K.

        merged: the transformer is `student_network()`. adapter: it is the teacher's, and the adapter is merged when
        the folder is loaded. The adapter's file is there either way; under unify, one for each other K as well.
        `weights` and `base` as in `student_network`, `size` as in `save_student`.
        Raises SaveError when it cannot be written and ValueError for `timesteps` that do not fit.
        """
        if lora_save not in ("merged", "adapter"):
            raise ValueError(f"lora_save is {lora_save!r}; it is merged or adapter")
        given = tuple(sorted(timesteps)) if isinstance(timesteps, Mapping) else None
        if given != self.unify:
            wanted = f"a list for each of {', '.join(map(str, self.unify))}" if self.unify else "one list of nodes"
            raise ValueError(f"timesteps are {timesteps}; this student takes {wanted}")
        files = {}
        if self.adapters is not None or lora_save == "adapter":
            files[LORA_FILE] = self.lora_file(weights)
            for k in (self.unify or ())[:-1]:
                files[LORA_FILE.replace(".", f"_{k}_step.", 1)] = self.lora_file(weights, k)
        save_student(
            folder,
            self.roles.student.model if lora_save == "adapter" else self.student_network(weights, base=base),
            teacher,
            timesteps,
            biases=self.biases(weights, base) if self.unify else None,
            files=files,
            adapter=LORA_FILE if lora_save == "adapter" else None,
            size=size,
        )

    def _student(self, weights: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in (weights or self.trainable("student")).items()}

    def _known(self, num_steps: int | None) -> int:
        assert self.unify is not None
        chosen = self.unify[-1] if num_steps is None else num_steps
        check_known(chosen, self.unify)
        return chosen

    def _time_embedding(self) -> str:
        """The name of the linear that the vectors of K are folded into."""
        wanted = self.roles.student.time_embedding()
        return next(name for name, module in self.roles.student.model.named_modules() if module is wanted)


def make_networks(
    teacher: Denoiser,
    *,
    kind: Literal["full", "lora"] = "full",
    lora_rank: int = 32,
    lora_alpha: float | None = None,
    teacher_dtype: torch.dtype | Literal["auto"] | None = "auto",
    unify: Sequence[int] | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> Networks:
    """Student and fake score that start as `teacher`, whose network is taken over: frozen, and cast to `teacher_dtype`.

    full: the two are trainable copies, in at least fp32. lora: the two are adapters of rank `lora_rank` on the
    teacher's own network, scaled by lora_alpha / lora_rank (1 if not given), trainable, in at least fp32; `seed`
    decides their first values. `teacher_dtype` is bf16 on CUDA and unchanged elsewhere if "auto", unchanged if None.
    `unify` are the numbers of steps that both are told, each by an embedding of its own. `device` is where adapters and
    embeddings are made beside a network that is on the meta device.
    Raises ValueError for a value that cannot work and a network that cannot be adapted or told.
    """
    _check(kind, lora_rank, lora_alpha, teacher_dtype, unify)
    frozen = teacher.model.requires_grad_(False).eval()
    weight = next(frozen.parameters())
    if teacher_dtype == "auto":
        teacher_dtype = torch.bfloat16 if weight.device.type == "cuda" else None
    trained_dtype = torch.promote_types(weight.dtype, torch.float32)
    adapters = None
    if kind == "full":
        copies = [_trainable_copy(teacher, trained_dtype) for _ in TRAINED]
    else:
        adapters = Adapters(frozen, TRAINED, lora_rank, lora_rank if lora_alpha is None else lora_alpha, seed, device)
        copies = [type(teacher)(frozen, teacher.schedule) for _ in TRAINED]
        for name, denoiser in zip(TRAINED, copies, strict=True):
            denoiser.context = RunWith(adapters, name)
    if teacher_dtype is not None:
        cast_frozen(frozen, teacher_dtype)
    if unify is not None:
        for denoiser in copies:
            dim = denoiser.time_embedding().out_features
            denoiser.steps_embedding = StepsEmbedding(sorted(unify), dim, trained_dtype, device or weight.device)
    student, fake = copies
    return Networks(Roles(student, teacher, fake), adapters, None if unify is None else tuple(sorted(unify)))


def _trainable_copy(denoiser: Denoiser, dtype: torch.dtype) -> Denoiser:
    """A copy in `dtype`, cast as it is copied; works for fake tensors too, which deepcopy alone does not."""
    memo: dict[int, Any] = {id(denoiser.schedule): denoiser.schedule}
    for parameter in denoiser.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to(dtype, copy=True))
    for buffer in denoiser.buffers():
        memo[id(buffer)] = buffer.to(dtype if buffer.is_floating_point() else None, copy=True)
    return copy.deepcopy(denoiser, memo).train()


def cast_frozen(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast what does not train, buffers included; adapters, and what diffusers keeps in fp32, keep their dtype."""
    kept = set(getattr(network, "_keep_in_fp32_modules", None) or ())
    for path, module in network.named_modules():
        parts = path.split(".")
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad and kept.isdisjoint((*parts, name)):
                setattr(module, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point() and kept.isdisjoint((*parts, name)):
                setattr(module, name, buffer.to(dtype))


def _check(
    kind: str,
    lora_rank: int,
    lora_alpha: float | None,
    teacher_dtype: torch.dtype | str | None,
    unify: Sequence[int] | None,
) -> None:
    if kind not in ("full", "lora"):
        raise ValueError(f"kind is {kind!r}; it is full (three networks) or lora (one network, two adapters)")
    if type(lora_rank) is not int or lora_rank < 1:
        raise ValueError(f"lora_rank is {lora_rank}; it takes a whole number of at least 1, for example 32")
    if lora_alpha is not None and not (math.isfinite(lora_alpha) and lora_alpha > 0):
        raise ValueError(f"lora_alpha is {lora_alpha}; it takes a finite number above 0, or None for lora_rank")
    if isinstance(teacher_dtype, str) and teacher_dtype != "auto":
        raise ValueError(f"teacher_dtype is {teacher_dtype!r}; it is a torch.dtype, auto or None")
    if isinstance(teacher_dtype, torch.dtype) and not teacher_dtype.is_floating_point:
        raise ValueError(f"teacher_dtype is {teacher_dtype}; weights are floating-point, for example torch.bfloat16")
    if unify is not None and (
        not unify or len(set(unify)) < len(unify) or not all(type(k) is int and k > 0 for k in unify)
    ):
        raise ValueError(f"unify is {tuple(unify)}; it takes different numbers of steps above 0, for example 1 2 4")
