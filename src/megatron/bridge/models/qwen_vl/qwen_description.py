"""What the Qwen families say of their models, for people and for other modules."""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from megatron.bridge.errors import BridgeError, ConfigError
from megatron.bridge.models.conversion.description import (
    Description,
    Fact,
    PictureCost,
    sizes_fact,
)
from megatron.bridge.models.conversion.model_bridge import (
    MegatronModelBridge,
    PlanOptions,
    Tensors,
)
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.fp8 import dequantized_view
from megatron.bridge.models.hf_pretrained.quantization import quantization_of
from megatron.bridge.models.qwen_vl.config_keys import MTP_LAYERS
from megatron.bridge.models.qwen_vl.disk_layout import DiskLayout
from megatron.bridge.models.qwen_vl.names import has_mtp_tensors
from megatron.bridge.models.qwen_vl.parts import BESIDE_VISION, VISION, WITH_MTP, Prefixes
from megatron.bridge.models.qwen_vl.rope_config import Rope, read_rope
from megatron.bridge.text.quoting import quoted

if TYPE_CHECKING:
    import torch

    from megatron.bridge.models.model_provider import ModelProvider

_TEXT_SIZES = (
    *("num_hidden_layers", "hidden_size", "intermediate_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("shared_expert_intermediate_size", "mlp_only_layers"),
    *("linear_num_key_heads", "linear_num_value_heads"),
    *("linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim"),
    *(MTP_LAYERS, "vocab_size", "max_position_embeddings", "attention_bias"),
)
_VISION_SIZES = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"),
    *("num_position_embeddings", "patch_size", "temporal_patch_size", "spatial_merge_size"),
    "deepstack_visual_indexes",
)


def language_parts(prefixes: Prefixes) -> dict[str, str]:
    """What Megatron names outside of the decoder's layers begin with, and the word for each."""
    root = prefixes.megatron
    return {
        f"{root}embedding.": "embedding",
        f"{root}output_layer.": "output",
        f"{root}mtp.": "MTP",
    }


class DescribedQwen(MegatronModelBridge):
    """What other modules ask of a family, for its language model."""

    prefixes: ClassVar[Prefixes]
    """What the names of the language model begin with."""
    optional_parts: ClassVar[Mapping[str, str]] = {WITH_MTP: "the MTP layer"}

    @abstractmethod
    def disk_layout(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> DiskLayout:
        """How the experts lie in files, or would lie in those of a config alone."""

    def language(self, config: HFConfig) -> HFConfig:
        """The config of the language model, which is the whole one."""
        return config

    def describe(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> Description:
        """Sizes, the rotation, how experts lie, and the MTP layer."""
        text = self._language(config)
        return {
            "text": sizes_fact("text", text, _TEXT_SIZES),
            "rope": _rope_fact(config),
            "experts": _experts_fact(self._known_layout(config, tensors, options)),
            "mtp": _mtp_fact(text, tensors),
        }

    def settings_for_layout(
        self, settings: Mapping[str, Any], plan: ConversionPlan, without: Collection[str]
    ) -> Mapping[str, Any]:
        """The same fields, with `mtp_num_layers` where the plan has an MTP layer that is built."""
        has_mtp = any(key.startswith(self.prefixes.mtp) for key in plan.megatron)
        if WITH_MTP in without or not has_mtp:
            return settings
        return {**settings, "mtp_num_layers": 1}

    def logits(
        self, model: "torch.nn.Module", inputs: Mapping[str, "torch.Tensor"]
    ) -> "torch.Tensor":
        """The logits of a model that takes what the processor gives."""
        found: torch.Tensor = model(**inputs, trim_vocab_padding=True)
        return found

    def _language(self, config: HFConfig) -> HFConfig | None:
        try:
            return self.language(config)
        except ConfigError:
            return None

    def _known_layout(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> DiskLayout:
        try:
            quantization = quantization_of(config, tensors)
            if tensors is not None:
                tensors = dequantized_view(tensors, quantization, config.origin)
            return self.disk_layout(config, tensors, options)
        except BridgeError:
            return DiskLayout()


class DescribedVision(DescribedQwen):
    """What other modules ask of a family with a vision tower."""

    auto_model = "AutoModelForImageTextToText"
    embedding_key = BESIDE_VISION.embedding
    parts: ClassVar[Mapping[str, str]] = {VISION: "vision", **language_parts(BESIDE_VISION)}

    def language(self, config: HFConfig) -> HFConfig:
        """The section of the text model."""
        return config.text

    def describe(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> Description:
        """What is said of the language model, and the sizes of the vision tower."""
        facts = dict(super().describe(config, tensors, options))
        vision = sizes_fact("vision", _section(config, "vision_config"), _VISION_SIZES)
        return {"text": facts.pop("text"), "vision": vision, **facts}

    def small(self, provider: "ModelProvider") -> "ModelProvider":
        """A language model with one layer of each kind, and a vision tower with one block."""
        made: Any = super().small(provider)
        made.vision = replace(made.vision, depth=1, deepstack_visual_indexes=())
        return cast("ModelProvider", made)

    def pictures(
        self, config: HFConfig, inputs: Mapping[str, "torch.Tensor"]
    ) -> PictureCost | None:
        """What attention takes: each patch of a picture, or of one frame, sees all others."""
        patches = 0
        for name in ("image_grid_thw", "video_grid_thw"):
            for _, height, width in inputs[name].tolist() if name in inputs else ():
                patches = max(patches, height * width)
        side = config.vision.count("patch_size")
        merged = config.vision.count("spatial_merge_size")
        return PictureCost(patches, config.vision.count("num_heads"), side, side * merged)


def _section(config: HFConfig, name: str) -> HFConfig | None:
    try:
        return config.section(name)
    except ConfigError:
        return None


def _rope_fact(config: HFConfig) -> Fact:
    try:
        rope = read_rope(config)
    except ConfigError:
        return Fact(None, "rope", None, "model")
    section = list(rope.mrope_section)
    value = {
        "theta": rope.theta,
        **({"mrope_section": section, "interleaved": True} if section else {}),
        "partial_rotary_factor": rope.partial_rotary_factor,
        "rope_type": rope.rope_type,
    }
    return Fact(value, "rope", _rope_in_words(rope), "model")


def _rope_in_words(rope: Rope) -> str:
    scaling = "".join(f", {key} {quoted(value)}" for key, value in rope.scaling.items())
    section = list(rope.mrope_section)
    sections = f", mrope section {section} interleaved" if section else ""
    return (
        f"{rope.rope_type}{scaling}, theta {rope.theta:g}{sections}, "
        f"{rope.partial_rotary_factor:g} of each head"
    )


def _experts_fact(disk: DiskLayout) -> Fact:
    found = (("decoder", disk.decoder), ("MTP layer", disk.mtp))
    shown = ", ".join(f"{layout} ({where})" for where, layout in found if layout is not None)
    return Fact({"decoder": disk.decoder, "mtp": disk.mtp}, "experts", shown or None, "files")


def _mtp_fact(text: HFConfig | None, tensors: Tensors | None) -> Fact:
    """What config and files say of it: transformers drops the tensors and keeps the config."""
    in_config = text is not None and bool(text.data.get(MTP_LAYERS))
    present = None if tensors is None else has_mtp_tensors(tensors)
    shown = None
    if present:
        shown = "present"
    elif in_config:
        files = "not in the files" if present is False else "no files at hand"
        shown = f"named by the config, {files}"
    return Fact({"in_config": in_config, "present": present}, "MTP layer", shown, "files")
