"""Hugging Face folders for megatron-core's own `dist_checkpointing.load` and `save`.

    strategy = HuggingFaceStrategy("organization/model")
    state = dist_checkpointing.load(
        model.sharded_state_dict(), strategy.checkpoint_dir, sharded_strategy=strategy
    )
    dist_checkpointing.save(model.sharded_state_dict(), "out", sharded_strategy=strategy)

Each rank reads and writes only the boxes that it holds: the plan says where in the files they lie.
"""

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)

from megatron.bridge.dtypes import torch_dtype
from megatron.bridge.engine.pieces import OutputFile
from megatron.bridge.engine.stream import write_files
from megatron.bridge.errors import InputError
from megatron.bridge.exchange.roster import Shard, check_held_once, global_tensors
from megatron.bridge.formats.file_plans import Sides, plan_of
from megatron.bridge.formats.hf_folder import side_file_copies, weight_files
from megatron.bridge.formats.torch_dist.file_layout import torch_dist_files
from megatron.bridge.live.filling import fill_all
from megatron.bridge.live.local_tensors import LocalTensor
from megatron.bridge.live.shard_transfer import write_by_ranks
from megatron.bridge.live.sharded_state import (
    Holding,
    check_common_state,
    check_objects,
    check_tensors,
    sharded_tensor,
    sharded_tensors,
)
from megatron.bridge.live.shared_files import SharedFiles
from megatron.bridge.live.shared_staging import filled_by_ranks
from megatron.bridge.models.conversion.casting import Casting
from megatron.bridge.models.conversion.layer_keys import BY_CONFIG, KeyForms
from megatron.bridge.models.conversion.model_bridge import PlanOptions
from megatron.bridge.models.conversion.plan import ConversionPlan
from megatron.bridge.models.hf_pretrained.fp8 import check_scales
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.paths import PathLike, local_path
from megatron.bridge.progress import Silent
from megatron.bridge.runtime.ranks import Ranks

_BACKEND, _VERSION = "hugging_face", 1
_WAYS_OUT = "round=True rounds them"

type State = dict[str, Any]


class HuggingFaceStrategy(TorchDistLoadShardedStrategy, TorchDistSaveShardedStrategy):
    """Loads sharded state dicts from Hugging Face files, and saves them as such files."""

    def __init__(
        self,
        path: PathLike,
        *,
        revision: str | None = None,
        part: str | None = None,
        experts: str | None = None,
        round: bool = False,  # noqa: A002 - the name of the option
        layers_share_keys: bool | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        """Nothing is read before `load` or `save`.

        Args:
            path: a folder or a hub id: what is loaded, or what a saved folder is laid out like.
            revision: of a hub id, where it does not stand behind an "@".
            part: of the model in the files ("language"), whose keys the state has.
            experts: how routed experts lie in the files (ExpertLayout), where names and shapes do
                not say it.
            round: round values that do not fit instead of raising InexactCast.
            layers_share_keys: the form of the keys in metadata, which megatron-core asks for with
                every `strict` but the default: False for that of `non_homogeneous_layers`, None for
                the one of the model that is made of the config. States are read and written in
                either form.
            process_group: of the ranks that load or save together; None for all of them.
        """
        TorchDistLoadShardedStrategy.__init__(self, stream_ckpt_dequant=False)
        TorchDistSaveShardedStrategy.__init__(self, _BACKEND, _VERSION)
        self._path, self._revision, self._part = path, revision, part
        self._experts, self._casting = experts, Casting(round, _WAYS_OUT)
        self._layers_share_keys, self._ranks = layers_share_keys, Ranks(process_group)
        self._gave_metadata = False

    @cached_property
    def checkpoint_dir(self) -> str:
        """The folder to give to `load`, which looks there for everything that is no tensor.

        It holds the common state of an imported checkpoint, and is gone with the strategy.
        """
        folder = tempfile.mkdtemp(prefix="hugging-face-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        files = torch_dist_files({}, [()], max_file_bytes=1 << 20)
        write_files(Path(folder), files, lambda *_: None)
        save_config(CheckpointingConfig(_BACKEND, _VERSION), folder)
        return folder

    @torch.no_grad()
    def load(
        self, sharded_state_dict: State, checkpoint_dir: PathLike, async_strategy: str = "mcore"
    ) -> State:
        """Fill the tensors of a sharded state dict; `dist_checkpointing.load` calls it.

        Values are cast to the dtype of their tensor.

        Args:
            sharded_state_dict: with factories applied.
            checkpoint_dir: that of this strategy.
            async_strategy: is not used.

        Returns:
            The state dict, with tensors and objects in the places of those that are sharded.

        Raises:
            InputError: the state holds what Hugging Face files do not; on every rank, if one of
                them cannot go on.
            PlanError: it is of another model than the files.
            CheckpointError: the files cannot be read.
            InexactCast: a norm that Megatron keeps as w - 1 does not fit its tensor.
        """

        def wanted() -> Holding:
            self._check_folder(checkpoint_dir)
            for entry in sharded_tensors(sharded_state_dict):
                entry.init_data("cpu")  # where there is none
            tensors = map(sharded_tensor, sharded_tensors(sharded_state_dict))
            return Holding.of(sharded_state_dict, tensors)

        holding = Holding.of_all(self._ranks.all_of(wanted))
        if holding.is_empty:
            return sharded_state_dict

        def planned() -> ConversionPlan:
            files = self._sides.files
            if not files.has_weights:
                raise InputError(f"{files.name_or_path}: there are no weights to load")
            plan = self._plan_of(sharded_state_dict, holding)
            self._check_metadata(holding.shards)
            check_scales(files.weights)
            return plan

        plan = self._ranks.together(planned)

        def fill() -> None:
            tensors = [*map(sharded_tensor, sharded_tensors(sharded_state_dict))]
            fill_all(plan, tensors, self._sides.files.weights, self._casting, Silent())

        self._ranks.together(fill)
        return dict(dict_list_map_outplace(_loaded, sharded_state_dict))

    def load_tensors_metadata(
        self, checkpoint_dir: PathLike, metadata: object = None
    ) -> dict[str, ShardedTensor]:
        """Every tensor by its key, whole and without data; see `layers_share_keys`.

        Args:
            checkpoint_dir: that of this strategy.
            metadata: is not used.

        Raises:
            BridgeError: as of `load`.
        """
        return {
            key: ShardedTensor.from_rank_offsets(
                key, torch.empty(spec.shape, dtype=torch_dtype(spec.dtype), device="meta")
            ).without_data()
            for key, spec in self._plan_by_config(checkpoint_dir).megatron.items()
        }

    def load_sharded_metadata(self, checkpoint_dir: PathLike) -> State:
        """Every tensor, and every object that an imported checkpoint holds beside them."""
        names = self._plan_by_config(checkpoint_dir).extra_states
        objects = {name: ShardedObject.empty_from_unique_key(name) for name in names}
        return {**objects, **self.load_tensors_metadata(checkpoint_dir)}

    @torch.no_grad()
    def save(self, sharded_state_dict: State, checkpoint_dir: PathLike) -> None:
        """Write a folder laid out like the strategy's own; `dist_checkpointing.save` calls it.

        Every rank writes what it is the main replica of. The folder's files appear when all of them
        are complete. Dtypes, files and their order are the reference's, and what the state has no
        place for, such as a layer that the model was built without, is.

        Args:
            sharded_state_dict: with factories applied.
            checkpoint_dir: an empty folder that all ranks see.

        Raises:
            InputError: the state holds what Hugging Face files do not, or the ranks do not hold all
                of the model; on every rank, if one of them cannot go on.
            TargetExists: the folder is not empty.
            PlanError: the state is of another model than the files.
            InexactCast: values do not fit their dtype.
        """

        def held() -> list[LocalTensor]:
            check_common_state(sharded_state_dict)
            tensors = map(sharded_tensor, sharded_tensors(sharded_state_dict))
            return [one for one in tensors if one.is_main]

        holding = Holding.of_all(self._ranks.all_of(lambda: Holding.of(sharded_state_dict, held())))

        def planned() -> tuple[ConversionPlan, list[OutputFile]]:
            plan, files = self._plan_of(sharded_state_dict, holding), self._sides.files
            check_held_once(plan.megatron, holding.shards)
            if plan.carried:
                check_scales(files.weights)
            return plan, [*weight_files(plan.hf, files), *side_file_copies(files)]

        plan, laid_out = self._ranks.together(planned)
        with filled_by_ranks(local_path(checkpoint_dir), self._ranks) as staged:
            files = SharedFiles(staged, laid_out, plan.hf)
            write_by_ranks(
                files, self._ranks, plan, held(), lambda: self._sides.files.weights, self._casting
            )

    def async_save(self, *args: object, **kwargs: object) -> NoReturn:
        """Refused. Raises InputError."""
        raise InputError(
            "Hugging Face files are not saved in the background; leave out async_sharded_save"
        )

    @cached_property
    def _sides(self) -> Sides:
        return Sides.of(PreTrainedVLM.from_pretrained(self._path, self._revision), self._part)

    def _plan_of(self, state: State, holding: Holding) -> ConversionPlan:
        """The proven plan of the files and what all ranks hold."""
        sides = self._sides
        options = replace(holding.options(sides.bridge), experts=self._experts)
        plan = plan_of(sides, options, compare=self._ranks.is_first)
        check_tensors(sides, plan, global_tensors(holding.shards))
        check_objects(plan, state)
        return plan

    def _plan_by_config(self, checkpoint_dir: PathLike) -> ConversionPlan:
        """The plan without a model."""

        def planned() -> ConversionPlan:
            self._check_folder(checkpoint_dir)
            paths = self._sides.bridge.layer_paths
            shared = self._layers_share_keys
            keys = BY_CONFIG if shared is None else KeyForms(dict.fromkeys(paths, shared))
            options = PlanOptions(experts=self._experts, keys=keys)
            return plan_of(self._sides, options, compare=self._ranks.is_first)

        self._gave_metadata = True
        return self._ranks.together(planned)

    def _check_metadata(self, shards: Sequence[Shard]) -> None:
        """Refuse a state that metadata in the other form made megatron-core empty."""
        path = self._sides.bridge.layer_paths[0]
        if self._gave_metadata and not any(shard.key.startswith(path) for shard in shards):
            raise InputError(
                f"nothing that begins with {path} is left to load: the keys of these layers have "
                f"another form; give layers_share_keys=False (or True), or leave out strict"
            )

    def _check_folder(self, checkpoint_dir: PathLike) -> None:
        if str(checkpoint_dir) != self.checkpoint_dir:
            raise InputError(
                f"checkpoint_dir is {checkpoint_dir}, and the strategy reads "
                f"{self._sides.files.name_or_path}; give the strategy's own checkpoint_dir"
            )


def _loaded(entry: ShardedTensor | ShardedObject) -> Any:
    """What takes the place of a shard: objects are empty, as `import` writes them."""
    return entry.data.detach() if isinstance(entry, ShardedTensor) else None
