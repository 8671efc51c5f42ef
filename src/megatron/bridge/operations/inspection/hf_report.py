"""What a Hugging Face model is made of, and whether a bridge can convert it."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from megatron.bridge.errors import BridgeError, CheckpointError, ConfigError, InputError
from megatron.bridge.formats.file_plans import Sides
from megatron.bridge.models.catalog import bridge_for, registered_bridges
from megatron.bridge.models.conversion.description import LANGUAGE_SIZES, Description, sizes_fact
from megatron.bridge.models.conversion.equal_copies import check_equal
from megatron.bridge.models.conversion.model_bridge import DEFAULTS, PlanOptions, with_files
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.fp8 import Weights, dequantized_view
from megatron.bridge.models.hf_pretrained.quantization import BlockFP8, quantization_of
from megatron.bridge.models.hf_pretrained.reference import local_folder, repository_of
from megatron.bridge.models.hf_pretrained.tensors import TensorIndex, TensorInfo
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.models.hf_pretrained.weight_files import INDEX_FILE
from megatron.bridge.operations.amounts import Shard, TensorSummary
from megatron.bridge.operations.inspection.hub_headers import RemoteTensor, hub_headers
from megatron.bridge.operations.inspection.row_summary import RowSummary
from megatron.bridge.paths import local_path
from megatron.bridge.tensors.spec import main_dtype
from megatron.bridge.text.document import UNSTATED, spread, stated

type Origin = Literal["files", "hub headers", "config", "checkpoint", "reference"]


@dataclass(frozen=True, kw_only=True)
class HFReport:
    """A Hugging Face model, as its config and headers describe it.

    Attributes:
        folder: that the source led to.
        bridge: the class that converts it, or None.
        origin: where the tensors are known from: the "files" or "hub headers" of the weights;
            "config" where no weights are at hand and the tensors are those that the config asks
            for; "checkpoint" where a Megatron checkpoint gives them; "reference" where it gives
            them in the layout of a reference.
        hf: the tensors as they are stored.
        megatron: those of the checkpoint; None without a plan.
        filled_in: what the config leaves out and transformers' config class fills in, of the keys
            that were needed, by path.
        tied: whether the output layer is the embedding.
        description: what the family says of the model; without a bridge, sizes alone.
        plan: None if it is not proven; of an FP8 release it is the plan of the dequantized model.
        settings: fields of the family's provider; None where they are not known to be right.
        problem: why no plan is proven.
    """

    format: Literal["huggingface", "megatron"] = "huggingface"
    source: str
    folder: Path
    architecture: str
    model_type: str
    bridge: str | None
    origin: Origin
    hf: TensorSummary | None
    megatron: TensorSummary | None
    shards: tuple[Shard, ...]
    side_files: tuple[str, ...]
    filled_in: Mapping[str, Any]
    tied: bool
    quantization: BlockFP8 | None
    description: Description = field(metadata=UNSTATED)
    plan: ConversionPlan | None = field(metadata=UNSTATED)
    settings: Mapping[str, Any] | None = field(metadata=UNSTATED)
    problem: BridgeError | None = field(metadata=UNSTATED)

    @spread
    def described(self) -> Mapping[str, Any]:
        """What the family says, by the names that it gives."""
        return {key: fact.value for key, fact in self.description.items()}

    @stated
    def dtypes_assumed(self) -> bool:
        """Whether no file says the dtypes."""
        return self.origin == "config"

    @stated
    def carried(self) -> Mapping[str, str]:
        """Tensors that have no place in the Megatron model, and why."""
        return {} if self.plan is None else self.plan.carried

    @stated
    def proven(self) -> bool:
        """Whether it converts."""
        return self.problem is None

    @stated
    def problems(self) -> tuple[str, ...]:
        """Why it does not convert, one by one."""
        if self.problem is None:
            return ()
        return self.problem.problems or (str(self.problem),)

    @stated
    def message(self) -> str | None:
        """Why it does not convert, as the error says it."""
        return None if self.problem is None else str(self.problem)

    @stated
    def rows(self) -> list[RowSummary]:
        """The rows of the plan; none without a plan."""
        return [] if self.plan is None else [RowSummary.of(row) for row in self.plan.rows]


def inspect_hf(
    reference: str | os.PathLike[str],
    revision: str | None = None,
    options: PlanOptions = DEFAULTS,
    part: str | None = None,
) -> HFReport:
    """Look at a folder, with weights or only a config.json, at a config.json, or at a hub id.

    Of a hub id that is not in the cache only the config, the small files and the headers of the
    weights are fetched. A model that cannot be converted is reported.

    Args:
        reference: what to look at.
        revision: of a hub id.
        options: what the plan depends on.
        part: of the model, to be converted alone.

    Raises:
        InputError: there is nothing to report on: no such model or part, an unreadable config,
            damaged weights.
    """
    path = local_path(reference)
    if path.is_file():
        if revision is not None:
            raise InputError(f"{reference} is a file: --revision means nothing for it")
        hf = PreTrainedVLM.from_config(HFConfig.from_file(path))
    else:
        hf = PreTrainedVLM.from_pretrained(reference, revision)
    sides = None if part is None else Sides.of(hf, part)
    return inspect_model(hf, os.fspath(reference), options, sides)


def inspect_model(
    hf: PreTrainedVLM,
    source: str,
    options: PlanOptions = DEFAULTS,
    sides: Sides | None = None,
) -> HFReport:
    """Look at a model; see `inspect_hf`.

    Args:
        hf: the model.
        source: what to call it.
        options: what the plan depends on.
        sides: the part of the model that is to be converted alone, if it is one.
    """
    config = hf.hf_config if sides is None else sides.config
    origin, tensors = _tensors(hf)
    known = registered_bridges().get(config.architecture)
    bridge = sides.bridge if sides else known() if known else None
    options = with_files(options, hf)
    found = _conversion(hf.hf_config, tensors, options, sides)
    if origin != "config":
        _check_equal(hf, found, read=origin == "files")
    if bridge is None:
        description: Description = {"text": sizes_fact("text", config, LANGUAGE_SIZES)}
    else:
        description = bridge.describe(config, tensors, options)
    expected = None if found.plan is None else found.plan.hf
    specs = expected if tensors is None else tensors
    return HFReport(
        source=source,
        folder=hf.folder if hf.has_files else Path(config.origin).absolute().parent,
        architecture=config.architecture,
        model_type=config.model_type,
        bridge=None if bridge is None else type(bridge).__name__,
        origin=origin,
        hf=None if specs is None else TensorSummary.of(specs.values()),
        megatron=None if found.plan is None else TensorSummary.of(found.plan.megatron.values()),
        shards=() if tensors is None else _shards(tensors),
        side_files=tuple(map(str, hf.side_files)),
        description=description,
        filled_in=dict(config.filled_in),
        tied=_tied(config),
        quantization=found.quantization,
        plan=found.plan,
        settings=found.settings,
        problem=found.problem,
    )


class _HeadersOnly(PreTrainedVLM):
    """A model on the hub of whose weights the headers are read: to plan with, not to convert."""

    @cached_property
    def weights(self) -> Weights:
        _, tensors = _tensors(self)
        view = dequantized_view(tensors or {}, self.quantization, self.hf_config.origin)
        return cast("Weights", view)


def headers_only(hf: PreTrainedVLM) -> PreTrainedVLM:
    """The same model to plan with: the weights of a hub id are not fetched."""
    if not hf.has_files or local_folder(hf.name_or_path) is not None:
        return hf
    repository = repository_of(hf.name_or_path)
    return _HeadersOnly.from_pretrained(repository, hf.folder.name)


def _tensors(
    hf: PreTrainedVLM,
) -> tuple[Origin, Mapping[str, TensorInfo] | Mapping[str, RemoteTensor] | None]:
    if not hf.has_weights:
        if hf.has_files and (hf.folder / INDEX_FILE).exists():
            return "files", hf.tensors  # raises: the index names shards that are not there
        return "config", None
    if local_path(hf.name_or_path).is_dir():
        return "files", hf.tensors
    try:
        return "files", TensorIndex.from_folder(hf.folder)
    except CheckpointError:  # not in the cache, or not all of them
        return "hub headers", hub_headers(hf.name_or_path, revision=hf.folder.name)


@dataclass
class _Conversion:
    """How a model is quantized, and its plan or why there is none."""

    quantization: BlockFP8 | None = None
    plan: ConversionPlan | None = None
    settings: Mapping[str, Any] | None = None
    problem: BridgeError | None = None


def _conversion(
    config: HFConfig,
    tensors: Mapping[str, TensorInfo] | Mapping[str, RemoteTensor] | None,
    options: PlanOptions,
    sides: Sides | None,
) -> _Conversion:
    """Settings of the Megatron model are part of the proof."""
    found = _Conversion()
    try:
        found.quantization = quantization_of(config, tensors)
        bridge = sides.bridge if sides else bridge_for(config.architecture)
        view = None
        if tensors is not None:
            view = dequantized_view(tensors, found.quantization, config.origin)
        if sides is not None:
            config = sides.config
        if view is None:
            bridge.check(config)  # what is wrong with the kind of model comes before its dtype
            plan = bridge.plan_from_config(config, config.dtype, options)
        else:
            plan = bridge.plan(config, view, options)
        dtype = main_dtype(plan.hf.values())
        found.settings = bridge.provider_settings(config, dtype, plan.hf)
        found.plan = plan
    except BridgeError as error:
        found.problem = error
    return found


def _check_equal(hf: PreTrainedVLM, found: _Conversion, *, read: bool) -> None:
    """Whether copies are copies is part of the proof, too; headers alone cannot tell.

    Args:
        hf: the model.
        found: its plan; this is changed.
        read: whether the data are at hand.
    """
    plan = found.plan
    if plan is None or not plan.equal:
        return
    if not read:
        unproven = {
            n: f"{plan.carried[n]}; not compared: only headers were read" for n in plan.equal
        }
        found.plan = replace(plan, carried={**plan.carried, **unproven})
        return
    try:
        check_equal(plan, hf.weights)
    except BridgeError as error:
        found.plan, found.settings, found.problem = None, None, error


def _tied(config: HFConfig) -> bool:
    """A wrong value is in `problem`."""
    try:
        return config.require("tie_word_embeddings", bool)
    except ConfigError:
        return False


def _shards(
    tensors: Mapping[str, TensorInfo] | Mapping[str, RemoteTensor],
) -> tuple[Shard, ...]:
    files: dict[str, list[int]] = defaultdict(list)
    for tensor in tensors.values():
        file = tensor.file
        if isinstance(tensors, TensorIndex):
            file = file.relative_to(tensors.folder)
        files[file.as_posix()].append(tensor.nbytes)
    return tuple(Shard(len(sizes), sum(sizes), name) for name, sizes in sorted(files.items()))
