"""What pipeline stages hand on beside hidden states: features of pictures that are needed later.

Pictures are encoded on the first stage. Layers that take features of deepstack, and the layers of
multi-token prediction, can be on any stage. megatron-core sends one tensor from stage to stage, so
features travel in it, behind the hidden states [s, b, h] along the first axis, each of the same
shape: [(1 + features) * s, b, h]. The way back brings their gradients. A batch without pictures has
hidden states alone. The shape of what is sent then varies, which megatron-core allows with
`variable_seq_lengths`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron.bridge.models.pipeline_stages import pipeline_stages

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider


@dataclass(frozen=True)
class StageBoundary:
    """What crosses from one stage to the next for a batch with pictures.

    Attributes:
        embeddings: the embeddings with the features in place, for multi-token prediction.
        deepstack: how many decoder layers after it take features of deepstack.
    """

    embeddings: bool = False
    deepstack: int = 0

    def __bool__(self) -> bool:
        return self.embeddings or self.deepstack > 0

    def join(
        self, hidden_states: Tensor, embeddings: Tensor | None, deepstack: Tensor | None
    ) -> Tensor:
        """What is sent, [(1 + features) * s, b, h].

        Args:
            hidden_states: [s, b, h].
            embeddings: [s, b, h].
            deepstack: [s, n, b, h] of the last n layers that take them, at least those needed here.
        """
        parts = [hidden_states]
        if self.embeddings and embeddings is not None:
            parts.append(embeddings)
        if self.deepstack and deepstack is not None:
            parts += deepstack[:, -self.deepstack :].unbind(1)
        return torch.cat(parts)

    def split(self, received: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states, embeddings and features of deepstack of what was received."""
        count = 1 + self.embeddings + self.deepstack
        hidden_states, *parts = received.unflatten(0, (count, -1)).unbind(0)
        embeddings = parts.pop(0) if self.embeddings else None
        return hidden_states, embeddings, torch.stack(parts, dim=1) if parts else None


def stage_boundaries(config: "Qwen3VLModelProvider") -> list[StageBoundary]:
    """What enters each of the `pipeline_stages`, and at the end what leaves the last: nothing."""
    stages = pipeline_stages(config)
    taps = len(config.vision.deepstack_visual_indexes)
    found = [StageBoundary()]
    for index, stage in enumerate(stages[:-1], 1):
        first = stage.layers.stop
        taken = max(0, taps - first) if first < config.num_layers else 0
        found.append(StageBoundary(any(one.predicts for one in stages[index:]), taken))
    return [*found, StageBoundary()]
