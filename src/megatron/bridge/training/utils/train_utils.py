"""Pre-wrap hooks of trainers: a head of values in the place of the logits, and frozen routers."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.moe.router import Router
from torch import Tensor

from megatron.bridge.errors import InputError
from megatron.bridge.models.wrapping import Chunks, ModelHook, unwrapped


class LinearForLastLayer(torch.nn.Linear):
    """A last layer that every tensor-parallel rank holds whole, without bias.

    Args:
        input_size: the hidden size h.
        output_size: values o for each token.
        sequence_parallel: whether each rank has its part of the tokens only.
    """

    def __init__(self, input_size: int, output_size: int, *, sequence_parallel: bool) -> None:
        super().__init__(input_size, output_size, bias=False)
        self.sequence_parallel = sequence_parallel
        # megatron-core sums the gradients of such parameters over the ranks.
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(  # type: ignore[override]
        self, input_: Tensor, weight: Tensor | None = None, runtime_gather_output: Any = None
    ) -> tuple[Tensor, None]:
        """Values of all tokens.

        Args:
            input_: [s, b, h], with sequence parallelism this rank's part of s.
            weight: is not used; megatron-core gives it that of a tied embedding.
            runtime_gather_output: is not used; the output is whole.

        Returns:
            fp32 [s, b, o], and no bias.
        """
        values = super().forward(input_).float()
        if self.sequence_parallel:
            values = tensor_parallel.gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False
            )
        return values, None


def make_value_model(hidden_size: int, sequence_parallel: bool) -> ModelHook:
    """A pre-wrap hook that puts one value per token in the place of the logits.

    The weights are loaded by `load_hf_weights(allowed_mismatched_params=["output_layer.weight"])`.

    Args:
        hidden_size: of the model.
        sequence_parallel: as in the provider.
    """

    def hook(chunks: Chunks) -> None:
        for chunk in unwrapped(chunks):
            language = _language_module(chunk)
            if language.post_process:
                head = LinearForLastLayer(hidden_size, 1, sequence_parallel=sequence_parallel)
                # A tied output layer has no weight of its own.
                place = next(language.decoder.parameters())
                language.output_layer = head.to(place.device, place.dtype)

    return hook


def _language_module(chunk: torch.nn.Module) -> Any:
    """The part of a chunk that computes logits."""
    for module in chunk.modules():
        if isinstance(module, LanguageModule) and hasattr(module, "decoder"):
            return module
    raise InputError(
        f"{type(chunk).__name__} holds no LanguageModule of megatron-core, whose output_layer a "
        "head of values could replace"
    )


def freeze_moe_router(model: Sequence[torch.nn.Module] | torch.nn.Module) -> Chunks:
    """Turn gradients off for the routers of all layers, and for the gates of shared experts.

    Args:
        model: the chunks of this rank, or one.

    Returns:
        The chunks.
    """
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    for module in (module for chunk in chunks for module in chunk.modules()):
        own = [*module.parameters(recurse=False)] if isinstance(module, Router) else []
        gate = getattr(module, "gate_weight", None)
        if isinstance(gate, torch.nn.Parameter):
            own.append(gate)
        for parameter in own:
            parameter.requires_grad_(False)
    return chunks
