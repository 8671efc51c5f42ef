"""Process groups: of a real run, and of any rank of an imagined cluster."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Self

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

from megatron.bridge.errors import ConfigError
from megatron.bridge.runtime.cpu import megatron_on_cpu


@dataclass(frozen=True)
class ParallelSizes:
    """How many ranks each kind of model parallelism spans; names as in megatron-core."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    expert_model_parallel_size: int = 1
    expert_tensor_parallel_size: int | None = None

    @classmethod
    def from_config(cls, config: ModelParallelConfig) -> Self:
        """The sizes that a megatron-core config asks for."""
        return cls(**{name: getattr(config, name) for name in cls.__dataclass_fields__})

    @classmethod
    def current(cls) -> Self:
        """The sizes that megatron-core's parallel state was initialized with."""
        return cls(
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_pipeline_model_parallel_world_size(),
            parallel_state.get_virtual_pipeline_model_parallel_world_size(),
            parallel_state.get_context_parallel_world_size(),
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )

    @property
    def ranks_per_replica(self) -> int:
        """Ranks that hold one copy of the model: the world size is a multiple of it."""
        dense = (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )
        expert = (
            self._expert_tensor
            * self.expert_model_parallel_size
            * self.pipeline_model_parallel_size
        )
        return lcm(dense, expert)

    @property
    def _expert_tensor(self) -> int:
        return self.expert_tensor_parallel_size or self.tensor_model_parallel_size

    def differences(self, other: "ParallelSizes") -> list[str]:
        """Field by field, where `other` differs; an unset expert tensor size follows the dense."""
        problems = []
        for name in self.__dataclass_fields__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "expert_tensor_parallel_size":
                mine, theirs = self._expert_tensor, other._expert_tensor
            if mine != theirs:
                problems.append(f"{name} is {mine}, the process groups were made for {theirs}")
        return problems


def initialize_process_groups(sizes: ParallelSizes, *, seed: int = 1234) -> None:
    """Make torch.distributed, megatron-core's parallel state and its random states ready.

    NCCL where CUDA is available, gloo otherwise; the rank comes from the launcher's environment
    (`torchrun`), and without a launcher the world is this one process. What exists already is
    used as it is: groups that do not fit `sizes` raise ConfigError.
    """
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
            _check_world_size(sizes)
            _initialize_model_parallel(sizes, create_gloo_process_groups=True)
        elif problems := sizes.differences(ParallelSizes.current()):
            raise ConfigError(
                "the process groups of this run do not fit the model: "
                + "; ".join(problems)
                + ". Set the sizes before the first model is built, or call "
                "megatron.core.parallel_state.destroy_model_parallel() first."
            )
        if not tensor_parallel.get_cuda_rng_tracker().is_initialized():
            tensor_parallel.model_parallel_cuda_manual_seed(seed)


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


def _check_world_size(sizes: ParallelSizes) -> None:
    world_size = dist.get_world_size()
    if world_size % sizes.ranks_per_replica:
        raise ConfigError(
            f"{sizes} needs a multiple of {sizes.ranks_per_replica} processes, and there "
            f"{'is' if world_size == 1 else 'are'} {world_size}. Start them with "
            f"torchrun --nproc-per-node {sizes.ranks_per_replica}, or lower the sizes."
        )


def _initialize_model_parallel(sizes: ParallelSizes, *, create_gloo_process_groups: bool) -> None:
    parallel_state.initialize_model_parallel(
        **{name: getattr(sizes, name) for name in sizes.__dataclass_fields__},
        create_gloo_process_groups=create_gloo_process_groups,
    )
