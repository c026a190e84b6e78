"""train.py under accelerate's FSDP2 on CPUs, which accelerate keeps for GPUs: all but its choice of that is its own."""

import sys
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from diffusion.commands.terminal import exit_code
from diffusion.training import trainer


def sharded(**options):
    accelerator = Accelerator(**options)
    plugin = FullyShardedDataParallelPlugin()  # as `accelerate launch` says in the environment
    assert plugin.fsdp_version == 2
    accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    assert accelerator.is_fsdp2
    return accelerator


if __name__ == "__main__":
    trainer.Accelerator = sharded
    sys.exit(exit_code(train.main))
