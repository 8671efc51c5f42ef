"""Which layer backend a model is built with."""

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.backends import BackendSpecProvider

from megatron.bridge.errors import ConfigError


def get_backend(transformer_impl: str | None) -> BackendSpecProvider:
    """The backend of a config's `transformer_impl`: "local" or "transformer_engine".

    None chooses: TransformerEngine where it can run, plain torch everywhere else.

    Raises:
        ConfigError: what was asked for cannot be used.
    """
    if transformer_impl is None:
        transformer_impl = "transformer_engine" if uses_transformer_engine(None) else "local"
    if transformer_impl == "local":
        from megatron.bridge.models.backends.torch_backend import TorchSpecProvider

        return TorchSpecProvider()
    if transformer_impl == "transformer_engine":
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


def uses_transformer_engine(transformer_impl: str | None) -> bool:
    """Whether `get_backend` gives TransformerEngine's."""
    if transformer_impl is None:
        return HAVE_TE and torch.cuda.is_available()
    return transformer_impl == "transformer_engine"
