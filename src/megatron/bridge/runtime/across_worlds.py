"""A process group of ranks that torch.distributed does not know to belong together."""

from __future__ import annotations

from datetime import timedelta
from typing import cast

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d


def group_across_worlds(
    store: dist.Store,
    rank: int,
    count: int,
    *,
    backend: str = "gloo",
    name: str = "megatron-bridge",
    timeout: timedelta = timedelta(minutes=30),
) -> dist.ProcessGroup:
    """A group of the ranks of several jobs, such as a trainer's and an inference engine's.

    Each keeps the world that it has, if it has one; all of the group call this. There is no public
    function for it in torch, where a group is a part of the one world of `init_process_group`.

    Args:
        store: that all of them reach, such as a `TCPStore`.
        rank: of this process in the group.
        count: how many there are.
        backend: "gloo" or "nccl".
        name: of the group; another one for each.
        timeout: of its collectives.
    """
    group, _ = c10d._new_process_group_helper(
        count,
        rank,
        [],  # of the ranks of a world: as for a world of its own
        dist.Backend(backend),
        store,
        group_name=name,  # type: ignore[arg-type]
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {one: one for one in range(count)}
    return cast("dist.ProcessGroup", group)
