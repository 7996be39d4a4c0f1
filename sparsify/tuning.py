"""Tune: measure attention layers on request, at lengths of the caller's choice; what the ops do by themselves on a GPU.

On a CPU nothing is measured otherwise: there the constants hold until this has run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparsify import timings
from sparsify.errors import ModelError, OptionError
from sparsify.ops import crossover
from sparsify.plan import DEFAULT_TOLERANCE, Budget
from sparsify.timings import Times

LENGTHS = {"cpu": (1024, 2048, 4096, 8192),
           "cuda": (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768)}
"""Lengths tuned by default, per device type; on a GPU every range there is, from 1K on."""
CPU_SECONDS = 3.0  # for the rounds of one length; a GPU needs less


@dataclass(frozen=True)
class Layer:
    """One attention layer, as far as its time depends on it."""

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}. Give at least 1.")
        if self.heads % self.kv_heads:
            raise OptionError(f"heads is {self.heads} and kv_heads is {self.kv_heads}. Query heads must be a multiple "
                              "of KV heads.")

    @classmethod
    def of_config(cls, config: Any) -> "Layer":
        """The layer of a Hugging Face model, by the names that their configurations share. Raises ModelError."""
        config = config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int):
            raise ModelError(f"model is a {type(config).__name__} without num_attention_heads. Give its attention as "
                             "heads, kv_heads and head_dim.")
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        if getattr(config, "v_head_dim", None):  # latent attention: keys and values are expanded, of two widths
            return cls(heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim)
        return cls(heads, getattr(config, "num_key_value_heads", None) or heads, head_dim, head_dim)


@dataclass(frozen=True)
class Tuned:
    """One length: what was measured and whether it could be stored, or why nothing was."""

    length: int
    times: Times | None
    why: str = ""
    stored: bool = False

    @property
    def is_sparse(self) -> bool:
        """Whether the ops run this length sparse, at the default tolerance."""
        return (self.times is not None and self.times.break_even is not None
                and self.times.break_even >= timings.expected_density(self.length, DEFAULT_TOLERANCE))

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        if self.times is None:
            return {"length": self.length, "why": self.why}
        return {"length": self.length, **self.times.to_dict(), "kernel": self.times.kernel,
                "break_even": self.times.break_even,
                "expected_density": timings.expected_density(self.length, DEFAULT_TOLERANCE), "sparse": self.is_sparse}


def tune(layer: Layer, lengths: Sequence[int] | None, *, device: torch.device, dtype: torch.dtype, batch: int = 1,
         causal: bool = True, singles: int = Budget.singles,
         progress: Callable[[str], None] | None = None) -> list[Tuned]:
    """Measure a layer at every length, and keep the times where the ops find them. Raises OptionError."""
    lengths = LENGTHS[device.type] if lengths is None else sorted(set(lengths))
    if not lengths or min(lengths) < crossover.SHORTEST:
        raise OptionError(f"lengths is {list(lengths)}. Give at least one length, each at least {crossover.SHORTEST}: "
                          "shorter ones are always exact.")
    if batch < 1:
        raise OptionError(f"batch is {batch}. Give at least 1.")
    if dtype not in crossover.DTYPES:
        raise OptionError(f"dtype is {dtype}. Give one of: {', '.join(crossover.DTYPES.values())}.")
    table = crossover.table_of(device)
    if table is None:
        raise OptionError("SPARSIFY_TUNE is 0 in the environment, so nothing measured would be used. Unset it.")
    seconds = crossover.TUNE_SECONDS if device.type == "cuda" else CPU_SECONDS
    tell, rows = progress or (lambda line: None), []
    for place, length in enumerate(lengths, start=1):
        tell(f"[{place}/{len(lengths)}] {length} keys")
        try:
            times = crossover.measure_layer(
                (batch, layer.heads, layer.kv_heads, length, layer.head_dim, layer.value_dim), causal, dtype, device,
                singles, seconds)
        except RuntimeError as error:  # out of memory, for one
            rows.append(Tuned(length, None, str(error).splitlines()[0]))
            continue
        rows.append(Tuned(length, times, stored=table.add(times)))
    return rows


def table(rows: Sequence[Tuned]) -> str:
    """The rows in columns, milliseconds."""
    head = ("length", "exact kernel", "exact ms", "kernels ms", "selection ms", "attention ms at density",
            "sparse below", "expected", "runs")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        if row.times is None:
            lines.append((str(row.length), f"not measured: {row.why}", *[""] * (len(head) - 2)))
            continue
        times, break_even = row.times, row.times.break_even
        lines.append((
            str(row.length), times.kernel, _ms(times.exact[times.kernel].device),
            " ".join(f"{name} {_ms(time.device)}" for name, time in times.exact.items()),
            "" if times.selection is None else _ms(times.selection.device),
            ", ".join(f"{_ms(time.device)} at {density:.2f}" for density, time in times.attention.items()),
            "" if break_even is None else f"{break_even:.2f}",
            f"{timings.expected_density(row.length, DEFAULT_TOLERANCE):.2f}", "sparse" if row.is_sparse else "exact"))
    widths = [max(len(line[i]) for line in lines if not line[1].startswith("not measured")) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
                     for line in lines)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3f}"
