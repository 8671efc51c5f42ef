"""A bridge per model family: its rows, its structure, its provider.

A subclass is a declaration. `register_bridge` files it under the Hugging Face architecture that
config.json names, so that importing the module of a family is all it takes to support it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.plan import ConversionPlan, TensorLike, TensorSpec
from megatron.bridge.models.conversion.plan_builder import build_plan, expected_tensors
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.quoting import quoted

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
    from megatron.bridge.models.model_provider import ModelProvider

REGISTERED_BRIDGES: dict[str, type["MegatronModelBridge"]] = {}
"""Bridges by architecture, as far as their modules were imported; see `models.catalog`."""


type Tensors = Mapping[str, TensorLike]


class HasConfig(Protocol):
    """Any object with a config, of transformers or as plain values."""

    config: Any


@dataclass(frozen=True)
class PlanOptions:
    """What a plan depends on beside the files.

    padded_vocab_size: rows of the Megatron embedding; None pads as files are padded by default.
    experts: the disk layout of routed experts, as the user says it, or for files to be.
    with_mtp: whether the Megatron model has the MTP layer that the files may hold.
    """

    padded_vocab_size: int | None = None
    experts: str | None = None
    with_mtp: bool = True


DEFAULTS = PlanOptions()


class MegatronModelBridge(ABC):
    """What one family of models needs to be converted."""

    source: ClassVar[str]
    """The Hugging Face architecture, as config.json names it."""
    target: ClassVar[str]
    """Dotted path of the Megatron model class; a path, since its module imports megatron-core."""
    provider: ClassVar[str]
    """Dotted path of the provider that builds it."""
    model_type: ClassVar[str | None] = None
    """What config.json states beside the architecture; None if that is not looked at."""
    embedding_key: ClassVar[str] = "language_model.embedding.word_embeddings.weight"
    """Checkpoint key whose rows are the vocabulary, padding included."""

    @staticmethod
    def register_bridge[Bridge: MegatronModelBridge](
        *,
        source: str | type,
        target: str | type,
        provider: str | type | None = None,
        model_type: str | None = None,
        override: bool = True,
    ) -> Callable[[type[Bridge]], type[Bridge]]:
        """Class decorator: this bridge converts architecture `source` to model class `target`.

        Each may be a class, or its name (`source`) and dotted path (`target`, `provider`). provider
        and model_type: in the place of those that the class states. override: take the place of
        a bridge that the architecture has already.
        """

        def register(bridge: type[Bridge]) -> type[Bridge]:
            bridge.source = source if isinstance(source, str) else source.__name__
            bridge.target = _dotted(target)
            if provider is not None:
                bridge.provider = _dotted(provider)
            if model_type is not None:
                bridge.model_type = model_type
            if override or bridge.source not in REGISTERED_BRIDGES:
                REGISTERED_BRIDGES[bridge.source] = bridge
            return bridge

        return register

    def check(self, config: HFConfig) -> None:
        """Raise ConfigError for a config of another kind of model, or of weights in no dtype.

        What else is wrong with such a config would be beside the point.
        """
        if self.model_type not in (None, config.model_type):
            raise ConfigError(
                f"{config.origin}: model_type of a {self.source} must be {self.model_type!r}, "
                f"found {quoted(config.model_type)}; one of the two belongs to another model"
            )
        config.stated_dtypes()

    @abstractmethod
    def mapping_registry(self) -> MegatronMappingRegistry:
        """The rows of the family, for files laid out as they are released."""

    def registry_for(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> MegatronMappingRegistry:
        """The rows for these files, or for those that a config alone would have."""
        return self.mapping_registry()

    @abstractmethod
    def structure(
        self, config: HFConfig, tensors: Tensors | None = None, options: PlanOptions = DEFAULTS
    ) -> ModelStructure:
        """Counts and dimensions of one model; what only files can tell is told by `tensors`.

        Raises ConfigError.
        """

    def carried(self, tensors: Tensors, options: PlanOptions) -> dict[str, str]:
        """Tensors that the Megatron model has no place for, and why."""
        return {}

    def assumed_dtype(self, config: HFConfig, name: str, dtype: str) -> str:
        """The dtype of a tensor in files that are not at hand, most of which are in `dtype`."""
        return dtype

    def options_of_checkpoint(self, tensors: Tensors) -> PlanOptions:
        """What a Megatron checkpoint says of the model that it was written from, by its keys.

        The vocabulary was padded for the parallel layout of that model.
        """
        embedding = tensors.get(self.embedding_key)
        if embedding is None or not embedding.shape:
            return DEFAULTS  # the plan will say what is missing
        return PlanOptions(padded_vocab_size=embedding.shape[0])

    @abstractmethod
    def provider_settings(
        self, config: HFConfig, dtype: str, tensors: Tensors | None = None
    ) -> dict[str, Any]:
        """Fields of the family's provider as plain JSON values, for a model in `dtype` ("BF16").

        tensors: the files, whose headers say which parameters have a dtype of their own.
        Raises ConfigError for a value that is missing or that the Megatron model cannot honour.
        """

    @abstractmethod
    def provider_bridge(self, hf_pretrained: "PreTrainedVLM | HasConfig") -> "ModelProvider":
        """The family's model provider, configured like a Hugging Face model."""

    def plan(
        self, config: HFConfig, tensors: Tensors, options: PlanOptions = DEFAULTS
    ) -> ConversionPlan:
        """The proven plan for files with this config. Raises PlanError or ConfigError."""
        self.check(config)
        return build_plan(
            self.registry_for(config, tensors, options),
            self.structure(config, tensors, options),
            tensors,
            self.carried(tensors, options),
        )

    def expected_tensors(
        self, config: HFConfig, dtype: str, options: PlanOptions = DEFAULTS
    ) -> dict[str, TensorSpec]:
        """The tensors that files of this config would hold, most of them in `dtype` ("BF16")."""
        self.check(config)
        return expected_tensors(
            self.registry_for(config, None, options),
            self.structure(config, None, options),
            lambda name: self.assumed_dtype(config, name, dtype),
        )

    def plan_from_config(
        self, config: HFConfig, dtype: str, options: PlanOptions = DEFAULTS
    ) -> ConversionPlan:
        """The plan that files of this config would have; see `expected_tensors`."""
        return self.plan(config, self.expected_tensors(config, dtype, options), options)


def _dotted(path_or_class: str | type) -> str:
    if isinstance(path_or_class, str):
        return path_or_class
    return f"{path_or_class.__module__}.{path_or_class.__qualname__}"
