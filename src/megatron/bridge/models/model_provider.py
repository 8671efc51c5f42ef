"""Providers: a megatron-core config that also builds the model it describes."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cache
from typing import Any, Self

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.dtypes import TORCH_NAMES
from megatron.bridge.errors import ConfigError
from megatron.bridge.models.backends.activations import activation
from megatron.bridge.models.backends.limits import backend_problems
from megatron.bridge.models.backends.selection import uses_transformer_engine
from megatron.bridge.models.building import (
    as_refusal,
    asked_dtype,
    broadcast_over_replicas,
    check_groups,
    in_ddp,
    in_mixed_precision,
    on_every_rank,
    on_meta,
    refuse_fsdp,
)
from megatron.bridge.models.pipeline_stages import (
    as_given,
    can_interleave,
    embedding_stages,
    layout_problems,
    pipeline_stages,
    virtual_stages,
)
from megatron.bridge.models.without_values import build_without_values
from megatron.bridge.models.wrapping import (
    Chunks,
    MixedPrecisionWrapper,
    ModelHook,
    ModelHooks,
    as_hooks,
    chunks_after,
)
from megatron.bridge.runtime.cpu import activate_megatron_on_cpu
from megatron.bridge.runtime.parallel import initialize_process_groups
from megatron.bridge.runtime.parallel_sizes import ParallelSizes


@cache
def _field_names(provider: type["ModelProvider"]) -> frozenset[str]:
    return frozenset(one.name for one in fields(provider))


@dataclass
class ModelProvider(TransformerConfig, ABC):
    """A TransformerConfig whose fields may be set after construction.

    megatron-core validates and derives fields when a config is constructed. Here that waits for
    `finalize()`, so that a provider read from a checkpoint can be adapted first. No rank and no
    process group is asked: what cannot be built is refused by every rank, or by none.

        provider.tensor_model_parallel_size = 2
        provider.finalize()
        chunks = provider.provide_distributed_model()

    Attributes:
        vocab_size: entries of the real vocabulary.
        make_vocab_size_divisible_by: the padded vocabulary is a multiple of this times the
            tensor-parallel size.
        should_pad_vocab: pad the vocabulary at all.
        seq_length: longest sequence the model was made for, in tokens.
        share_embeddings_and_output_weights: one weight for embedding and output layer.
        parallel_output: return logits split over the tensor-parallel ranks, as clients expect that
            compute probabilities of tokens; False gathers them.
        transformer_impl: "local" (plain torch) or "transformer_engine"; None chooses.
        pipeline_model_parallel_layout: which layers each stage has, as in megatron-core, such as
            "Ettt|tttL"; None deals them out evenly.
        pipeline_dtype: of what pipeline stages exchange; None for `params_dtype`.
        moe_grouped_gemm: multiply by all experts of a rank at once, which needs TransformerEngine;
            None where it is used. The plain torch backend runs one expert after the other.
    """

    vocab_size: int = 0
    make_vocab_size_divisible_by: int = 128
    should_pad_vocab: bool = True
    seq_length: int = 0
    share_embeddings_and_output_weights: bool = False
    parallel_output: bool = True
    transformer_impl: str | None = None
    pipeline_dtype: torch.dtype | None = None
    pipeline_model_parallel_layout: Any = None
    moe_grouped_gemm: bool | None = None
    moe_router_pre_softmax: bool = False

    def __post_init__(self) -> None:
        """Deferred to `finalize()`."""
        self._pre_wrap_hooks: list[ModelHook] = []
        self._post_wrap_hooks: list[ModelHook] = []
        self._is_filled = False
        self._derived: dict[str, Any] = {}
        self._set_by_megatron_core: set[str] = set()

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """A provider from plain values, as a bridge derives them and a checkpoint records them.

        Dtypes are torch names ("bfloat16"), `hidden_act` is the name of the activation.
        """
        fields = dict(settings)
        if "hidden_act" in fields:
            fields["activation_func"] = activation(fields.pop("hidden_act"))
        for name, value in settings.items():
            # Some dtypes of megatron-core's are words of its own ("fp32"): these stay.
            if name.endswith("_dtype") and value in TORCH_NAMES:
                fields[name] = getattr(torch, value)
        return cls(**fields)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A provider of its own. Functions, and so the hooks, are the same ones."""
        for hooks in (self._pre_wrap_hooks, self._post_wrap_hooks):
            memo[id(hooks)] = list(hooks)
        # A hook or a callback may be a method: of a bridge with its files, of a wrapper.
        memo.update((id(value), value) for value in vars(self).values() if callable(value))
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up as Megatron does."""
        if not self.should_pad_vocab:
            return self.vocab_size
        multiple = self.make_vocab_size_divisible_by * self.tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    def finalize(self) -> None:
        """Validate and derive; call it again after a change.

        Raises:
            ConfigError: every problem found by this project, or the first one that megatron-core
                finds.
        """
        # What was derived last time is derived anew: it may depend on what changed since.
        for name, value in self._derived.items():
            if getattr(self, name) is value:
                setattr(self, name, None)
        self.pipeline_model_parallel_layout = as_given(self.pipeline_model_parallel_layout)
        self.mtp_standalone = False
        if problems := self._size_problems() or self.problems():
            raise ConfigError.of_problems(f"{type(self).__name__} cannot be built", problems)
        names = [one.name for one in fields(self)]
        open_names = [name for name in names if getattr(self, name) is None]
        self.fill_in()
        known = vars(self).keys()
        before = set(known)
        try:
            with as_refusal(f"{type(self).__name__}: megatron-core refuses"):
                with self._admitted_by_megatron_core():
                    TransformerConfig.__post_init__(self)
                pipeline_stages(self)
        finally:
            self._set_by_megatron_core |= known - before
        self._derived = {
            name: value for name in open_names if (value := getattr(self, name)) is not None
        }

    def fill_in(self) -> None:
        """Set fields that are None and follow from others; what a subclass sets is derived, too."""
        if self.pipeline_dtype is None:
            self.pipeline_dtype = self.params_dtype
        if self.moe_grouped_gemm is None:
            self.moe_grouped_gemm = uses_transformer_engine(self.transformer_impl)

    @contextmanager
    def _admitted_by_megatron_core(self) -> Iterator[None]:
        """Show megatron-core's checks a router that they accept, where they are too strict.

        With one expert per token its weight is 1, whatever the router says: such a router learns
        by the auxiliary loss alone, so megatron-core refuses it. Such models are computed so.
        """
        one_expert = self.num_moe_experts is not None and self.moe_router_topk == 1
        pre_softmax = self.moe_router_pre_softmax
        self.moe_router_pre_softmax = pre_softmax or one_expert
        try:
            yield
        finally:
            self.moe_router_pre_softmax = pre_softmax

    def _size_problems(self) -> list[str]:
        """Sizes of parallelism that are none, and such as no process groups are made for."""
        sizes = ParallelSizes.from_config(self).fields
        if wrong := {name: size for name, size in sizes.items() if size is not None and size < 1}:
            return [f"{name} is {size!r}: expected 1 or more" for name, size in wrong.items()]
        ranks = self.tensor_model_parallel_size
        only: dict[str, tuple[Any, ...]] = {
            "gtp_weight_remat_size": (1,),
            "expert_gtp_weight_remat_size": (1,),
            "tensor_parallel_num_weight_shards": (None, ranks),
            "expert_tensor_parallel_num_weight_shards": (
                None,
                self.expert_tensor_parallel_size or ranks,
            ),
            "hierarchical_context_parallel_sizes": (None,),
        }
        return [
            f"{name} is {found!r}: no process groups are made for that, expected {values[0]!r}"
            for name, values in only.items()
            if (found := getattr(self, name)) not in values
        ]

    def problems(self) -> list[str]:
        """What cannot be built, one sentence each naming field, value and expectation."""
        problems = [
            f"{name} is set: {self._unknown(name)}"
            for name in vars(self)
            if not (self._is_known(name) or name.startswith("_"))
        ]
        problems += [
            f"{field} is {getattr(self, field)}: it must be set to a positive number"
            for field in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")
            if getattr(self, field) <= 0
        ]
        if self.params_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            problems.append(
                f"params_dtype is {self.params_dtype}: megatron-core computes in torch.float32, "
                f"torch.bfloat16 or torch.float16"
            )
        ranks = self.tensor_model_parallel_size
        if not self.should_pad_vocab and self.vocab_size % ranks:
            problems.append(
                f"vocab_size is {self.vocab_size}, not a multiple of tensor_model_parallel_size = "
                f"{ranks}: set should_pad_vocab=True"
            )
        if self.sequence_parallel and ranks == 1:
            problems.append(
                "sequence_parallel is True with tensor_model_parallel_size = 1: set it to False"
            )
        problems += self._pipeline_problems()
        if self.hybrid_context_parallel:
            problems.append(
                "hybrid_context_parallel is True: all batches have the one context_parallel_size, "
                "set it to False"
            )
        return [*problems, *backend_problems(self, self.transformer_impl)]

    def _pipeline_problems(self) -> list[str]:
        stages = self.pipeline_model_parallel_size
        if problems := list(layout_problems(self)):
            return problems
        chunks = virtual_stages(self)
        if chunks is None or can_interleave(self):
            return []
        problem = (
            f"virtual_pipeline_model_parallel_size is {chunks} with pipeline_model_parallel_size = "
            f"{stages}: interleaving needs more than 2 stages, or 2 with overlap_p2p_comm=True and "
            f"batch_p2p_comm=False"
        )
        return [problem]

    def apply_overrides_and_finalize(
        self, dtype: torch.dtype | None = None, overrides: Mapping[str, Any] | None = None
    ) -> Self:
        """Set fields, and finalize.

        Args:
            dtype: of the parameters, bfloat16, float16 or float32; None leaves it.
            overrides: further fields by name.

        Returns:
            The provider itself.

        Raises:
            AttributeError: for a name that is not a field; nothing is set then.
            ConfigError: as `finalize`.
        """
        overrides = overrides or {}
        self._require_known(overrides)
        if dtype is not None:
            self._set_dtype(dtype)
        self.set_fields(overrides)
        self.finalize()
        return self

    def _set_dtype(self, dtype: torch.dtype) -> None:
        self.params_dtype = dtype
        self.bf16, self.fp16 = dtype == torch.bfloat16, dtype == torch.float16

    def set_fields(self, values: Mapping[str, Any]) -> None:
        """Set fields by name. Raises AttributeError for another name; nothing is set then."""
        self._require_known(values)
        for name, value in values.items():
            setattr(self, name, value)

    def _require_known(self, names: Iterable[str]) -> None:
        for name in names:
            if not self._is_known(name):
                raise AttributeError(f"{name}: {self._unknown(name)}")

    def _is_known(self, name: str) -> bool:
        """Whether an attribute is a field, a replaced method, or megatron-core's own."""
        return (
            name in self._set_by_megatron_core
            or hasattr(type(self), name)
            or name in _field_names(type(self))
        )

    def _unknown(self, name: str) -> str:
        """Why an attribute cannot be honoured, and the field that may have been meant."""
        close = get_close_matches(name, [one.name for one in fields(self)], n=1)
        meant = f"; was {close[0]} meant?" if close else ""
        return f"{type(self).__name__} has no field of this name{meant}"

    @abstractmethod
    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> MegatronModule:
        """Build this rank's model, or its chunk `vp_stage` of an interleaved pipeline.

        Parameters are created in `params_dtype` on the current CUDA device, on the CPU without
        CUDA, or on the device of an enclosing `with torch.device("meta")`. Process groups must
        exist.

        Args:
            pre_process: with embedding and vision encoder; None decides by the pipeline stage.
            post_process: with the output layer; None decides by the pipeline stage.
            vp_stage: virtual stage, for interleaved pipelines.
        """

    def stage_ends(
        self, pre_process: bool | None, post_process: bool | None, vp_stage: int | None
    ) -> tuple[bool, bool]:
        """(first, last): the given values, or what this rank and virtual stage are."""
        pp_group = ProcessGroupCollection.use_mpu_process_groups(["pp"]).pp
        stages = self.virtual_pipeline_model_parallel_size
        if pre_process is None:
            pre_process = is_vp_first_stage(vp_stage, stages) and is_pp_first_stage(pp_group)
        if post_process is None:
            post_process = is_vp_last_stage(vp_stage, stages) and is_pp_last_stage(pp_group)
        return pre_process, post_process

    def register_pre_wrap_hook(
        self, hook: ModelHook, prepend: bool = False, *, fills: bool = False
    ) -> None:
        """Call `hook` with the list of built chunks, on their device, before anything wraps them.

        Args:
            hook: may change the chunks in place and return None, or return those to use from there
                on, as many as it got.
            prepend: call it before all hooks that are registered already.
            fills: the hook sets every parameter, or raises. Hooks before it find no values then:
                `provide_distributed_model` draws none.
        """
        self._pre_wrap_hooks.insert(0 if prepend else len(self._pre_wrap_hooks), hook)
        self._is_filled |= fills

    def register_post_wrap_hook(self, hook: ModelHook, prepend: bool = False) -> None:
        """Call `hook` with the chunks that `provide_distributed_model` is about to return.

        Args:
            hook: as of `register_pre_wrap_hook`.
            prepend: call it before all hooks that are registered already.
        """
        self._post_wrap_hooks.insert(0 if prepend else len(self._post_wrap_hooks), hook)

    def initialize_model_parallel(
        self,
        seed: int | None = None,
        seed_kwargs: Mapping[str, Any] | None = None,
        **model_parallel_kwargs: Any,
    ) -> None:
        """Make torch.distributed, megatron-core's process groups and random states ready.

        `provide_distributed_model` does the same where that was not done; groups that exist are
        used as they are.

        Args:
            seed: of the random states, also where there are some; None leaves those, and begins
                with 1234 where there are none.
            seed_kwargs: further arguments of megatron-core's `model_parallel_cuda_manual_seed`.
            **model_parallel_kwargs: further arguments of megatron-core's
                `parallel_state.initialize_model_parallel`. The sizes are the provider's fields.

        Raises:
            ConfigError: the groups that exist are of other sizes, the number of processes does not
                fit, or there is no argument of a name.
        """
        initialize_process_groups(
            ParallelSizes.from_config(self),
            seed=seed,
            # Stock groups are right where the predictors are on the last stage.
            embedding_stages=embedding_stages(self) if self.mtp_standalone else None,
            seed_kwargs=seed_kwargs or {},
            group_kwargs=model_parallel_kwargs,
        )

    def provide_distributed_model(
        self,
        ddp_config: DistributedDataParallelConfig | None = None,
        *,
        wrap_with_ddp: bool = True,
        seed: int | None = None,
        fp16: bool | None = None,
        bf16: bool | None = None,
        use_megatron_fsdp: bool = False,
        use_torch_fsdp2: bool = False,
        overlap_param_gather_with_optimizer_step: bool = False,
        data_parallel_random_init: bool = False,
        use_cpu_initialization: bool | None = None,
        init_model_with_meta_device: bool | None = None,
        pre_wrap_hook: ModelHooks | None = None,
        post_wrap_hook: ModelHooks | None = None,
        mixed_precision_wrapper: MixedPrecisionWrapper | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> Chunks:
        """Build this rank's part of the model, ready for training or inference.

        Makes process groups and random states where there are none. Without CUDA, megatron-core
        is kept running on the CPU until the process ends.

        Args:
            ddp_config: for the wrapper; None for megatron-core's defaults.
            wrap_with_ddp: wrap each chunk in megatron-core's DistributedDataParallel.
            seed: of the random states; None leaves those that there are, or begins with 1234.
            fp16: make the model in float16. False, and None, leave `params_dtype`.
            bf16: the same of bfloat16.
            use_megatron_fsdp: only False.
            use_torch_fsdp2: only False.
            overlap_param_gather_with_optimizer_step: keep the first chunk's gradients in one
                bucket, which megatron-core needs for it.
            data_parallel_random_init: give every data-parallel replica the values of the first,
                for random states that differ between them.
            use_cpu_initialization: set the field of this name; the model stays on the CPU.
            init_model_with_meta_device: set the field of this name; the chunks are on the meta
                device, without memory or values.
            pre_wrap_hook: one or several, called after those that are registered.
            post_wrap_hook: the same.
            mixed_precision_wrapper: put around each chunk of a model in float16 or bfloat16, such
                as megatron-core's Float16Module. None is needed: inputs are cast where they are
                used.
            pg_collection: process groups; they must be those of the parallel state.

        Returns:
            The chunks of this rank: one, or one per virtual pipeline stage.

        Raises:
            ConfigError: see `finalize`; an argument that cannot be honoured; or megatron-core
                cannot build the model.
            InputError: another rank cannot build its part; or a hook returned something else than
                as many modules as it got.
        """
        refuse_fsdp(use_megatron_fsdp=use_megatron_fsdp, use_torch_fsdp2=use_torch_fsdp2)
        if (dtype := asked_dtype(self.params_dtype, fp16, bf16)) is not None:
            self._set_dtype(dtype)
        if use_cpu_initialization is not None:
            self.use_cpu_initialization = use_cpu_initialization
        if init_model_with_meta_device is not None:
            self.init_model_with_meta_device = init_model_with_meta_device
        self.finalize()
        activate_megatron_on_cpu()
        self.initialize_model_parallel(seed)
        if pg_collection is not None:
            check_groups(pg_collection)
        chunks = on_every_rank(
            type(self).__name__, lambda: self._built(wrap_with_ddp=wrap_with_ddp)
        )
        for hook in (*self._pre_wrap_hooks, *as_hooks(pre_wrap_hook)):
            chunks = chunks_after(hook, chunks, "pre-wrap")
        chunks = in_mixed_precision(self, chunks, mixed_precision_wrapper)
        if data_parallel_random_init:
            broadcast_over_replicas(chunks)
        if wrap_with_ddp:
            one_bucket = overlap_param_gather_with_optimizer_step
            ddp_config = ddp_config or DistributedDataParallelConfig()
            chunks = in_ddp(self, chunks, ddp_config, in_one_bucket=one_bucket)
        for hook in (*self._post_wrap_hooks, *as_hooks(post_wrap_hook)):
            chunks = chunks_after(hook, chunks, "post-wrap")
        return chunks

    def _built(self, *, wrap_with_ddp: bool) -> Chunks:
        """The chunks of this rank, on their device, before any hook."""
        stages = self.virtual_pipeline_model_parallel_size
        vp_stages = [None] if stages is None else list(range(stages))
        on_cpu = self.use_cpu_initialization or not torch.cuda.is_available()

        def build() -> Chunks:
            return [self.provide(vp_stage=vp_stage) for vp_stage in vp_stages]

        if self.init_model_with_meta_device:
            return on_meta(build, is_filled=self._is_filled, wrap_with_ddp=wrap_with_ddp)

        def build_on_device() -> Chunks:
            return [chunk.to("cpu" if on_cpu else "cuda") for chunk in build()]

        # Quantized parameters keep statistics of all values that they ever had.
        drawn = not self._is_filled or self.fp8 or self.fp4
        return build_on_device() if drawn else build_without_values(self, build_on_device)
