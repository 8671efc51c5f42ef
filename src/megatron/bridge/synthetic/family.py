"""The families of which there are synthetic models."""

from __future__ import annotations

from megatron.bridge.errors import UnsupportedModel
from megatron.bridge.models.catalog import small_models
from megatron.bridge.models.small_model import SmallModel


def find_family(name: str) -> SmallModel:
    """The family called `name`; UnsupportedModel, which lists the families, if there is none."""
    known = small_models()
    if name not in known:
        raise UnsupportedModel(
            f"no synthetic model of family {name!r}; there is {', '.join(known)}"
        )
    return known[name]
