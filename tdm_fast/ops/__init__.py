"""The operations of trajectory distribution matching on plain tensors; each file is one op, defined in plain torch."""

from tdm_fast.ops.fake_score_loss import fake_score_loss, fake_score_loss_from_outputs
from tdm_fast.ops.ode_step import ode_step
from tdm_fast.ops.pseudo_huber import pseudo_huber
from tdm_fast.ops.renoise import renoise
from tdm_fast.ops.sample_intervals import sample_intervals
from tdm_fast.ops.tdm_loss import tdm_loss, tdm_loss_from_outputs

__all__ = [
    "fake_score_loss",
    "fake_score_loss_from_outputs",
    "ode_step",
    "pseudo_huber",
    "renoise",
    "sample_intervals",
    "tdm_loss",
    "tdm_loss_from_outputs",
]
