"""Gated DeltaNet, a linear attention, in plain torch.

megatron-core's own GatedDeltaNet needs flash-linear-attention. Here are the same parameters, with
the same sharding and checkpoint keys, and also packed sequences and padded batches.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.models.backends.delta_rule import causal_conv, gated_delta_rule
from megatron.bridge.models.backends.sequence_parts import SequenceParts
from megatron.bridge.models.backends.torch_attention import packed_lengths

# As megatron-core initializes A: uniform, then its logarithm.
A_RANGE = (1.0, 16.0)


class CausalConv1d(nn.Conv1d):
    """A depthwise convolution that looks back, and not over the borders of sequences."""

    def forward(  # type: ignore[override]
        self, x: Tensor, lengths: Sequence[int], channels: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Convolve some channels of sequences laid end to end.

        Args:
            x: [tokens, those channels].
            lengths: tokens of each sequence.
            channels: picks them from the weight.
        """
        return causal_conv(x, channels(self.weight), lengths)


class GatedDeltaNetParameters(MegatronModule):
    """What both implementations need beyond megatron-core: dtype, gradient and sections.

    megatron-core makes every parameter in `params_dtype`, and its Float16Module casts them all
    once more. Models are released with A_log and the output norm in fp32.
    """

    def finish_parameters(self, ssm_dtype: torch.dtype | None) -> None:
        """Call it once all parameters exist.

        Args:
            ssm_dtype: of A_log and out_norm; casting the model to a narrower dtype does not touch
                them. None: `params_dtype`, and they are cast like the others.
        """
        # Each section is split over the ranks by itself: megatron-core's resharding reads this.
        self.in_proj.weight.partition_sizes = [*self.in_proj_split_sections]
        self.conv1d.weight.partition_sizes = [*self.in_proj_split_sections[:3]]
        self.ssm_dtype = ssm_dtype
        # A plain torch module, of which a row has to know how many heads its channels are.
        self.conv1d.config = self.config
        for parameter in self._of_ssm_dtype():
            parameter.data = parameter.data.to(ssm_dtype)
        # Each rank norms its own heads with the whole weight, so its gradient is a part of a sum.
        # With sequence parallelism megatron-core sums it; without, only that of q and k norms.
        if self.pg_collection.tp.size() > 1 and not self.config.sequence_parallel:
            for parameter in self.out_norm.parameters():
                parameter.register_hook(self._sum_over_tensor_ranks)

    def _of_ssm_dtype(self) -> list[nn.Parameter]:
        return [] if self.ssm_dtype is None else [self.A_log, *self.out_norm.parameters()]

    def _sum_over_tensor_ranks(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=self.pg_collection.tp)
        return gradient

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Under `model.bfloat16()` and its like, keep the dtype of what has `ssm_dtype`."""
        kept = {id(tensor) for one in self._of_ssm_dtype() for tensor in (one, one.grad)}

        def unless_narrower(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if id(tensor) in kept and applied.dtype.itemsize < tensor.dtype.itemsize:
                return tensor.to(applied.device)
            return applied

        return super()._apply(unless_narrower, recurse)


class TorchGatedDeltaNet(GatedDeltaNetParameters):
    """`self_attention` of a TransformerLayer; parameters as in megatron-core's GatedDeltaNet.

    The heads are split over the tensor-parallel ranks. This rank's rows of in_proj.weight are
    [query; key; value; z; beta; alpha], those of conv1d.weight [query; key; value]. With context
    parallelism ranks that hold the same weights share their heads out, each for all tokens.

    Shapes: s length, of which hidden states are this rank's part, b batch, h hidden size; per rank
    n key heads of size k, m value heads of size v (m a multiple of n).

    Args:
        config: of the layer; the `linear_*` fields give heads and sizes.
        submodules: the linears and the norm; in_proj may norm its input first.
        layer_number: 1 for the first layer of the model.
        pg_collection: process groups.
        cp_comm_type: not used.
        ssm_dtype: of A_log and out_norm, see `GatedDeltaNetParameters`.
        name: of this module, for its linears.

    Raises:
        ConfigError: the config asks for what this module does not implement.
    """

    # What is in a checkpoint is megatron-core's decision; it reads the attributes set below.
    sharded_state_dict = GatedDeltaNet.sharded_state_dict

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
        super().__init__(config)
        _check(config)
        self.layer_number = layer_number
        self.pg_collection = pg_collection
        self.tp_size = pg_collection.tp.size()
        self.cp_size = pg_collection.cp.size()
        self.act_fn = config.activation_func
        self.conv_bias = False

        self.key_head_dim = config.linear_key_head_dim
        self.value_head_dim = config.linear_value_head_dim
        self.num_key_heads = config.linear_num_key_heads
        self.num_value_heads = config.linear_num_value_heads
        self.qk_dim = self.num_key_heads * self.key_head_dim
        self.v_dim = self.num_value_heads * self.value_head_dim
        self.conv_dim = 2 * self.qk_dim + self.v_dim
        self.in_proj_dim = self.conv_dim + self.v_dim + 2 * self.num_value_heads

        self.qk_dim_local_tp = self.qk_dim // self.tp_size
        self.v_dim_local_tp = self.v_dim // self.tp_size
        self.conv_dim_local_tp = self.conv_dim // self.tp_size
        value_heads = self.num_value_heads // self.tp_size
        self.in_proj_split_names = ["query", "key", "value", "z", "beta", "alpha"]
        self.in_proj_split_sections = (
            *(self.qk_dim_local_tp, self.qk_dim_local_tp, self.v_dim_local_tp),
            *(self.v_dim_local_tp, value_heads, value_heads),
        )

        self.in_proj = build_module(
            submodules.in_proj,
            config.hidden_size,
            self.in_proj_dim,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="fc1",
            tp_group=pg_collection.tp,
            name=None if name is None else f"{name}.in_proj",
        )
        placement = {"device": torch.cuda.current_device(), "dtype": config.params_dtype}
        self.conv1d = CausalConv1d(
            self.conv_dim_local_tp,
            self.conv_dim_local_tp,
            kernel_size=config.linear_conv_kernel_dim,
            groups=self.conv_dim_local_tp,
            bias=False,
            **placement,
        )
        self.dt_bias = nn.Parameter(torch.ones(value_heads, **placement))
        self.A_log = nn.Parameter(torch.zeros(value_heads, **placement))
        for parameter in (self.conv1d.weight, self.dt_bias, self.A_log):
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = 0  # type: ignore[attr-defined]
        self.out_norm = build_module(
            submodules.out_norm,
            config=config,
            hidden_size=self.value_head_dim,
            eps=config.layernorm_epsilon,
        )
        self.out_proj = build_module(
            submodules.out_proj,
            self.v_dim,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=True,
            is_expert=False,
            tp_comm_buffer_name="fc2",
            tp_group=pg_collection.tp,
            name=None if name is None else f"{name}.out_proj",
        )
        self.finish_parameters(ssm_dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw conv1d and A_log anew, differently on every tensor-parallel rank; dt_bias is 1."""
        if self.config.perform_initialization:
            with get_cuda_rng_tracker().fork():
                self.conv1d.reset_parameters()
                self.A_log.copy_(torch.empty_like(self.A_log).uniform_(*A_RANGE).log())
            self.dt_bias.fill_(1.0)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        inference_context: Any = None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of each sequence. Positions and biases of attention have no part in it.

        Args:
            hidden_states: [s, b, h]; with sequence parallelism this rank's part of s. Packed
                sequences are [t, 1, h].
            attention_mask: bool [b, 1, 1, s], True for padding, on either side: its input counts
                as zero, as in Hugging Face's model. None if there is none.
            inference_context: must be None.
            packed_seq_params: "thd" packing; sequences do not see each other.

        Returns:
            The output, as `hidden_states`, and None: there is no bias.

        Raises:
            InputError: inputs that do not fit, or that are not implemented.
        """
        if inference_context is not None:
            raise InputError("inference_context: GatedDeltaNet keeps no state, pass None")
        projected, _unused = self.in_proj(hidden_states)
        part_length, batch, _features = projected.shape
        length = part_length * self.cp_size
        lengths = [length] * batch
        if packed_seq_params is not None:
            if batch != 1 or attention_mask is not None:
                raise InputError(
                    f"packed_seq_params was given with a batch of {batch} and attention_mask "
                    f"{'None' if attention_mask is None else 'set'}: a packed batch is "
                    f"[tokens, 1, hidden size], without a mask"
                )
            lengths = packed_lengths(packed_seq_params, length, causal=True)
        parts = None
        if self.cp_size > 1:
            cut = lengths if packed_seq_params is not None else [length]
            parts = SequenceParts(self.pg_collection.cp, cut)
            projected = parts.to_heads(self._heads_of_ranks(projected))
        if attention_mask is not None:
            if attention_mask.shape != (batch, 1, 1, length):
                raise InputError(
                    f"attention_mask has shape {list(attention_mask.shape)}, expected "
                    f"{[batch, 1, 1, length]} with True for padding"
                )
            # in_proj has no bias: a zero input is a zero output.
            projected = projected.masked_fill(
                attention_mask.view(batch, length, 1).transpose(0, 1), 0.0
            )

        mixed = self._mix(projected.transpose(0, 1).flatten(0, 1), lengths)
        mixed = mixed.view(batch, length, -1).transpose(0, 1).contiguous()
        if parts is not None:
            mixed = parts.to_tokens(mixed)
        output, bias = self.out_proj(mixed.contiguous())
        return output, bias

    def _mix(self, projected: Tensor, lengths: list[int]) -> Tensor:
        """[tokens, in_proj_dim of this rank] -> [tokens, m * v], gated and normed."""
        sections = [size // self.cp_size for size in self.in_proj_split_sections]
        qkv, z, beta, alpha = projected.split([sum(sections[:3]), *sections[3:]], dim=-1)
        qkv = self.act_fn(self.conv1d(qkv, lengths, self._own_channels))
        query, key, value = qkv.split(sections[:3], dim=-1)
        # fp32: a decay close to 1 has few digits in bf16.
        a_log, dt_bias = self._own_heads(self.A_log), self._own_heads(self.dt_bias)
        g = -a_log.float().exp() * F.softplus(alpha.float() + dt_bias)
        mixed = gated_delta_rule(
            query.unflatten(-1, (-1, self.key_head_dim)),
            key.unflatten(-1, (-1, self.key_head_dim)),
            value.unflatten(-1, (-1, self.value_head_dim)),
            g,
            beta.sigmoid(),
            lengths,
        )
        # The gate is SiLU whatever the activation of the config, as in Hugging Face's model.
        gate = F.silu(z.unflatten(-1, (-1, self.value_head_dim)).float())
        return (self.out_norm(mixed) * gate).to(mixed.dtype).flatten(1)

    def _heads_of_ranks(self, projected: Tensor) -> Tensor:
        """[..., in_proj_dim of this rank], the heads of the first context-parallel rank first."""
        sections = projected.split(list(self.in_proj_split_sections), dim=-1)
        by_rank = zip(*(section.chunk(self.cp_size, dim=-1) for section in sections), strict=True)
        return torch.cat([part for parts in by_rank for part in parts], dim=-1)

    def _own_heads(self, heads: Tensor) -> Tensor:
        """Of something that begins with heads, those of this context-parallel rank."""
        return heads.chunk(self.cp_size)[self.pg_collection.cp.rank()]

    def _own_channels(self, weight: Tensor) -> Tensor:
        """Of the rows [query; key; value], those of this context-parallel rank."""
        if self.cp_size == 1:
            return weight
        sections = weight.split(list(self.in_proj_split_sections[:3]))
        return torch.cat([self._own_heads(section) for section in sections])


def _check(config: TransformerConfig) -> None:
    if config.experimental_attention_variant != "gated_delta_net":
        raise ConfigError(
            f"experimental_attention_variant={config.experimental_attention_variant!r}: expected "
            f"'gated_delta_net', with which megatron-core checks the linear_* fields."
        )
    selective = config.recompute_granularity == "selective"
    if selective and "gdn_norm_out" in config.recompute_modules:
        raise ConfigError(
            f"recompute_modules={config.recompute_modules!r}: the torch backend does not implement "
            f"'gdn_norm_out'. Leave it out."
        )
