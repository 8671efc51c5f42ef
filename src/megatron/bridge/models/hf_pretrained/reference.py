"""From what a user types, a folder or a hub id, to a folder on disk."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron.bridge.errors import InputError, ReferenceNotFound
from megatron.bridge.models.hf_pretrained.download_bars import fetching
from megatron.bridge.paths import is_given_folder, local_path

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)

_SIDE_FILE_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.md", "LICENSE*"]
# Some savers put the number of a shard behind the suffix.
_WEIGHT_PATTERNS = ["*.safetensors", "*.safetensors-*"]


def resolve_reference(
    reference: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True
) -> Path:
    """The folder of a model given as a folder, or as a hub id `org/name` or `org/name@revision`.

    A folder that exists is taken as it is. A hub id is fetched into the hub's cache, or with
    HF_HUB_OFFLINE=1 looked up there.

    Args:
        reference: the folder or hub id.
        revision: of a hub id, where it does not stand behind an "@".
        weights: False to fetch only the config, the tokenizer and other small files.

    Raises:
        ReferenceNotFound: there is no such folder, repository or revision, or the hub cannot be
            reached.
        InputError: a revision is given twice, or for a folder.
    """
    text = os.fspath(reference)
    folder = local_folder(reference)
    if folder is not None:
        if revision is not None:
            raise InputError(f"{text} is a folder: a revision ({revision!r}) means nothing for it")
        return folder
    path = Path(text)
    if path.is_file():
        raise ReferenceNotFound(
            f"{text} is a file; give the folder that holds it, {path.absolute().parent}, or a hub "
            "id"
        )
    repository, revision = _split_revision(text, revision)
    if not _HUB_ID.fullmatch(repository) or repository.startswith((".", "~")):
        raise ReferenceNotFound(
            f"{text!r}: there is no such folder, and it is not a hub id (org/name or "
            "org/name@revision); check the path"
        )
    return _snapshot(repository, revision, weights)


def local_folder(reference: str | os.PathLike[str]) -> Path | None:
    """The absolute path of the folder that `reference` names; None if it names none."""
    return local_path(reference).absolute() if is_given_folder(reference) else None


def repository_of(reference: str | os.PathLike[str]) -> str:
    """The repository that a hub id names, without a revision behind it."""
    return os.fspath(reference).partition("@")[0]


def repository_files(repository: str, revision: str) -> list[str]:
    """The paths of all files of a repository on the hub; none if it does not answer."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    try:
        return sorted(HfApi().list_repo_files(repository, revision=revision))
    except (hub.HfHubHTTPError, hub.OfflineModeIsEnabled, hub.HFValidationError, OSError):
        return []


def _split_revision(text: str, revision: str | None) -> tuple[str, str | None]:
    repository, mark, suffix = text.partition("@")
    if not mark:
        return text, revision
    if not suffix:
        raise InputError(f"{text!r}: the revision behind '@' is empty")
    if revision is not None and revision != suffix:
        raise InputError(f"{text!r} names another revision than revision={revision!r}; give one")
    return repository, suffix


def _snapshot(repository: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    wanted = f"{repository}@{revision}" if revision else repository
    patterns = _SIDE_FILE_PATTERNS + (_WEIGHT_PATTERNS if weights else [])
    try:
        with fetching():
            return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except hub.GatedRepoError as error:
        reason = "access to it has to be granted on the hub; ask for it, and log in"
        raise ReferenceNotFound(f"{wanted}: {reason}") from error
    except hub.RevisionNotFoundError as error:
        raise ReferenceNotFound(f"{wanted}: the repository has no such revision") from error
    except hub.RepositoryNotFoundError as error:
        reason = "the hub has no such repository, or it is private and you are not logged in"
        raise ReferenceNotFound(f"{wanted}: {reason}") from error
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled) as error:
        raise ReferenceNotFound(f"{wanted}: {_not_cached()}") from error
    except (hub.HFValidationError, hub.HfHubHTTPError, OSError) as error:
        first_line = str(error).partition("\n")[0]
        raise ReferenceNotFound(f"{wanted}: the hub answered: {first_line}") from error


def _not_cached() -> str:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return (
            "there is no such folder, it is not in the hub's cache, and HF_HUB_OFFLINE forbids "
            "fetching it; unset HF_HUB_OFFLINE, or give a folder"
        )
    return (
        "there is no such folder, it is not in the hub's cache, and the hub cannot be reached; "
        "check the connection, or give a folder"
    )
