"""Rows for routed experts that lie in fused tensors, one tensor for all experts of a layer.

Files hold them in two orientations; Megatron holds each expert as a linear layer's [out, in]:

    fused               gate_up [E, 2I, H] (rows gate, then up), down [E, H, I]
    fused, transposed   gate_up [E, H, 2I], down [E, I, H]

A square matrix is the same in both: transformers looks at shapes, and turns only what does not fit.
Experts that lie in files one by one are plain GatedMLPMapping and RowParallelMapping rows.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol, Self, cast

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.layout import HF, Layout, Same
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.bridge.models.conversion.patterns import WILDCARD
from megatron.bridge.models.conversion.structure import LayoutFields, RankSection
from megatron.bridge.models.conversion.wrapped_layouts import PickExpert, TransposedToFit

if TYPE_CHECKING:
    import torch


class ExpertLayoutFields(LayoutFields, Protocol):
    """The fields of a model with routed experts."""

    @property
    def num_moe_experts(self) -> int: ...


class _FusedExpertMapping(AutoMapping):
    """One expert of a fused tensor; the last wildcard of the Megatron name is its number.

    Args:
        megatron_param: name of the parameter.
        hf_param: name of the fused tensor.
        shape: symbols of its shape ("E 2Ie H").
        transposed: whether the file holds [in, out] where a linear layer's weight is [out, in] and
            not square.
        only: see `ParamMapping`.
        layers: see `ParamMapping`.
    """

    is_grouped_export = True

    def __init__(
        self,
        megatron_param: str,
        hf_param: str,
        shape: str | None = None,
        *,
        transposed: bool = False,
        only: str | None = None,
        layers: str | None = None,
    ) -> None:
        self.transposed = transposed
        self.expert: int | None = None
        super().__init__(megatron_param, hf_param, shape, only=only, layers=layers)

    def _validate_patterns(self, *args: object, **kwargs: object) -> None:
        """The Megatron name has one wildcard more: the expert, which lies inside of the tensor."""
        if self.megatron_param.count(WILDCARD) != self.hf_params[HF].count(WILDCARD) + 1:
            raise ValueError(
                f"{self.megatron_param} should have one wildcard more than {self.hf_params[HF]}, "
                f"for the expert"
            )

    def resolve(self, numbers: tuple[int | str, ...]) -> Self:
        """The row of one layer and, by the last number, of one expert."""
        row = super().resolve(numbers)
        row.expert = int(numbers[-1])
        return row

    def layout(self, fields: LayoutFields) -> Layout:
        if self.expert is None:
            raise InputError(f"{self.megatron_param}: resolve the row to one expert first")
        experts = cast(ExpertLayoutFields, fields).num_moe_experts
        return PickExpert(self._of_one(), self.expert, experts)

    def _of_one(self) -> Layout:
        return TransposedToFit(Same()) if self.transposed else Same()

    def hf_to_megatron(
        self,
        hf_weights: "torch.Tensor | Mapping[str, torch.Tensor]",
        megatron_module: "torch.nn.Module",
    ) -> "torch.Tensor":
        """This rank's shard of one expert.

        Args:
            hf_weights: the fused tensor [E, ., .], or this expert's part of it [., .].
            megatron_module: the module that owns the parameter.

        Raises:
            InputError: the shapes do not fit.
        """
        tensor = hf_weights[HF] if isinstance(hf_weights, Mapping) else hf_weights
        if tensor.ndim == 2:
            from megatron.bridge.models.conversion.module_weights import shard_of

            return shard_of(self, self._turned(tensor), megatron_module)
        return super().hf_to_megatron(tensor, megatron_module)

    def megatron_to_hf(
        self, megatron_weights: "torch.Tensor", megatron_module: "torch.nn.Module"
    ) -> "dict[str, torch.Tensor]":
        """This expert's part [., .] of the fused tensor, as the file holds it.

        It is a collective over the expert's tensor-parallel group where the parameter is split.
        """
        from megatron.bridge.models.conversion.module_weights import whole_of

        whole = whole_of(self, megatron_weights, megatron_module)
        return {self.hf_params[HF]: self._turned(whole).contiguous()}

    def _turned(self, part: "torch.Tensor") -> "torch.Tensor":
        """One expert's matrix in the other orientation, if files and Megatron differ in it."""
        turned = self.transposed and part.shape[0] != part.shape[1]
        return part.transpose(0, 1) if turned else part


class ExpertMLPDownProjMapping(_FusedExpertMapping):
    """Expert MLP down projection: one expert of ``experts.down_proj``."""

    expected_axis = 1
    saves_state = True


class ExpertMLPGateUpProjMapping(_FusedExpertMapping):
    """Expert MLP gate and up projections: one expert of ``experts.gate_up_proj``."""

    expected_axis = 0
    saves_state = True

    def rank_sections(self, fields: LayoutFields, rows: int) -> tuple[RankSection, ...]:
        return (RankSection(rows // 2), RankSection(rows // 2))

    def hf_to_megatron(
        self,
        hf_weights: "torch.Tensor | Mapping[str, torch.Tensor]",
        megatron_module: "torch.nn.Module",
    ) -> "torch.Tensor":
        """This rank's shard of one expert.

        Args:
            hf_weights: the fused tensor [E, ., .], this expert's part of it [., .], or the expert's
                own {"gate": [I, H], "up": [I, H]}.
            megatron_module: the module that owns the parameter.

        Raises:
            InputError: the shapes do not fit.
        """
        if isinstance(hf_weights, Mapping) and set(hf_weights) == {"gate", "up"}:
            import torch

            from megatron.bridge.models.conversion.module_weights import shard_of

            whole = torch.cat([hf_weights["gate"], hf_weights["up"]])
            return shard_of(self, whole, megatron_module)
        return super().hf_to_megatron(hf_weights, megatron_module)
