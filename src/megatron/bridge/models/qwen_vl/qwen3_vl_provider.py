"""The providers of Qwen3-VL models, dense and with a mixture of experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, cast

from megatron.core.transformer.transformer_block import get_num_layers_to_build

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.qwen_vl.family_fields import (
    ATTENTION,
    COMMON,
    EXPERTS,
    NORMALIZED,
    ExpertFields,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import Qwen3VLModel
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_config import VisionConfig
from megatron.bridge.models.qwen_vl.qwen_provider import QwenModelProvider


@dataclass
class Qwen3VLModelProvider(QwenModelProvider):
    """Config and builder of dense Qwen3-VL models, and the base of the other families with vision.

    The fields of megatron-core's TransformerConfig describe the language model.

    Attributes:
        vision: shape of the vision encoder.
        image_token_id: placeholder of one image feature in the prompt.
        video_token_id: placeholder of one video feature.
        vision_start_token_id: precedes the placeholders of an image or a frame.
        vision_end_token_id: follows them.
        freeze_language_model: build the language model without gradients.
        freeze_vision_model: build the encoder without gradients, but for its mergers.
        freeze_vision_projection: build the mergers without gradients.
    """

    model_class = Qwen3VLModel

    # Required like the sizes of the language model: `finalize()` refuses its absence.
    vision: VisionConfig = None  # type: ignore[assignment]
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653

    freeze_language_model: bool = False
    freeze_vision_model: bool = False
    freeze_vision_projection: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Self:
        """A provider from plain values, `vision` being a mapping of the fields of VisionConfig."""
        vision = dict(settings["vision"])
        vision["deepstack_visual_indexes"] = tuple(vision["deepstack_visual_indexes"])
        return super().from_settings({**settings, "vision": VisionConfig(**vision)})

    def problems(self) -> list[str]:
        """What cannot be built, one sentence each naming field, value and expectation."""
        problems = super().problems()
        problems += [
            f"{name} is {getattr(self, name)}, outside of vocab_size = {self.vocab_size}"
            for name in ("image_token_id", "video_token_id")
            if not 0 <= getattr(self, name) < self.vocab_size
        ]
        vision: VisionConfig | None = self.vision
        if vision is None:
            return [*problems, "vision is None: it must be set"]
        return problems + vision.problems(
            hidden_size=self.hidden_size,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
        )

    @property
    def spatial_merge_size(self) -> int:
        """Patches along each side of a picture that make one feature."""
        return self.vision.spatial_merge_size

    @property
    def takes_deepstack(self) -> bool:
        """Whether the first layers of the decoder add features of pictures."""
        return bool(self.vision.deepstack_visual_indexes)

    @property
    def placeholders(self) -> tuple[int, ...]:
        """Tokens that stand for features of pictures, which no token predicts."""
        return (self.image_token_id, self.video_token_id)

    def finalize(self) -> None:
        """Check the fields as every provider does, and that the first stage can take deepstack.

        Raises:
            ConfigError: a value cannot be built, or a layer that takes features of deepstack is on
                a later stage.
        """
        super().finalize()
        vp_stage = None if self.virtual_pipeline_model_parallel_size is None else 0
        try:
            first_stage = get_num_layers_to_build(self, vp_stage, pp_rank=0)
        except AssertionError as error:
            raise ConfigError(f"{type(self).__name__}: megatron-core refuses: {error}") from error
        # Without stages the features that no layer is there for are left over.
        taps = min(len(self.vision.deepstack_visual_indexes), self.num_layers)
        if first_stage < taps:
            raise ConfigError(
                f"the first pipeline stage gets {first_stage} decoder layers, and the first {taps} "
                f"need the deepstack features of the vision encoder, which is there. Lower "
                f"pipeline_model_parallel_size or virtual_pipeline_model_parallel_size."
            )

    def provide(
        self,
        pre_process: bool | None = None,
        post_process: bool | None = None,
        vp_stage: int | None = None,
    ) -> Qwen3VLModel:
        """Build this rank's model, and freeze what is to be; see ModelProvider.provide."""
        model = cast("Qwen3VLModel", super().provide(pre_process, post_process, vp_stage))
        model.freeze(
            freeze_language_model=self.freeze_language_model,
            freeze_vision_model=self.freeze_vision_model,
            freeze_vision_projection=self.freeze_vision_projection,
        )
        return model


@dataclass
class Qwen3VLMoEModelProvider(ExpertFields, Qwen3VLModelProvider):
    """Config and builder of Qwen3-VL models with a mixture of experts."""

    fixed = COMMON | ATTENTION | EXPERTS | NORMALIZED
