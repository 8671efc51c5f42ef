"""The multi-token-prediction layer of files: mapped where it is what the rows describe.

transformers does not read it, so files are whole without it, or with another one: that is carried.
"""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

from megatron.bridge.errors import ConfigError
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.conversion.plan_builder import expected_tensors
from megatron.bridge.models.conversion.spelling import Spelling
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.qwen_vl.config_keys import MTP_LAYERS, language_of
from megatron.bridge.models.qwen_vl.config_layers import expert_sizes, has_experts
from megatron.bridge.models.qwen_vl.disk_layout import (
    DiskLayout,
    ExpertLayout,
    find_expert_layout,
)
from megatron.bridge.models.qwen_vl.parts import HF_MTP, Prefixes
from megatron.bridge.models.qwen_vl.text_structure import language_structure
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.quoting import quoted

_DEDICATED = "mtp_use_dedicated_embeddings"


class MTPInFiles(NamedTuple):
    """The MTP layer of some files, or of files to be.

    Attributes:
        mapped: whether there is an MTP layer that the rows map.
        experts: how its routed experts lie; None where it has none.
        obstacle: why the tensors of an MTP layer are carried instead; empty if they are not.
    """

    mapped: bool
    experts: ExpertLayout | None = None
    obstacle: str = ""


def _config_obstacle(config: HFConfig) -> str:
    """Why the config's MTP layers are not those of the rows; empty if they are, or there are none.

    Raises:
        ConfigError: the number of layers is negative.
    """
    text = language_of(config)
    layers = text.get(MTP_LAYERS, 0)
    if layers < 0:
        raise ConfigError(
            f"{config.origin}: {text.dotted(MTP_LAYERS)} is {quoted(layers)}; expected 0 or more"
        )
    if layers > 1:
        return f"{layers} MTP layers, of which the Megatron model has one"
    if layers and text.get(_DEDICATED, False):
        return f"an MTP layer with an embedding of its own ({_DEDICATED})"
    return ""


def stated_mtp(config: HFConfig) -> MTPInFiles:
    """The MTP layer that files of a config would have."""
    obstacle = _config_obstacle(config)
    return MTPInFiles(bool(language_of(config).get(MTP_LAYERS, 0)) and not obstacle)


def find_mtp(
    rows: Callable[[DiskLayout], list[ParamMapping]],
    prefixes: Prefixes,
    config: HFConfig,
    tensors: Mapping[str, TensorSpec],
    spelling: Spelling,
    given: ExpertLayout | None,
) -> MTPInFiles:
    """The MTP layer of files.

    Args:
        rows: gives the rows of the language model for a disk layout.
        prefixes: what the names of the language model begin with.
        config: config of the whole model.
        tensors: those in the files, by name.
        spelling: how their names are spelled.
        given: the layout of the experts that the user states; None if the user states none.

    Raises:
        InputError: the shapes of the experts contradict `given`.
        ConfigError: the config lacks or contradicts a value, or it states a negative number of MTP
            layers.
    """
    root = spelling.of(HF_MTP)
    found = [name for name in tensors if name.startswith(root)]
    if not found:
        return MTPInFiles(mapped=False)
    if obstacle := _config_obstacle(config):
        return MTPInFiles(mapped=False, obstacle=obstacle)
    experts = None
    try:
        if has_experts(text := language_of(config)):
            sizes = expert_sizes(text)
            experts = find_expert_layout(tensors, root, sizes, (0,), given)
    except ConfigError as error:  # experts in two layouts
        return MTPInFiles(mapped=False, obstacle=f"an MTP layer of another kind: {error}")
    of_family = rows(DiskLayout(mtp=experts))
    declared = [row for row in of_family if row.megatron_param.startswith(prefixes.mtp)]
    expected = expected_tensors(
        spelling.registry(declared),
        language_structure(config, prefixes, with_mtp=True),
        lambda _name: "",
    )
    obstacle = _misfit(found, tensors, expected)
    return MTPInFiles(not obstacle, experts, obstacle)


def _misfit(
    found: Collection[str],
    tensors: Mapping[str, TensorSpec],
    expected: Mapping[str, TensorSpec],
) -> str:
    """Why tensors of an MTP layer are not those that rows describe; empty if they are."""
    for name, spec in expected.items():
        if name not in tensors:
            return f"an incomplete MTP layer: {name} is missing"
        if tuple(tensors[name].shape) != tuple(spec.shape):
            return (
                f"an MTP layer of another size than the model: {name} has shape "
                f"{tuple(tensors[name].shape)}, the model's would have {tuple(spec.shape)}"
            )
    if further := [name for name in found if name not in expected]:
        return f"an MTP layer of another kind: the Megatron model has no {further[0]}"
    return ""
