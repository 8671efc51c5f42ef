"""The parts of a Qwen model: how their names begin on the two sides, and which are optional.

A language model is the same whether it is a part of a vision-language model or a model of its own;
only what stands before its names differs.
"""

from copy import copy
from dataclasses import dataclass, replace

from megatron.bridge.models.conversion.param_mapping import ParamMapping

VISION = "vision_model."
VISION_LAYERS = f"{VISION}decoder.layers."
DEEPSTACK_MERGERS = f"{VISION}decoder.deepstack_merger_list."

HF_VISION = "model.visual."
HF_HEAD = "lm_head."
HF_SCORE = "score."
HF_MTP = "mtp."
HF_MTP_LAYER = f"{HF_MTP}layers.0."

# Optional parts.
ATTENTION_BIAS = "attention_bias"
UNTIED_OUTPUT = "untied_output"
SCORE_BIAS = "score_bias"
WITH_MTP = "mtp"
MTP_ATTENTION_BIAS = "mtp_attention_bias"

# Parts that a Megatron model may be built without; the MTP layer is one, too.
VISION_PART = "vision"

# Kinds of layers.
FULL_ATTENTION = "full_attention"
LINEAR_ATTENTION = "linear_attention"
DENSE_MLP = "dense_mlp"
SPARSE_MLP = "sparse_mlp"


@dataclass(frozen=True)
class Layer:
    """Where the rows of each layer apply, or of another module.

    Attributes:
        megatron: what its names begin with in Megatron.
        hf: the same in files.
        kind: the kind of layer that the rows are limited to; None for any.
        only: the feature without which there is no such layer; None if there always is.
        bias: the feature without which its attention has no biases.
    """

    megatron: str
    hf: str
    kind: str | None = None
    only: str | None = None
    bias: str = ATTENTION_BIAS

    def of_kind(self, kind: str) -> "Layer":
        """Those of these layers that are of one kind."""
        return replace(self, kind=kind)

    def rows(self, *rows: ParamMapping) -> list[ParamMapping]:
        """Put rows in the place of the layer.

        They exist where the layer does; a row with a feature of its own exists where that is.

        Args:
            *rows: rows whose names are those inside of the layer.

        Returns:
            Copies of them whose names are those in the model.
        """
        placed = [copy(row) for row in rows]
        for row in placed:
            row.megatron_param = self.megatron + row.megatron_param
            row.hf_params = {role: self.hf + name for role, name in row.hf_params.items()}
            row.only, row.layers = row.only or self.only, self.kind
        return placed


@dataclass(frozen=True)
class Prefixes:
    """What the names of a language model begin with.

    Attributes:
        megatron: what the names of its parameters in the Megatron model begin with.
        hf: what the names of its tensors in Hugging Face files begin with, but for those of the
            output layer and the MTP layer.
    """

    megatron: str
    hf: str

    @property
    def layers(self) -> str:
        """What stands before the number of a decoder layer in Megatron."""
        return f"{self.megatron}decoder.layers."

    @property
    def hf_layers(self) -> str:
        """What stands before the number of a decoder layer in files."""
        return f"{self.hf}layers."

    @property
    def embedding(self) -> str:
        """The name of the word embedding in Megatron."""
        return f"{self.megatron}embedding.word_embeddings.weight"

    @property
    def hf_embedding(self) -> str:
        """What the names of the word embedding in files begin with."""
        return f"{self.hf}embed_tokens."

    @property
    def mtp(self) -> str:
        """What Megatron names of the MTP layer, and of what joins it to the decoder, begin with."""
        return f"{self.megatron}mtp.layers.0."

    @property
    def layer(self) -> Layer:
        """Each decoder layer."""
        return Layer(f"{self.layers}*.", f"{self.hf_layers}*.")

    @property
    def predictor(self) -> Layer:
        """The MTP layer without the decoder layer inside of it, which is `mtp_layer`."""
        return Layer(self.mtp, HF_MTP, only=WITH_MTP)

    @property
    def mtp_layer(self) -> Layer:
        """The decoder layer inside of the MTP layer."""
        return Layer(
            f"{self.mtp}mtp_model_layer.", HF_MTP_LAYER, only=WITH_MTP, bias=MTP_ATTENTION_BIAS
        )


BESIDE_VISION = Prefixes("language_model.", "model.language_model.")
"""The language model of a vision-language model."""
ALONE = Prefixes("", "model.")
"""A model of text alone: Megatron's names are those of a GPTModel."""
