"""Which plan a conversion of files follows, in either direction."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron.bridge.dtypes import holds_all
from megatron.bridge.errors import CheckpointError, PlanError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.model_bridge import (
    DEFAULTS,
    MegatronModelBridge,
    PlanOptions,
)
from megatron.bridge.models.conversion.plan import ConversionPlan, TensorSpec
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM

if TYPE_CHECKING:
    from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint

_OPTIMIZER_PREFIX = "optimizer."
_EXPERTS = ".mlp.experts."


def plan_of(hf: PreTrainedVLM, options: PlanOptions = DEFAULTS) -> ConversionPlan:
    """The proven plan of a Hugging Face folder. Raises PlanError, ConfigError, CheckpointError."""
    bridge = bridge_for(hf.hf_config.architecture)
    return bridge.plan(hf.hf_config, hf.weights, options)


def weight_tensors(checkpoint: "TorchDistCheckpoint") -> dict[str, TensorSpec]:
    """The tensors of a Megatron checkpoint that are weights, not state of an optimizer.

    Raises CheckpointError if there are none, or if the format is not torch_dist.
    """
    checkpoint.require_torch_dist()
    found = {k: t for k, t in checkpoint.tensors.items() if not k.startswith(_OPTIMIZER_PREFIX)}
    if not found:
        raise CheckpointError(f"{checkpoint.folder}: it holds no weights of a model")
    return found


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
    options = replace(bridge.options_of_checkpoint(found), experts=experts)
    if not reference.has_weights:
        plan = _plan_without_files(bridge, config, found, options)
    elif experts is None:
        plan = bridge.plan(config, reference.weights, options)
    else:
        plan = bridge.plan(config, _rearranged(bridge, reference, options), options)
    require_common_key(checkpoint, plan)
    if problems := list(_differences(plan.megatron, found)):
        heading = f"{checkpoint.folder} does not hold the model of {config.origin}"
        raise PlanError(problems, heading=heading)
    return plan, tuple(key for key in checkpoint.tensors if key not in found)


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


def _plan_without_files(
    bridge: MegatronModelBridge,
    config: HFConfig,
    found: Mapping[str, TensorSpec],
    options: PlanOptions,
) -> ConversionPlan:
    """The plan of a config, in the dtypes of the checkpoint: no file says others."""
    plan = bridge.plan_from_config(config, main_dtype(found.values()), options)
    tensors = dict(plan.hf)
    for copy in plan.copies:
        spec, key = plan.hf[copy.hf_name], copy.megatron_key
        # Where the plan itself has two dtypes, as of what is kept as w - 1, they stay.
        if key in found and plan.megatron[key].dtype == spec.dtype:
            tensors[spec.name] = replace(spec, dtype=found[key].dtype)
    return plan if tensors == plan.hf else bridge.plan(config, tensors, options)


def _rearranged(
    bridge: MegatronModelBridge, reference: PreTrainedVLM, options: PlanOptions
) -> dict[str, TensorSpec]:
    """The reference's tensors with its routed experts in another disk layout.

    The experts of a layer get the dtype that they have in the reference. Tensors that are carried
    over stay as they are.
    """
    known = reference.weights
    carried = bridge.carried(known, options)
    dtypes = {_experts_of(name): spec.dtype for name, spec in known.items()}
    expected = bridge.expected_tensors(reference.hf_config, reference.main_dtype, options)
    rearranged: dict[str, dict[str, TensorSpec]] = defaultdict(dict)
    for name, spec in expected.items():
        module = _experts_of(name)
        if module and module in dtypes:
            rearranged[module][name] = TensorSpec(name, spec.shape, dtypes[module])
    # In the order of the reference; what is no expert is the plan's to accept or refuse.
    tensors: dict[str, TensorSpec] = {}
    for name, stored in known.items():
        module = _experts_of(name)
        if module and name not in carried:
            tensors |= rearranged.pop(module, {})
        else:
            tensors[name] = TensorSpec(name, stored.shape, stored.dtype)
    return tensors


def _experts_of(name: str) -> str:
    """The module of routed experts that a tensor belongs to; empty for any other tensor."""
    module, mark, _ = name.partition(_EXPERTS)
    return module + mark if mark else ""


def main_dtype(tensors: Iterable[TensorSpec]) -> str:
    """The dtype that most bytes have; a plan keeps each tensor's own."""
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0]


def _differences(
    expected: Mapping[str, TensorSpec], found: Mapping[str, TensorSpec]
) -> Iterator[str]:
    for key, spec in expected.items():
        if key not in found:
            yield f"{key}: missing from the checkpoint (shape {spec.shape}, dtype {spec.dtype})"
        elif found[key].shape != spec.shape or not holds_all(spec.dtype, found[key].dtype):
            yield (
                f"{key}: expected shape {spec.shape} and dtype {spec.dtype}, found "
                f"{found[key].shape} and {found[key].dtype}"
            )
    for key, spec in found.items():
        if key not in expected:
            yield f"{key}: no row maps it (shape {spec.shape}, dtype {spec.dtype})"
