"""Files to files: a Hugging Face folder to a Megatron checkpoint and back, by the plan.

Neither direction builds a model, needs a GPU or starts a process group; one tensor is in memory
at a time. Nothing is written before the plan is proven, and a target appears complete or not at
all.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron.bridge.checkpoint.config_record import write_config_record
from megatron.bridge.checkpoint.hf_folder import write_side_files, write_weights
from megatron.bridge.checkpoint.staging import staged_folder
from megatron.bridge.checkpoint.targets import check_target
from megatron.bridge.errors import PlanError
from megatron.bridge.models.catalog import bridge_for
from megatron.bridge.models.conversion.boxes import Box, full_box
from megatron.bridge.models.conversion.plan import ConversionPlan, TensorSpec
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.progress import Progress, Silent

if TYPE_CHECKING:
    import torch

    from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint

_OPTIMIZER_PREFIX = "optimizer."


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    dropped: tensors of a Megatron checkpoint that are no weights (optimizer state).
    """

    architecture: str
    target: Path
    plan: ConversionPlan
    dropped: tuple[str, ...] = ()


def plan_of(hf: PreTrainedVLM, padded_vocab_size: int | None = None) -> ConversionPlan:
    """The proven plan of a Hugging Face folder. Raises PlanError, ConfigError, CheckpointError."""
    bridge = bridge_for(hf.hf_config.architecture)
    return bridge.plan(hf.hf_config, hf.tensors, padded_vocab_size)


def import_checkpoint(
    source: PreTrainedVLM,
    target: Path,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write `source` as a Megatron checkpoint: target/iter_0000000 and the tracker file.

    Raises PlanError, CheckpointError or ConfigError before anything is written, TargetExists if
    `target` exists and `force` is not set.
    """
    from megatron.bridge.checkpoint.iterations import write_tracker
    from megatron.bridge.checkpoint.torch_dist_writer import write_torch_dist
    from megatron.bridge.models.conversion.transfer import read_megatron

    check_target(target, [source.name_or_path], force=force)
    bridge = bridge_for(source.hf_config.architecture)
    plan = plan_of(source)
    settings = bridge.provider_settings(source.hf_config, main_dtype(plan.hf.values()))
    shown = progress or Silent()

    def read(key: str, box: Box) -> "torch.Tensor":
        tensor = read_megatron(plan, key, box, source.tensors.read)
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
        write_config_record(folder, bridge.provider, settings, source.hf_config)
    return Conversion(bridge.source, target, plan)


def export_checkpoint(
    source: Path,
    target: Path,
    reference: PreTrainedVLM,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the Megatron checkpoint `source` as a Hugging Face folder laid out like `reference`.

    Names, shapes, dtypes, shards and side files are those of the reference; where it holds no
    weights, the dtype is the checkpoint's. Raises PlanError, CheckpointError or ConfigError before
    anything is written, TargetExists if `target` exists and `force` is not set.
    """
    from megatron.bridge.checkpoint.torch_dist_reader import TorchDistCheckpoint
    from megatron.bridge.models.conversion.transfer import read_hf

    check_target(target, [source, reference.name_or_path], force=force)
    checkpoint = TorchDistCheckpoint(source)
    plan, dropped = plan_export(checkpoint, reference)
    shown = progress or Silent()

    def read(name: str) -> "torch.Tensor":
        tensor = read_hf(plan, name, full_box(plan.hf[name].shape), checkpoint.read)
        shown.advance(tensor.nbytes)
        return tensor

    with staged_folder(target, force=force) as staged:
        shown.start("export", plan.hf_bytes)
        write_weights(staged, plan, reference, read)
        write_side_files(staged, reference)
    return Conversion(reference.hf_config.architecture, target, plan, dropped)


def plan_export(
    checkpoint: "TorchDistCheckpoint", reference: PreTrainedVLM
) -> tuple[ConversionPlan, tuple[str, ...]]:
    """The proven plan from a Megatron checkpoint to the layout of a reference.

    Also the keys of tensors that are no weights and stay behind. Raises PlanError if the
    checkpoint's tensors are not exactly those that the reference needs.
    """
    config = reference.hf_config
    bridge = bridge_for(config.architecture)
    found = {k: t for k, t in checkpoint.tensors.items() if not k.startswith(_OPTIMIZER_PREFIX)}
    # The vocabulary was padded for the layout that the checkpoint was written with.
    embedding = found.get(bridge.embedding_key)
    padded = embedding.shape[0] if embedding is not None and embedding.shape else None
    if reference.has_weights:
        plan = bridge.plan(config, reference.tensors, padded)
    else:
        plan = bridge.plan_from_config(config, main_dtype(found.values()), padded)
    if problems := list(_differences(plan.megatron, found)):
        heading = f"{checkpoint.folder} does not hold the model of {config.origin}"
        raise PlanError(problems, heading=heading)
    return plan, tuple(key for key in checkpoint.tensors if key not in found)


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
        elif found[key] != spec:
            yield (
                f"{key}: expected shape {spec.shape} and dtype {spec.dtype}, found "
                f"{found[key].shape} and {found[key].dtype}"
            )
    for key, spec in found.items():
        if key not in expected:
            yield f"{key}: no row maps it (shape {spec.shape}, dtype {spec.dtype})"
