"""Every family of diffusers' own as a teacher: iterations, checkpointing, compiled blocks, shards, adapters' files."""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runs import run_ranks
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from tiny_networks import CONFIGS, FAMILIES, TEXT_TOKENS, conditioning, denoiser, example, latent_shape, network
from torch import Tensor, nn

from tdm_fast.config import NetworksConfig, OptimiserConfig, RunConfig, TrainConfig
from tdm_fast.distill import TDMConfig
from tdm_fast.memory import estimate
from tdm_fast.metering import count_operations
from tdm_fast.models.blocks import named_blocks
from tdm_fast.models.loading import Weights
from tdm_fast.models.roles import Networks, make_networks
from tdm_fast.parallel import Compilations, apply_checkpointing, compile_blocks, compile_bound, warm_up
from tdm_fast.ranks import Ranks, joined
from tdm_fast.sharding import collect
from tdm_fast.sizing import with_flags
from tdm_fast.step import State, make_batch, make_state, update
from tdm_fast.text import PromptCache

CPU = torch.device("cpu")
KINDS = ("full", "lora")
ADAPTER = "pytorch_lora_weights.safetensors"
SLOW = pytest.mark.slow
