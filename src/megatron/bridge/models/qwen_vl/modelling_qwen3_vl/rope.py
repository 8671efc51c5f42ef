"""Interleaved multimodal rotary embedding of the language model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope_frequencies import RotaryFrequencies


class InterleavedMultimodalRotaryEmbedding(nn.Module):
    """Angles from three positions per token: temporal, height, width.

    Frequency j turns with the height if j % 3 == 1 and j < 3 * section[1], with the width if
    j % 3 == 2 and j < 3 * section[2], and with the temporal position otherwise. (The sections of
    megatron-core's MultimodalRotaryEmbedding are contiguous blocks instead.)

    The frequencies are computed when they are used. Where the rope type scales cos and sin as
    well, that is done by the attention.

    Args:
        frequencies: those of a head.
    """

    def __init__(self, frequencies: RotaryFrequencies) -> None:
        super().__init__()
        self.frequencies = frequencies

    def forward(
        self,
        position_ids: Tensor,
        mrope_section: Sequence[int],
        cp_group: torch.distributed.ProcessGroup | None = None,
    ) -> Tensor:
        """Angles for megatron-core's rotary application.

        Args:
            position_ids: [3, b, s].
            mrope_section: how many frequencies turn with each axis.
            cp_group: megatron-core passes it; the positions are what they are.

        Returns:
            fp32 [s, b, 1, rotated channels], the angles repeated for both halves of the rotation.
        """
        inv_freq = self.frequencies.inv_freq(position_ids)
        frequency = torch.arange(inv_freq.numel(), device=position_ids.device)
        axis = torch.zeros_like(frequency)
        for which in (1, 2):
            axis[(frequency % 3 == which) & (frequency < 3 * mrope_section[which])] = which
        # [3, b, s] -> [s, b, frequencies], each frequency with the position of its axis
        angles = position_ids.permute(2, 1, 0)[..., axis].float() * inv_freq
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]
