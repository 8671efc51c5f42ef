"""Vision encoder and language model in one megatron-core module, for all Qwen families."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron.bridge.errors import InputError
from megatron.bridge.models.model_copy import deep_copy
from megatron.bridge.models.pipeline_stages import stage_index
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.inputs import (
    VisualInputs,
    deepstack_context,
    place,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.rope_index import (
    get_packed_rope_index,
    get_rope_index,
    token_types,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.stage_boundary import stage_boundaries
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_checks import refuse_others
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_inputs import (
    TextInputs,
    batch_of,
    gathers_logits,
)
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.text_model import Qwen3VLTextModel
from megatron.bridge.models.qwen_vl.modelling_qwen3_vl.vision_model import Qwen3VLVisionModel
from megatron.bridge.runtime.cpu import megatron_on_cpu

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider


class _Inputs(NamedTuple):
    """A batch that nothing is wrong with, and where the features of its pictures belong."""

    tokens: TextInputs
    visual: VisualInputs
    positions: tuple[Tensor, Tensor]
    position_ids: Tensor


class Qwen3VLModel(MegatronModule):
    """One pipeline stage of Qwen3-VL or Qwen3.5.

    `vision_model` exists on the first stage only; `language_model` is this stage's part of the
    decoder, with the embedding on the first and the output layer on the last stage. Both are made
    with the arguments of this class, which are those of Qwen3VLTextModel.
    """

    def __init__(
        self,
        config: "Qwen3VLModelProvider",
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        self.pg_collection = groups
        self.pre_process = pre_process
        self.post_process = post_process
        self.vp_stage = vp_stage
        # Pipeline schedules and gradient finalization of megatron-core read these from the model.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = config.share_embeddings_and_output_weights
        index = stage_index(config, vp_stage, groups.pp.rank())
        self.receives, self.sends = stage_boundaries(config)[index : index + 2]

        if pre_process:
            self.vision_model = Qwen3VLVisionModel(
                config.vision, config.vision.to_transformer_config(config), groups
            )
        self.language_model = Qwen3VLTextModel(
            config,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )

    @property
    def image_token_id(self) -> int:
        """Placeholder of one image feature in the prompt."""
        return self.config.image_token_id

    @property
    def video_token_id(self) -> int:
        """Placeholder of one video feature."""
        return self.config.video_token_id

    @property
    def vision_start_token_id(self) -> int:
        """Precedes the placeholders of an image or a frame."""
        return self.config.vision_start_token_id

    def __deepcopy__(self, memo: dict[int, Any]) -> "Qwen3VLModel":
        """A model of its own on the same process groups; see `deep_copy`."""
        return deep_copy(self, memo)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Take what the previous pipeline stage returned."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """The weight that embedding and output layer share, for gradient finalization."""
        return self.language_model.shared_embedding_or_output_weight()

    def freeze(
        self,
        *,
        freeze_language_model: bool = False,
        freeze_vision_model: bool = False,
        freeze_vision_projection: bool = False,
    ) -> None:
        """Turn gradients off for parts of the model.

        Args:
            freeze_language_model: embedding, decoder and output layer.
            freeze_vision_model: the encoder without its mergers.
            freeze_vision_projection: the merger and the deepstack mergers.
        """
        for name, parameter in self.named_parameters():
            part, _, rest = name.partition(".")
            if part == "language_model":
                frozen = freeze_language_model
            elif rest.startswith(("merger.", "decoder.deepstack_merger_list.")):
                frozen = freeze_vision_projection
            else:
                frozen = freeze_vision_model
            if frozen:
                parameter.requires_grad_(False)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        *,
        runtime_gather_output: bool | None = None,
        trim_vocab_padding: bool = False,
        **others: None,
    ) -> Tensor:
        """Run this pipeline stage on what the Hugging Face processor returns.

        Every stage takes the same batch, and refuses the same; see `check_inputs`.

        Args:
            input_ids: int64 [b, s]; packed sequences are [1, t], or rows that are packed here.
                With context parallelism all ranks take all tokens and all pictures, and each
                returns its part, cut as by `SequenceParts`.
            position_ids: int64 [3, b, s], or [b, s] for a batch of text; None computes them from
                tokens and grids.
            attention_mask: bool or int [b, s], nonzero for real tokens, padding on either side; or
                bool [b, 1, 1, s], True for padding; None if all are real.
            labels: int64, one per token of what is returned, already shifted: the token that
                follows. -100 has no loss. With context parallelism they are cut already, as by
                megatron-core's get_batch_on_this_cp_rank.
            loss_mask: [b, s], for multi-token prediction, whose loss reaches the gradients only;
                None for the tokens with a label. The returned loss is not multiplied by it, as
                usual in Megatron.
            packed_seq_params: "thd" packing, sequences do not see each other. With a mask, or with
                several rows, each row is packed as the sequence of its number, its real tokens
                first; what is returned is [1, t].
            pixel_values: [image patches, channels * frames * height * width of a patch].
            image_grid_thw: int64 [images, 3], frames, rows and columns in patches.
            pixel_values_videos: as pixel_values.
            video_grid_thw: as image_grid_thw.
            mm_token_type_ids: int [b, s], 0 text, 1 image, 2 video; None derives it from
                `input_ids`.
            runtime_gather_output: whether logits are of the whole vocabulary; None for that if the
                provider's `parallel_output` is False.
            trim_vocab_padding: return logits of the real vocabulary only, all of it.
            **others: further arguments of megatron-core's GPTModel, all of them None.

        Returns:
            Last stage: logits [b, s, vocabulary], by default of the part of the padded vocabulary
            that this tensor-parallel rank has; those of padding have no share in a softmax. With
            labels the loss per token, fp32 [b, s].
            Other stages: hidden states [s, b, h], and behind them the features of pictures that
            later stages need (`StageBoundary`).

        Raises:
            InputError: inputs that contradict each other, with both numbers.
        """
        config = self.config
        refuse_others(others)
        with megatron_on_cpu():
            tokens, visual, positions, position_ids = self._inputs(
                input_ids,
                position_ids,
                attention_mask,
                labels,
                loss_mask,
                packed_seq_params,
                pixel_values,
                image_grid_thw,
                pixel_values_videos,
                video_grid_thw,
                mm_token_type_ids,
            )
            decoder_input: Tensor | None
            if self.pre_process:
                decoder_input, context = self._embed(tokens, visual, positions)
            else:
                decoder_input, context = self._receive(tokens, positions)
            output = self.language_model(
                input_ids=tokens.of_context(tokens.input_ids, 1),
                position_ids=tokens.angles_of(position_ids),
                **tokens.masks(config),
                decoder_input=decoder_input,
                labels=labels,
                loss_mask=loss_mask,
                packed_seq_params=packed_seq_params,
                extra_block_kwargs=None if context is None else {"context": context},
                runtime_gather_output=gathers_logits(
                    config, labels, runtime_gather_output, trim_vocab_padding
                ),
            )
            if self.sends and len(positions[0]):
                output = self.sends.join(output, decoder_input, context)
        if trim_vocab_padding and self.post_process and labels is None:
            return output[..., : config.vocab_size]
        return output

    def check_inputs(self, **batch: Any) -> None:
        """Refuse what `forward` would refuse, the same on every pipeline stage.

        In a schedule, a stage waits for the one before it and calls `forward` then. A loop that
        checks its batches before the schedule lets no stage wait for one that has refused.

        Args:
            batch: arguments of `forward`, by name.

        Raises:
            InputError: as `forward`.
        """
        self._inputs(**batch_of(batch))

    def _inputs(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
    ) -> _Inputs:
        """What a stage needs of a batch; all that can be wrong with one is refused here."""
        visual = VisualInputs.of(pixel_values, image_grid_thw, pixel_values_videos, video_grid_thw)
        config, merge = self.config, self.config.vision.spatial_merge_size
        visual.check(config.vision.patch_values, merge)
        tokens = TextInputs.of(
            config,
            self.pg_collection,
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            packed_seq_params=packed_seq_params,
            token_types=mm_token_type_ids,
            is_part=False,
            training=self.training,
        )
        tokens.check_labels(config, labels=labels, loss_mask=loss_mask)
        positions = visual.token_positions(
            tokens.input_ids, config.image_token_id, config.video_token_id, merge
        )
        return _Inputs(tokens, visual, positions, self._position_ids(tokens, visual))

    def _position_ids(self, tokens: TextInputs, visual: VisualInputs) -> Tensor:
        """[3, b, s] on the device of the tokens."""
        config, types = self.config, tokens.token_types
        if types is None:
            types = token_types(tokens.input_ids, config.image_token_id, config.video_token_id)
        if (given := tokens.position_ids) is not None:
            if given.ndim == 2 and bool(types.any()):
                raise InputError(
                    f"position_ids has shape {list(given.shape)} in a batch with pictures, whose "
                    f"tokens have three positions each: pass {[3, *given.shape]}, or None, which "
                    f"computes them"
                )
            return given.expand(3, *types.shape)
        merge = config.vision.spatial_merge_size
        grids = (visual.image_grid_thw, visual.video_grid_thw)
        if (boundaries := tokens.boundaries) is not None:
            return get_packed_rope_index(types, *grids, boundaries, merge)
        return get_rope_index(types, *grids, tokens.attention_mask, merge)

    def _embed(
        self, tokens: TextInputs, visual: VisualInputs, positions: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings [s, b, h] with the visual features in place, and the deepstack context.

        Both are this rank's part of the sequence.
        """
        embeddings, context = self.language_model.embedding(tokens.input_ids, None), None
        if (joined := visual.joined()) is not None:
            features, deepstack = self.vision_model(*joined)
            context = deepstack_context(deepstack, embeddings, positions)
            embeddings = place(features, embeddings, positions)
        elif self.training and torch.is_grad_enabled() and self.vision_model.is_trained:
            embeddings = embeddings + self.vision_model.nothing(embeddings.device)
        if context is not None:
            context = tokens.of_rank(context)
        return tokens.of_rank(embeddings), context

    def _receive(
        self, tokens: TextInputs, positions: tuple[Tensor, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The same on a later stage, whose hidden states are set; None for what it has no use for.

        A stage that predicts embeds the tokens itself, and takes the features alone: then its copy
        of the embedding has a gradient whether the batch has pictures or not.
        """
        model = self.language_model
        received, context = None, None
        if self.receives and len(positions[0]):
            hidden_states, received, context = self.receives.split(model.decoder.input_tensor)
            model.set_input_tensor(hidden_states)
        if not model.mtp_process:
            return received, context
        embeddings = model.embedding(tokens.input_ids, None)
        is_visual = torch.zeros_like(embeddings[..., :1], dtype=torch.bool)
        is_visual[positions] = True
        embeddings = tokens.of_rank(embeddings)
        if received is not None:
            embeddings = torch.where(tokens.of_rank(is_visual), received, embeddings)
        return embeddings, context
