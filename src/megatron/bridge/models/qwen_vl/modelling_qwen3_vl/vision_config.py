"""The shape of the vision encoder, and the megatron-core config it is built with."""

from dataclasses import dataclass

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron.bridge.models.backends.activations import activation, activation_problem

# What both configs share: how the run is parallelized, computed and initialized.
_FROM_LANGUAGE = (
    "tensor_model_parallel_size",
    "params_dtype",
    "fp16",
    "bf16",
    "perform_initialization",
    "use_cpu_initialization",
    "init_model_with_meta_device",
    "deterministic_mode",
    "transformer_impl",
    "attention_backend",
    "recompute_granularity",
    "recompute_method",
    "recompute_modules",
)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The vision encoder, with the names and the meaning of Hugging Face's `vision_config`.

    Attributes:
        depth: number of transformer blocks.
        hidden_size: width of the blocks.
        intermediate_size: width inside their MLPs.
        num_heads: attention heads; `hidden_size / num_heads` is a multiple of 4.
        patch_size: side of a patch in pixels.
        temporal_patch_size: frames per patch.
        in_channels: colour channels.
        spatial_merge_size: side, in patches, of the square that becomes one language token.
        out_hidden_size: width of the language model.
        num_position_embeddings: entries of the learned position table, a square number.
        deepstack_visual_indexes: blocks whose output is also given to the first decoder layers,
            ascending; empty for models without deepstack.
        hidden_act: activation of the MLPs in the blocks, any that transformers knows.
        rope_type: "axial", the only one.
        rope_theta: base of the rotary frequencies.
        initializer_range: standard deviation of weights that are not loaded.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    patch_size: int
    temporal_patch_size: int
    in_channels: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_visual_indexes: tuple[int, ...]
    hidden_act: str = "gelu_pytorch_tanh"
    rope_type: str = "axial"
    rope_theta: float = 10000.0
    initializer_range: float = 0.02

    @property
    def merged_hidden_size(self) -> int:
        """Width of the patches of one language token, side by side."""
        return self.hidden_size * self.spatial_merge_size**2

    @property
    def patch_values(self) -> int:
        """Numbers in one row of `pixel_values`."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def position_grid_size(self) -> int:
        """Side of the learned position table seen as a square."""
        return round(self.num_position_embeddings**0.5)

    def problems(self, *, hidden_size: int, tensor_model_parallel_size: int) -> list[str]:
        """What does not fit together, one sentence each.

        Args:
            hidden_size: width of the language model.
            tensor_model_parallel_size: number of ranks that heads and widths are split over.
        """
        problems = []
        if (reason := activation_problem(activation(self.hidden_act))) is not None:
            problems.append(f"vision.hidden_act is {self.hidden_act!r}: {reason}")
        if self.rope_type != "axial":
            problems.append(
                f"vision.rope_type is {self.rope_type!r}: transformers and this model have "
                f"'axial' only"
            )
        if self.hidden_size % (4 * self.num_heads):
            problems.append(
                f"vision.hidden_size is {self.hidden_size}, not a multiple of 4 * num_heads = "
                f"{4 * self.num_heads}: the rotary embedding needs quarters of a head"
            )
        for field in ("num_heads", "intermediate_size", "merged_hidden_size"):
            if getattr(self, field) % tensor_model_parallel_size:
                problems.append(
                    f"vision.{field} is {getattr(self, field)}, not a multiple of "
                    f"tensor_model_parallel_size = {tensor_model_parallel_size}"
                )
        if self.position_grid_size**2 != self.num_position_embeddings:
            problems.append(
                f"vision.num_position_embeddings is {self.num_position_embeddings}, not a square"
            )
        if self.out_hidden_size != hidden_size:
            problems.append(
                f"vision.out_hidden_size is {self.out_hidden_size}, and the language model's "
                f"hidden_size is {hidden_size}: they must be equal"
            )
        taps = self.deepstack_visual_indexes
        if list(taps) != sorted(set(taps)) or any(not 0 <= tap < self.depth for tap in taps):
            problems.append(
                f"vision.deepstack_visual_indexes is {list(taps)}: expected ascending block "
                f"indexes between 0 and {self.depth - 1}"
            )
        return problems

    def to_transformer_config(self, language: TransformerConfig) -> TransformerConfig:
        """The megatron-core config of the blocks.

        The encoder lives on the first pipeline stage as a whole, and its sequence, all patches of
        the batch, is not split over the tensor-parallel ranks.
        """
        return TransformerConfig(
            num_layers=self.depth,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.intermediate_size,
            num_attention_heads=self.num_heads,
            activation_func=activation(self.hidden_act),
            init_method_std=self.initializer_range,
            normalization="LayerNorm",
            layernorm_epsilon=1e-6,
            add_bias_linear=True,
            add_qkv_bias=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            # One layer at a time: a larger chunk would hide the deepstack taps inside it.
            recompute_num_layers=1
            if language.recompute_method == "uniform"
            else language.recompute_num_layers,
            **{name: getattr(language, name) for name in _FROM_LANGUAGE},
        )
