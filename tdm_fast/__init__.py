"""Trajectory Distribution Matching (arXiv 2503.06674): few-step video generators from slow diffusion teachers, fast.

The losses and samplers below are all that a trainer of your own needs: plain tensors in, plain tensors out.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # mypy takes the functions for the modules that they are named after.
    from tdm_fast.ops import (  # type: ignore[no-redef]
        fake_score_loss,
        fake_score_loss_from_outputs,
        ode_step,
        pseudo_huber,
        renoise,
        sample_intervals,
        tdm_loss,
        tdm_loss_from_outputs,
    )
    from tdm_fast.schedule import Schedule

__all__ = [
    "Schedule",
    "fake_score_loss",
    "fake_score_loss_from_outputs",
    "ode_step",
    "pseudo_huber",
    "renoise",
    "sample_intervals",
    "tdm_loss",
    "tdm_loss_from_outputs",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: the command must be able to hear Ctrl-C while PyTorch loads."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("tdm_fast.schedule" if name == "Schedule" else "tdm_fast.ops"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
