"""What the bridges of all Qwen vision-language families share: a vision tower beside the text."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from megatron.bridge.errors import UnsupportedModel
from megatron.bridge.models.conversion.extras import Extras
from megatron.bridge.models.conversion.model_bridge import (
    DEFAULTS,
    REGISTERED_BRIDGES,
    PlanOptions,
    Tensors,
)
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.conversion.part import ModelPart
from megatron.bridge.models.conversion.plan_builder import expected_tensors
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.disk_layout import DiskLayout
from megatron.bridge.models.qwen_vl.language_part import LANGUAGE, language_part
from megatron.bridge.models.qwen_vl.names import VISION_LANGUAGE_ROOTS
from megatron.bridge.models.qwen_vl.parts import (
    BESIDE_VISION,
    HF_VISION,
    VISION,
    VISION_LAYERS,
    VISION_PART,
)
from megatron.bridge.models.qwen_vl.provider_settings import vision_settings
from megatron.bridge.models.qwen_vl.qwen_bridge import QwenBridge
from megatron.bridge.models.qwen_vl.qwen_description import DescribedVision
from megatron.bridge.models.qwen_vl.qwen_text_bridges import QwenTextBridge
from megatron.bridge.models.qwen_vl.vision_rows import deepstack_rows, vision_rows
from megatron.bridge.models.qwen_vl.vision_structure import with_vision
from megatron.bridge.tensors.boxes import Shape

MODEL = "megatron.bridge.models.qwen_vl.modelling_qwen3_vl.model.Qwen3VLModel"


class QwenVLBridge(QwenBridge, DescribedVision):
    """A language model of any family with the vision tower, which is the same in all of them."""

    prefixes = BESIDE_VISION
    roots = VISION_LANGUAGE_ROOTS
    layer_paths = (BESIDE_VISION.layers, VISION_LAYERS)
    alone: ClassVar[type[QwenTextBridge]]
    """The bridge of the same language model without a tower."""

    def rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """Language model, vision tower and deepstack mergers."""
        return [*self.language_rows(disk), *vision_rows(), *deepstack_rows()]

    def check(self, config: HFConfig) -> None:
        """Refuse what QwenBridge refuses, and a model of text alone.

        Raises:
            UnsupportedModel: the config describes a language model without a vision tower.
            ConfigError: it is of another kind of model, or a value cannot be converted.
        """
        flat = not config.has("text_config") and config.has("num_hidden_layers")
        if config.model_type.endswith("_text") or flat:
            text_class = config.architecture.replace("ForConditionalGeneration", "ForCausalLM")
            advice = "put these weights in place of the language model of its base model, whose "
            advice += "vision tower and config.json complete them, and convert that"
            if text_class in REGISTERED_BRIDGES:
                advice = f"set architectures to {text_class} to convert it as it is, or {advice}"
            raise UnsupportedModel(
                f"{config.origin}: it describes the text half of a vision-language model, which "
                f"has no vision tower, but architectures names {config.architecture}; {advice}"
            )
        super().check(config)

    @property
    def separable(self) -> Mapping[str, str]:
        """The language model is a model of its own, too."""
        return {LANGUAGE: str(self.alone.model_type)}

    def part(self, name: str, config: HFConfig) -> ModelPart:
        """The language model as a model of text alone."""
        if name != LANGUAGE:
            return super().part(name, config)
        return language_part(self, self.alone, config)

    @property
    def removable(self) -> Mapping[str, str]:
        """The vision tower, and what the language model may be built without."""
        return {**super().removable, VISION_PART: VISION}

    def structure(
        self, config: HFConfig, tensors: Tensors | None = None, options: PlanOptions = DEFAULTS
    ) -> ModelStructure:
        """Counts and dimensions of one model. Raises ConfigError."""
        return with_vision(super().structure(config, tensors, options), config, options.keys)

    def extras(self, config: HFConfig, tensors: Tensors, options: PlanOptions) -> Extras:
        """The extras of the language model, and a vision tower that the model is built without."""
        extras = super().extras(config, tensors, options)
        if VISION_PART not in options.without:
            return extras
        spelling = self._spelling(config, tensors, options)
        root = spelling.of(HF_VISION)
        reason = "the Megatron model is built without its vision tower"
        carried = {name: reason for name in tensors if spelling.regular(name).startswith(root)}
        needed: dict[str, tuple[Shape, str]] = {
            name: (spec.shape, "the vision tower")
            for name, spec in expected_tensors(
                spelling.registry([*vision_rows(), *deepstack_rows()]),
                self.structure(config, tensors, options),
                lambda _: "",
            ).items()
        }
        return replace(
            extras,
            carried={**carried, **extras.carried},
            absent=extras.absent | carried.keys(),
            needed=needed,
        )

    def numbered(self, config: HFConfig) -> dict[str, tuple[HFConfig, str]]:
        """The layers of the language model and the blocks of the vision tower."""
        return super().numbered(config) | {f"{HF_VISION}blocks.": (config.vision, "depth")}

    def provider_settings(
        self, config: HFConfig, dtype: str, tensors: Tensors | None = None
    ) -> dict[str, Any]:
        """Fields of the family's provider. Raises ConfigError."""
        return super().provider_settings(config, dtype, tensors) | vision_settings(config)
