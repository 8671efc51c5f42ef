"""The providers of Qwen3-VL models, dense and with a mixture of experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from megatron.bridge.models.pipeline_stages import virtual_stages
from megatron.bridge.models.qwen_vl.family_fields import (
    ATTENTION,
    COMMON,
    EXPERTS,
    NORMALIZED,
    ExpertFields,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl import Qwen3VLModel
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.stage_boundary import stage_boundaries
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
        variable_seq_lengths: whether pipeline stages tell one another the shape of what they send;
            None where features of pictures travel with the hidden states: to layers that take those
            of deepstack, or that predict the token after the next, on later stages.
        moe_token_dispatcher_type: also in a model without experts megatron-core has "allgather"
            without variable_seq_lengths only.
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

    variable_seq_lengths: bool | None = None
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] = "alltoall"

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
        problems += vision.problems(
            hidden_size=self.hidden_size,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
        )
        # Without stages there is nothing to send, and what is wrong with them is told elsewhere.
        return problems or self._sending_problems()

    def fill_in(self) -> None:
        """Set fields that are None and follow from others."""
        super().fill_in()
        if self.variable_seq_lengths is None:
            self.variable_seq_lengths = self._sends_features()

    def _sends_features(self) -> bool:
        """Whether features of pictures go from one pipeline stage to another."""
        try:
            return any(stage_boundaries(self))
        except AssertionError:  # which `finalize` will meet again
            return False

    def _sending_problems(self) -> list[str]:
        """What keeps features of pictures from going to a later pipeline stage."""
        if not self._sends_features():
            return []
        wanted: dict[str, tuple[Any, ...]] = {
            "variable_seq_lengths": (True, None),
            "moe_token_dispatcher_type": ("alltoall", "flex"),
        }
        if virtual_stages(self) is not None:
            # The shapes of both directions are exchanged before anything else is: without overlap
            # a stage waits for those of one neighbour while the other waits for its tensors.
            wanted |= {"overlap_p2p_comm": (True,), "batch_p2p_comm": (False,)}
        return [
            f"{name} is {found!r}, and decoder layers or predictors on a later pipeline stage need "
            f"features of pictures: set {values[0]!r}"
            for name, values in wanted.items()
            if (found := getattr(self, name)) not in values
        ]

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
        """Tokens that stand for features of images and videos, which no token predicts."""
        return (self.image_token_id, self.video_token_id)

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
