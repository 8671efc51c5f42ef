"""Deepstack: the first decoder layers add features of earlier vision blocks to the visual tokens.

The features travel as the `context` of megatron-core's TransformerBlock, which hands it to every
layer and through activation recomputation, so gradients reach the vision encoder. The decoder has
no cross attention, its identity stand-in ignores the context.
"""

from typing import Any

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DeepstackTransformerLayer(TransformerLayer):
    """A decoder layer that adds its entry of `context`, if there is one for it, to its output."""

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Run the layer as TransformerLayer does.

        `context` is None or [s, layers, b, h] for the last so many of the layers that take features
        of deepstack, zeros where the token is not visual; with sequence parallelism s is this
        rank's part, as for the hidden states [s, b, h].
        """
        hidden_states, context = super().forward(*args, **kwargs)
        # layer_number counts from 1 over all pipeline stages.
        layers_after = len(self.config.vision.deepstack_visual_indexes) - self.layer_number
        if context is not None and layers_after >= 0:
            hidden_states = hidden_states + context[:, -1 - layers_after]
        return hidden_states, context
