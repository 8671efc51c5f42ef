"""What the process that is forked (see forked.py) has imported: all that a command may."""

# ruff: noqa: F401
import importlib
import pkgutil

import megatron.core.dist_checkpointing
import megatron.core.distributed
import rich.console
import rich.table
import torch.distributed.checkpoint.metadata
import transformers.models.qwen3_5.modeling_qwen3_5
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe
import transformers.models.qwen3_vl.modeling_qwen3_vl
import transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe

import megatron.bridge
import slow_conversion
from oracle import tiny

for _module in pkgutil.walk_packages(megatron.bridge.__path__, "megatron.bridge."):
    if not _module.name.endswith("__main__"):
        importlib.import_module(_module.name)
