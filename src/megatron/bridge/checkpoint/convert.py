"""Files to files: a Hugging Face folder to a Megatron checkpoint and back, by the plan.

Neither direction builds a model, needs a GPU or starts a process group; one tensor is in memory
at a time. Nothing is written before the plan is proven, and a target appears complete or not at
all.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.checkpoint.config_record import write_config_record
from megatron.bridge.checkpoint.hf_folder import write_side_files, write_weights
from megatron.bridge.checkpoint.staging import staged_folder
from megatron.bridge.checkpoint.targets import check_target
from megatron.bridge.dtypes import holds_all
from megatron.bridge.errors import InputError, PlanError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.boxes import Box, full_box
from megatron.bridge.models.conversion.model_bridge import (
    DEFAULTS,
    MegatronModelBridge,
    PlanOptions,
)
from megatron.bridge.models.conversion.plan import ConversionPlan, TensorSpec
from megatron.bridge.models.hf_pretrained.fp8 import BlockFP8
from megatron.bridge.models.hf_pretrained.tensors import TensorInfo
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.progress import Progress, Silent

if TYPE_CHECKING:
    import torch

    from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint

_OPTIMIZER_PREFIX = "optimizer."
_EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    dropped: tensors of a Megatron checkpoint that are no weights (optimizer state).
    inexact: tensors that will not come back exactly, with the largest error; only norms that
        Megatron keeps as w - 1, and only for values outside of [0.5, 2].
    hf: tensors of the Hugging Face files as they lie there; those of the plan are dequantized.
    quantization: of the Hugging Face files, None if they are not quantized.
    """

    architecture: str
    target: Path
    plan: ConversionPlan
    hf: Mapping[str, TensorSpec]
    quantization: BlockFP8 | None = None
    dropped: tuple[str, ...] = ()
    inexact: tuple[tuple[str, float], ...] = ()


def plan_of(hf: PreTrainedVLM, options: PlanOptions = DEFAULTS) -> ConversionPlan:
    """The proven plan of a Hugging Face folder. Raises PlanError, ConfigError, CheckpointError."""
    bridge = bridge_for(hf.hf_config.architecture)
    return bridge.plan(hf.hf_config, hf.weights, options)


def import_checkpoint(
    source: PreTrainedVLM,
    target: Path,
    *,
    experts: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write `source` as a Megatron checkpoint: target/iter_0000000 and the tracker file.

    The weights of an FP8 release are dequantized to BF16. experts: how the source's routed experts
    lie (ExpertLayout), where square shapes cannot tell.
    Raises PlanError, CheckpointError or ConfigError before anything is written, TargetExists if
    `target` exists and `force` is not set.
    """
    from megatron.bridge.checkpoint.iterations import write_tracker
    from megatron.bridge.checkpoint.torch_dist_writer import write_torch_dist
    from megatron.bridge.models.conversion.transfer import inexact_offsets, read_megatron

    check_target(target, [source.name_or_path], force=force)
    bridge = bridge_for(source.hf_config.architecture)
    plan = plan_of(source, PlanOptions(experts=experts))
    settings = bridge.provider_settings(
        source.hf_config, main_dtype(plan.hf.values()), source.tensors
    )
    inexact = tuple(inexact_offsets(plan, source.weights.read))
    shown = progress or Silent()

    def read(key: str, box: Box) -> "torch.Tensor":
        tensor = read_megatron(plan, key, box, source.weights.read)
        shown.advance(tensor.nbytes)
        return tensor

    with staged_folder(target, force=force) as staged:
        shown.start("import", plan.megatron_bytes)
        folder = write_tracker(staged, iteration=0)
        write_torch_dist(
            folder,
            plan.megatron,
            ((parameter.key, parameter.box) for parameter in plan.parameters),
            read,
            extra_states=plan.extra_states,
        )
        write_config_record(folder, bridge.provider, settings, source.unquantized_config)
    return Conversion(
        bridge.source,
        target,
        plan,
        _specs(source.tensors),
        source.quantization,
        inexact=inexact,
    )


def export_checkpoint(
    source: Path,
    target: Path,
    reference: PreTrainedVLM,
    *,
    experts: str | None = None,
    fp8: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the Megatron checkpoint `source` as a Hugging Face folder laid out like `reference`.

    Names, shapes, dtypes, shards and side files are those of the reference; where it holds no
    weights, the dtype is the checkpoint's. What the checkpoint has no place for, such as the MTP
    layer of a model that was trained without it, comes from the reference.

    experts: another disk layout of routed experts (ExpertLayout). fp8: quantize what the reference
    has quantized; without it the weights are BF16, and config.json says nothing else. Raises
    PlanError, InputError or one of its kinds before anything is written, TargetExists if `target`
    exists and `force` is not set.
    """
    from megatron.bridge.checkpoint.fp8_writer import Requantizer, fp8_reference
    from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint
    from megatron.bridge.models.conversion.transfer import read_hf

    check_target(target, [source, reference.name_or_path], force=force)
    if fp8 and experts is not None:
        raise InputError(
            "FP8 files are written in the layout of their reference: fp8 and experts exclude each "
            "other"
        )
    quantized = fp8_reference(reference) if fp8 else None
    checkpoint = TorchDistCheckpoint(source)
    plan, dropped = plan_export(checkpoint, reference, experts)
    shown = progress or Silent()

    def read_weight(name: str) -> "torch.Tensor":
        if name in plan.carried:
            return reference.weights.read(name)
        return read_hf(plan, name, full_box(plan.hf[name].shape), checkpoint.read)

    read_file = read_weight if quantized is None else Requantizer(quantized, read_weight).read
    written = plan.hf if quantized is None else _specs(quantized.index)

    def read(name: str) -> "torch.Tensor":
        tensor = read_file(name)
        shown.advance(tensor.nbytes)
        return tensor

    with staged_folder(target, force=force) as staged:
        shown.start("export", sum(spec.nbytes for spec in written.values()))
        write_weights(staged, written, reference, read)
        write_side_files(staged, reference, quantized=fp8)
    return Conversion(
        reference.hf_config.architecture,
        target,
        plan,
        written,
        reference.quantization if fp8 else None,
        dropped,
    )


def _specs(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, info.shape, info.dtype) for name, info in tensors.items()}


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
    found = {k: t for k, t in checkpoint.tensors.items() if not k.startswith(_OPTIMIZER_PREFIX)}
    options = replace(bridge.options_of_checkpoint(found), experts=experts)
    if not reference.has_weights:
        plan = bridge.plan_from_config(config, main_dtype(found.values()), options)
    elif experts is None:
        plan = bridge.plan(config, reference.weights, options)
    else:
        plan = bridge.plan(config, _rearranged(bridge, reference, options), options)
    if problems := list(_differences(plan.megatron, found)):
        heading = f"{checkpoint.folder} does not hold the model of {config.origin}"
        raise PlanError(problems, heading=heading)
    return plan, tuple(key for key in checkpoint.tensors if key not in found)


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
