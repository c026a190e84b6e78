"""`train.py` under accelerate's FSDP2 on CPUs, which accelerate keeps for GPUs: only its choice of that is replaced."""

from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from diffusion.commands import train
from diffusion.training import trainer


def sharded(**options):
    accelerator = Accelerator(**options)
    plugin = FullyShardedDataParallelPlugin()  # reads these variables
    assert plugin.fsdp_version == 2
    accelerator.state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    assert accelerator.is_fsdp2
    return accelerator


def main():
    trainer.Accelerator = sharded
    train.main()
