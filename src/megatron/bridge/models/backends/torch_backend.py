"""A megatron-core layer backend in plain torch: no GPU, Apex or TransformerEngine needed."""

from functools import partial

from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import ExpertsBuilder
from megatron.core.transformer.torch_norm import LayerNormBuilder

from megatron.bridge.models.backends.torch_attention import TorchCoreAttention
from megatron.bridge.models.backends.torch_linear import (
    TorchColumnParallelLinear,
    TorchRowParallelLinear,
)
from megatron.bridge.models.backends.torch_mlp import TorchExperts
from megatron.bridge.models.backends.torch_norm import build_norm


class TorchSpecProvider(BackendSpecProvider):
    """megatron-core's own parallel linears, with norms and attention of this package."""

    def column_parallel_linear(self) -> type:
        """Linear layer with its output dimension split over the tensor-parallel ranks."""
        return TorchColumnParallelLinear

    def row_parallel_linear(self) -> type[TorchRowParallelLinear]:
        """Linear layer with its input dimension split over the tensor-parallel ranks."""
        return TorchRowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """Norms are modules of their own."""
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        """There is no fused norm and linear."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> LayerNormBuilder:
        """The norm of the config it is built with, whatever the arguments."""
        return build_norm

    def core_attention(self) -> type:
        """Scaled dot product attention."""
        return TorchCoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> ExpertsBuilder:
        """Experts that multiply one after the other."""
        return partial(
            TorchExperts,
            submodules=MLPSubmodules(
                linear_fc1=TorchColumnParallelLinear, linear_fc2=TorchRowParallelLinear
            ),
        )

    def activation_func(self) -> None:
        """The activation of the config."""
