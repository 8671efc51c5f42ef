"""The family of `fifth_family.py`, known to this process for as long as a module of tests runs."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from megatron.bridge.models.conversion.model_bridge import REGISTERED_BRIDGES
from megatron.bridge.models.small_model import REGISTERED_SMALL_MODELS


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        family = import_module("fifth_family")
        yield
        for architecture in family.LlamaBridge.sources:
            del REGISTERED_BRIDGES[architecture]
        del REGISTERED_SMALL_MODELS["llama"]
        for module in ("fifth_family", "fifth_provider"):
            sys.modules.pop(module, None)
