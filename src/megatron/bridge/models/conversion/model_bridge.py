"""A bridge per model family: its rows, its structure, its provider.

A subclass is a declaration. `register_bridge` files it under the Hugging Face architecture that
config.json names, so that importing the module of a family is all it takes to support it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.plan import (
    ConversionPlan,
    TensorLike,
    build_plan,
    expected_tensors,
)
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
    from megatron.bridge.models.model_provider import ModelProvider

REGISTERED_BRIDGES: dict[str, type["MegatronModelBridge"]] = {}
"""Bridges by architecture, as far as their modules were imported; see `models.catalog`."""


class MegatronModelBridge(ABC):
    """What one family of models needs to be converted."""

    source: ClassVar[str]
    """The Hugging Face architecture, as config.json names it."""
    target: ClassVar[str]
    """Dotted path of the Megatron model class; a path, since its module imports megatron-core."""
    provider: ClassVar[str]
    """Dotted path of the provider that builds it."""
    embedding_key: ClassVar[str] = "language_model.embedding.word_embeddings.weight"
    """Checkpoint key whose rows are the vocabulary, padding included."""

    @staticmethod
    def register_bridge[Bridge: MegatronModelBridge](
        *, source: str | type, target: str | type
    ) -> Callable[[type[Bridge]], type[Bridge]]:
        """Class decorator: this bridge converts architecture `source` to model class `target`.

        Either may be a class, or its name (`source`) and dotted path (`target`). Raises ValueError
        if the architecture has a bridge already.
        """

        def register(bridge: type[Bridge]) -> type[Bridge]:
            bridge.source = source if isinstance(source, str) else source.__name__
            bridge.target = (
                target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
            )
            known = REGISTERED_BRIDGES.setdefault(bridge.source, bridge)
            if known is not bridge:
                raise ValueError(f"{bridge.source} is converted by {known.__name__} already")
            return bridge

        return register

    @abstractmethod
    def mapping_registry(self) -> MegatronMappingRegistry:
        """The rows of the family."""

    @abstractmethod
    def structure(self, config: HFConfig, padded_vocab_size: int | None = None) -> ModelStructure:
        """Counts and dimensions of one model. Raises ConfigError."""

    @abstractmethod
    def provider_settings(self, config: HFConfig, dtype: str) -> dict[str, Any]:
        """Fields of the family's provider as plain JSON values, for a model in `dtype` ("BF16").

        Raises ConfigError for a value that is missing or that the Megatron model cannot honour.
        """

    @abstractmethod
    def provider_bridge(self, hf_pretrained: "PreTrainedVLM") -> "ModelProvider":
        """The family's model provider, configured like a Hugging Face model."""

    def plan(
        self,
        config: HFConfig,
        tensors: Mapping[str, TensorLike],
        padded_vocab_size: int | None = None,
    ) -> ConversionPlan:
        """The proven plan for files with this config. Raises PlanError or ConfigError."""
        structure = self.structure(config, padded_vocab_size)
        return build_plan(self.mapping_registry(), structure, tensors)

    def plan_from_config(
        self, config: HFConfig, dtype: str, padded_vocab_size: int | None = None
    ) -> ConversionPlan:
        """The plan that files of this config in `dtype` ("BF16") would have."""
        structure = self.structure(config, padded_vocab_size)
        registry = self.mapping_registry()
        return build_plan(registry, structure, expected_tensors(registry, structure, dtype))
