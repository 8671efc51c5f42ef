"""megatron-core's parallel linears, that are plain ones where nothing is split.

Without tensor parallelism megatron-core's own add the bias in an operation of its own, and run
three functions of autograd around one product.
"""

from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

type Output = tuple[Tensor, Tensor | None]
"""What a linear gives, and the bias that is still to be added to it."""


class TorchColumnParallelLinear(ColumnParallelLinear):
    """Its output dimension is split over the tensor-parallel ranks."""

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> Output:
        """As megatron-core's; a plain one adds its bias here and now."""
        if weight is not None or not is_plain(self):
            output: Output = super().forward(input_, weight, runtime_gather_output)
            return output
        return F.linear(input_, self.weight, self.bias), None


class TorchRowParallelLinear(RowParallelLinear):
    """Its input dimension is split over the tensor-parallel ranks."""

    def forward(self, input_: Tensor) -> Output:
        """As megatron-core's; a plain one adds its bias here and now."""
        if not is_plain(self):
            output: Output = super().forward(input_)
            return output
        return F.linear(input_, self.weight, self.bias), None


def is_plain(linear: Any) -> bool:
    """Whether a parallel linear computes what torch's does, and nothing else."""
    config = linear.config
    # What megatron-core fuses with the bias, it does itself; so with an expert's, which it weighs.
    needs_bias = config.bias_activation_fusion or config.bias_dropout_fusion or linear.is_expert
    return bool(
        linear.tp_group.size() == 1
        and linear.weight is not None
        and not linear.gradient_accumulation_fusion
        and not config.defer_embedding_wgrad_compute
        and config._cpu_offloading_context is None
        and linear.gtp_remat_size == 1
        and not (linear.skip_bias_add and linear.bias is not None and needs_bias)
    )
