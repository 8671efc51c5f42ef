"""Every bridge that is at hand, by architecture: those that ship here, and those of other packages.

Another package declares its families as entry points, each a module that registers bridges when it
is imported:

    [project.entry-points."megatron_bridge.families"]
    my-family = "my_package.my_family"

Nothing else imports a family. A bridge that was registered takes the place of one that ships here.
"""

from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from megatron.bridge.errors import UnsupportedModel
from megatron.bridge.models.conversion.model_bridge import (
    REGISTERED_BRIDGES,
    UNSUPPORTED,
    MegatronModelBridge,
)
from megatron.bridge.models.small_model import REGISTERED_SMALL_MODELS, SmallModel
from megatron.bridge.text.quoting import printable

ENTRY_POINTS = "megatron_bridge.families"
"""The group of entry points in which a package names the modules of its families."""


def registered_bridges() -> Mapping[str, type[MegatronModelBridge]]:
    """Every bridge, those that a client registered included.

    Raises:
        UnsupportedModel: a family of another package cannot be imported.
    """
    _import_families()
    return REGISTERED_BRIDGES


def bridge_for(architecture: str) -> MegatronModelBridge:
    """The bridge of an architecture. Raises UnsupportedModel, listing what there is."""
    bridges = registered_bridges()
    bridge = bridges.get(architecture)
    if bridge is None and architecture in UNSUPPORTED:
        raise UnsupportedModel(f"{architecture}: {UNSUPPORTED[architecture]}")
    if bridge is None:
        known = ", ".join(sorted(bridges))
        raise UnsupportedModel(
            f"{architecture}: no bridge converts it; there are bridges for {known}"
        )
    return bridge()


def small_models() -> Mapping[str, SmallModel]:
    """What `make-model` can make, by name. Raises as `registered_bridges`."""
    _import_families()
    return REGISTERED_SMALL_MODELS


@cache
def _import_families() -> None:
    import megatron.bridge.models.qwen_vl  # noqa: F401  (it registers its bridges)

    for entry in entry_points(group=ENTRY_POINTS):
        _load(entry)


def _load(entry: EntryPoint) -> None:
    """Import the module of an entry point. Raises UnsupportedModel, whatever it raises."""
    try:
        entry.load()
    except Exception as error:
        package = "" if entry.dist is None else f" of {entry.dist.name}"
        raise UnsupportedModel(
            f"the family {entry.name}{package} cannot be imported from {entry.value}: "
            f"{type(error).__name__}: {printable(str(error))}; mend that package, or uninstall it"
        ) from error
