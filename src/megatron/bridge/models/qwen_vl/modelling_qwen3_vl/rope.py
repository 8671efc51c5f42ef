"""Interleaved multimodal rotary embedding of the language model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class InterleavedMultimodalRotaryEmbedding(nn.Module):
    """Angles from three positions per token: temporal, height, width.

    Frequency j turns with the height if j % 3 == 1 and j < 3 * section[1], with the width if
    j % 3 == 2 and j < 3 * section[2], and with the temporal position otherwise. (The sections of
    megatron-core's MultimodalRotaryEmbedding are contiguous blocks instead.)

    The frequencies are computed in fp32 when they are used: there is no buffer that a meta device
    could leave empty or a cast could round.

    Args:
        kv_channels: head size.
        rotary_percent: part of the head that is rotated.
        rotary_base: theta.
    """

    def __init__(self, kv_channels: int, rotary_percent: float, rotary_base: float) -> None:
        super().__init__()
        self.rotary_dim = int(kv_channels * rotary_percent)
        self.rotary_base = rotary_base

    def inv_freq(self, device: torch.device) -> Tensor:
        """theta ** (-2j / rotary_dim), fp32 [rotary_dim / 2]."""
        exponents = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device)
        return 1.0 / self.rotary_base ** (exponents / self.rotary_dim)

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
            cp_group: megatron-core passes it; context parallelism is not implemented.

        Returns:
            fp32 [s, b, 1, rotary_dim], the angles repeated for the two halves of the rotation.
        """
        inv_freq = self.inv_freq(position_ids.device)
        frequency = torch.arange(inv_freq.numel(), device=position_ids.device)
        axis = torch.zeros_like(frequency)
        for which in (1, 2):
            axis[(frequency % 3 == which) & (frequency < 3 * mrope_section[which])] = which
        # [3, b, s] -> [s, b, frequencies], each frequency with the position of its axis
        angles = position_ids.permute(2, 1, 0)[..., axis].float() * inv_freq
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]
