"""Which exact kernel a call runs, and whether sparse attention pays, from times measured on this machine.

    shape class   dtype, heads, head dims, kind of masks; batch and lengths in ranges: no new length is measured anew
    look-up       one dictionary, keyed on small numbers: a few microseconds of the host
    miss          the class is measured there and then, on a GPU, on parts of the call's own tensors, in well under a
                  second; never while a CUDA graph is captured or a graph is traced, never in deterministic mode. Where
                  it cannot be measured the nearest class within a factor of two decides, else constants

Sparse attention is entered where its time at the density to expect, selection included, is below that of the fastest
exact kernel: `Times.break_even` at least `expected_density`. What a call's density will be, nobody knows on the host
before selection has run, and waiting for it would cost more than it gains.

What is measured never changes more than which of several exact kernels runs and where sparse attention begins, and no
failure in here reaches the caller.
"""

import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sparsify import timings
from sparsify.kernels import rule
from sparsify.kernels.blocks import KEY_BLOCK, QUERY_BLOCK, KeptLists, allowed_blocks, count_blocks
from sparsify.kernels.masks import Masks
from sparsify.ops import exact
from sparsify.ops.lists import attend_lists, has_kernels
from sparsify.ops.select import keep_lists
from sparsify.ops.stopwatch import Call, Clock, clock_of, time_in_turns
from sparsify.plan import DEFAULT_TOLERANCE, Budget
from sparsify.timings import ShapeClass, Table, Times, lower_end

log = logging.getLogger("sparsify")

LAUNCH_SECONDS = 1.3e-3
"""What selection, lists and attention cost the host, a call, inside a compiled model (beside an H100)."""
GRAPH_SECONDS = 2.5e-4
"""The same in a CUDA graph: selection itself, where it and attention at density 0.1 gain 1.4x (H100, 4K keys)."""
BFLOAT16_ON_CPU = 16384
"""Keys from which sparse attention pays in bfloat16 on a CPU: it computes in float32, SDPA on matrix registers."""
DENSE_RATE = {2: 4.5e14, 4: 5e13, 8: 2.5e13}
"""FLOP/s of dense attention on an H100 (head dim 64), by bytes an element; slower cards only gain more."""
OP_SECONDS = 1e-4
"""What dense attention on a GPU must take to hide that an op costs the host 34 microseconds more than SDPA (H200)."""

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
SHORTEST = 512  # keys; below, and for less than a query block, dense attention is over before a choice would pay
DENSITIES = (0.125, 0.5)  # attention is timed at; its time is linear in the density (H100, 8K: .73 and .75 ms a unit)
MEASURED_DEVICES = ("cuda",)  # where a call may stop to measure
TUNE_SECONDS = 0.5  # for the rounds of one class
LARGEST_SECONDS = 0.005  # of dense attention by `dense_seconds`: larger layers are measured on some of their heads

_tables: dict[int, Table | None] = {}
_hopeless: set[tuple[ShapeClass, int]] = set()  # measured once, in vain
_measuring = threading.Lock()


def exact_kernel(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks) -> str:
    """Name of the exact kernel for this call."""
    table = _usable_table(q)
    shape = None if table is None else class_of(q, k, v, masks)
    if table is None or shape is None:
        return exact.usual_kernel(q, k, v, masks)
    name = table.kernels.get(shape)
    if name is None:
        times = _find_times(table, shape, q, k, v, scale, masks)
        name = None if times is None else times.kernel
    if name is None or not exact.can_run(name, q, k, v, masks):
        return exact.usual_kernel(q, k, v, masks)
    return name


def selection_pays(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks, tolerance: float, singles: int,
                   peaks: float = 0.0, shifts: Sequence[float] | None = None) -> bool:
    """Whether sparse attention may be expected to be faster than exact, for calls that our kernels take.

    `peaks`: see `sparsify.Budget`; 0.0: not known. `shifts`: factors on the tolerance, by query head.
    """
    table = _usable_table(q)
    shape = None if table is None else class_of(q, k, v, masks)
    if table is None or shape is None:
        return _pays_by_constants(q, k, v, masks)
    in_graph = _is_captured(q)
    break_even = (table.break_evens_in_graph if in_graph else table.break_evens).get((shape, singles))
    if break_even is None:
        times = _find_times(table, shape, q, k, v, scale, masks, singles)
        break_even = None if times is None else times.break_even_in_graph if in_graph else times.break_even
    if break_even is None:
        return _pays_by_constants(q, k, v, masks)
    keys = k.shape[2] if masks.window is None else max(1, min(masks.window, k.shape[2]))
    return break_even >= (timings.expected_density(keys, tolerance, peaks) if shifts is None else
                          _mean_density(keys, tolerance, peaks, tuple(shifts)))


def class_of(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> ShapeClass | None:
    """The shape class of a call; None: too small, or of a dtype that nobody times."""
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len, value_dim = v.shape[1:]
    dtype = DTYPES.get(q.dtype)
    if dtype is None or not batch or q_len < QUERY_BLOCK or kv_len < SHORTEST:
        return None
    offset, mask, features = masks.causal_offset, masks.attn_mask, 0
    if offset is not None and (offset < kv_len - 1 or masks.window is not None):
        features = 1 | (offset == 0) << 1 | (offset == kv_len - q_len) << 2
    features |= ((masks.key_mask is not None) << 3 | (masks.query_documents is not None) << 4
                 | bool(masks.softcap) << 7 | (masks.sink_logits is not None) << 8)
    if mask is not None:
        features |= 1 << (6 if mask.is_floating_point() else 5)
    window = 0 if masks.window is None else lower_end(max(1, min(masks.window, timings.LONGEST)))
    return ShapeClass(dtype, 1 << (batch.bit_length() - 1), heads, kv_heads, head_dim, value_dim,
                      lower_end(min(q_len, timings.LONGEST)), lower_end(min(kv_len, timings.LONGEST)), features, window)


def measure(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks, shape: ShapeClass, singles: int | None = None,
            clock: Clock | None = None, seconds: float = TUNE_SECONDS) -> Times:
    """Time the exact kernels of a class, and with `singles` selection and attention over kept lists.

    q, k, v and masks are of a call of that class; parts of them are used. Raises RuntimeError where nothing runs.
    """
    with torch.cuda.device_of(q):
        return _measure(*_part(q, k, v, masks, shape), scale, shape, singles, clock or clock_of(q.device), seconds)


def times_for(q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks, singles: int,
              seconds: float = TUNE_SECONDS) -> Times | None:
    """Times of the class of a call, sparse attention included: known here, else measured now and kept, on a CPU too.

    None where nothing is measured: small calls, SPARSIFY_TUNE=0, SPARSIFY_TUNE=read and nothing alike known.
    """
    table, shape = table_of(q.device), class_of(q, k, v, masks)
    if table is None or shape is None or not has_kernels(q, v):
        return None
    known = table.times.get((shape, singles))
    if known is None and timings.mode() == "on":
        try:
            known = measure(q, k, v, scale, masks, shape, singles, seconds=seconds)
        except RuntimeError as error:  # out of memory, for one
            log.info("sparsify: %s could not be measured: %s", shape, error)
        else:
            table.add(known)
    return known or table.near(shape, singles)


def measure_layer(sizes: tuple[int, int, int, int, int, int], causal: bool, dtype: torch.dtype, device: torch.device,
                  singles: int, seconds: float = TUNE_SECONDS) -> Times:
    """`measure` on random tensors, see `random_layer`."""
    q, k, v, masks = random_layer(sizes, causal, dtype, device)
    shape = class_of(q, k, v, masks)
    if shape is None:
        raise RuntimeError(f"{sizes[3]} keys of {dtype} are never timed")
    with torch.inference_mode():
        return measure(q, k, v, sizes[4] ** -0.5, masks, shape, singles, seconds=seconds)


def random_layer(sizes: tuple[int, int, int, int, int, int], causal: bool, dtype: torch.dtype,
                 device: torch.device) -> tuple[Tensor, Tensor, Tensor, Masks]:
    """q, k, v, laid out as models do, and masks; sizes: batch, heads, KV heads, length, head dim, value dim."""
    batch, heads, kv_heads, length, head_dim, value_dim = sizes
    generator = torch.Generator(device).manual_seed(length)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(batch, length, heads, dim, generator=generator, device=device, dtype=dtype).transpose(1, 2)

    q, k, v = normal(heads, head_dim), normal(kv_heads, head_dim), normal(kv_heads, value_dim)
    return q, k, v, Masks(0 if causal else None)


def table_of(device: torch.device) -> Table | None:
    """What is known of a device; None where the environment switches it off."""
    place = -1 if device.index is None else device.index
    if device.type == "cuda" and device.index is None:
        place = torch.cuda.current_device()
    if place not in _tables:
        _tables[place] = Table(timings.path(), _fingerprint(device)) if timings.mode() != "off" else None
    return _tables[place]


def forget() -> None:
    """Read file and environment anew at the next call."""
    _tables.clear()
    _hopeless.clear()


def dense_seconds(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> float:
    """Seconds that dense attention of these shapes takes at `DENSE_RATE`; causal: the lower half, or its window."""
    keys = k.shape[2] / (1 if masks.causal_offset is None else 2)
    if masks.window is not None:
        keys = min(keys, masks.window)
    pairs = q.shape[0] * q.shape[1] * q.shape[2] * keys
    return 2 * pairs * (q.shape[3] + v.shape[3]) / DENSE_RATE[q.element_size()]


def op_may_beat_sdpa(device_type: str, dtype: torch.dtype, keys: int, heads: int, dims: int, batch: int = 1) -> bool:
    """Whether `exact_attention` may be faster than SDPA in a graph, where SDPA says the masks without a tensor.

    keys, batch: the least of any call, queries as many as keys; dims: of a query and a value head together. On a GPU an
    op costs the host more than SDPA does, which dense attention must hide; half of its pairs are counted.
    """
    if device_type == "cpu":
        return dtype == torch.float32 and keys >= exact.LONG_ON_CPU
    return device_type == "cuda" and batch * keys * keys * heads * dims >= OP_SECONDS * DENSE_RATE[dtype.itemsize]


@lru_cache(maxsize=4096)  # sites times lengths; a call looks up what the last one computed
def _mean_density(keys: int, tolerance: float, peaks: float, shifts: tuple[float, ...]) -> float:
    """The density to expect of heads with tolerances of their own."""
    return sum(timings.expected_density(keys, tolerance * shift, peaks) for shift in shifts) / len(shifts)


def _pays_by_constants(q: Tensor, k: Tensor, v: Tensor, masks: Masks) -> bool:
    """Whether dense attention takes long enough: on CUDA to hide the launches of sparse attention."""
    if not q.is_cuda:
        return q.dtype != torch.bfloat16 or k.shape[2] >= BFLOAT16_ON_CPU
    return dense_seconds(q, k, v, masks) > (GRAPH_SECONDS if _is_captured(q) else LAUNCH_SECONDS)


def _is_captured(q: Tensor) -> bool:
    """Whether a CUDA graph records the call: then nobody waits for the host."""
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _usable_table(q: Tensor) -> Table | None:
    """The table of the call's device, if a look into it can help. Deterministic mode: what ran must run again."""
    if torch.are_deterministic_algorithms_enabled():
        return None
    table = _tables[q.get_device()] if q.get_device() in _tables else table_of(q.device)
    return table if table is not None and (table.times or q.device.type in MEASURED_DEVICES) else None


def _find_times(table: Table, shape: ShapeClass, q: Tensor, k: Tensor, v: Tensor, scale: float, masks: Masks,
                singles: int | None = None) -> Times | None:
    """Times of a class that is not in the table: measured now, or those of the nearest class."""
    wanted = (shape, singles or 0)
    if wanted not in _hopeless and _may_measure(q) and _measuring.acquire(blocking=False):
        try:
            times = measure(q, k, v, scale, masks, shape, singles)
            table.add(times)
            log.info("sparsify: measured %s: %s%s", shape, times.kernel, "" if times.break_even is None else
                     f", sparse below density {times.break_even:.2f}")
            if singles is None or times.break_even is not None:
                return times
        except Exception as error:  # whatever it is, the call itself must not suffer
            log.info("sparsify: %s could not be measured: %s", shape, error)
        finally:
            _measuring.release()
        _hopeless.add(wanted)
    return table.near(shape, singles)


def _may_measure(q: Tensor) -> bool:
    """Whether a call may take its time: real tensors on a GPU, nothing that records what runs."""
    return (q.device.type in MEASURED_DEVICES and type(q) in (Tensor, torch.nn.Parameter) and timings.mode() == "on"
            and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()
            and not _is_captured(q))


def _measure(q: Tensor, k: Tensor, v: Tensor, masks: Masks, scale: float, shape: ShapeClass, singles: int | None,
             clock: Clock, seconds: float) -> Times:
    calls: dict[str, Call] = {name: partial(exact.run, name, q, k, v, scale, masks)
                              for name in exact.kernels_of(q, k, v, masks)}
    rivals = list(calls)
    densities: dict[str, float] = {}
    if singles is not None and has_kernels(q, v):
        budget = Budget(DEFAULT_TOLERANCE)  # none of its numbers matters to the time of selection
        calls["selection"] = partial(keep_lists, q, k, scale, masks, DEFAULT_TOLERANCE, budget.max_density,
                                     budget.sinks, budget.local, singles)
        for wanted in DENSITIES:
            lists, density = _random_lists(q, k, masks, wanted)
            densities[f"density {wanted}"] = density
            calls[f"density {wanted}"] = partial(attend_lists, q, k, v, *lists, scale, masks)
    if q.is_cuda:
        _compile_ahead([call for name, call in calls.items() if name == "lists" or name not in rivals])
    times = time_in_turns(calls, clock, seconds, rivals)
    kernels = {name: times[name] for name in rivals if name in times}
    if not kernels:
        raise RuntimeError(f"no exact kernel runs for {shape}")
    if not densities or not {"selection", *densities} <= times.keys():
        return Times(shape, kernels)
    attention = {density: times[name] for name, density in densities.items()}
    return Times(shape, kernels, singles or 0, times["selection"], attention)


def _compile_ahead(calls: Sequence[Call]) -> None:
    """Compile the kernels of calls of ours at once: one after the other they took 13 seconds (H100, empty caches)."""
    from sparsify.kernels.launch import compiling_ahead  # Triton: imported when a CUDA op runs, not before

    try:
        with compiling_ahead():
            for call in calls:
                call()
    except Exception as error:  # what is wrong with a call, the call itself will say
        log.debug("sparsify: kernels were not compiled ahead: %s", error)


def _part(q: Tensor, k: Tensor, v: Tensor, masks: Masks,
          shape: ShapeClass) -> tuple[Tensor, Tensor, Tensor, Masks]:
    """The part of a call at which its class is measured: lengths and batch at their lower ends, not too many heads."""
    group = shape.heads // shape.kv_heads
    batch, kv_heads, q_len, kv_len = shape.batch, shape.kv_heads, shape.q_len, shape.kv_len
    offset = masks.causal_offset
    if offset is not None and offset == k.shape[2] - q.shape[2]:
        offset = kv_len - q_len  # bottom-right stays bottom-right
    sized = replace(masks, causal_offset=offset)
    q, k, v = q[:, :, :q_len], k[:, :, :kv_len], v[:, :, :kv_len]
    while dense_seconds(q[:batch, :kv_heads * group], k, v, sized) > LARGEST_SECONDS and batch * kv_heads > 1:
        batch, kv_heads = (batch // 2, kv_heads) if batch > 1 else (1, kv_heads // 2)
    heads = kv_heads * group

    def rows(x: Tensor | None, length: int) -> Tensor | None:
        return None if x is None else x[:batch, :length]

    mask, sinks = masks.attn_mask, masks.sink_logits
    part = replace(sized, key_mask=rows(masks.key_mask, kv_len), query_documents=rows(masks.query_documents, q_len),
                   key_documents=rows(masks.key_documents, kv_len),
                   attn_mask=None if mask is None else mask[:batch, :heads, :q_len, :kv_len],
                   sink_logits=None if sinks is None else sinks[:heads])
    return q[:batch, :heads], k[:batch, :kv_heads], v[:batch, :kv_heads], part


def _random_lists(q: Tensor, k: Tensor, masks: Masks, density: float) -> tuple[KeptLists, float]:
    """Kept lists of about this density, different for every head as real ones are, and their true density."""
    generator = torch.Generator(q.device).manual_seed(0)  # the caller's random numbers stay as they are
    rows, blocks = count_blocks(q.shape[2], QUERY_BLOCK), count_blocks(k.shape[2], KEY_BLOCK)
    luck = torch.rand(*q.shape[:2], rows, blocks, generator=generator, device=q.device)
    lists = rule.choose_blocks(luck, q_len=q.shape[2], kv_len=k.shape[2], tolerance=1 - density, max_density=1.0,
                               sinks=1, local=1, masks=masks)
    allowed = allowed_blocks(masks, q.shape[2], k.shape[2], q.device)
    total = allowed.sum(dtype=torch.float64).item() * math.prod(q.shape[:2]) / len(allowed)
    return lists, min(1.0, lists.counts.sum(dtype=torch.float64).item() / max(1.0, total))


@cache
def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


def _fingerprint(device: torch.device) -> dict[str, str]:
    """What the times of a device depend on beside the shapes."""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, cuDNN {torch.backends.cudnn.version()}"
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return {"type": device.type, "device": name, **timings.versions()}

