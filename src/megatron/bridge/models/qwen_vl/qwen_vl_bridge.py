"""What the bridges of all Qwen vision-language families share."""

from abc import abstractmethod
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import (
    DEFAULTS,
    HasConfig,
    MegatronModelBridge,
    PlanOptions,
    Tensors,
)
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.models.qwen_vl.disk_layout import (
    DECODER_EXPERTS,
    MTP_EXPERTS,
    DiskLayout,
    ExpertLayout,
    find_expert_layout,
    parse_expert_layout,
)
from megatron.bridge.models.qwen_vl.rows import HF_MTP, MTP
from megatron.bridge.models.qwen_vl.settings import qwen_vl_settings
from megatron.bridge.models.qwen_vl.structure import (
    expert_sizes,
    has_experts,
    has_mtp,
    qwen_vl_structure,
)

if TYPE_CHECKING:
    from megatron.bridge.models.qwen_vl.qwen3_vl_provider import Qwen3VLModelProvider


class QwenVLBridge(MegatronModelBridge):
    """A family is its rows, its provider, and the disk layout of its released files."""

    released_layout: ClassVar[DiskLayout] = DiskLayout()

    @abstractmethod
    def rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """The rows of the family for files laid out like `disk`."""

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The rows of the family for files as they are released."""
        return MegatronMappingRegistry(*self.rows(self.released_layout))

    def registry_for(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> MegatronMappingRegistry:
        """The rows for the disk layout of these files."""
        return MegatronMappingRegistry(*self.rows(self.disk_layout(config, tensors, options)))

    def disk_layout(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> DiskLayout:
        """How the experts lie in these files; without files, as `options` or releases have them.

        Raises InputError where the files lie otherwise than `options` say.
        """
        given = None if options.experts is None else parse_expert_layout(options.experts)
        if not has_experts(config.text):
            if given is not None:
                raise InputError(
                    f"{config.origin}: the model has no routed experts, so their layout means "
                    f"nothing for it"
                )
            return DiskLayout()
        if tensors is None:
            return self.released_layout if given is None else DiskLayout(given, given)
        sizes = expert_sizes(config.text)
        decoder = find_expert_layout(tensors, DECODER_EXPERTS, sizes, given)
        if decoder is ExpertLayout.PER_EXPERT and given not in (None, decoder):
            raise InputError(
                f"{config.origin}: the routed experts lie {decoder}, not {given}; leave their "
                f"layout to be found from names and shapes"
            )
        if not options.with_mtp:
            return DiskLayout(decoder)  # what is carried over may lie as it likes
        return DiskLayout(decoder, find_expert_layout(tensors, MTP_EXPERTS, sizes, given))

    def structure(
        self, config: HFConfig, tensors: Tensors | None = None, options: PlanOptions = DEFAULTS
    ) -> ModelStructure:
        """Counts and dimensions of one model. Raises ConfigError."""
        with_mtp = options.with_mtp and has_mtp(config, tensors)
        return qwen_vl_structure(config, options.padded_vocab_size, with_mtp=with_mtp)

    def options_of_checkpoint(self, tensors: Tensors) -> PlanOptions:
        """Also whether the model was built with its MTP layer."""
        with_mtp = any(key.startswith(MTP) for key in tensors)
        return replace(super().options_of_checkpoint(tensors), with_mtp=with_mtp)

    def carried(self, tensors: Tensors, options: PlanOptions) -> dict[str, str]:
        """The MTP layer's tensors, where the Megatron model is built without it."""
        if options.with_mtp:
            return {}
        reason = "the Megatron model is built without its MTP layer"
        return {name: reason for name in tensors if name.startswith(HF_MTP)}

    def provider_settings(
        self, config: HFConfig, dtype: str, tensors: Tensors | None = None
    ) -> dict[str, Any]:
        """Fields of the family's provider. Raises ConfigError."""
        return qwen_vl_settings(config, dtype)

    def provider_bridge(self, hf_pretrained: PreTrainedVLM | HasConfig) -> "Qwen3VLModelProvider":
        """The family's provider, configured like a Hugging Face model.

        hf_pretrained: a model, of which only the config and the headers of the files are read; or
        any object with a `config`, which then is all there is to go by. Raises ConfigError for a
        value that is missing or that Qwen3VLModel cannot honour.
        """
        module, _, name = self.provider.rpartition(".")
        provider: type[Qwen3VLModelProvider] = getattr(import_module(module), name)
        if not isinstance(hf_pretrained, PreTrainedVLM):
            hf_pretrained = PreTrainedVLM.from_config(hf_pretrained.config)
        tensors = hf_pretrained.tensors if hf_pretrained.has_weights else None
        config = hf_pretrained.hf_config
        self.check(config)
        dtype = hf_pretrained.main_dtype
        return provider.from_settings(self.provider_settings(config, dtype, tensors))
