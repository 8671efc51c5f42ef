"""Where a result is written: complete or not there, resumed, shared by processes."""
