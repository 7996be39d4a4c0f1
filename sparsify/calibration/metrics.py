"""What an error is: from the dense and the sparse output of one window to a number, 0 for no difference.

    kl         KL(dense || sparse) of the next-token distributions, nats, mean over positions
    loss       rise of the next-token loss, nats a token
    output     |sparse - dense| / |dense|, both as vectors: what is left where outputs are no logits of tokens
    callable   (dense output, sparse output) -> float, on what the model returns

The outputs of a language model are logits [batch, length, vocabulary]: a tensor, or something with `.logits`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from math import isfinite
from types import CodeType
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify.errors import ModelError, OptionError
from sparsify.measurement import Quality

Metric = Literal["kl", "loss"] | Callable[[Any, Any], float]

NAMES = {"kl": "KL, nats a token", "loss": "rise of the loss, nats a token",
         "output": "relative output error, |sparse - dense| / |dense|", "callable": "the caller's own function"}
OUTPUT_NAMES = ("logits", "sample", "last_hidden_state")
"""Under which models return their main output, where it is not the only one."""


def name_of(metric: Metric, output: Any, ids: Tensor | None) -> str:
    """Which of NAMES is measured, for a model with this output on these tokens (None: whole inputs)."""
    if callable(metric):
        return "callable"
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    are_of_tokens = (ids is not None and isinstance(logits, Tensor) and logits.dim() == 3
                     and logits.shape[:2] == (1, len(ids)) and logits.shape[2] > int(ids.max()))
    if are_of_tokens:
        return metric
    if metric == "loss":
        raise OptionError("metric is 'loss' and the model does not return logits [1, length, vocabulary] for the "
                          "samples' tokens. Give metric='kl', which falls back to the output error, or a callable.")
    return "output"


def identity_of(metric: Any) -> Any:
    """What a metric's results depend on, as plain data, the same in another process; else the same for no other.

    Of a function its code, the constants in it, and what it finds by name or in its closure, as far as that is plain.
    """
    if isinstance(metric, str):
        return metric
    if isinstance(metric, partial):
        return ["partial", identity_of(metric.func), _plain(metric.args), _plain(metric.keywords)]
    code = getattr(metric, "__code__", None)
    if code is None:
        call = vars(type(metric)).get("__call__")
        return [repr(type(metric)), _plain(vars(metric)), identity_of(call)] if hasattr(call, "__code__") and hasattr(
            metric, "__dict__") else repr(metric)
    known = getattr(metric, "__globals__", {})
    named = {name: known[name] for name in code.co_names if isinstance(known.get(name), str | int | float | tuple)}
    closure = [cell.cell_contents for cell in getattr(metric, "__closure__", None) or ()]
    return [getattr(metric, "__module__", ""), getattr(metric, "__qualname__", ""), _code(code), _plain(named),
            _plain(closure), _plain(getattr(metric, "__defaults__", None)),
            _plain(getattr(metric, "__kwdefaults__", None)), _plain(getattr(metric, "__self__", None))]


def _code(code: CodeType) -> list[Any]:
    return [code.co_code.hex(), [_code(x) if isinstance(x, CodeType) else repr(x) for x in code.co_consts],
            list(code.co_names)]


def _plain(x: Any) -> Any:
    """As JSON takes it. What cannot be described has its address in it: no other process finds results by that."""
    if isinstance(x, Tensor):
        return [str(x.dtype), list(x.shape), repr(x.tolist())]
    if isinstance(x, Mapping):
        return [[repr(name), _plain(value)] for name, value in x.items()]
    if isinstance(x, list | tuple):
        return [_plain(y) for y in x]
    return identity_of(x) if isinstance(x, partial) or hasattr(x, "__code__") else repr(x)


def error_of(name: str, metric: Metric, dense: Any, sparse: Any,
             ids: Tensor | None) -> tuple[float, tuple[float, float] | None]:
    """The error of one window, and the dense and sparse next-token losses where outputs are logits of tokens."""
    losses = None
    if name in ("kl", "loss"):
        assert ids is not None  # `name_of` saw to it
        quality = Quality()
        quality.add(tensor_of(dense)[0], tensor_of(sparse)[0], ids.to(tensor_of(dense).device))
        losses = quality.dense_loss / max(1, quality.targets), quality.sparse_loss / max(1, quality.targets)
        error = quality.mean_kl if name == "kl" else losses[1] - losses[0]
        return _checked(error, "the model's logits"), losses
    if callable(metric):
        return _checked(metric(dense, sparse), "metric(dense, sparse)"), None
    before, after = tensor_of(dense), tensor_of(sparse)
    difference = torch.linalg.vector_norm(after - before, dtype=torch.float64)
    size = torch.linalg.vector_norm(before, dtype=torch.float64)
    return _checked(float(difference) / max(float(size), 1e-300), "the model's output"), None


def tensor_of(output: Any) -> Tensor:
    """The main output: a tensor, the one of a known name, or the first. Raises ModelError where there is none."""
    if isinstance(output, Tensor) and output.is_floating_point():
        return output
    for name in OUTPUT_NAMES:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    parts = list(output.values()) if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else []
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise ModelError(f"model returns a {type(output).__name__} without a floating-point tensor to compare. Give "
                     "metric= a callable (dense output, sparse output) -> float.")


def _checked(error: Any, where: str) -> float:
    try:
        error = float(error)
    except (TypeError, ValueError) as mistake:
        raise OptionError(f"metric returned {error!r}. It must return a number.") from mistake
    if not isfinite(error):
        raise ModelError(f"{where} gave {'NaN' if error != error else error}, which is no error to compare. Results so "
                         "far are in the journal; calibrate once that is mended.")
    return error
