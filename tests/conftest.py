"""The environment of every test, set before a library reads it; child processes inherit it."""

import os
import shutil
import tempfile

import pytest

# One thread per process: the models are small, and gloo tests run several processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# No network, and neither the user's cache nor the user's login.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
_HF_HOME = tempfile.mkdtemp(prefix="megatron-bridge-tests-")
os.environ["HF_HOME"] = _HF_HOME
for _name in ("HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH"):
    os.environ.pop(_name, None)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)
