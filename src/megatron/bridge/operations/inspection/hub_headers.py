"""Tensors of a model on the hub, from the headers of its shards: no weights are fetched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from megatron.bridge.errors import CheckpointError, ReferenceNotFound
from megatron.bridge.models.hf_pretrained.download_bars import fetching
from megatron.bridge.models.hf_pretrained.other_formats import other_files
from megatron.bridge.models.hf_pretrained.reference import repository_files, repository_of
from megatron.bridge.models.hf_pretrained.safetensors_header import check_tensor
from megatron.bridge.tensors.spec import TensorSpec

_OF_BAD_HEADERS = (AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What huggingface_hub, which does not look closely at a header, may raise for one."""


@dataclass(frozen=True, slots=True)
class RemoteTensor(TensorSpec):
    """A tensor in a shard on the hub, without its data."""

    file: PurePosixPath


def hub_headers(reference: str, revision: str) -> Mapping[str, RemoteTensor]:
    """The tensors in all shards of a repository at a revision, by name.

    Where a tensor lies in two shards, whether their data differ is found when they are fetched.

    Args:
        reference: `org/name`, or `org/name@revision`, whose revision is passed over.
        revision: the one to look at.

    Raises:
        ReferenceNotFound: the hub does not answer.
        CheckpointError: headers cannot be used, or two shards differ in the shape or dtype of a
            tensor.
    """
    from huggingface_hub import errors as hub
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.constants import HF_HUB_OFFLINE

    repository = repository_of(reference)
    if HF_HUB_OFFLINE:
        raise ReferenceNotFound(
            f"{repository}: its weights are not in the hub's cache, and HF_HUB_OFFLINE forbids "
            "fetching their headers; unset HF_HUB_OFFLINE, or give a folder"
        )
    try:
        with fetching():
            answer = get_safetensors_metadata(repository, revision=revision)
    except (hub.HfHubHTTPError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise ReferenceNotFound(f"{repository}: the hub answered: {first_line}") from error
    except hub.NotASafetensorsRepoError as error:
        other = other_files(repository, repository_files(repository, revision))
        raise CheckpointError(
            other or f"{repository}: no safetensors weights in the repository"
        ) from error
    except (hub.SafetensorsParsingError, *_OF_BAD_HEADERS) as error:
        raise CheckpointError(f"{repository}: no usable safetensors weights: {error}") from error
    tensors: dict[str, RemoteTensor] = {}
    for file_name, header in sorted(answer.files_metadata.items()):
        for name, info in header.tensors.items():
            shape = list(info.shape)
            check_tensor(name, info.dtype, shape)
            found = RemoteTensor(name, tuple(shape), info.dtype, PurePosixPath(file_name))
            before = tensors.setdefault(name, found)
            if (before.shape, before.dtype) != (found.shape, found.dtype):
                raise CheckpointError(
                    f"{repository}: {name} is in two shards, {before.file} and {file_name}, which "
                    f"differ in it"
                )
    return tensors
