"""Updates whose loss or gradient is not finite are skipped; the host learns of it when it reads the log, not before.

One comparison with a device's number per iteration would make the host wait for the device once per iteration. So the
decision stays on the device: an optimiser's fused step takes a flag (`found_inf`, as torch.amp.GradScaler hands it
over) and leaves everything as it was, the moving average gets a weight of zero, and counters count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tdm_fast.ranks import Ranks

ROLES = ("fake", "student")


class Update(NamedTuple):
    """What an update came to, float32 scalars on the device."""

    norm: Tensor
    """The gradient's norm, before clipping."""
    applied: Tensor
    """1, or 0 where the update was skipped."""
    loss: Tensor
    """The loss, on several ranks their mean."""


class Guard:
    """Steps optimisers, skips what is not finite, and counts it on the device.

    `counts[role]` is int64 `[4]`: updates skipped in all, skipped in a row until now, in the longest row so far, and
    since the last `row()`. A run that goes on from a checkpoint wants them back: `tensors` and `restore`.
    """

    def __init__(
        self, roles: Sequence[str] = ROLES, device: torch.device | str = "cpu", ranks: Ranks | None = None
    ) -> None:
        self.ranks = ranks or Ranks()
        self.counts = {role: torch.zeros(4, dtype=torch.int64, device=device) for role in roles}

    @torch.no_grad()
    def step(
        self, role: str, optimizer: torch.optim.Optimizer, loss: Tensor, *, max_norm: float | None = None
    ) -> Update:
        """Clip the gradients to `max_norm`, if one is given, and take the step if `loss` and their norm are finite.

        A skipped step leaves parameters, moments and step counters as they were, to the bit. Gradients are spoilt by
        clipping with a norm that is not finite: clear them afterwards, as always. Several ranks add up the squares of
        their shards' norms and their losses, in one all-reduce of two numbers, and so decide alike.

        Torch's own optimisers with fused=True decide on the device. All others (8-bit AdamW of torchao or
        bitsandbytes, `foreach`) do not know `found_inf`, and a gradient of zeros would still decay weights and moments:
        for those the host waits for the one flag, once per update, after the backward.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        loss = loss.detach()
        if self.ranks.world == 1:
            norm = nn.utils.get_total_norm([p.grad for p in parameters])
            if max_norm is not None:
                nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        else:
            norm, loss = self._agreed([p.grad for p in parameters], loss)
            if max_norm is not None:  # as torch's function does, which takes no mixture of sharded and plain ones
                scale = (max_norm / (norm + 1e-6)).clamp(max=1)
                torch._foreach_mul_([local(p.grad) for p in parameters], scale)
        applied = (loss.isfinite() & norm.isfinite()).float()
        _step_unless(1 - applied, optimizer)
        total, in_a_row, longest, since_row = self.counts[role].unbind()
        skipped = 1 - applied.long()
        total += skipped
        in_a_row.add_(skipped).mul_(skipped)
        torch.maximum(longest, in_a_row, out=longest)
        since_row += skipped
        return Update(norm.float(), applied, loss)

    def _agreed(self, gradients: Sequence[Tensor], loss: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of all ranks' gradients together, and the mean of their losses: the same bits on every rank."""
        total = torch.zeros(2, dtype=torch.float32, device=loss.device)
        for sharded, times in ((True, self.ranks.copies), (False, self.ranks.world)):
            mine = [local(g) for g in gradients if isinstance(g, DTensor) == sharded]
            if mine := [g for g in mine if g.numel()]:
                # Every shard is there once for each whole copy of the weights.
                total[0] += torch.stack(torch._foreach_norm(mine)).float().square().sum() / times
        total[1] = loss.float() / self.ranks.world
        squares, mean = self.ranks.sum_(total).unbind()
        return squares.sqrt(), mean

    def row(self) -> dict[str, Tensor]:
        """For the iteration's row of the log: per role, the updates skipped since the last call, and in all."""
        values = {}
        for role, counts in self.counts.items():
            values[f"skipped_{role}"] = counts[3].clone()
            values[f"skipped_{role}_in_all"] = counts[0].clone()
            counts[3].zero_()
        return values

    def raise_if_stuck(self, limit: int = 10, checkpoint: Path | None = None) -> None:
        """Raise ValueError when `limit` updates of a role were skipped in a row; `checkpoint` is the last good one.

        Waits for the device; called when the log is flushed, and before a checkpoint is saved.
        """
        for role, counts in self.counts.items():
            total, _, longest, _ = counts.tolist()
            if longest >= limit:
                raise ValueError(
                    f"{longest} updates of the {role} in a row ({total} in all) had a loss or a gradient that is not"
                    " finite: the training diverged; metrics.jsonl names the samples. The last good checkpoint is"
                    f" {checkpoint or 'none'}: --resume_from_checkpoint with its path goes on from there with lower"
                    " rates or a smaller --max_grad_norm"
                )

    def tensors(self) -> dict[str, Tensor]:
        """The counters, for a checkpoint."""
        return dict(self.counts)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `tensors`, but for the longest row of earlier skips, which is over."""
        for role, counts in self.counts.items():
            counts.copy_(tensors[role])
            counts[2] = counts[1]


@torch.no_grad()
def average_(averages: Sequence[Tensor], parameters: Sequence[Tensor], share: float, applied: Tensor) -> None:
    """Move the averages towards the parameters by `share`, or, where `applied` is 0, not at all. In place."""
    mine, theirs = [local(average) for average in averages], [local(parameter) for parameter in parameters]
    weights = {dtype: (share * applied).to(dtype) for dtype in {average.dtype for average in mine}}
    torch._foreach_lerp_(mine, theirs, [weights[average.dtype] for average in mine])


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; a plain tensor as it is."""
    return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor


def name_samples(row: dict[str, Any], samples: range, prompts: Sequence[int]) -> str | None:
    """Where a row of the log says that an update was skipped, add the iteration's samples to it.

    `samples` are the iteration's global sample indices, `prompts` their prompts' indices. Returns a sentence for the
    user, or None, the row as it was, where nothing was skipped.
    """
    roles = [name.removeprefix("skipped_") for name in row if name.startswith("skipped_") and not _in_all(name)]
    skipped = [role for role in roles if row[f"skipped_{role}"]]
    if not skipped:
        return None
    row["samples"], row["prompts"] = [samples.start, samples.stop], list(prompts)
    return (
        f"iteration {row['step']}: update of {' and '.join(skipped)} skipped, because a loss or gradient is not finite;"
        f" samples {samples.start} to {samples.stop - 1}, prompts {', '.join(map(str, prompts))}"
    )


def _in_all(name: str) -> bool:
    return name.endswith("_in_all")


def _step_unless(skip: Tensor, optimizer: torch.optim.Optimizer) -> None:
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        if not skip.item():
            optimizer.step()
        return
    amp: Any = optimizer
    amp.grad_scale, amp.found_inf = None, skip
    try:
        optimizer.step()
    finally:
        del amp.grad_scale, amp.found_inf
