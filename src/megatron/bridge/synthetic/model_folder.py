"""Making a model folder: random weights, and everything that makes it usable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from megatron.bridge.paths import local_path
from megatron.bridge.synthetic.config_settings import resolve_settings
from megatron.bridge.synthetic.family import find_family
from megatron.bridge.target.interruption import done_means_done
from megatron.bridge.target.staging import staged_folder


@done_means_done()
def make_model(
    family: str,
    out: str | os.PathLike[str],
    settings: Mapping[str, object] | None = None,
    seed: int = 0,
    *,
    force: bool = False,
) -> Path:
    """Make a random model of a family, in the released disk layout.

    transformers loads it, and its processor takes real images and videos. The same arguments give
    the same files. Memory is bounded by the largest tensor, so real sizes can be made too.

    Args:
        family: name of the family.
        out: the folder to make; it appears when it is complete.
        settings: changes of the family's config, and options; see `synthetic.config_settings`.
        seed: seed of the random weights.
        force: whether to replace `out` if it exists.

    Returns:
        The path of the folder.

    Raises:
        UnsupportedModel: there is no such family.
        InputError: the settings make no model that transformers and the Megatron model of the
            family can be built of.
        TargetExists: `out` exists, and `force` is not given.
    """
    declaration = find_family(family)
    resolved = resolve_settings(declaration, settings or {})
    target = local_path(out)
    with staged_folder(target, force=force) as folder:
        # Only here, since they import torch and transformers.
        from megatron.bridge.synthetic.disk_tensors import disk_tensors, in_precision
        from megatron.bridge.synthetic.processors import write_side_files
        from megatron.bridge.synthetic.quantize import quantization_config
        from megatron.bridge.synthetic.random_weights import write_weights
        from megatron.bridge.synthetic.validation import check_config, check_tensors

        if resolved.changed:  # it takes megatron-core seconds to load
            check_config(resolved)
        plain = disk_tensors(declaration, resolved)
        check_tensors(resolved, {tensor.name: tensor for tensor in plain})
        tensors, config = in_precision(declaration, resolved, plain), dict(resolved.config)
        if resolved.options["fp8"]:
            config["quantization_config"] = quantization_config(tensor.name for tensor in tensors)
        write_side_files(folder, declaration, config, resolved.first_token_id)
        options = resolved.options
        write_weights(folder, tensors, options["num_shards"], options["max_shard_size"], seed)
    return target
