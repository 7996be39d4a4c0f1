"""What a calibration is asked for: arguments checked, lengths, and what its results depend on."""

import hashlib
from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from sparsify import timings
from sparsify.calibration.metrics import Metric, identity_of
from sparsify.errors import DeviceError, ModelError, OptionError
from sparsify.measurement import check_compiler, device_and_dtype, device_name, encode, tokenizer_of

LENGTHS = {"cpu": (512, 1024, 2048, 4096, 8192), "cuda": (512, 1024, 2048, 4096, 8192, 16384, 32768)}
"""Lengths calibrated by default, per device type, as far as model and documents reach."""


def check_arguments(model: nn.Module, max_error: float, metric: Metric, lengths: Sequence[int] | None,
           holdout: float) -> tuple[torch.device, torch.dtype]:
    if not isinstance(model, nn.Module):
        raise ModelError(f"model is a {type(model).__name__}. Give an nn.Module.")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ModelError("model was wrapped by torch.compile already. Give the module inside: model._orig_mod.")
    if model.training:
        raise ModelError("model is in training mode, where dropout would count as an error. Call model.eval() first.")
    if metric not in ("kl", "loss") and not callable(metric):
        raise OptionError(f"metric is {metric!r}. Give 'kl', 'loss' or a callable (dense output, sparse output) -> "
                          "float.")
    if not 0 < max_error < inf:
        raise OptionError(f"max_error is {max_error}. Give a number above 0, in units of the metric.")
    if not 0 < holdout < 1:
        raise OptionError(f"holdout is {holdout}. It is a share of the documents: give a number between 0 and 1.")
    if lengths is not None and (not lengths or min(lengths) < 1):
        raise OptionError(f"lengths is {list(lengths)}. Give at least one length, each at least 1.")
    places = {x.device for x in [*model.parameters(), *model.buffers()]}
    if len(places) > 1:
        raise DeviceError(f"model is on {', '.join(sorted(map(str, places)))}. Move it to one device with model.to.")
    device, dtype = device_and_dtype(model)
    if device.type not in LENGTHS:
        raise DeviceError(f"model is on {device}. There are kernels for: {', '.join(LENGTHS)}. Move the model, for "
                          "example with model.to('cpu').")
    check_compiler(device)
    return device, dtype


def lengths_of(lengths: Sequence[int] | None, model: nn.Module, device: torch.device) -> list[int]:
    if lengths is None:
        return default_lengths(model, device)
    most = _positions(model)
    if max(lengths) > most:
        raise OptionError(f"lengths holds {max(lengths)} and the model has {most} positions. Give lengths up to "
                          f"{most}.")
    return sorted(set(lengths))


def default_lengths(model: nn.Module, device: torch.device) -> list[int]:
    """LENGTHS of the device, as far as the positions of the model reach."""
    most = _positions(model)
    return [length for length in LENGTHS[device.type] if length <= most] or [int(most)]


def encoder(model: nn.Module, tokenizer: Any) -> Callable[[str], Tensor]:
    found: list[Any] = [tokenizer] if tokenizer is not None else []

    def encode_text(text: str) -> Tensor:
        if not found:
            found.append(tokenizer_of(model))
        return encode(text, found[0])

    return encode_text


def settings(model: nn.Module, metric: Metric, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What every result depends on, beside window and budget."""
    return {"model": _model_hash(model), "metric": identity_of(metric), **fingerprint(device, dtype)}


def fingerprint(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Where a plan is measured, its graph aside: device, dtype, torch, triton, and a digest of kernels and ops."""
    return {"device": device_name(device), "device_type": device.type, "dtype": str(dtype).removeprefix("torch."),
            **timings.versions()}


def _model_hash(model: nn.Module) -> str:
    """Of class, names, shapes and some values of every parameter and buffer: enough to tell a fine-tuned model. And of
    plain attributes of all modules: a scale or a window."""
    state = hashlib.sha256(repr(type(model)).encode())
    for name, module in model.named_modules():
        plain = {key: x for key, x in vars(module).items() if isinstance(x, str | int | float) and key[0] != "_"}
        state.update(f"{name} {type(module).__qualname__} {sorted(plain.items())}".encode())
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().flatten()
        some = flat[::max(1, flat.numel() // 256)].cpu()
        state.update(f"{name} {list(tensor.shape)} {tensor.dtype} {some.tolist()}".encode())
    return state.hexdigest()[:32]


def _positions(model: nn.Module) -> float:
    return getattr(getattr(model, "config", None), "max_position_embeddings", None) or inf
