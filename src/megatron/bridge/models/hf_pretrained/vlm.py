"""A Hugging Face vision-language model: its config, tensors, processor and side files.

hf = PreTrainedVLM.from_pretrained("Qwen/Qwen3-VL-2B-Instruct")
hf.hf_config.require("text_config.num_hidden_layers", int)
hf.weights.read("model.language_model.norm.weight")
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from megatron.bridge.errors import InputError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.fp8 import (
    CONFIG_KEY,
    BlockFP8,
    DequantizedTensors,
    Weights,
    quantization_of,
    weights_of,
)
from megatron.bridge.models.hf_pretrained.reference import local_folder, resolve_reference
from megatron.bridge.models.hf_pretrained.side_files import side_files
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex
from megatron.bridge.models.hf_pretrained.weight_files import has_weight_files

if TYPE_CHECKING:
    from transformers import (
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
    ) -> None:
        """Use `from_pretrained` or `from_config`."""
        self._reference = reference
        self._revision = revision
        self._given_config = config
        self.trust_remote_code = trust_remote_code
        """Whether transformers may run Python code that comes with the model."""

    @classmethod
    def from_pretrained(
        cls,
        reference: str | os.PathLike[str],
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """A model folder, or a hub id `org/name` or `org/name@revision`.

        A hub id's small files are fetched here, its weights when they are first needed. Raises
        ReferenceNotFound.
        """
        model = cls(reference, revision=revision, trust_remote_code=trust_remote_code)
        _ = model.folder  # a reference that leads nowhere is an error now, not later
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
        repository = os.fspath(reference).partition("@")[0]
        return resolve_reference(repository, self.folder.name)

    @cached_property
    def hf_config(self) -> HFConfig:
        """config.json as plain JSON; ConfigError if it cannot be read."""
        return self._given_config or HFConfig.from_file(self.folder)

    @cached_property
    def tensors(self) -> TensorIndex:
        """The tensors in the files as they are; CheckpointError if they are not in order."""
        return TensorIndex.from_folder(self.weights_folder)

    @cached_property
    def weights(self) -> Weights:
        """The weights of the model: of an FP8 release those that it stands for, in BF16.

        From headers only. Raises CheckpointError if the files are not in order, UnsupportedModel
        for another quantization.
        """
        return weights_of(self.tensors, self.hf_config)

    @cached_property
    def quantization(self) -> BlockFP8 | None:
        """How the files are quantized, by the config; None if they are not."""
        return quantization_of(self.hf_config)

    @cached_property
    def unquantized_config(self) -> HFConfig:
        """config.json as it describes `weights`: without a word of quantization."""
        data = self.hf_config.data
        data.pop(CONFIG_KEY, None)
        return HFConfig.from_dict(data, self.hf_config.origin)

    @cached_property
    def main_dtype(self) -> str:
        """The safetensors dtype of most of the weights; without files, that of the config.

        Raises ConfigError for a config alone that names none.
        """
        if self.has_weights:
            sizes: Counter[str] = Counter()
            for tensor in self.weights.values():
                sizes[tensor.dtype] += tensor.nbytes
            return sizes.most_common(1)[0][0]
        return self.hf_config.dtype

    @cached_property
    def side_files(self) -> tuple[Path, ...]:
        """All files but the weights, relative to `folder`; none for a config alone."""
        return side_files(self.folder) if self.has_files else ()

    @cached_property
    def side_file_names(self) -> frozenset[str]:
        """The names of `side_files`, as POSIX paths."""
        return frozenset(file.as_posix() for file in self.side_files)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The config as a transformers object."""
        from transformers import AutoConfig

        if self.has_files:
            return self._load("config", AutoConfig, self.folder, **self._remote_code)
        data = self.hf_config.data
        return AutoConfig.for_model(data.pop("model_type"), **data)

    @cached_property
    def processor(self) -> ProcessorMixin:
        """The transformers processor of text, images and videos."""
        from transformers import AutoProcessor

        return self._load("processor", AutoProcessor, self.folder, **self._remote_code)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The transformers tokenizer."""
        from transformers import AutoTokenizer

        return self._load("tokenizer", AutoTokenizer, self.folder, **self._remote_code)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The transformers generation settings of this model."""
        from transformers import GenerationConfig

        return self._load("generation config", GenerationConfig, self.folder)

    def load_model(self, **kwargs: Any) -> PreTrainedModel:
        """The model of transformers itself with these weights, in eager attention.

        It is the reference to compare with. `kwargs` go to its `from_pretrained`, for instance
        `dtype=torch.float32`. The weights of an FP8 release are dequantized here: transformers
        itself would not round them to bfloat16, and takes blocks for equal in size.
        """
        import transformers

        options: dict[str, Any] = {"attn_implementation": "eager", "output_loading_info": True}
        options |= self._remote_code | kwargs
        quantized = isinstance(self.weights, DequantizedTensors)
        if not quantized and self.tensors.files_as_released:
            auto_class = transformers.AutoModelForImageTextToText
            loaded = self._load("model", auto_class, self.weights_folder, **options)
        else:
            config = transformers.AutoConfig.from_pretrained(self.folder, **self._remote_code)
            if quantized:
                del config.quantization_config
            options |= {
                "config": config,
                "state_dict": {name: self.weights.read(name) for name in self.weights},
            }
            # Without a folder, only a class of its own loads.
            own_class = getattr(transformers, self.hf_config.architecture)
            loaded = self._load("model", own_class, **options)
        model, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise InputError(
                f"{self.name_or_path}: transformers finds no {missing[0]} "
                f"({len(missing)} tensors are missing for it) and would make up random ones"
            )
        return model

    @property
    def _remote_code(self) -> dict[str, bool]:
        return {"trust_remote_code": self.trust_remote_code}

    def _load(self, what: str, auto_class: Any, folder: Path | None = None, **options: Any) -> Any:
        try:
            return auto_class.from_pretrained(folder, **options)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.name_or_path}: transformers cannot load the {what}: {error}"
            ) from error

    def _required_reference(self) -> str | os.PathLike[str]:
        if self._reference is None:
            raise InputError(
                f"{self.name_or_path}: only a config is at hand, no weights and no other files; "
                "use PreTrainedVLM.from_pretrained with a folder or a hub id"
            )
        return self._reference
