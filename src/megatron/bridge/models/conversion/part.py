"""A part of a model that is a model of its own, such as the language model of a larger one.

The two sides name it by themselves: files may hold it inside of the larger model, and a checkpoint
alone, or the other way round. For either there is a bridge, in the words of the model alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron.bridge.models.hf_pretrained.config import HFConfig

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge, Tensors


@dataclass(frozen=True)
class ModelPart:
    """A part of one model.

    Attributes:
        config: config.json of the part as a model of its own.
        in_files: between files of the whole and checkpoints of the part.
        in_checkpoint: between files of the part and checkpoints of the whole.
        root: what the keys of the part begin with in checkpoints of the whole.
        own_names: of the tensors in files of the whole gives those of the part: name in files of
            the part -> name there.
        experts: the disk layout of routed experts in files of the part; None for that of the whole.
    """

    config: HFConfig
    in_files: "MegatronModelBridge"
    in_checkpoint: "MegatronModelBridge"
    root: str
    own_names: Callable[["Tensors"], Mapping[str, str]]
    experts: str | None = None
