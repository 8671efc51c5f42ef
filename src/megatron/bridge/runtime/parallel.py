"""Process groups: of a real run, and of any rank of an imagined cluster."""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from megatron.bridge.errors import ConfigError, InputError
from megatron.bridge.runtime.cpu import megatron_on_cpu
from megatron.bridge.runtime.parallel_sizes import FIELDS, ParallelSizes
from megatron.bridge.runtime.ranks import Ranks

FIRST_SEED = 1234
"""Of random states for which none is given."""


def initialize_process_groups(
    sizes: ParallelSizes,
    *,
    seed: int | None = None,
    embedding_stages: Sequence[int] | None = None,
    seed_kwargs: Mapping[str, Any] = MappingProxyType({}),
    group_kwargs: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Make torch.distributed, megatron-core's parallel state and its random states ready.

    NCCL where CUDA is available, gloo otherwise; the rank comes from the launcher's environment
    (`torchrun`), and without a launcher the world is this one process. What exists already is
    used as it is.

    Args:
        sizes: of the groups.
        seed: of the random states; None leaves those that there are.
        embedding_stages: pipeline ranks that share the weight of the embedding; None for the first
            and the last, or whichever they are in groups that exist.
        seed_kwargs: further arguments of `model_parallel_cuda_manual_seed`.
        group_kwargs: further arguments of `parallel_state.initialize_model_parallel`. With
            `local_world_size`, and `rank_offset`, groups are of that many consecutive ranks; every
            rank calls this, and one outside of them then has no parallel state.

    Raises:
        ConfigError: groups that exist do not fit, the number of processes does not, megatron-core
            has no argument of a name, or this rank is outside of groups that were made.
    """
    manual_seed = tensor_parallel.model_parallel_cuda_manual_seed
    _check_arguments("seed_kwargs", seed_kwargs, manual_seed, ("seed",))
    make_groups = parallel_state.initialize_model_parallel
    _check_arguments("initialize_model_parallel", group_kwargs, make_groups, FIELDS.values())
    if not dist.is_initialized():
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

    with megatron_on_cpu():
        if not parallel_state.model_parallel_is_initialized():
            _check_not_outside()
            _check_world_size(sizes, **group_kwargs)
            _initialize_model_parallel(
                sizes, embedding_stages, **{"create_gloo_process_groups": True, **group_kwargs}
            )
            if not parallel_state.model_parallel_is_initialized():
                return  # what follows is of ranks that build a model
        elif problems := sizes.differences(ParallelSizes.current()):
            raise ConfigError(
                "the process groups of this run do not fit the model: "
                + "; ".join(problems)
                + ". Set the sizes before the first model is built, or call "
                "megatron.core.parallel_state.destroy_model_parallel() first."
            )
        elif embedding_stages is not None and not _embedding_group_is(embedding_stages):
            raise ConfigError(
                "the process groups of this run do not fit the model: the weight of the embedding "
                f"is on the pipeline ranks {list(embedding_stages)}, its group is of others. Let "
                "provide_distributed_model make the groups, or give initialize_model_parallel "
                "get_embedding_ranks=lambda ranks: [ranks[i] for i in "
                f"{list(embedding_stages)}]."
            )
        if seed is not None or not tensor_parallel.get_cuda_rng_tracker().is_initialized():
            manual_seed(FIRST_SEED if seed is None else seed, **seed_kwargs)


def ranks_of_model() -> Ranks:
    """The ranks of megatron-core's parallel state, which may be a part of all; all without one.

    Raises:
        InputError: megatron-core has no group of them.
    """
    if not parallel_state.model_parallel_is_initialized():
        return Ranks()
    count = (
        parallel_state.get_tensor_model_parallel_world_size()
        * parallel_state.get_pipeline_model_parallel_world_size()
        * parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    )
    if count == dist.get_world_size():
        return Ranks()
    # Of an instance of the optimizer; with one instance these are all.
    group = parallel_state.get_intra_distributed_optimizer_instance_group(check_initialized=False)
    if group is None or dist.get_world_size(group) != count:
        raise InputError(
            f"the process groups are of {count} of {dist.get_world_size()} ranks, and no group has "
            f"all {count}; initialize them with num_distributed_optimizer_instances=1"
        )
    return Ranks(group)


def destroy_process_groups() -> None:
    """Undo `initialize_process_groups`: parallel state, random states and torch.distributed."""
    tensor_parallel.get_cuda_rng_tracker().reset()
    # It keeps one number per layer of the first model that it sees.
    destroy_moe_metrics_tracker()
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def fake_cluster(rank: int, world_size: int, sizes: ParallelSizes) -> Iterator[None]:
    """Be rank `rank` of a cluster of `world_size` ranks that does not exist.

    Built on torch's "fake" process group, whose collectives do nothing: for building a model on
    the meta device and asking it for its `sharded_state_dict()`, not for running it. Raises
    ConfigError when the process has process groups already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ConfigError(
            "fake_cluster needs a process without process groups, and torch.distributed is "
            "initialized. Call destroy_process_groups() first."
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with megatron_on_cpu(even_with_cuda=True):
            _check_world_size(sizes)
            # Gloo groups would look for the other ranks.
            _initialize_model_parallel(sizes, create_gloo_process_groups=False)
            tensor_parallel.model_parallel_cuda_manual_seed(1234)
            yield
    finally:
        destroy_process_groups()


def _check_not_outside() -> None:
    # The one thing that a rank outside of the groups is left with.
    if parallel_state._GLOBAL_MEMORY_BUFFER is not None:
        raise ConfigError(
            "this rank is outside of the ranks that have the model (rank_offset and "
            "local_world_size of initialize_model_parallel); give an empty list of chunks where "
            "the others give theirs, and build the model on those alone"
        )


def _check_world_size(
    sizes: ParallelSizes,
    rank_offset: int = 0,
    local_world_size: int | None = None,
    **_: object,
) -> None:
    there, least = dist.get_world_size(), sizes.ranks_per_replica
    world_size = there if local_world_size is None else local_world_size
    if rank_offset < 0 or world_size < 1 or rank_offset + world_size > there:
        raise ConfigError(
            f"rank_offset={rank_offset} and local_world_size={local_world_size} are not ranks of "
            f"{there}; give local_world_size, and with rank_offset at most {there}"
        )
    if world_size % least:
        given = ", ".join(f"{FIELDS[name]} = {size}" for name, size in sizes.given().items())
        raise ConfigError(
            f"{given} needs a multiple of {least} processes, and there "
            f"{'is' if world_size == 1 else 'are'} {world_size}. Start them with "
            f"torchrun --nproc-per-node {least}, or lower the sizes."
        )


def _initialize_model_parallel(
    sizes: ParallelSizes, embedding_stages: Sequence[int] | None = None, **arguments: Any
) -> None:
    if embedding_stages is not None:

        def get_embedding_ranks(ranks: list[int]) -> list[int]:
            return [ranks[stage] for stage in embedding_stages]

        arguments.setdefault("get_embedding_ranks", get_embedding_ranks)
    parallel_state.initialize_model_parallel(**sizes.fields, **arguments)


def _embedding_group_is(stages: Sequence[int]) -> bool:
    """Whether these pipeline ranks are the embedding's group, by the verdict of all of them.

    A rank outside of the group does not know who is in it.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    ranks = dist.get_process_group_ranks(pipeline)
    expected = [ranks[stage] for stage in stages]
    group = parallel_state.get_embedding_group(check_initialized=False)
    found = None if group is None else dist.get_process_group_ranks(group)
    fits = found == (expected if dist.get_rank() in expected else None)
    verdict = torch.tensor(fits, dtype=torch.int, device=torch.cuda.current_device())
    dist.all_reduce(verdict, dist.ReduceOp.MIN, group=pipeline)
    return bool(verdict)


def _check_arguments(
    where: str, given: Mapping[str, Any], function: Callable[..., Any], own: Iterable[str]
) -> None:
    """Raise ConfigError for a name that megatron-core's function lacks, or that is set elsewhere.

    Args:
        where: they were given, in messages.
        given: the arguments.
        function: of megatron-core.
        own: names of arguments that the provider and the seed give.
    """
    own = tuple(own)
    known = [name for name in inspect.signature(function).parameters if name not in own]
    for name in given:
        if name in own:
            raise ConfigError(
                f"{where}: {name} does not belong here; set the provider's field of this name, or "
                f"give the argument seed"
            )
        if name not in known:
            raise ConfigError(
                f"{where}: megatron-core's {function.__name__} has no argument {name!r}; it has "
                f"{', '.join(known)}"
            )
