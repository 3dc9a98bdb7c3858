"""`checkpoint_jobs.train` for torchrun: FOLDER TOTAL [PHASE]; in PHASE of the first start rank 1 is killed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch.distributed as dist
from checkpoint_jobs import Kill, train
from few_ranks import Few

from tdm_fast import cli
from tdm_fast.rendezvous import fresh_store


def main() -> int:
    folder, total, phase = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    store, rank, world = fresh_store()
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    kills = phase and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    accident = Kill(phase[0], 1, folder) if kills else lambda _: None
    train(Few(rank, world), folder, total, accident=accident, every=0.02)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(cli.guarded(main))
