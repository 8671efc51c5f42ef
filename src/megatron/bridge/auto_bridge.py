"""AutoBridge: one entry for every supported model, in both directions.

bridge = AutoBridge.from_hf_pretrained("organization/model")
provider = bridge.to_megatron_provider()
model = provider.provide_distributed_model(wrap_with_ddp=False)
bridge.save_hf_pretrained(model, "out")
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self, Unpack

from megatron.bridge.dtypes import DType, weight_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.formats.iterations import Iteration, iteration_folder
from megatron.bridge.live.arguments import (
    Rounding,
    casting_of,
    check_device_map,
    check_dtype,
    quantization_of_targets,
    require_process_group,
    unless_auto,
)
from megatron.bridge.live.save_options import SaveKeywords, SaveOptions, one_dtype
from megatron.bridge.models.catalog import bridge_for, registered_bridges
from megatron.bridge.models.conversion.model_bridge import (
    DEFAULTS,
    MegatronModelBridge,
    PlanOptions,
)
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.operations.options import ConversionOptions, ExportKeywords, ImportKeywords
from megatron.bridge.paths import PathLike, local_path
from megatron.bridge.progress import Progress
from megatron.bridge.progress_lines import shown
from megatron.bridge.target.interruption import done_means_done
from megatron.bridge.target.targets import check_target

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup
    from transformers import PretrainedConfig

    from megatron.bridge.exchange.landing import Targets
    from megatron.bridge.exchange.low_rank import LowRank
    from megatron.bridge.exchange.transport import TransportName
    from megatron.bridge.live.conversion_tasks import ConversionTask
    from megatron.bridge.live.export import Receivers
    from megatron.bridge.live.refit import Refit
    from megatron.bridge.models.model_provider import ModelProvider
    from megatron.bridge.models.wrapping import BuildKeywords

type Model = Sequence[torch.nn.Module]


class HFWeight(NamedTuple):
    """A Hugging Face tensor by name."""

    name: str
    tensor: "torch.Tensor"

    @property
    def param_name(self) -> str:
        """`name`, as other bridges call it."""
        return self.name

    @property
    def weight(self) -> "torch.Tensor":
        """`tensor`, as other bridges call it."""
        return self.tensor


class AutoBridge:
    """Converts one Hugging Face model; make it by `from_hf_pretrained` or `from_hf_config`."""

    def __init__(self, hf_pretrained: PreTrainedVLM, *, experts: str | None = None) -> None:
        self.hf_pretrained = hf_pretrained
        self.experts = experts

    @classmethod
    def from_hf_pretrained(
        cls,
        path: PathLike,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        experts: str | None = None,
        dtype: DType | None = None,
        torch_dtype: DType | None = None,
        device_map: Any = None,
        **config_values: Any,
    ) -> Self:
        """A folder, or a hub id ("org/name" or "org/name@revision").

        Args:
            path: the folder or hub id.
            revision: of a hub id, where it does not stand behind an "@".
            trust_remote_code: whether transformers may run Python code that comes with the model.
            experts: how routed experts lie in the files (ExpertLayout). Without it that is found
                from names and shapes; a layout that these contradict is refused.
            dtype: of the Megatron models that are made of it; None and "auto" for that of most of
                the files. Tensors that are exported keep the dtypes of the files.
            torch_dtype: `dtype`, as transformers called it before 5.
            device_map: no model of transformers is loaded, so only "cpu" or "auto".
            **config_values: in the place of those in config.json, as if set on
                `hf_pretrained.config`; a dict for a part of it sets values on that part.

        Raises:
            InputError: an argument cannot be honoured, or the config has no value of a name.
            ReferenceNotFound: there is no such folder, repository or revision.
            CheckpointError: the folder is of another format, or holds an adapter.
            ConfigError: the config cannot be read.
            UnsupportedModel: no bridge converts the model.
        """
        check_device_map("from_hf_pretrained", device_map)
        asked = one_dtype(unless_auto(dtype), unless_auto(torch_dtype), "torch_dtype")
        model_dtype = None if asked is None else weight_dtype(asked)
        hf = PreTrainedVLM.from_pretrained(
            path, revision, trust_remote_code, model_dtype=model_dtype
        )
        if config_values:
            hf.set_on_config(config_values)
        bridge = cls(hf, experts=experts)
        _ = bridge.model_bridge
        return bridge

    @classmethod
    def from_hf_config(cls, config: "PretrainedConfig | Mapping[str, Any]") -> Self:
        """A config alone: models can be built and weights exported, but none are at hand."""
        bridge = cls(PreTrainedVLM.from_config(config))
        _ = bridge.model_bridge
        return bridge

    @classmethod
    def from_auto_config(
        cls,
        megatron_path: PathLike,
        hf_model_id: PathLike | None = None,
        trust_remote_code: bool = False,
        *,
        iteration: Iteration | None = None,
    ) -> Self:
        """The model of a Megatron checkpoint: its config is the one that the checkpoint records.

        Args:
            megatron_path: the folder of the checkpoint.
            hf_model_id: where tokenizer, processor and the other files come from, and the config if
                the checkpoint records none; None for the one that it names.
            trust_remote_code: as in `from_hf_pretrained`.
            iteration: as of `load_megatron_model`.

        Raises:
            CheckpointError: there is no checkpoint, or it says nothing of its model and
                `hf_model_id` is not given.
            BridgeError: as `from_hf_pretrained`.
        """
        from megatron.bridge.formats.config_record import read_hf_config, read_record

        folder = iteration_folder(local_path(megatron_path), iteration)
        record = read_record(folder)
        config = None if record is None else record.hf
        named = hf_model_id or (None if record is None else record.hf_model_id)
        if named is None:
            return cls.from_hf_config(read_hf_config(folder).data)
        hf = PreTrainedVLM.from_pretrained(named, None, trust_remote_code, config=config)
        bridge = cls(hf)
        _ = bridge.model_bridge
        return bridge

    @staticmethod
    def list_supported_models() -> list[str]:
        """The Hugging Face architectures that have a bridge."""
        return sorted(registered_bridges())

    @classmethod
    def supports(cls, config: "PretrainedConfig | Mapping[str, Any]") -> bool:
        """Whether a config's architecture has a bridge."""
        view = PreTrainedVLM.from_config(config).hf_config
        return view.has("architectures") and view.architecture in registered_bridges()

    @classmethod
    def can_handle(cls, path: PathLike, *, trust_remote_code: bool = False) -> bool:
        """Whether a folder or hub id holds a model with a bridge; False for anything unreadable."""
        try:
            config = PreTrainedVLM.from_pretrained(
                path, trust_remote_code=trust_remote_code
            ).hf_config
            return config.architecture in registered_bridges()
        except InputError:
            return False

    @property
    def model_bridge(self) -> MegatronModelBridge:
        """The family's bridge, by the architecture of the config. Raises UnsupportedModel."""
        return bridge_for(self.hf_pretrained.hf_config.architecture)

    @property
    def transformer_config(self) -> "ModelProvider":
        """The finalized provider, which is a megatron-core TransformerConfig."""
        provider = self.to_megatron_provider(load_weights=False)
        provider.finalize()
        return provider

    def plan(self, options: PlanOptions = DEFAULTS) -> ConversionPlan:
        """The proven plan of the files, or of the config where there are none.

        Raises:
            PlanError: files and config are not of one model.
            ConfigError: the config cannot be used.
            CheckpointError: the files cannot be read.
        """
        from megatron.bridge.formats.file_plans import plan_of

        return plan_of(
            self.hf_pretrained, replace(options, experts=options.experts or self.experts)
        )

    def to_megatron_provider(self, load_weights: bool = True) -> "ModelProvider":
        """A provider configured like the model; its fields may be changed before it builds.

        Args:
            load_weights: fill each model that the provider builds.

        Raises:
            InputError: weights are asked for, and there is a config alone.
        """
        if load_weights and not self.hf_pretrained.has_weights:
            raise InputError(
                f"{self.hf_pretrained.name_or_path}: there are no weights to load; "
                f"use to_megatron_provider(load_weights=False)"
            )
        provider = self.model_bridge.provider_bridge(self.hf_pretrained)
        if load_weights:
            provider.register_pre_wrap_hook(self.load_hf_weights, fills=True)
        return provider

    def to_megatron_model(
        self, load_weights: bool = True, **build: "Unpack[BuildKeywords]"
    ) -> "list[torch.nn.Module]":
        """Build this rank's chunks of the model, by default with weights and without DDP.

        Args:
            load_weights: fill the model.
            **build: for `provide_distributed_model` of the provider.
        """
        provider = self.to_megatron_provider(load_weights)
        build.setdefault("wrap_with_ddp", False)
        return provider.provide_distributed_model(**build)

    def load_hf_weights(
        self,
        model: Model,
        hf_path: PathLike | None = None,
        progress: Progress | None = None,
        *,
        allowed_mismatched_params: Collection[str] | None = None,
        experts: str | None = None,
        round: bool = False,  # noqa: A002 - the name of the option
    ) -> None:
        """Fill a live model, at any parallel layout, from this model's files or from others.

        Every rank calls this, and reads only what it holds. Values are cast to the parameters'
        dtypes. It is proven that the ranks together hold all of the model.

        Args:
            model: the chunks of this rank.
            hf_path: a folder or hub id; None for this model's files.
            progress: is told how many bytes are loaded.
            allowed_mismatched_params: parameters that may be missing from the files, or have
                another shape there, by their names in Megatron ("output_layer.weight"), with ``*``
                for anything. They are left as they are then.
            experts: as in `from_hf_pretrained`.
            round: round values that do not fit instead of raising InexactCast.

        Raises:
            PlanError: files and model do not fit.
            InexactCast: a norm that Megatron keeps as w - 1 does not fit its parameter.
        """
        from megatron.bridge.live.weights import fill_from_files
        from megatron.bridge.models.conversion.casting import Casting

        source = self if hf_path is None else type(self).from_hf_pretrained(hf_path)
        ways_out = "load with round=True to round them, or build the model in a wider dtype"
        fill_from_files(
            model,
            source.hf_pretrained,
            progress,
            experts=experts or source.experts,
            casting=Casting(round, ways_out),
            allowed=allowed_mismatched_params or (),
        )

    def export_hf_weights(
        self,
        model: Model,
        *,
        cpu: bool = True,
        show_progress: bool = False,
        conversion_tasks: "Iterable[ConversionTask] | None" = None,
        merge_adapter_weights: bool = True,
        dtype: DType | None = None,
        weight_dtype: DType | None = None,
        round: Rounding = False,  # noqa: A002 - the name of the option
        to: "Receivers" = "all",
        window_bytes: int | None = None,
        merge: "Iterable[LowRank]" = (),
    ) -> Iterator[HFWeight]:
        """Every Hugging Face tensor of a live model, by name, in the order of the files.

        The model may be split over ranks in any way. Then every rank calls this and goes on to the
        end; values go straight from the ranks that hold them to those that are given them.

        Args:
            model: the chunks of this rank.
            cpu: move tensors to the CPU.
            show_progress: as lines on stderr.
            conversion_tasks: of `get_conversion_tasks`; only tensors that their parameters make
                are given, with the values of their `param_weight`.
            merge_adapter_weights: accepted as other bridges have it; a model whose adapters are not
                merged into its weights is refused by the names of their parameters.
            dtype: of the tensors; what the release keeps in float32 stays so. None for the dtype
                that each has in its file.
            weight_dtype: `dtype`, as other bridges call it.
            round: round values that do not fit instead of raising InexactCast; those of all
                tensors, or of the names or patterns given (``"*.mlp.*"``).
            to: "all" gives every tensor to every rank, a number to that rank alone, "spread" each
                to one of the ranks, about as many bytes to each.
            window_bytes: that a rank sends, and receives, at a time; None for 256 MiB. Four times
                as much memory, and that of the tensors given, is all that it takes.
            merge: the adapters of this rank's weights, whose products are added to them.

        Yields:
            The tensors that this rank is given.

        Raises:
            PlanError: the ranks do not hold the model.
            InputError: the tasks do not make whole tensors, or another rank cannot go on.
            InexactCast: values do not fit their dtype.
        """
        from megatron.bridge.exchange.windows import WINDOW_BYTES
        from megatron.bridge.live.export import Export
        from megatron.bridge.live.weights import plan_of_model
        from megatron.bridge.runtime.parallel import together_if_split

        def prepared() -> Export:
            kept = one_dtype(dtype, weight_dtype)
            plan = plan_of_model(self.hf_pretrained, model, experts=self.experts, dtype=kept)
            window = WINDOW_BYTES if window_bytes is None else window_bytes
            return Export(plan, casting_of(round, plan.hf), to, window, tuple(merge))

        export = together_if_split(prepared)
        show = shown(None, as_lines=show_progress)
        for name, tensor in export.tensors(model, conversion_tasks, show):
            yield HFWeight(name, tensor.cpu() if cpu else tensor)

    def refit(
        self,
        model: Model,
        targets: "Targets",
        *,
        group: "ProcessGroup | None" = None,
        window_bytes: int | None = None,
        ranks_per_node: int | None = None,
        delta: bool = False,
        transport: "TransportName" = "point-to-point",
        dtype: DType | None = None,
        round: Rounding = False,  # noqa: A002 - the name of the option
        fp8: PathLike | Mapping[str, Any] | None = None,
        merge: "Iterable[LowRank]" = (),
    ) -> "Refit":
        """Prepare to move a live model's weights into the memory of other ranks, step by step.

        Every rank of the group calls this, and the refit that it gives for each step: those with a
        part of the model, those with targets, and those with both.

        Args:
            model: the chunks of this rank; an empty list where it has no part of the model.
            targets: the memory that this rank wants filled: whole tensors by name, such as a
                `state_dict()`, or landings.
            group: of the ranks, None for all of them.
            window_bytes: that a rank sends, and receives, at a time; None for 256 MiB. Buffers
                take four times as much.
            ranks_per_node: consecutive ranks that share a node, within which a tensor stays where
                it can.
            delta: from the second refit on send only what changed, see Refit.
            transport: "point-to-point" moves bytes by messages, so that ranks without bytes for
                each other do not meet, and large ones go from memory to memory on CPUs;
                "all-to-all" moves them by collectives.
            dtype: of the tensors on the way; None for the dtype that each has in its file.
            round: round values that do not fit instead of raising InexactCast; those of all
                tensors, or of the names or patterns given (``"*.mlp.*"``).
            fp8: how targets in FP8 are quantized: a `quantization_config`, or the release that has
                it, a folder or hub id. None for that of this model.
            merge: the adapters of this rank's weights, whose products are added to them.

        Raises:
            PlanError: the ranks do not hold the model, or it cannot give what a target wants.
            InputError: a target does not fit, the ranks have different settings, or another rank
                cannot go on.
        """
        from megatron.bridge.exchange.route import Affinity
        from megatron.bridge.exchange.windows import WINDOW_BYTES
        from megatron.bridge.live.refit import Refit
        from megatron.bridge.live.weights import plan_of_ranks
        from megatron.bridge.runtime.ranks import Ranks

        hf, ranks = self.hf_pretrained, Ranks(group)
        plan = plan_of_ranks(hf, model, ranks, experts=self.experts, dtype=dtype)
        casting, block = ranks.together(
            lambda: (casting_of(round, plan.hf), quantization_of_targets(hf, fp8))
        )
        return Refit(
            model,
            targets,
            plan,
            group=group,
            window_bytes=WINDOW_BYTES if window_bytes is None else window_bytes,
            affinity=Affinity(ranks_per_node),
            casting=casting,
            fp8=block,
            merge=merge,
            delta=delta,
            transport=transport,
        )

    def save_hf_weights(
        self, model: Model, path: PathLike, **options: Unpack[SaveKeywords]
    ) -> None:
        """Write a live model's weights and nothing else; see `save_hf_pretrained`."""
        self._save(model, path, SaveOptions.of("save_hf_weights", options), side_files=False)

    def save_hf_pretrained(
        self, model: Model, path: PathLike, **options: Unpack[SaveKeywords]
    ) -> None:
        """Write a folder that transformers loads: weights, config, tokenizer, processor and all.

        Every rank calls this, at any parallel layout, and writes its part of the files.

        Args:
            model: the chunks of this rank.
            path: the folder, which is complete or not there. It may be empty, or hold files that
                are no weights and that have other names; these stay.
            **options: see SaveOptions. With `dtype`, config.json states it, too.

        Raises:
            TargetExists: `path` holds a model, and `force` is not set.
            PlanError: the ranks do not hold the model.
            InputError: another rank cannot go on, or an option cannot be honoured.
            InexactCast: values do not fit their dtype.
        """
        self._save(model, path, SaveOptions.of("save_hf_pretrained", options), side_files=True)

    def save_megatron_model(
        self,
        model: Model,
        path: PathLike,
        hf_tokenizer_path: PathLike | None = None,
        low_memory_save: bool = False,
        hf_tokenizer_kwargs: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
    ) -> None:
        """Write a live model as a torch_dist checkpoint, in the model's own dtypes.

        Every rank calls this, at any parallel layout, and writes its part of one folder.

        Args:
            model: the chunks of this rank.
            path: the folder, which is complete or not there.
            hf_tokenizer_path: a folder or hub id that the config record names, for trainers; the
                tokenizer's files stay where they are.
            low_memory_save: accepted as other bridges have it; parameters are always written from
                where they are, without a copy.
            hf_tokenizer_kwargs: for that tokenizer, of plain values.
            force: replace a folder that exists.

        Raises:
            TargetExists: `path` exists, and `force` is not set.
            PlanError: the ranks do not hold the model.
            InputError: another rank cannot go on, or arguments are given for a tokenizer that is
                not.
        """
        from megatron.bridge.formats.config_record import TokenizerRecord
        from megatron.bridge.live.megatron_checkpoint import save_model

        tokenizer = None
        if hf_tokenizer_path is not None:
            tokenizer = TokenizerRecord(os.fspath(hf_tokenizer_path), hf_tokenizer_kwargs or {})
        elif hf_tokenizer_kwargs:
            raise InputError("hf_tokenizer_kwargs without hf_tokenizer_path; give both, or neither")

        hf, target = self.hf_pretrained, local_path(path)
        save_model(model, target, hf, experts=self.experts, tokenizer=tokenizer, force=force)

    def load_megatron_model(
        self,
        path: PathLike,
        *,
        iteration: Iteration | None = None,
        dtype: DType | None = None,
        round: bool = False,  # noqa: A002 - the name of the option
        mp_overrides: Mapping[str, Any] | None = None,
        wrap_with_ddp: bool = False,
        skip_temp_dist_context: bool | None = None,
    ) -> "list[torch.nn.Module]":
        """Build this rank's chunks of the model, filled from a torch_dist checkpoint of any layout.

        Args:
            path: the folder of the checkpoint.
            iteration: a number, or "release"; None for the one that the tracker file names.
            dtype: of the model; None for that of the checkpoint.
            round: round values that the model does not hold instead of raising InexactCast.
            mp_overrides: fields of the provider, set before it builds, such as the parallel sizes.
            wrap_with_ddp: wrap each chunk in megatron-core's DistributedDataParallel.
            skip_temp_dist_context: True refuses to make torch.distributed's process group. None and
                False make it where there is none; it stays.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            PlanError: the checkpoint does not hold this model.
            InputError: the provider has no field of a name in `mp_overrides`.
            InexactCast: values do not fit the model's dtypes.
        """
        from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
        from megatron.bridge.live.megatron_checkpoint import provider_of_checkpoint

        if skip_temp_dist_context:
            require_process_group("skip_temp_dist_context=True")
        provider = provider_of_checkpoint(
            TorchDistCheckpoint(local_path(path), iteration),
            self.hf_pretrained,
            None if dtype is None else weight_dtype(dtype),
            casting_of(round),
        )
        try:
            provider.set_fields(mp_overrides or {})
        except AttributeError as error:
            raise InputError(f"mp_overrides: {error}") from error
        return list(provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp))

    @classmethod
    @done_means_done()
    def import_ckpt(
        cls,
        hf_model_id: PathLike,
        megatron_path: PathLike,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        torch_dtype: "torch.dtype | str | None" = None,
        device_map: Any = None,
        show_progress: bool = False,
        progress: Progress | None = None,
        **options: Unpack[ImportKeywords],
    ) -> None:
        """A Hugging Face folder or hub id to a Megatron checkpoint, files to files.

        Args:
            hf_model_id: the folder or hub id.
            megatron_path: the folder of the checkpoint.
            revision: of a hub id.
            trust_remote_code: whether transformers may run Python code that comes with the model.
            torch_dtype: every tensor keeps its dtype, so only the files' main dtype or "auto".
            device_map: no model is built, so only "cpu" or "auto".
            show_progress: as lines on stderr.
            progress: is told how many bytes are converted.
            **options: those of the command, see ConversionOptions; also as one of the processes
                that torchrun started.

        Raises:
            InputError: an option cannot be honoured.
            BridgeError: as `operations.convert.import_checkpoint`.
        """
        from megatron.bridge.operations.convert import import_checkpoint

        chosen = ConversionOptions.of("import_ckpt", ImportKeywords, options)
        check_device_map("import_ckpt", device_map)
        target = local_path(megatron_path)
        check_target(target, [hf_model_id], force=chosen.force)
        source = cls.from_hf_pretrained(
            hf_model_id, revision=revision, trust_remote_code=trust_remote_code
        ).hf_pretrained
        check_dtype(torch_dtype, source)
        with chosen.run(shown(progress, as_lines=show_progress)) as run:
            import_checkpoint(source, target, **chosen.of_import, run=run)

    @done_means_done()
    def export_ckpt(
        self,
        megatron_path: PathLike,
        hf_path: PathLike,
        show_progress: bool = False,
        strict: bool = True,
        source_path: PathLike | None = None,
        *,
        progress: Progress | None = None,
        **options: Unpack[ExportKeywords],
    ) -> None:
        """A Megatron checkpoint to a folder laid out like this model's, files to files.

        Args:
            megatron_path: the folder of the checkpoint.
            hf_path: the folder to write.
            show_progress: as lines on stderr.
            strict: accepted as other bridges have it; what is not proven is never written.
            source_path: another model than this one to be laid out like.
            progress: is told how many bytes are converted.
            **options: those of the command, see ConversionOptions; also as one of the processes
                that torchrun started.

        Raises:
            InputError: an option cannot be honoured.
            BridgeError: as `operations.convert.export_checkpoint`.
        """
        from megatron.bridge.operations.convert import export_checkpoint

        chosen = ConversionOptions.of("export_ckpt", ExportKeywords, options)
        source, target = local_path(megatron_path), local_path(hf_path)
        like = self if source_path is None else type(self).from_hf_pretrained(source_path)
        reference = like.hf_pretrained
        check_target(target, [source, reference.name_or_path], force=chosen.force)
        with chosen.run(shown(progress, as_lines=show_progress)) as run:
            export_checkpoint(source, target, reference, **chosen.of_export, run=run)

    @staticmethod
    def get_hf_model_id_from_checkpoint(
        path: PathLike, *, iteration: Iteration | None = None
    ) -> str | None:
        """The Hugging Face model that a checkpoint's run_config.yaml names as `hf_model_id`.

        Args:
            path: the folder of the checkpoint.
            iteration: as of `load_megatron_model`.

        Returns:
            The name; None if there is no such record, or no name in it.

        Raises:
            CheckpointError: there is no checkpoint.
        """
        from megatron.bridge.formats.config_record import read_record

        record = read_record(iteration_folder(local_path(path), iteration))
        return None if record is None else record.hf_model_id

    def get_conversion_tasks(self, model: Model) -> "list[ConversionTask]":
        """The row of every parameter of the whole model, the same list on every rank; a collective.

        Raises:
            PlanError: a parameter has no row.
        """
        from megatron.bridge.live.conversion_tasks import conversion_tasks

        return conversion_tasks(model, self.model_bridge.mapping_registry())

    def _save(
        self, model: Model, path: PathLike, options: SaveOptions, *, side_files: bool
    ) -> None:
        from megatron.bridge.live.save import save_folder
        from megatron.bridge.runtime.parallel import ranks_of_model

        ranks, like = ranks_of_model(), options.source_path
        source = (
            self if like is None else ranks.together(lambda: type(self).from_hf_pretrained(like))
        )
        as_lines = options.show_progress and ranks.is_first
        with shown(options.progress, as_lines=as_lines)() as progress:
            save_folder(
                model,
                local_path(path),
                source.hf_pretrained,
                experts=self.experts,
                side_files=side_files,
                dtype=options.chosen_dtype,
                casting=casting_of(options.round),
                force=options.force,
                progress=progress,
            )
