"""`python -m megatron.bridge` is the command `megatron-bridge`."""

import sys

from megatron.bridge.cli import main

if __name__ == "__main__":
    sys.exit(main())
