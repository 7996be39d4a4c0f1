"""What launching takes from the host: kernels without Triton's Python in between, facts of a device asked once.

    @launched
    @triton.jit
    def _kernel(...): ...

    _kernel[grid](...)     as before

Triton binds, specialises and prints the arguments of every launch to find the compiled kernel: 75 microseconds for
those of ours. `launched` finds it by a key of its own, made of all that Triton may specialise on, and calls Triton's
launcher.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

Grid = tuple[int, ...]
COMPILERS = 8  # threads: a call that selects has six kernels, its exact rival one

_COMPILES_ONLY: ContextVar[bool] = ContextVar("sparsify_compiles_only", default=False)


class Launched:
    """A kernel whose compiled forms are remembered by the kinds of the arguments; else as the kernel itself.

    Positional arguments are the kernel's first parameters; keywords are constants or options of the compiler.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
        self._is_compiled = isinstance(kernel, triton.JITFunction)  # not in Triton's interpreter
        self._is_direct = self._is_compiled

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: Grid, *args: Any, **keywords: Any) -> None:
        if self._is_compiled and _COMPILES_ONLY.get():
            self.kernel.warmup(*args, grid=grid, **keywords)
            return
        if not self._is_direct or is_watched():
            self.kernel[grid](*args, **keywords)
            return
        device = torch.cuda.current_device()
        kinds, values = describe_arguments(args)
        key = device, tuple(kinds), tuple(keywords.items())
        known = self._compiled.get(key)
        if known is None:
            compiled = self.kernel[grid](*args, **keywords)
            constants = self._constants(len(args), keywords)
            if compiled is not None and constants is not None:
                self._compiled[key] = compiled, constants
            return
        compiled, constants = known
        width, height, depth = (*grid, 1, 1)[:3]
        try:
            compiled.run(width, height, depth, torch._C._cuda_getCurrentRawStream(device), compiled.function,
                         compiled.packed_metadata, None, None, None, *values, *constants)
        except TypeError:  # the launcher of another Triton (ours: 3.6) takes other arguments; it launched nothing
            self._is_direct = False
            self.kernel[grid](*args, **keywords)

    def _constants(self, position: int, keywords: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Values of the parameters behind the positional ones; None if one has its default."""
        names = self.kernel.arg_names[position:]
        return tuple(keywords[name] for name in names) if all(name in keywords for name in names) else None


def launched(kernel: Any) -> Launched:
    """Decorator of a Triton or Gluon kernel that the host launches."""
    return Launched(kernel)


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """Launches inside only compile, all of them at once in threads; done at the end. Errors are left to the launches.

    What kernels would have written stays unset: nothing inside may depend on it.
    """
    with ThreadPoolExecutor(COMPILERS) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        token = _COMPILES_ONLY.set(True)
        try:
            yield
        finally:
            _COMPILES_ONLY.reset(token)


def is_only_compiling() -> bool:
    """Whether this is inside `compiling_ahead`."""
    return _COMPILES_ONLY.get()


def describe_arguments(args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """Kinds of arguments, equal only if Triton compiles one kernel for both; and the arguments, tensors as addresses.

    Triton tells integers by 1, divisibility by 16 and width, pointers by dtype and alignment to 16 bytes. Of a tensor
    its launcher would ask the driver for the address.
    """
    kinds: list[Any] = []
    values: list[Any] = []
    for x in args:
        if isinstance(x, Tensor):
            address = x.data_ptr()
            kinds.append((x.dtype, address % 16 == 0))
            values.append(address)
            continue
        values.append(x)
        if type(x) is int:
            kinds.append((x == 1, x % 16 == 0, -(1 << 31) <= x < 1 << 31, x < 1 << 63))
        elif isinstance(x, TensorDescriptor):
            kinds.append((x.base.dtype, tuple(x.block_shape), x.layout))
        elif isinstance(x, tuple):
            kinds.append(tuple(describe_arguments(x)[0]))
        else:
            kinds.append(type(x))
    return kinds, values


def is_watched() -> bool:
    """Whether somebody wants to hear of launches, as a profiler of Triton's does."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return any(hook is not None and bool(getattr(hook, "calls", True)) for hook in hooks)


def descriptor(tensor: Tensor, strides: list[int], box: list[int], layout: Any) -> TensorDescriptor:
    """The copy engine's view of a tensor, without the checks that TensorDescriptor makes: they take 15 microseconds.

    The caller knows that the address and all strides but the last are multiples of 16 bytes, and the last stride 1.
    """
    described = object.__new__(TensorDescriptor)
    vars(described).update(base=tensor, shape=list(tensor.shape), strides=strides, block_shape=box, layout=layout,
                           padding="zero")
    return described


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device with an index; 1 in Triton's interpreter."""
    return 1 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@cache
def is_hopper(device: torch.device) -> bool:
    """Whether a device is a CUDA device of compute capability 9."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
