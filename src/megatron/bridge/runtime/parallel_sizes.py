"""The sizes of the kinds of parallelism, in the short names that everybody types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from megatron.core.model_parallel_config import ModelParallelConfig

FIELDS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
"""Short name -> the field of megatron-core's config."""


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks each kind of parallelism spans, and how many there are.

    Attributes:
        tp: tensor parallelism.
        pp: pipeline stages.
        vpp: chunks of each pipeline stage; None for one.
        cp: context parallelism.
        ep: ranks that share the routed experts.
        etp: tensor parallelism of the routed experts; None for `tp`.
        world_size: all ranks; None for the smallest cluster.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    world_size: int | None = None

    @classmethod
    def from_config(cls, config: ModelParallelConfig) -> Self:
        """The sizes that a megatron-core config asks for."""
        return cls(**{name: getattr(config, field) for name, field in FIELDS.items()})

    @classmethod
    def current(cls) -> Self:
        """The sizes that megatron-core's parallel state was initialized with."""
        from megatron.core import parallel_state as state

        return cls(
            tp=state.get_tensor_model_parallel_world_size(),
            pp=state.get_pipeline_model_parallel_world_size(),
            vpp=state.get_virtual_pipeline_model_parallel_world_size(),
            cp=state.get_context_parallel_world_size(),
            ep=state.get_expert_model_parallel_world_size(),
            etp=state.get_expert_tensor_parallel_world_size(),
        )

    @property
    def fields(self) -> dict[str, int | None]:
        """The sizes by the fields of megatron-core's config."""
        return {field: getattr(self, name) for name, field in FIELDS.items()}

    @property
    def is_split(self) -> bool:
        """Whether ranks hold parts of a model."""
        return max(self.tp, self.pp, self.ep, self.etp or 1) > 1

    @property
    def dense_ranks(self) -> int:
        """Ranks that hold one copy of all but the routed experts."""
        return self.tp * self.pp * self.cp

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of the routed experts."""
        return (self.etp or self.tp) * self.ep * self.pp

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one copy of the model: the number of ranks is a multiple of it."""
        return lcm(self.dense_ranks, self.expert_ranks)

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.world_size or self.ranks_per_replica

    def filled_in(self) -> ParallelSizes:
        """The same with what follows from the others in place of None."""
        return replace(self, etp=self.etp or self.tp, world_size=self.ranks)

    def given(self) -> dict[str, int]:
        """The sizes that differ from the defaults, by short name, without the number of ranks."""
        found = {name: getattr(self, name) for name in FIELDS}
        return {name: size for name, size in found.items() if size != getattr(DEFAULTS, name)}

    def only(self, *names: str) -> ParallelSizes:
        """These sizes alone, the others by default."""
        sizes: dict[str, Any] = {name: getattr(self, name) for name in names}
        return ParallelSizes(**sizes)

    def without(self, name: str) -> ParallelSizes:
        """One size by default."""
        return self.with_size(name, getattr(DEFAULTS, name))

    def with_size(self, name: str, size: int | None) -> ParallelSizes:
        """One size changed."""
        changed: dict[str, Any] = {name: size}
        return replace(self, **changed)

    def differences(self, groups: ParallelSizes) -> list[str]:
        """Field by field, where the process groups that exist were made for another size."""
        mine, theirs = self.filled_in().fields, groups.filled_in().fields
        return [
            f"{field} is {mine[field]}, the process groups were made for {theirs[field]}"
            for field in mine
            if mine[field] != theirs[field]
        ]

    def __str__(self) -> str:
        world = {} if self.world_size is None else {"world-size": self.world_size}
        return " ".join(f"--{name} {size}" for name, size in (self.given() | world).items())


DEFAULTS = ParallelSizes()
