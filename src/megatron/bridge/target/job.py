"""What a conversion is to do, so that two runs can be told to be the same one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Self

from megatron.bridge.engine.pieces import FileCopy, Literal, Part, Piece
from megatron.bridge.target.fingerprint import Fingerprint
from megatron.bridge.target.json_fields import fields
from megatron.bridge.text.quoting import is_name, quoted

FORMAT = 3
"""The format of records. Another one is not read."""


def package_version() -> str:
    """The version of this package; another one may lay files out differently."""
    return version("megatron-bridge-vl")


@dataclass(frozen=True)
class Job:
    """One conversion. Two of them are the same if they give the same bytes.

    Attributes:
        options: all that decides what is written, as JSON values by name.
        sources: the files that are read, by what they are ("source", "reference").
        layout: digest of the output files and their pieces, see `layout_digest`.
    """

    command: str
    options: Mapping[str, Any]
    sources: Mapping[str, Fingerprint]
    layout: str
    package: str = field(default_factory=package_version)

    def to_json(self) -> dict[str, Any]:
        """The job as plain JSON values."""
        return {
            "format": FORMAT,
            "package": self.package,
            "command": self.command,
            "options": dict(self.options),
            "sources": {role: source.to_json() for role, source in self.sources.items()},
            "layout": self.layout,
        }

    @classmethod
    def from_json(cls, value: object) -> Self:
        """What `to_json` gave. Raises ValueError for anything else."""
        known = {"format": int, "package": str, "command": str, "options": dict, "sources": dict}
        kinds = known | {"layout": str}
        number, package, command, options, sources, layout = fields(value, kinds)
        if number != FORMAT:
            raise ValueError(f"format {number}, this version reads {FORMAT}")
        if not all(map(is_name, (package, command, *options))):
            raise ValueError("a version, command or option that is no name")
        prints = {role: Fingerprint.from_json(source) for role, source in sources.items()}
        return cls(command, options, prints, layout, package)

    def differences(self, before: Job) -> list[str]:
        """Why `before` was another conversion; empty if it was the same one."""
        found = []
        if before.package != self.package:
            found.append(f"megatron-bridge: was {before.package}, now {self.package}")
        if before.command != self.command:
            found.append(f"command: was {before.command}, now {self.command}")
        was, now = _plain(before.options), _plain(self.options)
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name):
                found.append(f"option {name}: was {_shown(was, name)}, now {_shown(now, name)}")
        for role in sorted(before.sources.keys() | self.sources.keys()):
            old, new = before.sources.get(role), self.sources.get(role)
            changes = new.changed_since(old) if old and new else ["was not the same kind"]
            found += [f"{role}: {change}" for change in changes]
        if not found and before.layout != self.layout:
            found.append("the layout of the output files")
        return found


def _plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as they come back from a file: tuples are lists there."""
    return json.loads(json.dumps(dict(options)))


def _shown(options: Mapping[str, Any], name: str) -> str:
    return quoted(options[name]) if options.get(name) is not None else "not given"


def layout_digest(pieces: Iterable[Piece]) -> str:
    """SHA-256 over every output file's name, its pieces and what they are made of.

    The same for every number of threads and processes.
    """
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(f"\n{piece.file}\0{piece.offset}\0{piece.nbytes}\0".encode())
        for part in piece.parts:
            digest.update(_content(part))
    return digest.hexdigest()


def _content(part: Part) -> bytes:
    if isinstance(part, Literal):
        return b"L%d:" % len(part.data) + part.data
    if isinstance(part, FileCopy):  # where the file lies does not matter
        return f"F{part.path.name}:{part.offset}:{part.nbytes}".encode()
    if " at 0x" in (text := repr(part)):
        raise TypeError(f"{text} does not say what it holds")
    return text.encode()
