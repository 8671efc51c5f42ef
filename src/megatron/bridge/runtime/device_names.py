"""Functions of megatron-core that name the GPU in their own text: without one they name the CPU.

`device="cuda"` and `tensor.type() == "torch.cuda.FloatTensor"` ask nothing of `torch.cuda` that
could be answered. Only the constants of these functions are changed, so that no other code sees
another torch: to anyone else "cuda" stays a device that is not there.
"""

from contextlib import ExitStack
from functools import reduce
from importlib import import_module
from inspect import unwrap
from typing import Any

_ON_CPU = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}

# Module of megatron.core: {function: the lines of 0.19.2 that name the GPU, and what they make}.
_FUNCTIONS = {
    "pipeline_parallel.schedules": {
        "forward_backward_no_pipelining": "749, the number of tokens",
        "forward_backward_pipelining_with_interleaving": "1121, the same",
        "forward_backward_pipelining_without_interleaving": "2292, the same",
    },
    "optimizer.optimizer": {
        "MegatronOptimizer.has_grad_norm_group": "315, a flag",
        "MixedPrecisionOptimizer.__init__": "690, 698, 702, flags and the scale of the loss",
        "Float16OptimizerWithFloat16Params.__init__": "1009, 1028, parameters by type",
        "FP32Optimizer.__init__": "1249, the scale of the loss",
    },
    "optimizer.distrib_optimizer": {
        "DistributedOptimizer._build_model_and_main_param_groups": "401, 466, parameters by type",
        "DistributedOptimizer.__init__": "758, parameters by type",
    },
    "optimizer.clip_grads": {
        "get_grad_norm_fp32": "96, 108, 112, the norm",
        "clip_grad_by_total_norm_fp32": "174, gradients by type; 180, a flag",
        "count_zeros_fp32": "231, the count",
    },
    "utils": {
        "local_multi_tensor_l2_norm": "1332, the norm of this rank",
    },
}


def name_the_cpu(undo: ExitStack) -> None:
    """Let the functions of the table name the CPU until `undo` is closed."""
    for module, functions in _FUNCTIONS.items():
        for name in functions:
            found: Any = reduce(getattr, name.split("."), import_module(f"megatron.core.{module}"))
            function = unwrap(getattr(found, "__func__", found))
            undo.callback(setattr, function, "__code__", function.__code__)
            function.__code__ = function.__code__.replace(
                co_consts=tuple(map(_on_cpu, function.__code__.co_consts))
            )


def _on_cpu(constant: Any) -> Any:
    """The names are constants of the code, or in its constant tuples."""
    if isinstance(constant, tuple):
        return tuple(map(_on_cpu, constant))
    return _ON_CPU.get(constant, constant) if isinstance(constant, str) else constant
