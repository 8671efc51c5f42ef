"""The copy that everything is compared with.

    python plain_copy.py SOURCE TARGET FILE...

Files of the folder SOURCE, by relative path, are copied into the new folder TARGET one after the
other, and flushed to the disk with their folders. Prints {"seconds": ..., "bytes": ...}. Only the
standard library is used: the process is as light as a copy should be.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

WAIT = 2.5
"""Seconds before the copy begins: about as long as a command takes to start.

What the step before freed goes back from a virtual machine to its host within seconds, and taking
it again costs more than copying into it: a copy that began at once would not pay for that.
"""


def copy(source: Path, target: Path, names: list[str]) -> int:
    """Copy and flush; returns the bytes of the files."""
    target.mkdir()
    folders = {target, target.parent}
    nbytes = 0
    for name in names:
        file = target / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, file)
        flush(file)
        nbytes += file.stat().st_size
        folders.add(file.parent)
    for folder in folders:
        flush(folder)
    return nbytes


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main() -> None:
    """Run one copy."""
    source, target, *names = sys.argv[1:]
    time.sleep(WAIT)
    begin = time.perf_counter()
    nbytes = copy(Path(source), Path(target), names)
    json.dump({"seconds": time.perf_counter() - begin, "bytes": nbytes}, sys.stdout)


if __name__ == "__main__":
    main()
