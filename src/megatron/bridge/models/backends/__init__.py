"""Layer backends: which module implements each part of a transformer layer.

The layer specs are written once against megatron-core's `BackendSpecProvider`;
`selection.get_backend` picks the implementation.
"""

import megatron.bridge.runtime  # noqa: F401  (silences the import of megatron-core)
