"""A part of a model's files as the files of a model of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from megatron.bridge.dtypes import TORCH_NAME_OF
from megatron.bridge.errors import CheckpointError
from megatron.bridge.models.hf_pretrained.config import HFConfig
from megatron.bridge.models.hf_pretrained.config_dtype import config_in_dtype
from megatron.bridge.models.hf_pretrained.fp8 import Weights
from megatron.bridge.models.hf_pretrained.tensors import ReadableTensors, TensorInfo
from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
from megatron.bridge.tensors.boxes import Box
from megatron.bridge.tensors.spec import TensorSpec

if TYPE_CHECKING:
    from megatron.bridge.tensors.arrays import Array

_OF_PROCESSORS = frozenset(
    {"preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"}
)
"""Files that say how pictures become inputs: of the whole model, and of no part that has none."""


class RenamedTensors(ReadableTensors[TensorInfo | TensorSpec]):
    """Some tensors of a model, under other names."""

    def __init__(self, tensors: Weights, names: Mapping[str, str]) -> None:
        """names: what each is called here -> its name in `tensors`."""
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> TensorInfo | TensorSpec:
        found: Any = self._tensors[self._names[name]]
        return cast("TensorInfo | TensorSpec", replace(found, name=name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def dtype_of(self, name: str) -> str:
        """The dtype ("BF16") in which a tensor is read. Raises CheckpointError if unknown."""
        return self._tensors.dtype_of(self._known(name))

    def place(self, name: str) -> TensorInfo | None:
        """Where the bytes of a tensor lie; see ReadableTensors.place."""
        found = self._tensors.place(self._known(name))
        return None if found is None else replace(found, name=name)

    def read_into(self, name: str, box: Box, out: Array) -> None:
        """Read the part of a tensor inside `box` into `out`; see ReadableTensors.read_into."""
        self._tensors.read_into(self._known(name), box, out)

    def close(self) -> None:
        """Close the file handles; a later read opens them again."""
        self._tensors.close()

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise CheckpointError(f"there is no tensor {name!r} in this part of the model")
        return self._names[name]


class PartOfVLM(PreTrainedVLM):
    """A part of a model as a model of its own: its config, its weights, and what accompanies them.

    `tensors` are the files of the whole, as they are; processors of pictures stay behind.
    """

    def __init__(
        self,
        whole: PreTrainedVLM,
        config: HFConfig,
        own_names: Callable[[Weights], Mapping[str, str]],
    ) -> None:
        """config: of the part. own_names: of weights of the whole: name in the part -> there."""
        super().__init__(
            whole.name_or_path if whole.has_files else None,
            trust_remote_code=whole.trust_remote_code,
            config=config,
        )
        self._whole, self._own_names = whole, own_names

    @cached_property
    def folder(self) -> Path:
        """The folder with the small files of the whole."""
        return self._whole.folder

    @cached_property
    def weights_folder(self) -> Path:
        """The folder with the weights of the whole."""
        return self._whole.weights_folder

    @cached_property
    def weights(self) -> Weights:
        """The weights of the part, under its own names; see PreTrainedVLM.weights."""
        whole = self._whole.weights
        return cast("Weights", RenamedTensors(whole, self._own_names(whole)))

    @cached_property
    def side_files(self) -> tuple[Path, ...]:
        """Those of the whole, but for processors of pictures."""
        return tuple(file for file in self._whole.side_files if file.name not in _OF_PROCESSORS)

    def restated_config(self, *, quantized: bool = False, dtype: str | None = None) -> bytes | None:
        """config.json of the part, which no file holds."""
        config = self.hf_config
        if dtype is not None:
            config = config_in_dtype(config, TORCH_NAME_OF[dtype])
        return f"{json.dumps(config.data, indent=2, ensure_ascii=False)}\n".encode()
