"""An unfinished target, killed before each change that it makes to the file system."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from unfinished_target import SIZES, convert

_KILLED_EVERYWHERE = """
import os, signal, sys, shutil, json
from pathlib import Path
import unfinished_target as t

CHANGES = "os.rename os.remove os.rmdir os.mkdir os.truncate shutil.rmtree".split()
home, begin = Path(sys.argv[1]), sys.argv[2]
os.fsync = lambda descriptor: None  # a kill loses nothing that the kernel has
outcome = []

def killed_at(step, target):
    child = os.fork()
    if not child:
        seen = 0
        def hook(event, args):
            nonlocal seen
            if event in CHANGES or event == "open" and args[2] & (os.O_WRONLY | os.O_CREAT):
                seen += 1
                if seen == step:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            t.convert(target, resume=begin == "resume", force=begin == "force")
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0

for step in range(1, 200):
    target = home / f"{step}" / "out"
    target.parent.mkdir()
    if begin == "resume":
        t.killed(target, 1)
    if begin == "force":
        t.convert(target)
    was_killed = killed_at(step, target)
    left = t.names(target.parent)
    try:
        again = t.convert(target, resume=True, force=begin == "force")
    except Exception as error:
        again = f"{type(error).__name__}: {error}"
    same = target.is_dir() and t.tree(target) == t.tree(home / "expected")
    outcome.append([was_killed, left, again, same, t.names(target.parent)])
    if not was_killed:
        break
print(json.dumps(outcome))
"""


@pytest.mark.parametrize(
    "begin", ["fresh", "resume", pytest.param("force", marks=pytest.mark.slow)]
)
def test_killed_at_every_step(tmp_path: Path, begin: str) -> None:
    """Before every change that a run makes: the next run always comes to the same target."""
    convert(tmp_path / "expected")
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_EVERYWHERE, str(tmp_path), begin],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
    )
    *steps, last = json.loads(done.stdout)
    assert len(steps) > 12
    assert not last[0]
    total = sum(SIZES.values())
    for number, (was_killed, left, again, same, after) in enumerate(steps, 1):
        assert was_killed
        if left == ["out"] and begin != "force":
            assert again == f"TargetExists: {again.partition(': ')[2]}", number
        else:
            assert isinstance(again, int), (number, again)
        assert same, (number, left, again)
        hidden = [name for name in after if name != "out"]
        assert all(name.startswith(".out.") for name in hidden), (number, after)
        assert len(hidden) <= 1, (number, after)
    taken = [again for _, left, again, _, _ in steps if "out.partial" in left]
    assert taken == sorted(taken)
    assert taken[-1] == total
