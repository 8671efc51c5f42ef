"""Configs made from a client's own settings."""

from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.building import refuse_fsdp
from megatron.bridge.runtime.ddp_config import DistributedDataParallelConfig


def create_ddp_config(
    wrap_with_ddp: bool = True,
    use_distributed_optimizer: bool = True,
    use_megatron_fsdp: bool = False,
    overrides: Mapping[str, Any] | None = None,
    finalize: bool = True,
) -> DistributedDataParallelConfig | None:
    """The config of megatron-core's DistributedDataParallel.

    Args:
        wrap_with_ddp: whether there is one at all.
        use_distributed_optimizer: a field of the config.
        use_megatron_fsdp: only False.
        overrides: further fields by name.
        finalize: check it.

    Returns:
        The config; None without DDP.

    Raises:
        ConfigError: there is no field of a name, or a value cannot be honoured.
    """
    refuse_fsdp(use_megatron_fsdp=use_megatron_fsdp)
    if not wrap_with_ddp:
        return None
    given = {"use_distributed_optimizer": use_distributed_optimizer, **(overrides or {})}
    known = [field.name for field in fields(DistributedDataParallelConfig)]
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            meant = f"; was {close[0]} meant?" if close else ""
            raise ConfigError(f"overrides: DistributedDataParallelConfig has no {name}{meant}")
    config = DistributedDataParallelConfig(**given)
    if finalize:
        config.finalize()
    return config
