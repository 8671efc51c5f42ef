"""Memory that is about to be written for the first time: its pages, all at once.

Otherwise the kernel is interrupted for each page of four kilobytes, in the middle of a read.
"""

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

import torch

_MADV_POPULATE_WRITE = 23


def make_pages(tensor: torch.Tensor) -> None:
    """Let the kernel make the pages of a tensor on the CPU; they keep what they hold.

    Kernels older than 5.14 do it when the memory is written, as without this.
    """
    if tensor.is_contiguous() and (madvise := _madvise()) is not None:
        begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(begin, tensor.data_ptr() + tensor.nbytes - begin, _MADV_POPULATE_WRITE)


@cache
def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
