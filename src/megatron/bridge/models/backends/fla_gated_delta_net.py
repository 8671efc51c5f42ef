"""megatron-core's GatedDeltaNet on the kernels of flash-linear-attention, with padded batches.

Written against megatron-core 0.19; flash-linear-attention needs a GPU, and this file has not been
run on one. The tests of this project run `torch_gated_delta_net`.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron.bridge.models.backends.sequence_parts import SequenceParts
from megatron.bridge.models.backends.torch_gated_delta_net import GatedDeltaNetParameters


class FlaGatedDeltaNet(GatedDeltaNetParameters, GatedDeltaNet):
    """As TorchGatedDeltaNet. megatron-core's class ignores the attention mask."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: GatedDeltaNetSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        cp_comm_type: str | None = None,
        ssm_dtype: torch.dtype | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(
            config,
            submodules,
            layer_number=layer_number,
            pg_collection=pg_collection,
            cp_comm_type=cp_comm_type,
            name=name,
        )
        self.finish_parameters(ssm_dtype)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As megatron-core's; `attention_mask` [b, 1, 1, s] is True for padding, taken as zero."""
        if attention_mask is not None:
            padding = attention_mask[:, 0, 0, :].t()
            if (group := self.pg_collection.cp).size() > 1:
                padding = SequenceParts(group, [len(padding)]).cut(padding)
            if self.config.sequence_parallel:
                padding = padding.chunk(self.tp_size)[self.tp_group.rank()]
            # A norm that is fused into in_proj keeps a zero what it is.
            hidden_states = hidden_states.masked_fill(padding.unsqueeze(-1), 0.0)
        # megatron-core's forward reads this weight without calling its module, and data parallelism
        # that gathers parameters late waits for them in that call.
        with torch.no_grad():
            channels = self.conv_dim_local_tp
            self.conv1d(hidden_states.new_zeros(1, channels, 1, dtype=self.config.params_dtype))
        return super().forward(hidden_states, attention_mask, *args, **kwargs)
