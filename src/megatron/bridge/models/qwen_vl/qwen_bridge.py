"""What the bridges of all Qwen models share: those of text alone, and those with a vision tower."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from megatron.bridge.errors import InputError, UnsupportedModel
from megatron.bridge.models.conversion.diagnosis import Terms
from megatron.bridge.models.conversion.extras import Extras
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import (
    DEFAULTS,
    HasConfig,
    PlanOptions,
    Tensors,
)
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.models.conversion.plan import CopyOf
from megatron.bridge.models.conversion.spelling import Spelling
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.models.qwen_vl.config_keys import check_keys, language_of
from megatron.bridge.models.qwen_vl.config_layers import (
    expert_sizes,
    has_experts,
    is_tied,
    sparse_layers,
)
from megatron.bridge.models.qwen_vl.disk_layout import (
    DiskLayout,
    ExpertLayout,
    check_expert_order,
    find_expert_layout,
    parse_expert_layout,
)
from megatron.bridge.models.qwen_vl.heads import (
    is_headless,
    is_other_head,
    needs_no_head,
    scores_of,
)
from megatron.bridge.models.qwen_vl.mtp import MTPInFiles, find_mtp, stated_mtp
from megatron.bridge.models.qwen_vl.names import Roots, find_spelling, language_root, terms_of
from megatron.bridge.models.qwen_vl.parts import (
    HF_HEAD,
    HF_MTP,
    HF_VISION,
    UNTIED_OUTPUT,
    WITH_MTP,
)
from megatron.bridge.models.qwen_vl.provider_settings import language_settings
from megatron.bridge.models.qwen_vl.qwen_description import DescribedQwen
from megatron.bridge.models.qwen_vl.rows import score_rows
from megatron.bridge.models.qwen_vl.text_structure import language_structure

if TYPE_CHECKING:
    from megatron.bridge.models.model_provider import ModelProvider


class QwenBridge(DescribedQwen):
    """A family is its rows, its provider, and the disk layout of its released files."""

    roots: ClassVar[Roots]
    """What the names of each part begin with in files."""
    released_layout: ClassVar[DiskLayout] = DiskLayout()
    merges_experts: ClassVar[bool] = False
    """Whether transformers merges experts that lie one by one; otherwise it passes over them."""
    others_are: ClassVar[str] = "transformers does not read it either"
    """Why a tensor of no known kind is carried."""
    elsewhere: ClassVar[tuple[str, ...]] = ()
    """What names in files begin with that are beside this model, and so no problem of it."""

    @abstractmethod
    def language_rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """The rows of the language model for files laid out like `disk`."""

    def rows(self, disk: DiskLayout) -> list[ParamMapping]:
        """The rows of the whole model for files laid out like `disk`."""
        return self.language_rows(disk)

    def check(self, config: HFConfig) -> None:
        """Refuse a config that cannot be converted, whatever the files hold.

        Raises:
            ConfigError: the config is of another kind of model, or a value cannot be converted.
        """
        super().check(config)
        check_keys(config)

    def mapping_registry(self) -> MegatronMappingRegistry:
        """The rows of the family for files as they are released."""
        return MegatronMappingRegistry(*self.rows(self.released_layout))

    def spelling(self, config: HFConfig, tensors: Tensors) -> Spelling:
        """How the names in these files are spelled. Raises InputError if that cannot be told."""
        bare = config.architecture.endswith("Model")
        return find_spelling(tensors, self.prefixes, self.roots, tied=is_tied(config), bare=bare)

    def terms(self, spelling: Spelling) -> Terms:
        """The words for the parts of these models."""
        vision = HF_VISION in self.roots
        section = "text_config." if vision else ""
        return terms_of(spelling, self.prefixes, section, vision=vision)

    def registry_for(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> MegatronMappingRegistry:
        """The rows for the disk layout of these files, with the names that stand in them."""
        absent = tuple(self.removable[part] for part in options.without)
        rows = [
            row
            for row in self.rows(self.disk_layout(config, tensors, options))
            if not row.megatron_param.startswith(absent)
        ]
        if is_tied(config) or scores_of(config):
            # The embedding may stand under the name of the output layer; a classifier has none.
            rows = [row for row in rows if row.only != UNTIED_OUTPUT]
        if scores_of(config):
            rows += score_rows(self.prefixes)
        return self._spelling(config, tensors, options).registry(rows)

    def disk_layout(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> DiskLayout:
        """How the experts lie in these files; without files, as `options` or releases have them.

        Raises:
            InputError: the experts in the files lie otherwise than `options` say, or `options` say
                a layout and there are no experts.
            ConfigError: the experts of one model lie in two ways, or under two prefixes.
        """
        given, text = _given_layout(options), language_of(config)
        if not has_experts(text):
            if given is not None:
                raise InputError(
                    f"{config.origin}: the model has no routed experts, so their layout means "
                    f"nothing for it"
                )
            return DiskLayout()
        if tensors is None:
            return self.released_layout if given is None else DiskLayout(given, given)
        spelling = self._spelling(config, tensors, options)
        root = language_root(spelling, self.prefixes)
        regular = spelling.by_regular_name(tensors)
        layers, sizes = sparse_layers(text), expert_sizes(text)
        merged = self.merges_experts
        decoder = find_expert_layout(regular, root, sizes, layers, given, merged=merged)
        if decoder is ExpertLayout.PER_EXPERT and (spelling.strays or spelling.copies):
            doubled = frozenset(spelling.copies.values())
            check_expert_order(tensors, root, spelling.regular, doubled)
        if decoder is ExpertLayout.PER_EXPERT and given not in (None, decoder):
            raise InputError(
                f"{config.origin}: the routed experts lie {decoder}, not {given}; leave their "
                f"layout to be found from names and shapes"
            )
        return DiskLayout(decoder, self._mtp(config, tensors, options).experts)

    def structure(
        self, config: HFConfig, tensors: Tensors | None = None, options: PlanOptions = DEFAULTS
    ) -> ModelStructure:
        """Counts and dimensions of one model. Raises ConfigError."""
        with_mtp = self._mtp(config, tensors, options).mapped
        structure = language_structure(
            config,
            self.prefixes,
            options.padded_vocab_size,
            with_mtp=with_mtp,
            keys=options.keys,
        )
        if self._has_output_layer(config, tensors, options):
            return structure
        return replace(structure, features=structure.features - {UNTIED_OUTPUT})

    @property
    def removable(self) -> Mapping[str, str]:
        """Parts that a Megatron model may be built without -> what their names begin with."""
        return {WITH_MTP: self.prefixes.mtp}

    def options_of_checkpoint(self, tensors: Tensors) -> PlanOptions:
        """What every checkpoint says, and which parts the model was built without."""
        without = (
            part
            for part, prefix in self.removable.items()
            if not any(key.startswith(prefix) for key in tensors)
        )
        return replace(super().options_of_checkpoint(tensors), without=frozenset(without))

    def options_of_model(self, provider: "ModelProvider") -> PlanOptions:
        """What every model says, and whether it was built without its MTP layer."""
        without = frozenset() if provider.mtp_num_layers else frozenset({WITH_MTP})
        return replace(super().options_of_model(provider), without=without)

    def extras(self, config: HFConfig, tensors: Tensors, options: PlanOptions) -> Extras:
        """Parts that the Megatron model is built without, heads, copies of tied weights."""
        spelling = self._spelling(config, tensors, options)
        carried = {name: self.others_are for name in tensors if name.startswith(self.elsewhere)}
        absent: set[str] = set()
        found = [name for name in tensors if name.startswith(spelling.of(HF_MTP))]
        if obstacle := self._mtp(config, tensors, options).obstacle:
            carried |= dict.fromkeys(found, obstacle)
        elif WITH_MTP in options.without:
            carried |= dict.fromkeys(found, "the Megatron model is built without its MTP layer")
            absent |= set(found)
        equal: dict[str, CopyOf] = {}
        name, embedding = (
            spelling.of(f"{root}weight") for root in (HF_HEAD, self.prefixes.hf_embedding)
        )
        if is_tied(config) and name != embedding and {name, embedding} <= tensors.keys():
            if not is_headless(config):
                equal[name] = CopyOf(embedding, _TIED.format(name))
                carried[name] = f"a copy of {embedding}, to which the config ties it"
        elif name in tensors and not self._has_output_layer(config, tensors, options):
            carried[name] = f"an output layer, which a {config.architecture} does not have"
        return Extras(
            carried=carried,
            absent=frozenset(absent),
            equal=equal,
            copies={
                name: CopyOf(other, _SAME.format(name)) for name, other in spelling.copies.items()
            },
            reason=partial(self._why_carried, spelling, config),
        )

    def _spelling(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> Spelling:
        if options.spelling is not None:
            return options.spelling
        return Spelling() if tensors is None else self.spelling(config, tensors)

    def _mtp(self, config: HFConfig, tensors: Tensors | None, options: PlanOptions) -> MTPInFiles:
        """The MTP layer of these files, or of those that a config alone would have."""
        without = WITH_MTP in options.without
        if tensors is None:
            return MTPInFiles(mapped=False) if without else stated_mtp(config)
        given, spelling = _given_layout(options), self._spelling(config, tensors, options)
        try:
            found = find_mtp(self.language_rows, self.prefixes, config, tensors, spelling, given)
        except InputError:
            if not without:
                raise
            return MTPInFiles(mapped=False)  # what is carried over may lie as it likes
        return MTPInFiles(mapped=False, obstacle=found.obstacle) if without else found

    def _has_output_layer(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> bool:
        """Whether files have an output layer of their own, or should have one."""
        if scores_of(config):
            return False
        if tensors is None:
            return not is_headless(config)
        head = self._spelling(config, tensors, options).of(f"{HF_HEAD}weight")
        if head not in tensors:
            return not needs_no_head(config, tensors, options.files)
        structure = language_structure(config, self.prefixes)
        return not is_headless(config) or tuple(tensors[head].shape) == structure.shape("V H")

    def provider_settings(
        self, config: HFConfig, dtype: str, tensors: Tensors | None = None
    ) -> dict[str, Any]:
        """Fields of the family's provider. Raises ConfigError."""
        return language_settings(config, dtype)

    def provider_bridge(self, hf_pretrained: PreTrainedVLM | HasConfig) -> "ModelProvider":
        """The family's provider, configured like a Hugging Face model.

        Args:
            hf_pretrained: a model, of which only the config and the headers of the files are read;
                or any object with a `config`, which then is all there is to go by.

        Raises:
            ConfigError: a value is missing, or the Megatron model cannot honour it.
            UnsupportedModel: the files have no output layer, which the Megatron model needs.
        """
        if not isinstance(hf_pretrained, PreTrainedVLM):
            hf_pretrained = PreTrainedVLM.from_config(hf_pretrained.config)
        self.check(hf_pretrained.hf_config)
        self._check_output_layer(hf_pretrained)
        return super().provider_bridge(hf_pretrained)

    def _check_output_layer(self, hf: "PreTrainedVLM") -> None:
        """Raise UnsupportedModel for files without it: the Megatron model computes logits."""
        config, tensors = hf.hf_config, hf.weights if hf.has_weights else None
        options = PlanOptions(files=hf.side_file_names)
        if scores_of(config) or is_tied(config) or self._has_output_layer(config, tensors, options):
            return
        raise UnsupportedModel(
            f"{hf.name_or_path}: a {config.architecture} without an output layer can be "
            f"converted from files to files, but the Megatron model that computes always has "
            f"one; add lm_head.weight and name the {self.sources[0]} class to build it"
        )

    def _why_carried(self, spelling: Spelling, config: HFConfig, name: str) -> str:
        """Why a tensor is carried that lies beside a whole model."""
        name = spelling.regular(name)
        if is_other_head(name):
            return "the head of a reward, value or classification model"
        if name.endswith("rotary_emb.inv_freq"):
            return "a buffer that the model computes by itself"
        if "lora_" in name or ".base_layer." in name:
            return "of an adapter, which the model does not apply"
        for root, (section, key) in self.numbered(config).items():
            spelled = spelling.of(root)
            number = name.removeprefix(spelled).partition(".")[0]
            if name.startswith(spelled) and number.isdecimal():
                if int(number) >= section.count(key):
                    return f"of a layer beyond {section.dotted(key)}"
                if name.endswith(".bias"):
                    return "a bias that the config switches off"
        return self.others_are

    def numbered(self, config: HFConfig) -> dict[str, tuple[HFConfig, str]]:
        """What names in files have before the number of a layer -> where the config counts them."""
        return {self.prefixes.hf_layers: (language_of(config), "num_hidden_layers")}


_TIED = (
    "the config ties them (tie_word_embeddings): set it to false if the output layer is a matrix "
    "of its own, or remove {}"
)
_SAME = "transformers takes both names for one parameter: remove the wrong one, perhaps {}"


def _given_layout(options: PlanOptions) -> ExpertLayout | None:
    """The layout of experts that the user states."""
    return None if options.experts is None else parse_expert_layout(options.experts)
