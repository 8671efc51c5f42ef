"""megatron-core without a GPU: imported and run without torch's compiler."""

import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from megatron.bridge.runtime.as_written import compile_nothing

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without CUDA")

_PROGRAM = """
import sys
import megatron.bridge
assert "torch" not in sys.modules
{first}
import torch
compile = torch.compile
import megatron.bridge.models.qwen_vl.qwen35_vl_provider
from megatron.bridge.runtime.cpu import megatron_on_cpu
with megatron_on_cpu():
    from megatron.core.fusions.fused_bias_swiglu import swiglu
    x = torch.arange(6.0).view(1, 6)
    assert torch.equal(swiglu(x), torch.nn.functional.silu(x[:, :3]) * x[:, 3:])
assert torch.compile is compile
from megatron.bridge.runtime.cpu import activate_megatron_on_cpu
activate_megatron_on_cpu()  # until the end, which must be silent
print(*sorted({{"torch._dynamo", "torch._inductor.compile_fx"}} & sys.modules.keys()))
"""


@pytest.mark.parametrize("first", ["", "import megatron.core"], ids=["by us", "by a client"])
def test_the_compiler_is_not_imported(first: str) -> None:
    program = [sys.executable, "-c", _PROGRAM.format(first=first)]
    found = subprocess.run(program, capture_output=True, text=True, timeout=120, check=False)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "", "")


def test_decorators_of_all_forms() -> None:
    before = torch.compile
    with ExitStack() as undo:
        compile_nothing(undo)

        @torch.compile
        def plain(x: float) -> float:
            return 2 * x

        @torch.compile(dynamic=True)
        def with_options(x: float) -> float:
            return 3 * x

    assert torch.compile is before
    assert (plain(2.0), with_options(2.0)) == (4.0, 6.0)
    assert (plain.__name__, with_options.__name__) == ("plain", "with_options")
