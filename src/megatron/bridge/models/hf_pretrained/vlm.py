"""A Hugging Face model: its config, tensors, processor and side files.

hf = PreTrainedVLM.from_pretrained("organization/model")
hf.hf_config.require("tie_word_embeddings", bool)
hf.weights.read("lm_head.weight")
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron.bridge.dtypes import TORCH_NAME_OF
from megatron.bridge.errors import CheckpointError, InputError
from megatron.bridge.models.hf_pretrained.config import CONFIG_FILE, HFConfig
from megatron.bridge.models.hf_pretrained.config_changes import set_values, with_changes
from megatron.bridge.models.hf_pretrained.config_dtype import config_in_dtype
from megatron.bridge.models.hf_pretrained.fp8 import Weights, weights_of
from megatron.bridge.models.hf_pretrained.other_formats import (
    bare_adapter,
    other_files,
    other_weights,
)
from megatron.bridge.models.hf_pretrained.quantization import (
    CONFIG_KEY,
    BlockFP8,
    quantization_of,
    states_quantization,
)
from megatron.bridge.models.hf_pretrained.reference import (
    local_folder,
    repository_files,
    repository_of,
    resolve_reference,
)
from megatron.bridge.models.hf_pretrained.safetensors_header import read_header
from megatron.bridge.models.hf_pretrained.side_files import replace_file, side_files
from megatron.bridge.models.hf_pretrained.state import StateDict
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.transformers_model import load, load_transformers_model
from megatron.bridge.models.hf_pretrained.weight_files import has_weight_files, is_safetensors
from megatron.bridge.paths import local_path
from megatron.bridge.tensors.spec import TensorSpec, main_dtype, widened

if TYPE_CHECKING:
    from transformers import (
        BaseImageProcessor,
        GenerationConfig,
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        ProcessorMixin,
    )


class PreTrainedVLM:
    """One model, as a folder or hub id with weights, or as a config alone.

    Everything is found and read when it is first asked for. Attributes that need files raise
    InputError when only a config is at hand.
    """

    def __init__(
        self,
        reference: str | os.PathLike[str] | None,
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        config: HFConfig | None = None,
        model_dtype: str | None = None,
    ) -> None:
        """Use `from_pretrained` or `from_config`."""
        self._reference = reference
        self._revision = revision
        self._given_config = config
        self._config_before: dict[str, Any] | None = None
        self._model_dtype = model_dtype
        self.trust_remote_code = trust_remote_code
        """Whether transformers may run Python code that comes with the model."""

    @classmethod
    def from_pretrained(
        cls,
        reference: str | os.PathLike[str],
        revision: str | None = None,
        trust_remote_code: bool = False,
        *,
        model_dtype: str | None = None,
        config: HFConfig | None = None,
    ) -> Self:
        """A model folder, or a hub id `org/name` or `org/name@revision`.

        A hub id's small files are fetched here, its weights when they are first needed.

        Args:
            reference: the folder or hub id.
            revision: of a hub id.
            trust_remote_code: whether transformers may run Python code that comes with the model.
            model_dtype: see the property.
            config: in the place of its config.json.

        Raises:
            ReferenceNotFound: see `resolve_reference`.
            CheckpointError: the folder is of another format, or holds an adapter.
        """
        model = cls(
            reference,
            revision=revision,
            trust_remote_code=trust_remote_code,
            config=config,
            model_dtype=model_dtype,
        )
        # What leads nowhere, or to something else, is an error now, not later.
        is_local = local_folder(reference) is not None
        other = other_weights(model.folder) if is_local else bare_adapter(model.folder)
        if other is not None:
            raise CheckpointError(other)
        return model

    @classmethod
    def from_config(cls, config: PretrainedConfig | Mapping[str, Any] | HFConfig) -> Self:
        """A model without files. The config is copied."""
        if isinstance(config, HFConfig):
            return cls(None, config=config)
        if isinstance(config, Mapping):
            return cls(None, config=HFConfig.from_dict(config))
        return cls(None, config=HFConfig.from_transformers(config))

    @property
    def name_or_path(self) -> str:
        """What the user gave; for a config alone, where that came from."""
        if self._reference is None:
            return self.hf_config.origin
        return os.fspath(self._reference)

    @property
    def model_name_or_path(self) -> str:
        """`name_or_path`, as other libraries call it."""
        return self.name_or_path

    @property
    def has_files(self) -> bool:
        """False if there is a config and nothing else."""
        return self._reference is not None

    @property
    def has_weights(self) -> bool:
        """Whether there are safetensors files; a hub id counts as having them."""
        if self._reference is None:
            return False
        folder = local_folder(self._reference)
        return folder is None or has_weight_files(folder)

    @cached_property
    def folder(self) -> Path:
        """The folder with the model's small files."""
        return resolve_reference(self._required_reference(), self._revision, weights=False)

    @cached_property
    def weights_folder(self) -> Path:
        """The folder with the weights: `folder`, after the weights were fetched if need be."""
        reference = self._required_reference()
        if local_folder(reference) is not None:
            return self.folder
        # The snapshot is named after its commit: the weights have to be of the same one.
        repository = repository_of(reference)
        folder = resolve_reference(repository, self.folder.name)
        if not any(folder.glob("*.safetensors")):
            files = repository_files(repository, self.folder.name)
            if (other := other_files(repository, files, self.folder)) is not None:
                raise CheckpointError(other)
        return folder

    @property
    def hf_config(self) -> HFConfig:
        """config.json as plain JSON, with what was set on `config` since.

        Raises:
            ConfigError: it cannot be read, or a change cannot be honoured.
        """
        if self._config_before is None:
            return self._stated_config
        return with_changes(self._stated_config, self.config, self._config_before)

    @property
    def config_is_changed(self) -> bool:
        """Whether something was set on `config`, so that config.json says otherwise."""
        return self.hf_config is not self._stated_config

    @cached_property
    def _stated_config(self) -> HFConfig:
        return self._given_config or HFConfig.from_file(self.folder)

    @cached_property
    def tensors(self) -> TensorIndex:
        """The tensors in the files as they are; CheckpointError if they are not in order."""
        return TensorIndex.from_folder(self.weights_folder)

    @cached_property
    def weights(self) -> Weights:
        """The weights of the model: of an FP8 release those that it stands for, in BF16.

        From headers only.

        Raises:
            CheckpointError: the files are not in order.
            ConfigError: the config states a quantization that the files do not have.
            UnsupportedModel: the quantization is another one.
        """
        return weights_of(self.tensors, self.hf_config)

    @property
    def state(self) -> StateDict:
        """`weights` as whole tensors by name, each read when it is asked for."""
        return StateDict(self.weights)

    @property
    def quantization(self) -> BlockFP8 | None:
        """How the files are quantized, by the config; None if they are not."""
        return quantization_of(self.hf_config)

    @property
    def unquantized_config(self) -> HFConfig:
        """config.json as it describes `weights`: without a word of quantization."""
        data = self.hf_config.data
        data.pop(CONFIG_KEY, None)
        return HFConfig.from_dict(data, self.hf_config.origin)

    @property
    def main_dtype(self) -> str:
        """The safetensors dtype of most of the weights; without files, that of the config.

        Raises:
            ConfigError: there is a config alone, and it names none.
        """
        return self._dtype_of_files if self.has_weights else self.hf_config.dtype

    @property
    def model_dtype(self) -> str:
        """The dtype of a model made of it ("BF16"): the one asked for, or `main_dtype`."""
        return self._model_dtype or self.main_dtype

    @property
    def model_tensors(self) -> Mapping[str, TensorSpec] | None:
        """The tensors in the files, none narrower than a dtype asked for; None without files."""
        if not self.has_weights:
            return None
        return (
            self.tensors if self._model_dtype is None else widened(self.tensors, self._model_dtype)
        )

    @cached_property
    def _dtype_of_files(self) -> str:
        return main_dtype(self.weights.values())

    @cached_property
    def side_files(self) -> tuple[Path, ...]:
        """All files but the weights, relative to `folder`; none for a config alone."""
        return side_files(self.folder) if self.has_files else ()

    def restated_config(self, *, quantized: bool = False, dtype: str | None = None) -> bytes | None:
        """The config.json of a saved model, where the model's own file would not do.

        That is so where there is none, where something was set on `config`, where the file says
        that the weights are quantized, but they are not, by `quantized`, or where most of them get
        another `dtype` ("BF16").
        """
        config = self.hf_config
        if states_quantization(config) and not quantized:
            config = self.unquantized_config
        if dtype is not None:
            config = config_in_dtype(config, TORCH_NAME_OF[dtype])
        fits = self.has_files and self._given_config is None and not self.config_is_changed
        if fits and config.data == self.hf_config.data:
            return None
        return f"{json.dumps(config.data, indent=2, ensure_ascii=False)}\n".encode()

    def save_artifacts(self, path: str | os.PathLike[str]) -> None:
        """Write config, tokenizer, processor and all else but weights into a folder.

        The folder is made if need be; files of the same names in it are replaced, one by one. The
        config describes weights that are not quantized.

        Raises:
            InputError: the folder is the model's own, or cannot be written.
        """
        target, config = local_path(path), self.restated_config()
        if self.has_files and target.resolve() == self.folder.resolve():
            raise InputError(f"{path}: these files come from there; name another folder")
        try:
            for file in self.side_files:
                if config is None or file != Path(CONFIG_FILE):
                    replace_file(target / file, (self.folder / file).read_bytes())
            if config is not None:
                replace_file(target / CONFIG_FILE, config)
        except OSError as error:
            raise InputError(f"{error.filename}: {error.strerror}") from error

    @cached_property
    def side_file_names(self) -> frozenset[str]:
        """The names of `side_files`, as POSIX paths."""
        return frozenset(file.as_posix() for file in self.side_files)

    def tensors_beside(self) -> dict[str, str]:
        """The tensors in safetensors files that are not the model's, each with its file."""
        found: dict[str, str] = {}
        for name in sorted(filter(is_safetensors, self.side_file_names)):
            try:
                header = read_header(self.folder / name)
            except CheckpointError:
                continue  # nobody reads it
            found |= {tensor.name: name for tensor in header.tensors}
        return found

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config as a transformers object. What is set on it counts, here and in `hf_config`.

        Dtypes of weights are those of the files.
        """
        from transformers import AutoConfig

        if self._given_config is None:
            config = self._loaded("config", AutoConfig, trust_remote_code=self.trust_remote_code)
        else:
            data = self._stated_config.data
            config = AutoConfig.for_model(data.pop("model_type"), **data)
        self._config_before = config.to_dict()
        return config

    def set_on_config(self, values: Mapping[str, Any]) -> None:
        """Set values on `config`; a dict for a part of it sets values on that part.

        Raises:
            InputError: the config has no value of a name.
        """
        set_values(self.config, values)

    @cached_property
    def image_processor(self) -> BaseImageProcessor:
        """The transformers processor of images alone."""
        from transformers import AutoImageProcessor

        return self._loaded(
            "image processor", AutoImageProcessor, trust_remote_code=self.trust_remote_code
        )

    @cached_property
    def processor(self) -> ProcessorMixin:
        """The transformers processor of text, images and videos."""
        from transformers import AutoProcessor

        return self._loaded("processor", AutoProcessor, trust_remote_code=self.trust_remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer."""
        from transformers import AutoTokenizer

        return self._loaded("tokenizer", AutoTokenizer, trust_remote_code=self.trust_remote_code)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The transformers generation settings of this model."""
        from transformers import GenerationConfig

        return self._loaded("generation config", GenerationConfig)

    def load_model(self, auto_model: str | None = None, **kwargs: Any) -> PreTrainedModel:
        """The model of transformers itself with these weights, in eager attention.

        It is the reference to compare with. The weights of an FP8 release are dequantized here:
        transformers itself would not round them to bfloat16, and takes blocks for equal in size.

        Args:
            auto_model: the class of transformers that loads it; None for that of the model type.
            **kwargs: for its `from_pretrained`, such as `dtype=torch.float32`.

        Raises:
            InputError: transformers cannot load the model, or misses tensors.
        """
        return load_transformers_model(self, auto_model, **kwargs)

    def _loaded(self, what: str, auto_class: Any, **options: Any) -> Any:
        return load(self.name_or_path, what, auto_class, self.folder, **options)

    def _required_reference(self) -> str | os.PathLike[str]:
        if self._reference is None:
            raise InputError(
                f"{self.name_or_path}: only a config is at hand, no weights and no other files; "
                "use PreTrainedVLM.from_pretrained with a folder or a hub id"
            )
        return self._reference
