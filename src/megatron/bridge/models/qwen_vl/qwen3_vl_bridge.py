"""Bridge for Qwen3-VL (dense)."""

from typing import TYPE_CHECKING, Any

from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl import rows
from megatron.bridge.models.qwen_vl.settings import qwen_vl_settings
from megatron.bridge.models.qwen_vl.structure import qwen_vl_structure

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
    from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider


@MegatronModelBridge.register_bridge(
    source="Qwen3VLForConditionalGeneration",
    target="megatron.bridge.models.qwen_vl.modelling_qwen3_vl.model.Qwen3VLModel",
)
class Qwen3VLBridge(MegatronModelBridge):
    """Qwen3VLForConditionalGeneration to and from Qwen3VLModel."""

    provider = "megatron.bridge.models.qwen_vl.qwen3_vl_provider.Qwen3VLModelProvider"

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Language model, vision tower and deepstack mergers."""
        layer, hf_layer = f"{rows.DECODER_LAYERS}*.", f"{rows.HF_LANGUAGE}layers.*."
        return MegatronMappingRegistry(
            *rows.embedding_rows(),
            *rows.attention_rows(layer, hf_layer),
            *rows.dense_mlp_rows(layer, hf_layer),
            *rows.vision_rows(),
            *rows.deepstack_rows(),
        )

    def structure(self, config: HFConfig, padded_vocab_size: int | None = None) -> ModelStructure:
        """Counts and dimensions of one model. Raises ConfigError."""
        return qwen_vl_structure(config, padded_vocab_size)

    def provider_settings(self, config: HFConfig, dtype: str) -> dict[str, Any]:
        """Fields of Qwen3VLModelProvider. Raises ConfigError."""
        return qwen_vl_settings(config, dtype)

    def provider_bridge(self, hf_pretrained: "PreTrainedVLM") -> "Qwen3VLModelProvider":
        """Create a Qwen3VLModelProvider configured like a Hugging Face model.

        hf_pretrained: a model, of which only the config and the headers of the files are read.
        Raises ConfigError for a value that is missing or that Qwen3VLModel cannot honour.
        """
        from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider

        settings = self.provider_settings(hf_pretrained.hf_config, hf_pretrained.main_dtype)
        return Qwen3VLModelProvider.from_settings(settings)
