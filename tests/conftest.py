"""The environment of every test, set before a library reads it; child processes inherit it."""

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


def _no_wait_for_the_disk(descriptor: int) -> None:
    os.fstat(descriptor)  # still an error if it is closed


# What a process wrote outlives it all the same. The tests of what is synced put theirs here.
os.fsync = _no_wait_for_the_disk


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fork the process that is forked by the tests that import `forked`, before the first runs."""
    if "forked" in sys.modules and not session.config.option.collectonly:
        sys.modules["forked"].ensure_running()
    keep_what_is_imported()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Libraries are imported by the first test that needs them."""
    if len(sys.modules) > _kept[-1] + 50:
        keep_what_is_imported()


_kept = [0]
"""How many modules there were when the garbage collector was told of them."""


def keep_what_is_imported() -> None:
    """It stays: the garbage collector need not look at it in each test."""
    gc.collect()
    gc.freeze()
    _kept.append(len(sys.modules))


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """What megatron-core keeps of a process is not that of the next module's tests.

    Of process groups a fake cluster wants none. Of the scale of the last loss it keeps the shape,
    too: a backward pass without a schedule makes it a scalar, a schedule has it of one element.
    """
    yield
    if moe_utils := sys.modules.get("megatron.core.transformer.moe.moe_utils"):
        moe_utils.MoEAuxLossAutoScaler.main_loss_backward_scale = None
    if parallel := sys.modules.get("megatron.bridge.runtime.parallel"):
        parallel.destroy_process_groups()


@pytest.fixture(scope="module")
def on_the_gpu() -> Iterator[None]:
    """Where there is a GPU, tensors of a test are made there, as the models that it builds are."""
    import torch

    if not torch.cuda.is_available():
        yield
        return
    # Products in fp32, as on the CPU.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3-VL in the released layout, three shards. Shared: copy it to change it."""
    from megatron.bridge.synthetic import make_model

    return make_model("qwen3-vl", tmp_path_factory.mktemp("models") / "small", {"num_shards": 3})


@pytest.fixture(scope="session")
def small_checkpoint(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_model` as a Megatron checkpoint. Shared: copy it to change it."""
    from megatron.bridge.models.hf_pretrained.vlm import PreTrainedVLM
    from megatron.bridge.operations.convert import import_checkpoint

    target = tmp_path_factory.mktemp("checkpoints") / "small"
    import_checkpoint(PreTrainedVLM.from_pretrained(small_model), target)
    return target
