"""Where trainers look for configs; this one is in `runtime.ddp_config`."""

from megatron.bridge.runtime.ddp_config import DistributedDataParallelConfig

__all__ = ["DistributedDataParallelConfig"]
