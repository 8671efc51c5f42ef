"""What a layer backend, or this machine, does not have of what a config asks for.

Each is known of the config alone, so it is refused before anything is built, on every rank alike.
megatron-core finds some of it in the first forward, and some of it never: a model that is to
compute in FP8 would compute in the dtype of its parameters.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.tensor_parallel import layers
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.backends.selection import get_backend, uses_transformer_engine
from megatron.bridge.models.backends.torch_attention import COMPUTED

_OF_TORCH: Mapping[str, Any] = {
    **COMPUTED,
    "fp8": None,
    "fp4": None,
    "use_kitchen": False,
    "use_kitchen_attention": False,
    "use_te_activation_func": False,
    "use_grouped_gemm_for_shared_expert": False,
}
"""What the plain torch backend has, and one value of each."""

_FLEX = {
    "deepep": (fused_a2a.HAVE_DEEP_EP, "DeepEP (deep_ep)"),
    "hybridep": (fused_a2a.HAVE_HYBRIDEP, "DeepEP with HybridEP (deep_ep)"),
    "ncclep": (fused_a2a.HAVE_TE_EP, "TransformerEngine with NCCL EP"),
}
"""What sends the tokens of the dispatcher "flex", whether it is here, and what it is called."""


def backend_problems(config: TransformerConfig, transformer_impl: str | None) -> Iterator[str]:
    """What cannot be computed, one sentence each naming field, value and expectation.

    Args:
        config: of the model.
        transformer_impl: of the layers, see `get_backend`.
    """
    try:
        get_backend(transformer_impl)
    except ConfigError as error:
        yield str(error)
        return
    if not uses_transformer_engine(transformer_impl):
        for name, only in _OF_TORCH.items():
            if (found := getattr(config, name)) != only:
                yield (
                    f"{name} is {found!r}: layers of plain torch (transformer_impl='local') have "
                    f"{only!r} alone; set that, or use transformer_impl='transformer_engine'"
                )
        if config.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
            yield (
                "gradient_accumulation_fusion is True: it needs APEX's "
                "fused_weight_gradient_mlp_cuda, which is not installed; set it to False"
            )
    if config.moe_router_fusion and te.fused_topk_with_score_function is None:
        yield (
            "moe_router_fusion is True: it needs TransformerEngine 2.6 or newer, which is not "
            "installed; set it to False"
        )
    graphs = getattr(config.cuda_graph_impl, "name", config.cuda_graph_impl)
    if graphs != "none" and not torch.cuda.is_available():
        yield f"cuda_graph_impl is {graphs!r}, and there is no GPU: set it to 'none'"
    yield from _dispatcher_problems(config)


def _dispatcher_problems(config: TransformerConfig) -> Iterator[str]:
    """What keeps the dispatcher "flex" from sending tokens to experts."""
    name = config.moe_flex_dispatcher_backend
    if not config.num_moe_experts or config.moe_token_dispatcher_type != "flex":
        return
    if name in _FLEX and not _FLEX[name][0]:
        yield (
            f"moe_token_dispatcher_type is 'flex' with moe_flex_dispatcher_backend = {name!r}: "
            f"{_FLEX[name][1]} is not installed; set moe_token_dispatcher_type to 'alltoall'"
        )
