"""A bridge per model family: its rows, its structure, its provider.

A subclass is a declaration. `register_bridge` files it under the Hugging Face architecture that
config.json names, so that importing the module of a family is all it takes to support it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from megatron.bridge.dtypes import MIXABLE, widest
from megatron.bridge.errors import ConfigError, PlanError
from megatron.bridge.models.conversion.diagnosis import Terms
from megatron.bridge.models.conversion.extras import Extras
from megatron.bridge.models.conversion.layer_keys import BY_CONFIG, KeyForms
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.plan import ConversionPlan, TensorLike, TensorSpec
from megatron.bridge.models.conversion.plan_builder import build_plan, expected_tensors
from megatron.bridge.models.conversion.spelling import Spelling
from megatron.bridge.models.conversion.structure import ModelStructure
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.quoting import printable, quoted

if TYPE_CHECKING:
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
    from megatron.bridge.models.model_provider import ModelProvider

REGISTERED_BRIDGES: dict[str, type["MegatronModelBridge"]] = {}
"""Bridges by architecture, as far as their modules were imported; see `models.catalog`."""

UNSUPPORTED: dict[str, str] = {}
"""Architectures that no bridge converts, and the sentence that says what they are."""


def register_unsupported(architectures: Sequence[str], sentence: str) -> None:
    """Let architectures be refused in a sentence of their own."""
    UNSUPPORTED.update(dict.fromkeys(architectures, sentence))


type Tensors = Mapping[str, TensorLike]


class HasConfig(Protocol):
    """Any object with a config, of transformers or as plain values."""

    config: Any


@dataclass(frozen=True)
class PlanOptions:
    """What a plan depends on beside the files.

    padded_vocab_size: rows of the Megatron embedding; None pads as files are padded by default.
    experts: the disk layout of routed experts, as the user says it, or for files to be.
    without: the parts of the model that the Megatron side was built without, by the family's names.
    spelling: of the names in the files; found from them where it is not given.
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
    optional_parts: ClassVar[frozenset[str]] = frozenset()
    """Parts without which the Hugging Face files are whole, by the names of PlanOptions.without."""
    embedding_key: ClassVar[str] = "language_model.embedding.word_embeddings.weight"
    """Checkpoint key whose rows are the vocabulary, padding included."""
    layer_paths: ClassVar[tuple[str, ...]] = ()
    """What Megatron names of parameters have before the number of a TransformerBlock's layer."""

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

        Each may be a class, or its name (`source`) and dotted path (`target`, `provider`); there
        may be several sources. provider and model_type: in the place of those that the class
        states. override: take the place of a bridge that an architecture has already.
        """
        given = [source] if isinstance(source, str | type) else source
        names = tuple(one if isinstance(one, str) else one.__name__ for one in given)

        def register(bridge: type[Bridge]) -> type[Bridge]:
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
        """Raise ConfigError for a config of another kind of model, or of weights in no dtype.

        What else is wrong with such a config would be beside the point.
        """
        if self.model_type not in (None, config.model_type):
            raise ConfigError(
                f"{config.origin}: model_type of a {config.architecture} must be "
                f"{self.model_type!r}, found {quoted(config.model_type)}; one of the two belongs "
                f"to another model"
            )
        config.stated_dtypes()

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
        """Counts and dimensions of one model; what only files can tell is told by `tensors`.

        Raises ConfigError.
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
        """Fields of the family's provider as plain JSON values, for a model in `dtype` ("BF16").

        tensors: the files, whose headers say which parameters have a dtype of their own.
        Raises ConfigError for a value that is missing or that the Megatron model cannot honour.
        """

    def provider_of(self, settings: Mapping[str, Any]) -> "ModelProvider":
        """The family's model provider with these fields, as `provider_settings` gives them."""
        module, _, name = self.provider.rpartition(".")
        provider: ModelProvider = getattr(import_module(module), name).from_settings(settings)
        return provider

    @abstractmethod
    def provider_bridge(self, hf_pretrained: "PreTrainedVLM | HasConfig") -> "ModelProvider":
        """The family's model provider, configured like a Hugging Face model."""

    def plan(
        self, config: HFConfig, tensors: Tensors, options: PlanOptions = DEFAULTS
    ) -> ConversionPlan:
        """The proven plan for files with this config. Raises PlanError or ConfigError.

        Where the plan has `equal` tensors, it is proven once `check_equal` has compared them.
        """
        self.check(config)
        if options.spelling is None:
            options = replace(options, spelling=self.spelling(config, tensors))
        terms = self.terms(options.spelling or Spelling())
        try:
            plan = build_plan(
                self.registry_for(config, tensors, options),
                self.structure(config, tensors, options),
                tensors,
                self.extras(config, tensors, options),
                terms,
            )
        except PlanError as error:
            if elsewhere := _found_beside(error, options.beside()):
                raise PlanError(error.problems, causes=[elsewhere]) from None
            if assumed := _assumed_sizes(config, str(error)):
                raise PlanError(error.problems, causes=[assumed]) from None
            raise
        beyond = {key for key, _ in terms.counts.values() if key in config.filled_in}
        cut = [
            f"{name}: {reason}"
            for name, reason in plan.carried.items()
            if any(reason.endswith(key) for key in beyond)
        ]
        if cut:  # a number that nobody stated does not decide what is left out
            raise PlanError(cut, causes=[_assumed_sizes(config, "\n".join(cut))])
        return plan

    def expected_tensors(
        self, config: HFConfig, dtype: str, options: PlanOptions = DEFAULTS
    ) -> dict[str, TensorSpec]:
        """The tensors that files of this config would hold, most of them in `dtype` ("BF16")."""
        self.check(config)
        return expected_tensors(
            self.registry_for(config, None, options),
            self.structure(config, None, options),
            lambda name: self.assumed_dtype(config, name, dtype),
        )

    def plan_from_config(
        self, config: HFConfig, dtype: str, options: PlanOptions = DEFAULTS
    ) -> ConversionPlan:
        """The plan that files of this config would have; see `expected_tensors`."""
        return self.plan(config, self.expected_tensors(config, dtype, options), options)


def _found_beside(error: PlanError, beside: Mapping[str, str]) -> str:
    """What to say where tensors are missing that lie in a file beside the model's; or nothing."""
    named = (problem.partition(": missing, ")[0] for problem in error.problems)
    found = {name: beside[name] for name in named if name in beside}
    if not found:
        return ""
    files, name = sorted(set(found.values())), next(iter(found))
    shown = ", ".join([*map(printable, files[:3]), *(["..."] if len(files) > 3 else [])])
    return (
        f"{len(found)} tensor{'s are' if len(found) > 1 else ' is'} missing, such as {name}, and "
        f"in a file that does not count as the model's: {shown}. Take the weight index that "
        f"belongs to these files, or name {'them' if len(files) > 1 else 'it'} in the one that is "
        f"there"
    )


def _assumed_sizes(config: HFConfig, problems: str) -> str:
    """What to say where files contradict sizes that the config leaves out; empty for none.

    problems: text that names some of them, perhaps.
    """
    filled = config.filled_in.items()
    sizes = {path: value for path, value in filled if type(value) in (int, list)}
    if not sizes:
        return ""
    sizes = {path: value for path, value in sizes.items() if path in problems} or sizes
    shown = ", ".join(f"{path} ({quoted(value)})" for path, value in sizes.items())
    return (
        f"{config.origin} does not state {shown}: these are transformers' defaults, and do not fit "
        f"the files; state what they have"
    )


def _dotted(path_or_class: str | type) -> str:
    if isinstance(path_or_class, str):
        return path_or_class
    return f"{path_or_class.__module__}.{path_or_class.__qualname__}"
