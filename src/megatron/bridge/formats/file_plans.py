"""Which plan a conversion of files follows, in either direction."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron.bridge.dtypes import widest
from megatron.bridge.errors import CheckpointError, InputError, PlanError
from megatron.bridge.formats.config_record import CONFIG_RECORD, read_hf_config, read_record
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.equal_copies import check_equal
from megatron.bridge.models.conversion.model_bridge import (
    DEFAULTS,
    MegatronModelBridge,
    PlanOptions,
    with_files,
)
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.tensors.spec import TensorSpec, differences, main_dtype
from megatron.bridge.text.quoting import quoted

if TYPE_CHECKING:
    from megatron.bridge.formats.torch_dist.reader import TorchDistCheckpoint

_STATE = re.compile(r"(chained_\d+\.)*(optimizer\.|(rng_state|rerun_state_machine_state)(/|$))")


def plan_of(hf: PreTrainedVLM, options: PlanOptions = DEFAULTS) -> ConversionPlan:
    """The proven plan of a Hugging Face folder, or of a config where there are no files.

    Raises PlanError, ConfigError or CheckpointError.
    """
    bridge = bridge_for(hf.hf_config.architecture)
    if not hf.has_weights:
        return bridge.plan_from_config(hf.hf_config, hf.main_dtype, options)
    plan = bridge.plan(hf.hf_config, hf.weights, with_files(options, hf))
    check_equal(plan, hf.weights)
    return plan


def is_state(key: str) -> bool:
    """Whether a checkpoint key is that of training state: of optimizers, random numbers, reruns.

    As megatron-core names it; with several optimizers the keys of each begin with ``chained_<i>.``.
    """
    return _STATE.match(key) is not None


def weight_tensors(checkpoint: "TorchDistCheckpoint") -> dict[str, TensorSpec]:
    """The tensors of a Megatron checkpoint that are weights, not state of training (`is_state`).

    Raises CheckpointError if there are none, or if the format is not torch_dist.
    """
    checkpoint.require_torch_dist()
    found = {key: spec for key, spec in checkpoint.tensors.items() if not is_state(key)}
    if not found:
        raise CheckpointError(f"{checkpoint.folder}: it holds no weights of a model")
    return found


def recorded_model(checkpoint: "TorchDistCheckpoint") -> PreTrainedVLM:
    """The model that the config record in a checkpoint describes; it has a config and no files.

    Raises CheckpointError if the format is not torch_dist, or no record holds a config.
    """
    checkpoint.require_torch_dist()
    return PreTrainedVLM.from_config(read_hf_config(checkpoint.folder))


def plan_export(
    checkpoint: "TorchDistCheckpoint", reference: PreTrainedVLM, experts: str | None = None
) -> tuple[ConversionPlan, tuple[str, ...]]:
    """The proven plan from a Megatron checkpoint to the layout of a reference.

    experts: another disk layout of routed experts than the reference's.
    Also the keys of tensors that are no weights and stay behind. Raises PlanError if the
    checkpoint's tensors are not exactly those that the reference needs.
    """
    config = reference.hf_config
    bridge = bridge_for(config.architecture)
    found = weight_tensors(checkpoint)
    _check_family(checkpoint, config)
    options = replace(bridge.options_of_checkpoint(found), experts=experts)
    if not reference.has_weights:
        _check_whole(checkpoint, bridge, options)
        plan = bridge.plan_from_config(config, main_dtype(found.values()), options)
        plan = replace(plan, hf=as_stored(plan, found))
    elif experts is None:
        plan = plan_of(reference, options)
    else:
        options = with_files(options, reference)
        plan = bridge.plan(config, _rearranged(bridge, reference, options), options)
        check_equal(plan, reference.weights)
    require_common_key(checkpoint, plan)
    if problems := list(differences(plan.megatron, found)):
        heading = f"{checkpoint.folder} does not hold the model of {config.origin}"
        raise PlanError(problems, heading=heading)
    return plan, tuple(key for key in checkpoint.tensors if key not in found)


def _check_family(checkpoint: "TorchDistCheckpoint", config: HFConfig) -> None:
    """Raise InputError for a reference of another family than the record beside the checkpoint."""
    record = read_record(checkpoint.folder)
    if record is None or record.hf is None or not record.hf.has("model_type"):
        return
    if (recorded := record.hf.model_type) != config.model_type:
        raise InputError(
            f"{checkpoint.folder} is of a {quoted(recorded)} model by its {CONFIG_RECORD}, "
            f"{config.origin} of a {quoted(config.model_type)}; name a model of the same family"
        )


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


def require_common_key(checkpoint: "TorchDistCheckpoint", plan: ConversionPlan) -> None:
    """Raise CheckpointError if no key is one of the model's: then it is another kind of file."""
    if not checkpoint.tensors.keys() & plan.megatron.keys():
        found, expected = next(iter(checkpoint.tensors.values())), next(iter(plan.megatron))
        raise CheckpointError(
            f"{checkpoint.folder}: none of its tensors has a key of this model in megatron-core: "
            f"expected such as {expected}, found such as {found.name}: {found.dtype} of shape "
            f"{found.shape}. It is of another model, or of another program; then save it with "
            "megatron-core as torch_dist"
        )


def left_out(
    reference: PreTrainedVLM, plan: ConversionPlan, experts: str | None = None
) -> tuple[str, ...]:
    """Tensors that a config names and neither a checkpoint nor a reference with weights holds."""
    if reference.has_weights:
        return ()
    config = reference.hf_config
    bridge = bridge_for(config.architecture)
    named = bridge.expected_tensors(
        config, main_dtype(plan.hf.values()), PlanOptions(experts=experts)
    )
    return tuple(name for name in named if name not in plan.hf)


def _rearranged(
    bridge: MegatronModelBridge, reference: PreTrainedVLM, options: PlanOptions
) -> dict[str, TensorSpec]:
    """The reference's tensors with its routed experts in another disk layout.

    The experts of a layer get the dtype that they have in the reference. Tensors that are carried
    over stay as they are.
    """
    known = reference.weights
    spelling = bridge.spelling(reference.hf_config, known)
    options = replace(options, spelling=spelling)
    carried = _carried(bridge, reference, options)

    def module_of(name: str) -> str:
        return _experts_of(spelling.regular(name), bridge.experts_module)

    dtypes = {module_of(name): spec.dtype for name, spec in known.items()}
    expected = bridge.expected_tensors(reference.hf_config, reference.main_dtype, options)
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


def _carried(
    bridge: MegatronModelBridge, reference: PreTrainedVLM, options: PlanOptions
) -> Mapping[str, str]:
    """What of a reference is carried, and so keeps its layout, whichever is asked for."""
    config, known = reference.hf_config, reference.weights
    try:
        return bridge.extras(config, known, replace(options, experts=None)).carried
    except InputError:  # square experts: the shape does not tell their layout, the caller does
        return bridge.extras(config, known, options).carried


def _experts_of(name: str, experts: str) -> str:
    """The module of routed experts that a tensor belongs to; empty for any other tensor.

    experts: what such names have behind that of their layer.
    """
    module, mark, _ = name.partition(experts)
    return module + mark if mark else ""


def as_stored(plan: ConversionPlan, found: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """The Hugging Face tensors of a plan in the dtypes that the tensors of a checkpoint have.

    found: those, by key. Parameters that are kept wider than their files are, to be shifted
    without loss, say nothing of the files: for these the plan's dtype stays.
    """
    dtypes: dict[str, set[str]] = defaultdict(set)
    for copy in plan.copies:
        if copy.megatron_key in found and not copy.offset:
            dtypes[copy.hf_name].add(found[copy.megatron_key].dtype)
    return {
        name: replace(spec, dtype=widest(*dtypes[name]) or spec.dtype) if dtypes[name] else spec
        for name, spec in plan.hf.items()
    }
