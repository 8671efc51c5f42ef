"""A bridge per model family: its rows, its structure, its provider.

A subclass is a declaration. `register_bridge` files it under the Hugging Face architecture that
config.json names, so that importing the module of a family is all it takes to support it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from megatron.bridge.dtypes import MIXABLE, widest
from megatron.bridge.errors import ConfigError, InputError, PlanError, UnsupportedModel
from megatron.bridge.models.conversion.description import (
    LANGUAGE_SIZES,
    Description,
    PictureCost,
    sizes_fact,
)
from megatron.bridge.models.conversion.diagnosis import Terms, assumed_sizes, found_beside
from megatron.bridge.models.conversion.extras import Extras
from megatron.bridge.models.conversion.layer_keys import BY_CONFIG, KeyForms
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.part import ModelPart
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.conversion.plan_builder import build_plan, expected_tensors
from megatron.bridge.models.conversion.spelling import Spelling
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.tensors.spec import TensorSpec
from megatron.bridge.text.quoting import printable, quoted

if TYPE_CHECKING:
    import torch

    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
    from megatron.bridge.models.model_provider import ModelProvider

REGISTERED_BRIDGES: dict[str, type["MegatronModelBridge"]] = {}
"""Bridges by architecture, as far as their modules were imported; see `models.catalog`."""

UNSUPPORTED: dict[str, str] = {}
"""Architectures that no bridge converts, and the sentence that says what they are."""


def register_unsupported(architectures: Sequence[str], sentence: str) -> None:
    """Let architectures be refused in a sentence of their own."""
    UNSUPPORTED.update(dict.fromkeys(architectures, sentence))


type Tensors = Mapping[str, TensorSpec]


class HasConfig(Protocol):
    """Any object with a config, of transformers or as plain values."""

    config: Any


@dataclass(frozen=True)
class PlanOptions:
    """What a plan depends on beside the files.

    Attributes:
        padded_vocab_size: rows of the Megatron embedding; None pads as files are padded by default.
        experts: the disk layout of routed experts, as the user says it, or for files to be.
        without: the parts of the model that the Megatron side was built without, by the family's
            names.
        spelling: of the names in the files; None to find it from them.
        files: names of the files that accompany the weights; some say what a model is for.
        beside: gives the tensors in safetensors files among these, by name, each with its file.
        keys: how the Megatron keys are formed, where that is known.
    """

    padded_vocab_size: int | None = None
    experts: str | None = None
    without: frozenset[str] = frozenset()
    spelling: Spelling | None = None
    files: frozenset[str] = frozenset()
    beside: Callable[[], Mapping[str, str]] = dict
    keys: KeyForms = BY_CONFIG


DEFAULTS = PlanOptions()


def with_files(options: PlanOptions, hf: "PreTrainedVLM") -> PlanOptions:
    """The options for a model with what accompanies its weights."""
    return replace(options, files=hf.side_file_names, beside=hf.tensors_beside)


class MegatronModelBridge(ABC):
    """What one family of models needs to be converted."""

    sources: ClassVar[tuple[str, ...]] = ()
    """The Hugging Face architectures, as config.json names them."""
    target: ClassVar[str]
    """Dotted path of the Megatron model class; a path, since its module imports megatron-core."""
    provider: ClassVar[str]
    """Dotted path of the provider that builds it."""
    model_type: ClassVar[str | None] = None
    """What config.json states beside the architecture; None if that is not looked at."""
    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    """The class of transformers that loads the model."""
    optional_parts: ClassVar[Mapping[str, str]] = {}
    """Parts without which the Hugging Face files are whole, by the names of PlanOptions.without,
    and the words for each."""
    embedding_key: ClassVar[str] = "embedding.word_embeddings.weight"
    """Checkpoint key whose rows are the vocabulary, padding included."""
    layer_paths: ClassVar[tuple[str, ...]] = ("decoder.layers.",)
    """What Megatron names of parameters have before the number of a TransformerBlock's layer.

    The decoder's is the first; transformers' `get_decoder()` has the same layers.
    """
    parts: ClassVar[Mapping[str, str]] = {"embedding.": "embedding", "output_layer.": "output"}
    """What Megatron names of parameters outside of the decoder's layers begin with, and the word
    for that part, in the order of the model."""
    experts_module: ClassVar[str] = ".mlp.experts."
    """What Hugging Face names of routed experts have behind the name of their layer."""

    @staticmethod
    def register_bridge[Bridge: MegatronModelBridge](
        *,
        source: str | type | Sequence[str | type],
        target: str | type,
        provider: str | type | None = None,
        model_type: str | None = None,
        override: bool = True,
    ) -> Callable[[type[Bridge]], type[Bridge]]:
        """Class decorator: this bridge converts architecture `source` to model class `target`.

        Args:
            source: the architecture, a class or its name; or several of them.
            target: the model class, or its dotted path.
            provider: of the models, a class or its dotted path; None for that of the bridge class.
            model_type: that config.json states; None for that of the bridge class.
            override: take the place of a bridge that an architecture has already.

        Raises:
            TypeError: the class lacks what every bridge has to say.
        """
        given = [source] if isinstance(source, str | type) else source
        names = tuple(one if isinstance(one, str) else one.__name__ for one in given)

        def register(bridge: type[Bridge]) -> type[Bridge]:
            if lacking := sorted(bridge.__abstractmethods__):
                raise TypeError(f"{bridge.__name__} does not define {', '.join(lacking)}")
            bridge.sources = names
            bridge.target = _dotted(target)
            if provider is not None:
                bridge.provider = _dotted(provider)
            if model_type is not None:
                bridge.model_type = model_type
            for name in names:
                if override or name not in REGISTERED_BRIDGES:
                    REGISTERED_BRIDGES[name] = bridge
            return bridge

        return register

    def check(self, config: HFConfig) -> None:
        """Refuse a config of another kind of model: what else is wrong with it is beside the point.

        Raises:
            ConfigError: model type and architecture contradict each other, or a dtype of the
                weights is unknown.
        """
        if self.model_type not in (None, config.model_type):
            raise ConfigError(
                f"{config.origin}: model_type of a {config.architecture} must be "
                f"{self.model_type!r}, found {quoted(config.model_type)}; one of the two belongs "
                f"to another model"
            )
        config.stated_dtypes()

    def language(self, config: HFConfig) -> HFConfig:
        """The config of the language model, which is the whole one or a section of it."""
        return config

    @property
    def separable(self) -> Mapping[str, str]:
        """Parts that are models of their own: name -> model_type of such a model."""
        return {}

    def part(self, name: str, config: HFConfig) -> ModelPart:
        """The part of this name, of a model with this config. Raises InputError, ConfigError."""
        parts = ", ".join(self.separable)
        raise InputError(
            f"{config.origin}: a {config.architecture} has no part {quoted(name)} that is a model "
            f"of its own; " + (f"it has {parts}" if parts else "leave out --part (part=None)")
        )

    @abstractmethod
    def mapping_registry(self) -> MegatronMappingRegistry:
        """The rows of the family, for files laid out as they are released."""

    def registry_for(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> MegatronMappingRegistry:
        """The rows for these files, or for those that a config alone would have."""
        return self.mapping_registry()

    @abstractmethod
    def structure(
        self, config: HFConfig, tensors: Tensors | None = None, options: PlanOptions = DEFAULTS
    ) -> ModelStructure:
        """Counts and dimensions of one model.

        Which layers share checkpoint keys is as megatron-core does it for the model of the config;
        where `options.keys` say otherwise, that counts.

        Args:
            config: of the model.
            tensors: tell what only files can tell; None without files.
            options: of the plan.

        Raises:
            ConfigError: the config cannot be used.
        """

    def spelling(self, config: HFConfig, tensors: Tensors) -> Spelling:
        """How the names in these files are spelled. Raises InputError if that cannot be told."""
        return Spelling()

    def extras(self, config: HFConfig, tensors: Tensors, options: PlanOptions) -> Extras:
        """What is known of tensors that no row maps."""
        return Extras()

    def terms(self, spelling: Spelling) -> Terms:
        """The family's words for messages about files that are spelled so."""
        return Terms()

    def assumed_dtype(self, config: HFConfig, name: str, dtype: str) -> str:
        """The dtype of a tensor in files that are not at hand, most of which are in `dtype`."""
        return dtype

    def in_dtype(self, plan: ConversionPlan, config: HFConfig, dtype: str) -> ConversionPlan:
        """The plan for Hugging Face tensors in `dtype` ("BF16"), as the family is released in it.

        What a release keeps wider stays as wide as it is. Neither what is carried nor what holds
        no floating numbers is changed.
        """

        def wanted(spec: TensorSpec) -> TensorSpec:
            if spec.name in plan.carried or spec.dtype not in MIXABLE:
                return spec
            kept = self.assumed_dtype(config, spec.name, dtype) != dtype
            return replace(spec, dtype=(kept and widest(spec.dtype, dtype)) or dtype)

        return replace(plan, hf={name: wanted(spec) for name, spec in plan.hf.items()})

    def options_of_checkpoint(self, tensors: Tensors) -> PlanOptions:
        """What a Megatron checkpoint says of the model that it was written from, by its keys.

        The vocabulary was padded for the parallel layout of that model.
        """
        keys = KeyForms.of(tensors.keys(), self.layer_paths)
        embedding = tensors.get(self.embedding_key)
        if embedding is None or not embedding.shape:
            return PlanOptions(keys=keys)  # the plan will say what is missing
        return PlanOptions(padded_vocab_size=embedding.shape[0], keys=keys)

    def options_of_model(self, provider: "ModelProvider") -> PlanOptions:
        """What a live model was built with, by its config."""
        return PlanOptions(provider.padded_vocab_size)

    @abstractmethod
    def provider_settings(
        self, config: HFConfig, dtype: str, tensors: Tensors | None = None
    ) -> dict[str, Any]:
        """Fields of the family's provider as plain JSON values.

        Args:
            config: of the model.
            dtype: of the model ("BF16").
            tensors: those of the files, which say which parameters have a dtype of their own.

        Raises:
            ConfigError: a value is missing, or the Megatron model cannot honour it.
        """

    def provider_of(self, settings: Mapping[str, Any]) -> "ModelProvider":
        """The family's model provider with these fields, as `provider_settings` gives them.

        Raises:
            UnsupportedModel: the class of the provider cannot be imported.
        """
        module, _, name = self.provider.rpartition(".")
        try:
            kind: type[ModelProvider] = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UnsupportedModel(
                f"the provider {self.provider} of {type(self).__name__} cannot be imported: "
                f"{printable(str(error))}; install what it needs, or mend the bridge's package"
            ) from error
        return kind.from_settings(settings)

    def provider_bridge(self, hf_pretrained: "PreTrainedVLM | HasConfig") -> "ModelProvider":
        """The family's model provider, configured like a Hugging Face model.

        Args:
            hf_pretrained: a model, of which only the config and the headers of the files are read;
                or any object with a `config`, which then is all there is to go by.

        Raises:
            ConfigError: a value is missing, or the Megatron model cannot honour it.
        """
        from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

        hf = hf_pretrained
        if not isinstance(hf, PreTrainedVLM):
            hf = PreTrainedVLM.from_config(hf.config)
        self.check(hf.hf_config)
        settings = self.provider_settings(hf.hf_config, hf.model_dtype, hf.model_tensors)
        return self.provider_of(settings)

    def settings_for_layout(
        self, settings: Mapping[str, Any], plan: ConversionPlan, without: Collection[str]
    ) -> Mapping[str, Any]:
        """Fields of the provider for a model with every part of a plan, to be laid out over ranks.

        Args:
            settings: as `provider_settings` gives them.
            plan: of the model.
            without: names of `optional_parts`.
        """
        return settings

    def small(self, provider: "ModelProvider") -> "ModelProvider":
        """The same widths with one layer of each kind: built in no time, and split alike.

        The provider that is given may be changed and returned.
        """
        patterns = {
            name: pattern
            for name in ("linear_attention_freq", "moe_layer_freq")
            if isinstance(pattern := getattr(provider, name), list)
        }
        kinds = list(dict.fromkeys(zip(*patterns.values(), strict=True))) or [()]
        provider.num_layers = len(kinds)
        for position, name in enumerate(patterns):
            setattr(provider, name, [kind[position] for kind in kinds])
        provider.mtp_num_layers = None
        return provider

    def describe(
        self, config: HFConfig, tensors: Tensors | None, options: PlanOptions
    ) -> Description:
        """What `inspect` shows of a model beyond what it shows of every one.

        Raises nothing: what cannot be told is left out, and the plan says why.

        Args:
            config: of the model.
            tensors: those of the files as they are stored, None without files.
            options: of the plan.
        """
        return {"text": sizes_fact("text", config, LANGUAGE_SIZES)}

    def pictures(
        self, config: HFConfig, inputs: Mapping[str, "torch.Tensor"]
    ) -> PictureCost | None:
        """What attention over the pictures of a prompt takes; None for a model without any.

        Args:
            config: of the model.
            inputs: what the processor made of the prompt.
        """
        return None

    def logits(
        self, model: "torch.nn.Module", inputs: Mapping[str, "torch.Tensor"]
    ) -> "torch.Tensor":
        """The logits of a live model for a prompt without padding; here as GPTModel is called.

        Args:
            model: of one process, on the device of the inputs.
            inputs: what the tokenizer or processor gives.

        Returns:
            [b, s, vocabulary].

        Raises:
            UnsupportedModel: the model does not take these inputs.
        """
        import torch

        tokens, mask = inputs["input_ids"], inputs.get("attention_mask")
        if others := inputs.keys() - {"input_ids", "attention_mask"}:
            raise UnsupportedModel(
                f"{type(self).__name__}: the processor gives {', '.join(sorted(others))}, too; "
                f"expected input_ids and attention_mask alone: override `logits`"
            )
        if mask is not None and not bool(mask.bool().all()):
            raise UnsupportedModel(f"{type(self).__name__}: a prompt with padding: give it alone")
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        found: torch.Tensor = model(tokens, positions, None, runtime_gather_output=True)
        provider: Any = model.config
        return found[..., : provider.vocab_size]

    def plan(
        self, config: HFConfig, tensors: Tensors, options: PlanOptions = DEFAULTS
    ) -> ConversionPlan:
        """The proven plan for files with this config.

        Where the plan has `equal` tensors, it is proven once `check_equal` has compared them.

        Args:
            config: of the model.
            tensors: those of the files.
            options: what else the plan depends on.

        Raises:
            PlanError: files and config are not of one model.
            ConfigError: the config cannot be used.
        """
        self.check(config)
        if options.spelling is None:
            options = replace(options, spelling=self.spelling(config, tensors))
        terms = self.terms(options.spelling or Spelling())
        try:
            plan = build_plan(
                self.registry_for(config, tensors, options),
                self.structure(config, tensors, options).with_keys(options.keys),
                tensors,
                self.extras(config, tensors, options),
                terms,
            )
        except PlanError as error:
            if elsewhere := found_beside(error, options.beside()):
                raise PlanError(error.problems, causes=[elsewhere]) from None
            if assumed := assumed_sizes(config.origin, config.filled_in, str(error)):
                raise PlanError(error.problems, causes=[assumed]) from None
            raise
        beyond = {key for key, _ in terms.counts.values() if key in config.filled_in}
        cut = [
            f"{name}: {reason}"
            for name, reason in plan.carried.items()
            if any(reason.endswith(key) for key in beyond)
        ]
        if cut:  # a number that nobody stated does not decide what is left out
            raise PlanError(
                cut, causes=[assumed_sizes(config.origin, config.filled_in, "\n".join(cut))]
            )
        return plan

    def expected_tensors(
        self, config: HFConfig, dtype: str, options: PlanOptions = DEFAULTS
    ) -> dict[str, TensorSpec]:
        """The tensors that files of this config would hold, most of them in `dtype` ("BF16")."""
        self.check(config)
        return expected_tensors(
            self.registry_for(config, None, options),
            self.structure(config, None, options).with_keys(options.keys),
            lambda name: self.assumed_dtype(config, name, dtype),
        )

    def plan_from_config(
        self, config: HFConfig, dtype: str, options: PlanOptions = DEFAULTS
    ) -> ConversionPlan:
        """The plan that files of this config would have; see `expected_tensors`."""
        return self.plan(config, self.expected_tensors(config, dtype, options), options)


def _dotted(path_or_class: str | type) -> str:
    if isinstance(path_or_class, str):
        return path_or_class
    return f"{path_or_class.__module__}.{path_or_class.__qualname__}"
