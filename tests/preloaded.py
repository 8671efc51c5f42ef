"""What the process that is forked (see forked.py) has imported."""

# ruff: noqa: F401
import megatron.core.dist_checkpointing
import megatron.core.distributed
import torch.distributed.checkpoint.metadata
import transformers.models.qwen3_5.modeling_qwen3_5
import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe
import transformers.models.qwen3_vl.modeling_qwen3_vl
import transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe

import slow_conversion
from megatron.bridge import AutoBridge
from oracle import tiny
