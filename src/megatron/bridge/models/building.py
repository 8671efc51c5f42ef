"""What a client asks for beside a provider's fields when a model is built, honoured or refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from traceback import extract_tb
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.wrapping import Chunks, MixedPrecisionWrapper
from megatron.bridge.runtime.cpu import megatron_on_cpu
from megatron.bridge.runtime.ddp_config import DistributedDataParallelConfig as CheckedWhenUsed
from megatron.bridge.runtime.parallel import ranks_of_model

# What megatron-core raises for values that it does not take, some of them by mistake.
_REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)

_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@contextmanager
def as_refusal(title: str) -> Iterator[None]:
    """Where megatron-core does not take a config, say so.

    Args:
        title: of the message.

    Raises:
        ConfigError: with its message; where it gives none that says more, with the line that
            raised it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _REFUSALS as error:
        reason = str(error)
        if not reason or not isinstance(error, AssertionError | RuntimeError | ValueError):
            line = extract_tb(error.__traceback__)[-1].line or ""
            reason = f"{type(error).__name__} {error} in {line!r}"
        raise ConfigError(f"{title}: {reason}") from error


def on_every_rank(name: str, build: Callable[[], Chunks]) -> Chunks:
    """What `build` gives here, once every rank of the model has built its part.

    Args:
        name: of the config's class.
        build: of this rank; in megatron-core's process groups.

    Raises:
        ConfigError: megatron-core cannot build it.
        InputError: another rank cannot.
    """

    def built() -> Chunks:
        with as_refusal(f"{name} cannot be built"):
            return build()

    if dist.get_backend() == "fake":  # whose other ranks are none
        return built()
    return ranks_of_model().together(built)


def refuse_fsdp(**asked: bool) -> None:
    """Refuse wrappers whose parameters are split in a way that `sharded_state_dict()` hides.

    Args:
        **asked: whether each is asked for, by the name of its argument.

    Raises:
        ConfigError: one is.
    """
    for name, is_asked in asked.items():
        if is_asked:
            raise ConfigError(
                f"{name}=True: weights are exchanged with megatron-core's DistributedDataParallel "
                f"alone; leave it out, and use_distributed_optimizer=True in ddp_config splits the "
                f"optimizer state"
            )


def asked_dtype(
    params_dtype: torch.dtype, fp16: bool | None, bf16: bool | None
) -> torch.dtype | None:
    """The dtype that the two arguments ask for; None if they ask for none.

    Raises:
        ConfigError: they contradict each other, or one denies `params_dtype`.
    """
    asked = {"fp16": fp16, "bf16": bf16}
    chosen = [_HALVES[name] for name, value in asked.items() if value]
    if len(chosen) > 1:
        raise ConfigError("fp16=True and bf16=True: a model has one of these dtypes; choose one")
    if chosen:
        return chosen[0]
    for name, value in asked.items():
        if value is False and params_dtype == _HALVES[name]:
            raise ConfigError(
                f"{name}=False, and the provider's params_dtype is {params_dtype}; leave {name} "
                f"out, or set the provider's params_dtype to torch.float32"
            )
    return None


def in_mixed_precision(
    config: TransformerConfig, chunks: Chunks, wrapper: MixedPrecisionWrapper | None
) -> Chunks:
    """Each chunk of a model in float16 or bfloat16 in a client's wrapper; others as they are.

    Raises:
        ConfigError: the fields that such wrappers read contradict the dtype of the parameters.
    """
    half = next((name for name, dtype in _HALVES.items() if dtype == config.params_dtype), None)
    if wrapper is None or half is None:
        return chunks
    if [name for name in _HALVES if getattr(config, name)] != [half]:
        raise ConfigError(
            f"mixed_precision_wrapper with params_dtype = {config.params_dtype}: the provider has "
            f"fp16={config.fp16} and bf16={config.bf16}, which the wrapper reads; give {half}=True"
        )
    return [wrapper(config, chunk) for chunk in chunks]


def check_groups(given: ProcessGroupCollection) -> None:
    """Refuse process groups that are not those of megatron-core's parallel state.

    Raises:
        ConfigError: one has other ranks.
    """
    for name, ranks, expected in _group_ranks(given):
        if ranks != expected:
            raise ConfigError(
                f"pg_collection.{name} has the ranks {ranks}; expected {expected}, as "
                f"megatron-core's parallel state has for the provider's sizes; leave "
                f"pg_collection out, or initialize the parallel state with the same groups"
            )


def _group_ranks(given: ProcessGroupCollection) -> Iterator[tuple[str, list[int], list[int]]]:
    """Name, ranks, and ranks of the parallel state, of each group that both have."""
    own = ProcessGroupCollection.use_mpu_process_groups()
    for name in (field.name for field in fields(ProcessGroupCollection)):
        pair = getattr(given, name, None), getattr(own, name, None)
        if all(isinstance(group, dist.ProcessGroup) for group in pair):
            ranks, expected = map(dist.get_process_group_ranks, pair)
            yield name, ranks, expected


@torch.no_grad()
def broadcast_over_replicas(chunks: Chunks) -> None:
    """Give all data-parallel replicas of each parameter the values of the first."""
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        # megatron-core marks parameters of which replicas are found among other ranks.
        if getattr(parameter, "allreduce", True):
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        else:
            group = parallel_state.get_expert_data_parallel_group()
        dist.broadcast(parameter.data, src=dist.get_global_rank(group, 0), group=group)


def in_ddp(
    config: TransformerConfig,
    chunks: Chunks,
    ddp_config: DistributedDataParallelConfig,
    *,
    in_one_bucket: bool,
) -> Chunks:
    """Each chunk in megatron-core's DistributedDataParallel.

    Args:
        config: of the model.
        chunks: the modules.
        ddp_config: of the wrapper.
        in_one_bucket: also the first chunk, as the others always are.
    """
    if isinstance(ddp_config, CheckedWhenUsed):
        ddp_config.finalize()
    with megatron_on_cpu():
        return [
            DistributedDataParallel(
                config, ddp_config, chunk, disable_bucketing=index > 0 or in_one_bucket
            )
            for index, chunk in enumerate(chunks)
        ]


def on_meta(build: Callable[[], Chunks], *, is_filled: bool, wrap_with_ddp: bool) -> Chunks:
    """Chunks without any memory.

    Raises:
        ConfigError: something needs their memory.
    """
    why: dict[str, Any] = {
        "a hook fills the model: make the provider by to_megatron_provider(load_weights=False)": (
            is_filled
        ),
        "DistributedDataParallel keeps gradients: give wrap_with_ddp=False": wrap_with_ddp,
    }
    for reason in (reason for reason, holds in why.items() if holds):
        raise ConfigError(f"init_model_with_meta_device=True, and {reason}")
    with torch.device("meta"):
        return build()
