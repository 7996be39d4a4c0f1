"""Calls of C functions that take and give tensors as handles, as AOTInductor's code calls them."""

import ctypes
from typing import Any

import torch

# torch hands handles out as capsules.
pointer_in = ctypes.pythonapi.PyCapsule_GetPointer
pointer_in.restype, pointer_in.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
capsule_of = ctypes.pythonapi.PyCapsule_New
capsule_of.restype, capsule_of.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Arguments:
    """Arguments as AOTInductor's code passes them, alive until the call is over."""

    def __init__(self) -> None:
        self.alive: list = []

    def tensor(self, x):
        (capsule,) = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([x])
        self.alive += [x, capsule]
        return ctypes.c_void_p(pointer_in(capsule, None))

    def optional(self, value, kind):
        if value is None:
            return ctypes.c_void_p()
        holder = self.tensor(value) if kind is None else kind(value)
        self.alive.append(holder)
        return ctypes.byref(holder)

    def column(self, numbers, kind):
        array = (kind * len(numbers))(*numbers)
        self.alive.append(array)
        return array, ctypes.c_int64(len(numbers))


def returned(function: Any, *arguments: Any) -> torch.Tensor:
    """What a function gives back through its last argument."""
    result = ctypes.c_void_p()
    assert function(*arguments, ctypes.byref(result)) == 0
    (out,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([capsule_of(result, None, None)])
    return out
