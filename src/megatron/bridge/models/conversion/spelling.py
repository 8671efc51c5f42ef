"""How files spell the names that rows declare.

Rows are declared with the names of a release. Other programs save the same tensors under other
roots: with a prefix before all of them (``module.``), with one name less or one twice. The names
are never changed: the rows are spelled like the files, so that whatever is written, shown or read
carries the names that stand there. Some roots transformers takes for the same; files may have
several of these, and then single tensors are spelled on their own.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.text.quoting import printable


@dataclass(frozen=True)
class Root:
    """The root of a part of a model.

    Attributes:
        declared: as rows have it.
        found: as most names of the part have it in some files.
        others: further roots that transformers takes for the same.
    """

    declared: str
    found: str
    others: tuple[str, ...] = ()

    @property
    def is_understood(self) -> bool:
        """Whether transformers finds the part without being told."""
        return self.found in (self.declared, *self.others)


@dataclass(frozen=True)
class Spelling:
    """The roots of names in some files, and the names that stand under others.

    Attributes:
        roots: of those that begin alike as declared, the longer one stands first.
        strays: name as it would be under its part's root -> name in the files, where they differ.
        copies: name in the files -> the name of a tensor that stands for the same parameter.
    """

    roots: tuple[Root, ...] = ()
    strays: Mapping[str, str] = field(default_factory=dict)
    copies: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_names(cls, names: Collection[str], roots: Iterable[Root]) -> "Spelling":
        """How names are spelled, by the roots of their parts."""
        roots = tuple(roots)
        strays: dict[str, str] = {}
        copies: dict[str, str] = {}
        ends = sorted(
            (
                (other, root.found)
                for root in roots
                for other in (root.found, root.declared, *root.others)
            ),
            key=lambda end: -len(end[0]),
        )
        found = {root.found for root in roots}
        for name in names:
            other, root = next((end for end in ends if name.startswith(end[0])), ("", ""))
            if other in found or not other:
                continue
            regular = root + name.removeprefix(other)
            if regular in names:
                copies[name] = regular
            elif (first := strays.setdefault(regular, name)) != name:
                copies[name] = first
        return cls(roots, strays, copies)

    def of(self, name: str) -> str:
        """A declared name, pattern or root as it stands in the files."""
        for root in self.roots:
            if name.startswith(root.declared):
                spelled = root.found + name.removeprefix(root.declared)
                return self.strays.get(spelled, spelled)
        return name

    def regular(self, name: str) -> str:
        """A name in the files as it would be under the root of its part."""
        return self._regular.get(name, name)

    @cached_property
    def _regular(self) -> dict[str, str]:
        return {name: regular for regular, name in self.strays.items()}

    def by_regular_name[Value](self, tensors: Mapping[str, Value]) -> Mapping[str, Value]:
        """The same tensors, each as it would be named under the root of its part."""
        if not self.strays:
            return tensors
        regular = self._regular
        return {regular.get(name, name): tensor for name, tensor in tensors.items()}

    def to_declared(self) -> dict[str, str]:
        """Regular expression for a root that transformers does not understand -> as declared.

        The longest root in the files stands first.
        """
        changed = {root.found: root.declared for root in self.roots if not root.is_understood}
        roots = sorted(changed, key=len, reverse=True)
        return {f"^{re.escape(root)}": changed[root] for root in roots}

    def registry(self, rows: Iterable[ParamMapping]) -> MegatronMappingRegistry:
        """The rows with their Hugging Face names spelled like the files."""
        if any(root.declared != root.found for root in self.roots):
            rows = [row.respelled(self.of) for row in rows]
        return MegatronMappingRegistry(*rows, spelled=self.strays)


def find_root(
    names: Collection[str],
    declared: str,
    anchors: Sequence[str],
    *,
    what: str,
    others: Sequence[str] = (),
    never: str = "",
) -> str | None:
    """The root under which the files hold a part of a model.

    Where the declared root or some of the others are found, the part is there, and the root is the
    one with most of its anchors.

    Args:
        names: of all tensors.
        declared: the root as rows have it.
        anchors: regular expressions for names behind the root that every such part has.
        what: the part, for messages.
        others: roots that transformers takes for the declared one.
        never: the end of roots that belong to another part with the same names.

    Returns:
        The root; None if the part is not there.

    Raises:
        InputError: several roots of other kinds are found.
    """
    anchor = re.compile(rf"((?:.*\.)?)(?:{'|'.join(anchors)})")
    found = Counter(match[1] for name in names if (match := anchor.fullmatch(name)))
    roots = [root for root in found if not (never and root.endswith(never))]
    if understood := [root for root in (declared, *others) if root in roots]:
        return max(understood, key=lambda root: found[root])
    if len(roots) > 1:
        shown = " and ".join(printable(root) or "no prefix" for root in sorted(roots)[:3])
        raise InputError(
            f"the names of the {what} stand under {len(roots)} prefixes, {shown}; which of them is "
            f"the model cannot be told: keep one, under {declared}"
        )
    return roots[0] if roots else None
