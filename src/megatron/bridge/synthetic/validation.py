"""Whether a config makes a model: what its bridge and its provider say of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from megatron.bridge.dtypes import TORCH_NAMES
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.synthetic.config_settings import ORIGIN, Settings
from megatron.bridge.tensors.spec import TensorSpec


def check_config(settings: Settings) -> None:
    """Raise InputError for a config that the Megatron model of the family cannot be built of."""
    config = HFConfig.from_dict(settings.config, ORIGIN)
    bridge = bridge_for(config.architecture)
    bridge.check(config)
    dtype = TORCH_NAMES[settings.options["dtype"]]
    with warnings.catch_warnings():
        # What megatron-core advises for training is not about files.
        warnings.simplefilter("ignore")
        bridge.provider_of(bridge.provider_settings(config, dtype)).finalize()


def check_tensors(settings: Settings, tensors: Mapping[str, TensorSpec]) -> None:
    """Raise InputError if these tensors, before quantization, cannot be proven to convert."""
    config = HFConfig.from_dict(settings.config, ORIGIN)
    try:
        bridge_for(config.architecture).plan(config, tensors)
    except PlanError as error:
        raise InputError.of_problems(f"{ORIGIN} make no model", error.problems) from error
