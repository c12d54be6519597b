"""Lets a kernel have more than 48 KB of shared memory, some of it reserved by name.

CUDA wants to be asked for more than that before a launch. Triton asks where what it reserves by itself, at launch, comes to
more; where the names in a kernel bring the sum above it the launch would fail. So it is asked here, as Triton does it: all that
a program may have, less what is reserved by name (CUDA driver API, ``cuFuncSetAttribute``).
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
import triton

from spectral_compile.errors import Mistake

_NAMED, _AT_LAUNCH, _PREFER_SHARED = 1, 8, 1  # CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES and so on


@functools.cache
def opt_in(name: str) -> None:
    """From now on kernels of this name are asked for when they are loaded."""

    def loaded(module: Any, function: Any, loaded_name: str, metadata_group: Any, hash: Any) -> None:
        if loaded_name == name:
            _ask(function)

    triton.knobs.runtime.kernel_load_end_hook.add(loaded)


def _ask(function: int) -> None:
    driver, handle, named = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p(function), ctypes.c_int()
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    most = properties.shared_memory_per_block_optin
    failed = driver.cuFuncGetAttribute(ctypes.byref(named), _NAMED, handle)
    failed = failed or driver.cuFuncSetAttribute(handle, _AT_LAUNCH, most - named.value)
    failed = failed or driver.cuFuncSetCacheConfig(handle, _PREFER_SHARED)
    if failed:
        raise Mistake(f"CUDA gives an attention kernel no more than 48 KB of shared memory (error {failed}); update its driver")
