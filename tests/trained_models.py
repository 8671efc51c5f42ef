"""Training steps by megatron-core's own schedules and optimizers, at any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from schedules import Batch, run_schedule


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        model: name of a folder.
        provider, ddp, optimizer: fields of the provider, DistributedDataParallelConfig and
            OptimizerConfig.
        batches: name of a list of microbatches.
    """

    model: str = "dense"
    provider: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    batches: str = "mixed"


@dataclass
class Trained:
    """The chunks of a rank in DistributedDataParallel, and their optimizer."""

    chunks: list[Any]
    optimizer: Any

    @property
    def config(self) -> Any:
        return self.chunks[0].config

    def steps(self, number: int, batches: list[Batch]) -> list[tuple[float, ...]]:
        """Loss by token, norm of the gradient and its zeros if counted, for each step."""
        mine = of_replica(batches)
        return [(self.backward(mine), *self.update()) for _ in range(number)]

    def backward(self, batches: Sequence[Batch], length: int | None = None) -> float:
        """Make the gradients of this replica's batches; the loss by token of all replicas.

        length: of the whole sequences, where a batch has a part of them.
        """
        from megatron.core import parallel_state

        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = run_schedule(self.chunks, batches, self._for_loss, length, forward_only=False)
        total = torch.stack([one["sum, tokens"] for one in losses] or [torch.zeros(2)]).sum(0)
        for group in (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_pipeline_model_parallel_group(),
        ):
            dist.all_reduce(total, group=group)
        return float(total[0] / total[1])

    def update(self) -> tuple[float, int]:
        """Norm of the gradient, and its zeros if they are counted."""
        _, norm, zeros = self.optimizer.step()
        return float(norm), zeros or 0

    def _for_loss(self, batch: Batch) -> Any:
        from megatron.core import parallel_state

        def of_loss(loss: Tensor) -> Any:
            tokens = (batch["labels"] != -100).sum().int()
            seen = {"sum, tokens": torch.stack([loss.detach().sum(), tokens.float()])}
            if self.config.calculate_per_token_loss:
                return loss.sum(), tokens, seen
            tokens = tokens.clone()
            dist.all_reduce(tokens, group=parallel_state.get_context_parallel_group())
            return loss.sum() / tokens, seen

        return of_loss

    def sharded_state_dict(self, sharding: str | None, *, is_loading: bool = False) -> Any:
        """Of model and optimizer, as trainers put it together."""
        from megatron.core.utils import unwrap_model

        models = [one.sharded_state_dict() for one in unwrap_model(self.chunks)]
        state = {f"model{index}": model for index, model in enumerate(models)}
        metadata = {"chained_optim_avoid_prefix": True}
        if sharding:
            metadata |= {"distrib_optim_sharding_type": sharding}
        of_optimizer = self.optimizer.sharded_state_dict(
            state if len(models) > 1 else models[0], is_loading=is_loading, metadata=metadata
        )
        return state | {"optimizer": of_optimizer}

    def load_state_dict(self, state: Any) -> None:
        from megatron.core.utils import unwrap_model

        for index, model in enumerate(unwrap_model(self.chunks)):
            model.load_state_dict(state[f"model{index}"])
        self.optimizer.load_state_dict(state["optimizer"])


def of_replica[T](batches: Sequence[T]) -> list[T]:
    """What this data-parallel replica has of a list."""
    from megatron.core import parallel_state

    ranks = parallel_state.get_data_parallel_world_size()
    return [*batches[parallel_state.get_data_parallel_rank() :: ranks]]


def build(
    training: Training, folder: Path, *, filled: bool = True, checkpoint: Path | None = None
) -> Trained:
    """What is trained, of the Hugging Face model of the folder.

    Args:
        training: names the model.
        folder: of models.
        filled: with the weights of the model, or with others.
        checkpoint: a Megatron checkpoint to have the weights of.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder / training.model)
    fields = {"params_dtype": torch.float32, "bf16": False, "calculate_per_token_loss": True}
    fields |= {"parallel_output": False} | training.provider
    ddp = DistributedDataParallelConfig(**training.ddp)
    if checkpoint is None:
        provider = bridge.to_megatron_provider(load_weights=filled)
        provider.set_fields(fields)
        chunks = provider.provide_distributed_model(ddp)
    else:
        chunks = [
            DistributedDataParallel(chunk.config, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(
                bridge.load_megatron_model(checkpoint, mp_overrides=fields)
            )
        ]
    return _with_optimizer(training, chunks, ddp)


def _with_optimizer(training: Training, chunks: list[Any], ddp: Any) -> Trained:
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    of_chunks = chunks[0].config
    defaults: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "weight_decay": 0.01}
    config = OptimizerConfig(
        **defaults
        | {name: getattr(of_chunks, name) for name in ("params_dtype", "bf16", "fp16")}
        | {"use_distributed_optimizer": ddp.use_distributed_optimizer}
        | {"overlap_param_gather": ddp.overlap_param_gather}
        | training.optimizer
    )
    trained = Trained(chunks, get_megatron_optimizer(config, chunks))
    of_chunks.finalize_model_grads_func = finalize_model_grads
    of_chunks.grad_scale_func = trained.optimizer.scale_loss
    if ddp.overlap_grad_reduce:
        of_chunks.no_sync_func = _each(chunks, "no_sync")
    if ddp.overlap_param_gather:
        of_chunks.param_sync_func = _each(chunks, "start_param_sync")
    return trained


def _each(chunks: list[Any], method: str) -> Any:
    """As the schedules want it: of the chunk, or of each of them."""
    methods = [getattr(chunk, method) for chunk in chunks]
    return methods if len(methods) > 1 else methods[0]


def forget_layout() -> None:
    """Let the next model have process groups of its own."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    destroy_moe_metrics_tracker()  # which is as long as the first model is deep
    parallel_state.destroy_model_parallel()
