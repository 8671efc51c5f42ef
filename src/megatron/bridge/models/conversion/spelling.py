"""How files spell the names that rows declare.

Rows are declared with the names of a release. Other programs save the same tensors under other
roots: with a prefix before all of them (``module.``), with one name less or one twice. The names
are never changed: the rows are spelled like the files, so that whatever is written, shown or read
carries the names that stand there.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from megatron.bridge.errors import InputError
from megatron.bridge.models.conversion.param_mapping import ParamMapping
from megatron.bridge.quoting import printable


@dataclass(frozen=True)
class Spelling:
    """The roots of names in some files.

    roots: (root as rows declare it, root in the files). Of roots that begin alike, the longer one
    stands first.
    """

    roots: tuple[tuple[str, str], ...] = ()

    def of(self, name: str) -> str:
        """A declared name, pattern or root as it stands in the files."""
        for declared, found in self.roots:
            if name.startswith(declared):
                return found + name.removeprefix(declared)
        return name

    @property
    def is_declared(self) -> bool:
        """Whether the names are spelled as rows declare them."""
        return all(declared == found for declared, found in self.roots)

    def to_declared(self) -> dict[str, str]:
        """Regular expression for a root in the files -> root as declared, for other programs.

        The longest root in the files stands first.
        """
        changed = {found: declared for declared, found in self.roots if declared != found}
        roots = sorted(changed, key=len, reverse=True)
        return {f"^{re.escape(root)}": changed[root] for root in roots}

    def rows(self, rows: Iterable[ParamMapping]) -> list[ParamMapping]:
        """The rows with their Hugging Face names spelled like the files."""
        return list(rows) if self.is_declared else [row.respelled(self.of) for row in rows]


def find_root(
    names: Collection[str], declared: str, anchors: Sequence[str], *, what: str, never: str = ""
) -> str | None:
    """The root under which the files hold a part of a model; None if it is not there.

    anchors: regular expressions for names behind the root that every such part has. Where the
    declared root is among those that are found, it is meant. never: the end of roots that belong
    to another part with the same names. Raises InputError where several others are found.
    """
    anchor = re.compile(rf"((?:.*\.)?)(?:{'|'.join(anchors)})")
    found = {match[1]: None for name in names if (match := anchor.fullmatch(name))}
    roots = [root for root in found if not (never and root.endswith(never))]
    if declared in roots:
        return declared
    if len(roots) > 1:
        shown = " and ".join(printable(root) or "no prefix" for root in sorted(roots)[:3])
        raise InputError(
            f"the names of the {what} stand under {len(roots)} prefixes, {shown}; which of them is "
            f"the model cannot be told: keep one, under {declared}"
        )
    return roots[0] if roots else None
