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
    """Make a random model of `family` in the folder `out`, in the released disk layout.

    transformers loads it, and its processor takes real images and videos. `settings` change the
    family's config (see `synthetic.config_settings`). The same arguments give the same
    files. Memory is bounded by the largest tensor, so real sizes can be made too.

    Raises UnsupportedModel for an unknown family, InputError for settings that make no model,
    TargetExists if `out` exists and `force` is not given. `out` appears when it is complete.
    """
    declaration = find_family(family)
    resolved = resolve_settings(declaration, settings or {})
    target = local_path(out)
    with staged_folder(target, force=force) as folder:
        # Only here, since they import torch and transformers.
        from megatron.bridge.synthetic.disk_tensors import disk_tensors
        from megatron.bridge.synthetic.processors import write_side_files
        from megatron.bridge.synthetic.quantize import quantization_config
        from megatron.bridge.synthetic.weights import write_weights

        tensors = disk_tensors(declaration, resolved)
        config = dict(resolved.config)
        if resolved.form.fp8:
            config["quantization_config"] = quantization_config(tensor.name for tensor in tensors)
        write_side_files(folder, declaration, config, resolved.first_token_id)
        write_weights(folder, tensors, resolved.num_shards, resolved.max_shard_size, seed)
    return target
