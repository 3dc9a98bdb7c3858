"""Teachers: one adapter per model family, and the networks that this project runs natively."""

from tdm_fast.models.causalvae import CausalVAEModel
from tdm_fast.models.opensora import OpenSoraT2V_v1_3
from tdm_fast.models.wfvae import WFVAEModel

__all__ = ["CausalVAEModel", "OpenSoraT2V_v1_3", "WFVAEModel"]
