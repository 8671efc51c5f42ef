"""AutoBridge: one entry for every supported model, in both directions.

bridge = AutoBridge.from_hf_pretrained("organization/model")
provider = bridge.to_megatron_provider()
model = provider.provide_distributed_model(wrap_with_ddp=False)
bridge.save_hf_pretrained(model, "out")
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self, Unpack

from megatron.bridge.dtypes import DType, weight_dtype
from megatron.bridge.errors import InputError
from megatron.bridge.formats.iterations import Iteration, iteration_folder
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
    from transformers import PretrainedConfig

    from megatron.bridge.live.conversion_tasks import ConversionTask
    from megatron.bridge.models.conversion.casting import Casting
    from megatron.bridge.models.model_provider import ModelProvider

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
    ) -> Self:
        """A folder, or a hub id ("org/name" or "org/name@revision").

        Args:
            path: the folder or hub id.
            revision: of a hub id, where it does not stand behind an "@".
            trust_remote_code: whether transformers may run Python code that comes with the model.
            experts: how routed experts lie in the files (ExpertLayout). Without it that is found
                from names and shapes; a layout that these contradict is refused.

        Raises:
            ReferenceNotFound: there is no such folder, repository or revision.
            CheckpointError: the folder is of another format, or holds an adapter.
            ConfigError: the config cannot be read.
            UnsupportedModel: no bridge converts the model.
        """
        hf = PreTrainedVLM.from_pretrained(path, revision, trust_remote_code)
        bridge = cls(hf, experts=experts)
        _ = bridge.model_bridge
        return bridge

    @classmethod
    def from_hf_config(cls, config: "PretrainedConfig | Mapping[str, Any]") -> Self:
        """A config alone: models can be built and weights exported, but none are at hand."""
        bridge = cls(PreTrainedVLM.from_config(config))
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
        self, load_weights: bool = True, *, wrap_with_ddp: bool = False
    ) -> "list[torch.nn.Module]":
        """Build this rank's chunks of the model, by default with weights and without DDP."""
        provider = self.to_megatron_provider(load_weights)
        return list(provider.provide_distributed_model(wrap_with_ddp=wrap_with_ddp))

    def load_hf_weights(
        self,
        model: Model,
        hf_path: PathLike | None = None,
        progress: Progress | None = None,
        *,
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
        )

    def export_hf_weights(
        self,
        model: Model,
        *,
        cpu: bool = True,
        dtype: DType | None = None,
        round: bool = False,  # noqa: A002 - the name of the option
    ) -> Iterator[HFWeight]:
        """Every Hugging Face tensor of a live model, by name, in the order of the files.

        Args:
            model: the chunks of this rank.
            cpu: move tensors to the CPU.
            dtype: of the tensors; what the release keeps in float32 stays so. None for the dtype
                that each has in its file.
            round: round values that do not fit instead of raising InexactCast.

        Yields:
            The tensors.

        Raises:
            InputError: this rank does not hold the whole model.
            InexactCast: values do not fit their dtype.
        """
        from megatron.bridge.live.weights import export_weights, plan_of_model

        plan = plan_of_model(self.hf_pretrained, model, experts=self.experts, dtype=dtype)
        for name, tensor in export_weights(model, plan, _casting_of(round=round)):
            yield HFWeight(name, tensor.cpu() if cpu else tensor)

    def save_hf_weights(
        self,
        model: Model,
        path: PathLike,
        *,
        dtype: DType | None = None,
        round: bool = False,  # noqa: A002 - the name of the option
        force: bool = False,
    ) -> None:
        """Write a live model's weights and nothing else; see `save_hf_pretrained`."""
        self._save(model, path, dtype, round=round, side_files=False, force=force)

    def save_hf_pretrained(
        self,
        model: Model,
        path: PathLike,
        *,
        dtype: DType | None = None,
        round: bool = False,  # noqa: A002 - the name of the option
        force: bool = False,
    ) -> None:
        """Write a folder that transformers loads: weights, config, tokenizer, processor and all.

        Every rank calls this, at any parallel layout, and writes its part of the files.

        Args:
            model: the chunks of this rank.
            path: the folder, which is complete or not there.
            dtype: as in `export_hf_weights`; config.json then states it, too.
            round: as in `export_hf_weights`.
            force: replace a folder that exists.

        Raises:
            TargetExists: `path` exists, and `force` is not set.
            PlanError: the ranks do not hold the model.
            InputError: another rank cannot go on.
            InexactCast: values do not fit their dtype.
        """
        self._save(model, path, dtype, round=round, side_files=True, force=force)

    def save_megatron_model(self, model: Model, path: PathLike, *, force: bool = False) -> None:
        """Write a live model as a torch_dist checkpoint, in the model's own dtypes.

        Every rank calls this, at any parallel layout, and writes its part of one folder.

        Args:
            model: the chunks of this rank.
            path: the folder, which is complete or not there.
            force: replace a folder that exists.

        Raises:
            TargetExists: `path` exists, and `force` is not set.
            PlanError: the ranks do not hold the model.
            InputError: another rank cannot go on.
        """
        from megatron.bridge.live.megatron_checkpoint import save_model

        hf, target = self.hf_pretrained, local_path(path)
        save_model(model, target, hf, experts=self.experts, force=force)

    def load_megatron_model(
        self,
        path: PathLike,
        *,
        iteration: Iteration | None = None,
        dtype: DType | None = None,
        round: bool = False,  # noqa: A002 - the name of the option
        mp_overrides: Mapping[str, Any] | None = None,
        wrap_with_ddp: bool = False,
    ) -> "list[torch.nn.Module]":
        """Build this rank's chunks of the model, filled from a torch_dist checkpoint of any layout.

        Args:
            path: the folder of the checkpoint.
            iteration: a number, or "release"; None for the one that the tracker file names.
            dtype: of the model; None for that of the checkpoint.
            round: round values that the model does not hold instead of raising InexactCast.
            mp_overrides: fields of the provider, set before it builds, such as the parallel sizes.
            wrap_with_ddp: wrap each chunk in megatron-core's DistributedDataParallel.

        Raises:
            CheckpointError: the checkpoint cannot be read.
            PlanError: the checkpoint does not hold this model.
            InputError: the provider has no field of a name in `mp_overrides`.
            InexactCast: values do not fit the model's dtypes.
        """
        from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint
        from megatron.bridge.live.megatron_checkpoint import provider_of_checkpoint

        provider = provider_of_checkpoint(
            TorchDistCheckpoint(local_path(path), iteration),
            self.hf_pretrained,
            None if dtype is None else weight_dtype(dtype),
            _casting_of(round=round),
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
        if device_map not in (None, "cpu", "auto"):
            raise InputError(
                f"device_map={device_map!r}: import_ckpt builds no model, files are converted to "
                "files; leave it out"
            )
        target = local_path(megatron_path)
        check_target(target, [hf_model_id], force=chosen.force)
        source = cls.from_hf_pretrained(
            hf_model_id, revision=revision, trust_remote_code=trust_remote_code
        ).hf_pretrained
        _check_dtype(torch_dtype, source)
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
        """The row of every parameter of a live model. Raises PlanError for one without a row."""
        from megatron.bridge.live.conversion_tasks import conversion_tasks

        return conversion_tasks(model, self.model_bridge.mapping_registry())

    def _save(
        self,
        model: Model,
        path: PathLike,
        dtype: DType | None,
        *,
        round: bool,  # noqa: A002 - the name of the option
        side_files: bool,
        force: bool,
    ) -> None:
        from megatron.bridge.live.save import save_folder

        save_folder(
            model,
            local_path(path),
            self.hf_pretrained,
            experts=self.experts,
            side_files=side_files,
            dtype=dtype,
            casting=_casting_of(round=round),
            force=force,
        )


def _check_dtype(given: "torch.dtype | str | None", source: PreTrainedVLM) -> None:
    """Raise InputError for a dtype that the weights of an import will not have."""
    from megatron.bridge.dtypes import torch_dtype

    if given is None or given == "auto":
        return
    name, main = str(given).removeprefix("torch."), torch_dtype(source.main_dtype)
    if name != str(main).removeprefix("torch."):
        raise InputError(
            f"torch_dtype={given!r}: import_ckpt keeps the dtype of every tensor, and most of "
            f"{source.name_or_path} are {main}; leave it out"
        )


def _casting_of(*, round: bool) -> "Casting":  # noqa: A002 - the name of the option
    from megatron.bridge.models.conversion.casting import Casting

    return Casting(round, "round=True rounds them, dtype=torch.float32 keeps them")
