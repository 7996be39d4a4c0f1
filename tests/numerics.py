"""What "as good as torch" means: the one judgement of an error, for ops and kernels alike."""

import torch
from torch import Tensor


def attention_units(q: Tensor, k: Tensor, scale: float) -> float:
    """Rounding units of an attention: a weight is exp(score), and a score of size s, rounded, moves it by s eps.

    Plain torch's own error is no yardstick for that where there are few draws: on one query its roundings cancel, and a
    right result was seen at 2.8 times its error plus four units.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return 4.0 + abs(scale) * float((q.double() @ k.double().mT).abs().max())


def judge(ours: Tensor, plain: Tensor, exact: Tensor, units: float = 4.0) -> tuple[float, float]:
    """The error of `ours` and the one allowed: twice plain torch's on the same inputs, plus rounding.

    Rounding is `units` times eps of the largest value. Equal infinities are no error.
    """
    def error(tensor: Tensor) -> float:
        difference = torch.where(tensor.double() == exact, 0.0, (tensor.double() - exact).abs())
        return float(difference.nan_to_num(nan=torch.inf).max())

    finite = exact[exact.isfinite()].abs()
    rounding = units * torch.finfo(ours.dtype).eps * (float(finite.max()) if finite.numel() else 0.0)
    return error(ours), 2 * error(plain) + rounding


def assert_as_good_as_torch(ours: Tensor, plain: Tensor, exact: Tensor, units: float = 4.0) -> None:
    error, allowed = judge(ours, plain, exact, units)
    assert error <= allowed, f"error {error:.3e} is above {allowed:.3e}"
