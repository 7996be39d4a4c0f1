"""The roof over every kernel here: what a matrix product and a copy reach on this device, measured beside them.

    attainable = min(products, FLOP per byte * copy)     TFLOP/s

FLOP are those of kept work. Bytes are compulsory: q, k, v and the output, once each.
"""

from dataclasses import dataclass

import torch

from benchmarks.clock import Call

PRODUCT_SIZE = {"cuda": 8192, "cpu": 1024}  # rows, columns and depth of the product
COPY_BYTES = {"cuda": 1 << 29, "cpu": 1 << 26}


@dataclass(frozen=True)
class Roof:
    """Rates of one device at one time: a card's clock drifts."""

    product_tflops: float
    copy_gbs: float

    @classmethod
    def of_times(cls, product_ms: float, copy_ms: float, device: str) -> "Roof":
        """From the times of `roof_calls`."""
        flop, moved = 2 * PRODUCT_SIZE[device] ** 3, 2 * COPY_BYTES[device]
        return cls(tflops(flop, product_ms), moved / copy_ms / 1e6)

    def attainable(self, flop_per_byte: float) -> float:
        """TFLOP/s that no kernel of this intensity can exceed."""
        return min(self.product_tflops, flop_per_byte * self.copy_gbs / 1e3)


def roof_calls(device: str, dtype: torch.dtype) -> dict[str, Call]:
    """A large product of random matrices, and a large copy."""
    generator = torch.Generator(device).manual_seed(0)
    size = PRODUCT_SIZE[device]
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(COPY_BYTES[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"product": lambda: torch.mm(left, right), "copy": lambda: target.copy_(source)}


def tflops(flop: float, ms: float) -> float:
    """10^12 operations a second."""
    return flop / ms / 1e9
