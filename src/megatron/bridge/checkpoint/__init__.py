"""Names under which scripts look for what is in `megatron.bridge.formats`."""
