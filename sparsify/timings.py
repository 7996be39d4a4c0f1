"""Times of attention measured on this machine, one record a shape class, and the two decisions that follow from them.

    which exact kernel    `Times.kernel`: the fastest, if it beats torch's own choice by more than the noise
    sparse or exact       `Times.break_even`: the density below which selection and attention over kept lists are faster

A leaf: imports nothing but the standard library, so anyone may import it. `sparsify/ops/crossover.py` looks up and
measures; `sparsify tune` measures on request.

The file is one JSON object a line, `tuning.jsonl` in the user's cache ($XDG_CACHE_HOME or ~/.cache, then sparsify/). A
record is appended by one write, so processes need no lock: the last record of a class counts, a torn line is skipped,
and so is what another fingerprint (device, torch, Triton, source of kernels and ops) measured.

SPARSIFY_TUNE=0 switches all of it off: nothing is measured, the file is not read, the built-in constants decide.
SPARSIFY_TUNE=read uses what was measured, and measures nothing more.
"""

import functools
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

log = logging.getLogger("sparsify")

LONGEST = 32768  # beyond, all times grow alike
FEATURES = ("causal", "top left", "bottom right", "key mask", "documents", "bool mask", "bias", "soft cap", "sinks")
"""What a mask may hold; bit i of `ShapeClass.masks` says that it holds the i-th."""

GAIN = 0.97  # of a time: what is not faster by more may be noise, and is left as it was
# A model's own code runs between two calls and empties the host's caches: launches take longer than measured in a row,
# .69 ms a site in the shipped model where a call of an op in a row took .52 (one H200's host).
HOST_FACTOR = 1.4
LEAST_DENSITY = 0.3  # no expectation below it: models differ
PEAKS = 90.0
"""Expected density = PEAKS / (keys * tolerance): attention sums to 1, so the keys that can reach the tolerance do not
grow with the length. Measured numerators: SmolLM2 38 to 61 (4K and 8K keys), the shipped model 76 at 4K, 92 at 8K."""
NEIGHBOURS = 2  # classes to either side that stand in for one that cannot be measured now: a factor of two
LEAST_CROSSOVER = 1024


class ShapeClass(NamedTuple):
    """What times depend on. Sizes are the lower ends of their ranges, at which a class is measured."""

    dtype: str
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q_len: int
    kv_len: int
    masks: int
    window: int  # 0: none

    def __str__(self) -> str:
        masks = ", ".join(name for bit, name in enumerate(FEATURES) if self.masks >> bit & 1) or "full"
        window = f", window {self.window}" if self.window else ""
        return (f"{self.dtype}, batch {self.batch}, {self.heads} / {self.kv_heads} heads, {self.head_dim} / "
                f"{self.value_dim} dims, {self.q_len} x {self.kv_len}, {masks}{window}")


class Time(NamedTuple):
    """Seconds of one call: on the device, and on the host to launch it (0 where the host is the device)."""

    device: float
    host: float


@dataclass(frozen=True)
class Times:
    """One record: exact kernels by name, torch's choice or the constants' first; selection and attention by density."""

    shape: ShapeClass
    exact: Mapping[str, Time]
    singles: int = 0  # 0: no sparse attention was measured
    selection: Time | None = None
    attention: Mapping[float, Time] = field(default_factory=dict)

    @property
    def dense(self) -> float:
        """Seconds of the fastest exact kernel."""
        return min(time.device for time in self.exact.values())

    @property
    def kernel(self) -> str:
        """The exact kernel to run. None of which the launch could outlast the kernel that it replaces."""
        usual, reference = next(iter(self.exact.items()))
        fit = {name: time for name, time in self.exact.items() if HOST_FACTOR * time.host <= reference.device}
        best = min(fit, key=lambda name: fit[name].device, default=usual)
        return best if self.exact[best].device < GAIN * reference.device else usual

    @property
    def break_even(self) -> float | None:
        """The density up to which sparse attention is faster than the fastest exact kernel; None: not measured.

        0 where it never is, or where launching it takes the host longer than dense attention takes the device.
        """
        if self.selection is None or not self.attention:
            return None
        host = self.selection.host + max(time.host for time in self.attention.values())
        return 0.0 if HOST_FACTOR * host > self.dense else self.break_even_in_graph

    @property
    def break_even_in_graph(self) -> float | None:
        """`break_even` by the device's times alone: a CUDA graph needs no host to launch its kernels."""
        if self.selection is None or not self.attention:
            return None
        points = dict(self.attention)
        if "lists" in self.exact:  # all blocks; what making the lists costs is in it, so it errs to the safe side
            points[1.0] = self.exact["lists"]
        left, reached, least = GAIN * self.dense - self.selection.device, 0.0, 0.0
        for density, time in sorted(points.items()):
            if time.device > left:  # linear between two points; below the first, forced blocks leave no room
                return reached and reached + (density - reached) * (left - least) / (time.device - least)
            reached, least = density, time.device
        return reached

    def relative(self, density: float) -> float | None:
        """Time of sparse attention at this density, selection included, over that of the fastest exact kernel.

        None: not measured. Linear between what was measured, and beyond it from the two nearest points.
        """
        if self.selection is None or not self.attention:
            return None
        points = sorted({**self.attention, **({1.0: self.exact["lists"]} if "lists" in self.exact else {})}.items())
        if len(points) < 2:
            return (self.selection.device + points[0][1].device) / self.dense
        upper = next((i for i, (known, _) in enumerate(points) if known >= density), len(points) - 1)
        (low, least), (high, most) = points[max(0, upper - 1)], points[max(1, upper)]
        slope = (most.device - least.device) / max(high - low, 1e-9)
        attention = max(least.device + slope * (density - low), 0.5 * points[0][1].device)
        return (self.selection.device + attention) / self.dense

    def to_dict(self) -> dict[str, Any]:
        """Plain data, microseconds."""
        shape = {**self.shape._asdict(), "masks": [x for bit, x in enumerate(FEATURES) if self.shape.masks >> bit & 1]}
        data: dict[str, Any] = {"shape": shape, "exact": {name: _to_us(time) for name, time in self.exact.items()}}
        if self.selection is not None:
            data |= {"singles": self.singles, "selection": _to_us(self.selection),
                     "attention": [[density, *_to_us(time)] for density, time in self.attention.items()]}
        return data

    @classmethod
    def from_dict(cls, data: Any) -> "Times":
        """Read what `to_dict` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        shape = dict(data["shape"])
        shape["masks"] = sum(1 << FEATURES.index(name) for name in shape["masks"])
        if any(not isinstance(size, int) for name, size in shape.items() if name != "dtype"):
            raise ValueError("sizes are whole numbers")
        exact = {str(name): _from_us(time) for name, time in data["exact"].items()}
        if not exact:
            raise ValueError("no exact kernel")
        selection = data.get("selection")
        return cls(ShapeClass(**shape), exact, int(data.get("singles", 0)),
                   None if selection is None else _from_us(selection),
                   {float(density): _from_us(time) for density, *time in data.get("attention", ())})


class Table:
    """What is known of one device: the records of a file that bear its fingerprint, and what was measured since."""

    def __init__(self, path: Path, fingerprint: Mapping[str, str]) -> None:
        self.path = path
        self.fingerprint = dict(fingerprint)
        self.times: dict[tuple[ShapeClass, int], Times] = {}
        self.kernels: dict[ShapeClass, str] = {}
        self.break_evens: dict[tuple[ShapeClass, int], float] = {}
        self.break_evens_in_graph: dict[tuple[ShapeClass, int], float] = {}
        self._nearest: dict[tuple[ShapeClass, int | None], Times | None] = {}
        for found, times in _records(path):
            if found == self.fingerprint:
                self._take(times)

    def add(self, times: Times) -> bool:
        """Take a record and append it to the file; one that cannot be written is logged and left. Whether it could."""
        self._take(times)
        # The newline comes first: a line that somebody could not finish does not swallow this one.
        line = "\n" + json.dumps({"fingerprint": self.fingerprint, **times.to_dict()}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)
        except OSError as error:
            log.info("sparsify: %s cannot be written (%s): what is measured lasts as long as this process",
                     self.path, error.strerror)
            return False
        return True

    def near(self, shape: ShapeClass, singles: int | None = None) -> Times | None:
        """The record of the class nearest in lengths and batch, if one is within a factor of two of each."""
        if (shape, singles) not in self._nearest:
            self._nearest[shape, singles] = self._find_near(shape, singles)
        return self._nearest[shape, singles]

    def _find_near(self, shape: ShapeClass, singles: int | None) -> Times | None:
        def distance(other: ShapeClass) -> int:
            return max(abs(_rank(x) - _rank(y)) for x, y in ((shape.q_len, other.q_len), (shape.kv_len, other.kv_len),
                                                            (shape.batch, other.batch)))

        alike = [times for (other, m), times in self.times.items() if singles in (None, m)
                 and shape._replace(q_len=other.q_len, kv_len=other.kv_len, batch=other.batch) == other]
        nearest = min(alike, key=lambda times: distance(times.shape), default=None)
        return nearest if nearest is not None and distance(nearest.shape) <= NEIGHBOURS else None

    def _take(self, times: Times) -> None:
        self._nearest.clear()
        self.times[times.shape, times.singles] = times
        self.kernels[times.shape] = times.kernel
        if times.break_even is not None and times.break_even_in_graph is not None:
            self.break_evens[times.shape, times.singles] = times.break_even
            self.break_evens_in_graph[times.shape, times.singles] = times.break_even_in_graph


def lower_end(size: int) -> int:
    """The lower end of a size's range: 1, 2, 3, 4, 6, 8, 12, 16 ... two ranges a doubling."""
    power = 1 << (size.bit_length() - 1)
    return power + power // 2 if size >= power + power // 2 else power


def expected_density(keys: int, tolerance: float, peaks: float = 0.0) -> float:
    """The density to reckon with, before anything is selected: a high guess, since a wrong one must not cost time.

    peaks: what calibration measured in place of PEAKS; 0.0: nothing.
    """
    if peaks:
        return min(1.0, peaks / max(keys * tolerance, peaks))
    return min(1.0, max(LEAST_DENSITY, PEAKS / max(keys * tolerance, PEAKS)))


def crossover(device_type: str, tolerance: float, singles: int) -> int | None:
    """Key length from which a square causal or full layer measured on such a device gains; None: none was measured.

    The smallest of all layers measured: the plan's edge only says from where on the op decides, layer by layer.
    """
    if mode() == "off":
        return None
    here = versions()
    layers: dict[tuple[str, ShapeClass], dict[int, float]] = {}
    for fingerprint, times in _records(path()):
        shape, break_even = times.shape, times.break_even
        square = shape.q_len == shape.kv_len and not shape.window and shape.masks >> FEATURES.index("key mask") == 0
        if (break_even is not None and times.singles == singles and square
                and fingerprint.get("type") == device_type and here.items() <= fingerprint.items()):
            layer = fingerprint.get("device", ""), shape._replace(q_len=0, kv_len=0)
            layers.setdefault(layer, {})[shape.kv_len] = break_even
    edges = []
    for break_evens in layers.values():
        for length, break_even in sorted(break_evens.items(), reverse=True):
            if break_even < expected_density(length, tolerance):
                break
            edges.append(max(length, LEAST_CROSSOVER))
    return min(edges, default=None)


def mode() -> str:
    """What the environment says: "off", "read" or "on"."""
    wish = os.environ.get("SPARSIFY_TUNE", "").strip().lower()
    return {"0": "off", "off": "off", "false": "off", "read": "read"}.get(wish, "on")


def path() -> Path:
    """Where the records are."""
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or (tempfile.gettempdir() if home == "~" else os.path.join(home, ".cache"))
    return Path(cache) / "sparsify" / "tuning.jsonl"


@functools.cache
def versions() -> dict[str, str]:
    """The part of a fingerprint that says what ran, on whatever device."""
    return {"torch": _version("torch"), "triton": _version("triton"), "source": _source()}


def _records(file: Path) -> Iterator[tuple[dict[str, str], Times]]:
    """Fingerprint and times of every line that can be read."""
    try:
        lines: Iterable[str] = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            data = json.loads(line)
            yield dict(data["fingerprint"]), Times.from_dict(data)
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # torn, or of another version


def _to_us(time: Time) -> list[float]:
    return [round(1e6 * seconds, 2) for seconds in time]


def _from_us(values: Any) -> Time:
    device, host = values
    if not (device > 0 and host >= 0):
        raise ValueError("times are positive")
    return Time(1e-6 * device, 1e-6 * host)


def _rank(size: int) -> int:
    """Number of a range among all."""
    return 2 * (size.bit_length() - 1) + (size >= 3 << max(0, size.bit_length() - 2))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


def _source() -> str:
    """Digest of the kernels and ops: their times end with them."""
    digest = hashlib.sha256()
    for folder in ("kernels", "ops"):
        for file in sorted(Path(__file__).with_name(folder).rglob("*")):
            if file.suffix in (".py", ".cpp"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
