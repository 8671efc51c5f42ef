"""Functions of megatron-core that name the GPU in their own text: without one they name the CPU.

`device="cuda"` and `tensor.type() == "torch.cuda.FloatTensor"` ask nothing of `torch.cuda` that
could be answered. Only the constants of these functions are changed, so that no other code sees
another torch: to anyone else "cuda" stays a device that is not there.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import reduce
from importlib import import_module
from inspect import unwrap
from types import FunctionType
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
    "optimizer.grad_scaler": {
        "MegatronGradScaler.__init__": "20, the scale of the loss in fp16",
        "DynamicGradScaler.__init__": "111, 114, 117, how it changes",
    },
    "utils": {
        "local_multi_tensor_l2_norm": "1332, the norm of this rank",
    },
    "tensor_parallel.data": {
        "_build_key_size_numel_dictionaries": "37, the sizes of a batch",
    },
    "transformer.utils": {
        "get_default_causal_mask": "39, the mask where none is given",
    },
    "dist_checkpointing.exchange_utils": {
        "_get_empty_tensor_for_exchange": "97, 103, 105, 109, what another rank has loaded",
    },
}


def name_the_cpu(undo: ExitStack) -> None:
    """Let the functions of the table name the CPU until `undo` is closed."""
    for function in functions_that_name_the_gpu():
        code = function.__code__
        undo.callback(setattr, function, "__code__", code)
        function.__code__ = code.replace(co_consts=tuple(map(_on_cpu, code.co_consts)))


def functions_that_name_the_gpu() -> Iterator[FunctionType]:
    """Those of the table."""
    for module, functions in _FUNCTIONS.items():
        for name in functions:
            found: Any = reduce(getattr, name.split("."), import_module(f"megatron.core.{module}"))
            yield unwrap(getattr(found, "__func__", found))  # of a class method, of a decorated one


def _on_cpu(constant: Any) -> Any:
    """The names are constants of the code, or in its constant tuples."""
    if isinstance(constant, tuple):
        return tuple(map(_on_cpu, constant))
    return _ON_CPU.get(constant, constant) if isinstance(constant, str) else constant
