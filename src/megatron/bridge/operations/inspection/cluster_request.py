"""The parallel layout that is asked for, in the short names that everybody types."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import lcm
from typing import Any

OPTIONS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
"""Short name -> the field of megatron-core's config."""


@dataclass(frozen=True)
class ParallelRequest:
    """Sizes of the kinds of parallelism, and the number of ranks.

    vpp: chunks of each pipeline stage; None for one. etp: tensor parallelism of the routed experts;
    None for `tp`. world_size: None for the smallest cluster.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    cp: int = 1
    ep: int = 1
    etp: int | None = None
    world_size: int | None = None

    @property
    def dense_ranks(self) -> int:
        """Ranks that hold one copy of all but the routed experts."""
        return self.tp * self.pp * self.cp

    @property
    def expert_ranks(self) -> int:
        """Ranks that hold one copy of the routed experts."""
        return (self.etp or self.tp) * self.ep * self.pp

    @property
    def smallest_world(self) -> int:
        """Every number of ranks that megatron-core accepts is a multiple of this."""
        return lcm(self.dense_ranks, self.expert_ranks)

    @property
    def ranks(self) -> int:
        """The number of ranks."""
        return self.smallest_world if self.world_size is None else self.world_size

    def given(self) -> dict[str, int]:
        """The sizes that differ from the defaults, by short name, without the number of ranks."""
        found = {name: getattr(self, name) for name in OPTIONS}
        return {name: size for name, size in found.items() if size != _default(name)}

    def only(self, *options: str) -> ParallelRequest:
        """These sizes alone, the others by default."""
        sizes: dict[str, Any] = {name: getattr(self, name) for name in options}
        return ParallelRequest(**sizes)

    def without(self, option: str) -> ParallelRequest:
        """One size by default."""
        return self.with_size(option, _default(option))

    def with_size(self, option: str, size: int | None) -> ParallelRequest:
        """One size changed."""
        changed: dict[str, Any] = {option: size}
        return replace(self, **changed)

    def __str__(self) -> str:
        world = {} if self.world_size is None else {"world-size": self.world_size}
        return " ".join(f"--{name} {size}" for name, size in (self.given() | world).items())


def _default(option: str) -> int | None:
    """The default of a size."""
    return getattr(ParallelRequest, option)
