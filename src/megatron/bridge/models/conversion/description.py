"""What a family says of one model, for people and for programs that look at it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.text.quoting import quoted

LANGUAGE_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
"""Keys by which transformers' configs of language models name their sizes."""


@dataclass(frozen=True)
class Fact:
    """One thing that `inspect` shows of a model, beyond what it shows of every one.

    Attributes:
        value: in the JSON document, of plain JSON values.
        label: in the table.
        shown: in the table, behind the label; None to leave the line out.
        about: the "files", how they are laid out, which `plan` shows, too; the "config", what it
            states; or the "model" that it describes.
    """

    value: Any
    label: str
    shown: str | None
    about: Literal["files", "config", "model"] = "config"


type Description = Mapping[str, Fact]
"""Facts by their keys in the JSON document."""


class PictureCost(NamedTuple):
    """What sizes the attention over the pictures of one prompt, in transformers' eager form.

    Attributes:
        patches: of the largest picture or frame.
        heads: of the attention between them.
        patch_pixels: the side of a patch.
        unit_pixels: what the sides of a picture are multiples of.
    """

    patches: int
    heads: int
    patch_pixels: int
    unit_pixels: int


def sizes_fact(label: str, config: HFConfig | None, keys: tuple[str, ...]) -> Fact:
    """Those of the keys that a config, or a section of one, states; of a section without, none.

    Values are shown as they stand there: whether they make sense, the plan says.
    """
    data = {} if config is None else config.data
    values = {key: data[key] for key in keys if data.get(key) is not None}
    shown = ", ".join(f"{key} {quoted(value)}" for key, value in values.items())
    return Fact(values, label, shown or None)
