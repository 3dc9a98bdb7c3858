"""Trajectory Distribution Matching (arXiv 2503.06674): few-step video generators from slow diffusion teachers, fast.

The losses and samplers below are all that a trainer of your own needs: plain tensors in, plain tensors out.
"""

from tdm_fast.ops import (
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
