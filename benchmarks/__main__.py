"""`python -m benchmarks`, from the root of the project."""

import sys
from pathlib import Path

# The configs of released models stand in tests/, which is on the path there, too.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main())
