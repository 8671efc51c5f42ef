"""Which plan a conversion of files follows, in either direction."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from megatron.bridge.dtypes import widest
from megatron.bridge.errors import CheckpointError, InputError, PlanError
from megatron.bridge.formats.config_record import CONFIG_RECORD, read_hf_config, read_record
from megatron.bridge.models.catalog import bridge_for, registered_bridges
from megatron.bridge.models.conversion.equal_copies import check_equal
from megatron.bridge.models.conversion.model_bridge import (
    DEFAULTS,
    MegatronModelBridge,
    PlanOptions,
    with_files,
)
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.part_files import PartOfVLM
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.tensors.spec import TensorSpec, differences, main_dtype
from megatron.bridge.text.quoting import quoted

if TYPE_CHECKING:
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint

_STATE = re.compile(r"(chained_\d+\.)*(optimizer\.|(rng_state|rerun_state_machine_state)(/|$))")


@dataclass(frozen=True)
class Sides:
    """The files of a model, and the bridge between them and a Megatron checkpoint.

    Attributes:
        files: those of the Hugging Face side.
        config: of the model in the checkpoint, where that is a part of the one in the files.
        bridge: between the two.
        root: what the keys of the model begin with in the checkpoint; others are left behind.
        experts: the disk layout of routed experts, where it is not that of the files.
    """

    files: PreTrainedVLM
    config: HFConfig
    bridge: MegatronModelBridge
    root: str = ""
    experts: str | None = None

    @classmethod
    def of(cls, files: PreTrainedVLM, part: str | None = None) -> Self:
        """The sides of an import: the whole model in the files, or a part of it.

        Raises:
            InputError: the model does not have the part.
        """
        config = files.hf_config
        bridge = bridge_for(config.architecture)
        if part is None:
            return cls(files, config, bridge)
        found = bridge.part(part, config)
        return cls(files, found.config, found.in_files)

    @property
    def recorded_config(self) -> HFConfig:
        """The config that a checkpoint of the model keeps."""
        return self.files.unquantized_config if self.config is self.files.hf_config else self.config


def plan_of(
    model: PreTrainedVLM | Sides, options: PlanOptions = DEFAULTS, *, compare: bool = True
) -> ConversionPlan:
    """The proven plan of a Hugging Face folder, or of a config where there are no files.

    Args:
        model: the folder, and the bridge to the Megatron side where that is not its own.
        options: what else the plan depends on.
        compare: whether tensors that have to be equal are read and compared; False where another
            process does that.

    Raises:
        PlanError: files and config are not of one model.
        ConfigError: the config cannot be used.
        CheckpointError: the files cannot be read.
    """
    sides = model if isinstance(model, Sides) else Sides.of(model)
    hf = sides.files
    if not hf.has_weights:
        return sides.bridge.plan_from_config(sides.config, hf.main_dtype, options)
    plan = sides.bridge.plan(sides.config, hf.weights, with_files(options, hf))
    if compare:
        check_equal(plan, hf.weights)
    return plan


def is_state(key: str) -> bool:
    """Whether a checkpoint key is that of training state: of optimizers, random numbers, reruns.

    As megatron-core names it; with several optimizers the keys of each begin with ``chained_<i>.``.
    """
    return _STATE.match(key) is not None


def weight_tensors(checkpoint: "TorchDistCheckpoint") -> dict[str, TensorSpec]:
    """The tensors of a Megatron checkpoint that are weights, not state of training (`is_state`).

    Raises:
        CheckpointError: there are none, or the format is not torch_dist.
    """
    checkpoint.require_torch_dist()
    found = {key: spec for key, spec in checkpoint.tensors.items() if not is_state(key)}
    if not found:
        raise CheckpointError(f"{checkpoint.folder}: it holds no weights of a model")
    return found


def recorded_model(checkpoint: "TorchDistCheckpoint") -> PreTrainedVLM:
    """The model that the config record in a checkpoint describes; it has a config and no files.

    Raises:
        CheckpointError: the format is not torch_dist, or no record holds a config.
    """
    checkpoint.require_torch_dist()
    return PreTrainedVLM.from_config(read_hf_config(checkpoint.folder))


def sides_of_export(
    checkpoint: "TorchDistCheckpoint", reference: PreTrainedVLM | None, part: str | None = None
) -> Sides:
    """A Megatron checkpoint and the files that it is exported like.

    Without a part they are of one model. With a part:

        checkpoint    reference    files
        of the part   whole        the whole model, the part in it that of the checkpoint
        whole         whole        the part alone, named like a model of its own
        whole         the part     the part alone, like the reference

    Args:
        checkpoint: what is exported.
        reference: None for the config that the checkpoint keeps.
        part: the name of a part of the model.

    Raises:
        InputError: checkpoint and reference are of different models, or neither is a whole of which
            there is such a part.
        CheckpointError: no reference is given, and the checkpoint keeps no config.
    """
    files = recorded_model(checkpoint) if reference is None else reference
    config = files.hf_config
    bridge = bridge_for(config.architecture)
    if part is None:
        _check_family(checkpoint, config, config.model_type)
        return Sides(files, config, bridge)
    keys = weight_tensors(checkpoint)
    if part not in bridge.separable and bridge.embedding_key not in keys:
        return _like_the_part(checkpoint, files, part)
    found = bridge.part(part, config)
    if found.in_files.embedding_key not in keys:
        _check_family(checkpoint, config, config.model_type)
        alone = PartOfVLM(files, found.config, found.own_names)
        return Sides(alone, found.config, found.in_checkpoint, found.root, found.experts)
    _check_family(checkpoint, config, found.config.model_type)
    if not files.has_weights:
        raise InputError(
            f"{checkpoint.folder} holds the {part} part of the model alone, and "
            f"{files.name_or_path} no weights to take the rest from; name a folder or hub id that "
            f"has them (--hf)"
        )
    return Sides(files, found.config, found.in_files)


def _like_the_part(
    checkpoint: "TorchDistCheckpoint",
    files: PreTrainedVLM,
    part: str,
) -> Sides:
    """A checkpoint of a whole, of which nothing but its record tells, and files of the part."""
    config, record = files.hf_config, read_record(checkpoint.folder)
    whole = None if record is None else record.hf
    known = registered_bridges().get(whole.architecture) if whole else None
    of_whole = None if known is None else known()
    if whole is None or of_whole is None or part not in of_whole.separable:
        raise InputError(
            f"{checkpoint.folder} keeps no config of a model with a part {quoted(part)}, and "
            f"{config.origin} is not one of such a model; name one that is by --hf"
        )
    found = of_whole.part(part, whole)
    if found.config.model_type != config.model_type:
        raise InputError(
            f"{checkpoint.folder}: its {part} part is a {quoted(found.config.model_type)} model, "
            f"{config.origin} is of a {quoted(config.model_type)}; name one of the same family"
        )
    return Sides(files, config, found.in_checkpoint, found.root)


def plan_export(
    checkpoint: "TorchDistCheckpoint", sides: Sides, experts: str | None = None
) -> tuple[ConversionPlan, tuple[str, ...]]:
    """The proven plan from a Megatron checkpoint to files.

    Args:
        checkpoint: what is exported.
        sides: the files, and the bridge between them and the checkpoint.
        experts: another disk layout of routed experts than that of the files.

    Returns:
        The plan, and the keys of tensors that are no weights of the model and stay behind.

    Raises:
        PlanError: the checkpoint's tensors are not exactly those that the files need.
        CheckpointError: it holds no weights, or none of this model.
        InputError: it lacks a part that only a reference with weights could give.
    """
    reference, config, bridge = sides.files, sides.config, sides.bridge
    experts = experts or sides.experts
    weights = weight_tensors(checkpoint)
    found = {key: spec for key, spec in weights.items() if key.startswith(sides.root)}
    options = replace(bridge.options_of_checkpoint(found), experts=experts)
    if not reference.has_weights:
        _check_whole(checkpoint, bridge, options)
        plan = bridge.plan_from_config(config, main_dtype(found.values()), options)
        plan = replace(plan, hf=as_stored(plan, found))
    elif experts is None:
        plan = plan_of(sides, options)
    else:
        options = with_files(options, reference)
        plan = bridge.plan(config, _rearranged(sides, options), options)
        check_equal(plan, reference.weights)
    require_common_key(checkpoint, plan, config)
    if problems := list(differences(plan.megatron, found)):
        heading = f"{checkpoint.folder} does not hold the model of {config.origin}"
        raise PlanError(problems, heading=heading)
    return plan, tuple(key for key in checkpoint.tensors if key not in found)


def _check_family(checkpoint: "TorchDistCheckpoint", config: HFConfig, model_type: str) -> None:
    """Refuse a reference of another family than the record beside the checkpoint.

    Args:
        checkpoint: the one with the record.
        config: of the reference.
        model_type: that the checkpoint has to have for this reference.

    Raises:
        InputError: the record states another one.
    """
    record = read_record(checkpoint.folder)
    if record is None or record.hf is None or not record.hf.has("model_type"):
        return
    if (recorded := record.hf.model_type) == model_type:
        return
    raise InputError(
        f"{checkpoint.folder} is of a {quoted(recorded)} model by its {CONFIG_RECORD}, "
        f"{config.origin} of a {quoted(config.model_type)}; "
        + (_part_of_the_other(record.hf, config) or "name a model of the same family")
    )


def _part_of_the_other(one: HFConfig, other: HFConfig) -> str:
    """What to do where one model is a part of the other; empty where it is not."""
    for whole, part in ((one, other), (other, one)):
        bridge = registered_bridges().get(whole.architecture)
        for name, model_type in bridge().separable.items() if bridge else ():
            if model_type == part.model_type:
                return f'one is the {name} part of the other: give --part {name} (part="{name}")'
    return ""


def _check_whole(
    checkpoint: "TorchDistCheckpoint", bridge: MegatronModelBridge, options: PlanOptions
) -> None:
    """Raise InputError for a checkpoint without a part that files of the model need."""
    if lacking := sorted(options.without - bridge.optional_parts.keys()):
        raise InputError(
            f"{checkpoint.folder}: it holds no {' and no '.join(lacking)} part of the model, and "
            f"the Hugging Face side has no weights to take it from; name a folder or hub id that "
            f"has them (--hf)"
        )


def require_common_key(
    checkpoint: "TorchDistCheckpoint", plan: ConversionPlan, config: HFConfig
) -> None:
    """Refuse a checkpoint that has no key of the model: then it is another kind of file.

    Args:
        checkpoint: the one that is looked at.
        plan: of the model.
        config: of the model.

    Raises:
        InputError: the record says that the checkpoint is of another family.
        CheckpointError: no key is one of the model's, whatever the record says.
    """
    if not checkpoint.tensors.keys() & plan.megatron.keys():
        _check_family(checkpoint, config, config.model_type)
        found, expected = next(iter(checkpoint.tensors.values())), next(iter(plan.megatron))
        raise CheckpointError(
            f"{checkpoint.folder}: none of its tensors has a key of this model in megatron-core: "
            f"expected such as {expected}, found such as {found.name}: {found.dtype} of shape "
            f"{found.shape}. It is of another model, or of another program; then save it with "
            "megatron-core as torch_dist"
        )


def left_out(sides: Sides, plan: ConversionPlan, experts: str | None = None) -> tuple[str, ...]:
    """Tensors that a config names and neither a checkpoint nor a reference with weights holds."""
    if sides.files.has_weights:
        return ()
    named = sides.bridge.expected_tensors(
        sides.config, main_dtype(plan.hf.values()), PlanOptions(experts=experts or sides.experts)
    )
    return tuple(name for name in named if name not in plan.hf)


def _rearranged(sides: Sides, options: PlanOptions) -> dict[str, TensorSpec]:
    """The reference's tensors with its routed experts in another disk layout.

    The experts of a layer get the dtype that they have in the reference. Tensors that are carried
    over stay as they are.
    """
    bridge, config, known = sides.bridge, sides.config, sides.files.weights
    spelling = bridge.spelling(config, known)
    options = replace(options, spelling=spelling)
    carried = _carried(sides, options)

    def module_of(name: str) -> str:
        return _experts_of(spelling.regular(name), bridge.experts_module)

    dtypes = {module_of(name): spec.dtype for name, spec in known.items()}
    expected = bridge.expected_tensors(config, sides.files.main_dtype, options)
    rearranged: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in expected.items():
        module = module_of(name)
        if module and module in dtypes:
            rearranged[module][name] = TensorSpec(name, spec.shape, dtypes[module])
    # In the order of the reference; what is not an expert is the plan's to accept or refuse.
    tensors: dict[str, TensorSpec] = {}
    modules = set(rearranged)
    for name, stored in known.items():
        module = module_of(name)
        if module in modules and name not in carried:
            tensors |= rearranged.pop(module, {})
        else:
            tensors[name] = TensorSpec(name, stored.shape, stored.dtype)
    return tensors


def _carried(sides: Sides, options: PlanOptions) -> Mapping[str, str]:
    """What of a reference is carried, and so keeps its layout, whichever is asked for."""
    bridge, config, known = sides.bridge, sides.config, sides.files.weights
    try:
        return bridge.extras(config, known, replace(options, experts=None)).carried
    except InputError:  # square experts: the shape does not tell their layout, the caller does
        return bridge.extras(config, known, options).carried


def _experts_of(name: str, experts: str) -> str:
    """The module of routed experts that a tensor belongs to; empty for any other tensor.

    Args:
        name: of the tensor.
        experts: what such names have behind that of their layer.
    """
    module, mark, _ = name.partition(experts)
    return module + mark if mark else ""


def as_stored(plan: ConversionPlan, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The Hugging Face tensors of a plan in the dtypes that the tensors of a checkpoint have.

    Parameters that are kept wider than their files are, to be shifted without loss, say nothing of
    the files: for these the plan's dtype stays.

    Args:
        plan: from the checkpoint to the files.
        found: the tensors of the checkpoint, by key.
    """
    dtypes: dict[str, set[str]] = defaultdict(set)
    for copy in plan.copies:
        if copy.megatron_key in found and not copy.offset:
            dtypes[copy.hf_name].add(found[copy.megatron_key].dtype)
    return {
        name: replace(spec, dtype=widest(*dtypes[name]) or spec.dtype) if dtypes[name] else spec
        for name, spec in plan.hf.items()
    }
