"""Which layer backend a model is built with."""

from typing import Literal

import torch
from megatron.core.models.backends import BackendSpecProvider

from megatron.bridge.errors import ConfigError

TransformerImpl = Literal["local", "transformer_engine"]


def default_transformer_impl() -> TransformerImpl:
    """TransformerEngine where it can run, plain torch everywhere else."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return "transformer_engine" if HAVE_TE and torch.cuda.is_available() else "local"


def get_backend(transformer_impl: str) -> BackendSpecProvider:
    """The backend of a config's `transformer_impl`; ConfigError when it cannot be used."""
    if transformer_impl == "local":
        from megatron.bridge.models.backends.torch_backend import TorchSpecProvider

        return TorchSpecProvider()
    if transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import HAVE_TE

        if not HAVE_TE:
            raise ConfigError(
                "transformer_impl='transformer_engine', and TransformerEngine is not installed. "
                "Install transformer-engine, or set transformer_impl='local'."
            )
        from megatron.bridge.models.backends.te_backend import PaddedTESpecProvider

        return PaddedTESpecProvider()
    raise ConfigError(
        f"transformer_impl={transformer_impl!r} is not one of 'local', 'transformer_engine'"
    )
