"""Plans: which budget holds for which key length. JSON on disk, versioned, hashable, readable by a person.

A leaf: imports nothing of sparsify but the other leaves, so anyone may import it.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from sparsify import timings
from sparsify.bounds import Bounds
from sparsify.errors import PlanError

SCHEMA = 2
READABLE = (1, 2)
"""Schemas that `Plan.from_dict` reads: 1 has no calibration, no graph, no gates and no bounds."""

# Key length below which attention is exact: on a CPU dense is as fast and little can be dropped; on a GPU dense is as
# fast up to 8K even with many heads. `sparsify tune` may find that it is less; above, the op itself decides call by
# call, see `ops.crossover.selection_pays`.
CROSSOVER = {"cpu": 4096, "cuda": 8192}
DEFAULT_TOLERANCE = 0.03  # 16K tokens, the shipped model: KL 0.005 nats, loss +0.2 %; 0.04 has twice the KL


@dataclass(frozen=True)
class Budget:
    """How much attention a site may drop.

    tolerance    share of attention, 0 to 1: a key block is dropped only if no query of its query block is estimated
                 to give it that much. None: dense, nothing is ever dropped.
    max_density  a query block that would keep more than this share of its allowed key blocks keeps them all
    sinks        first key blocks that are always kept
    local        key blocks before the diagonal that are always kept
    singles      surprising keys that a split summary keeps single (m)
    peaks        density x keys x tolerance, as calibration measured it: hardly changes with the length, and tells the
                 ops which density to reckon with when they decide whether selection pays. None: they guess high
    shifts       a factor on the tolerance for each query head, 0 (keep everything) to 1; None: 1 for all.
                 `Plan.guaranteed` sets them
    """

    tolerance: float | None
    max_density: float = 0.9
    sinks: int = 1
    local: int = 1
    singles: int = 6
    peaks: float | None = None
    shifts: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and not (_is_number(self.tolerance) and 0 <= self.tolerance <= 1):
            raise PlanError(f"budget.tolerance is {self.tolerance!r}. It is a share of attention: "
                            "give a number from 0 to 1, or null for dense.")
        if not (_is_number(self.max_density) and 0 < self.max_density <= 1):
            raise PlanError(f"budget.max_density is {self.max_density!r}. Give a share above 0 and up to 1.")
        if self.peaks is not None and not (_is_number(self.peaks) and self.peaks > 0):
            raise PlanError(f"budget.peaks is {self.peaks!r}. Give a number above 0, or leave it out.")
        for name, least, most in (("sinks", 0, 64), ("local", 0, 64), ("singles", 1, 16)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise PlanError(f"budget.{name} is {value!r}. Give a whole number from {least} to {most}.")
        if self.shifts is not None:
            if not isinstance(self.shifts, tuple | list) or not self.shifts or not all(
                    _is_number(shift) and 0 <= shift <= 1 for shift in self.shifts):
                raise PlanError(f"budget.shifts is {self.shifts!r}. Give a factor from 0 to 1 for each query head.")
            object.__setattr__(self, "shifts", tuple(self.shifts))

    @classmethod
    def dense(cls) -> "Budget":
        """Exact attention."""
        return cls(tolerance=None)

    @property
    def is_dense(self) -> bool:
        return self.tolerance is None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as a plan file holds it."""
        if self.is_dense:
            return {"tolerance": None}
        optional = {"peaks": self.peaks, "shifts": None if self.shifts is None else list(self.shifts)}
        return {**{name: value for name, value in asdict(self).items() if name not in optional},
                **{name: value for name, value in optional.items() if value is not None}}

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        others = "".join(f", {x.name} {getattr(self, x.name)}" for x in fields(self)[1:]
                         if x.name not in ("peaks", "shifts") and getattr(self, x.name) != x.default)
        times = "" if self.shifts is None else f" times {min(self.shifts):.3g} to {max(self.shifts):.3g} by head"
        return f"tolerance {self.tolerance:g}{times}{others}"


@dataclass(frozen=True)
class Gate:
    """What calibration found at one key length, on documents that chose nothing.

    length       key length of the windows
    budget       what was tested: the most time saved of all budgets that passed, or the last that did not
    sites        budgets of single sites under which it was tested, by index
    passed       whether every condition of the gate held
    documents    held-out documents; where they are few, `upper` is far above `mean`
    mean, upper  the metric: mean over documents, and its one-sided upper confidence bound
    rise, rise_upper  increase of the next-token loss in per cent, likewise; None where there is no such loss
    kinds        mean by kind of document
    density      kept share of the allowed key blocks, mean over sites, on the held-out documents
    densities    the same by site
    gain         share of the attention's time that is saved here, by the times of this machine; 0 or less: none
    timed        whether those times were measured; else they are constants
    why          in words
    """

    length: int
    budget: Budget
    passed: bool
    documents: int
    mean: float
    upper: float
    density: float
    gain: float
    timed: bool
    why: str
    sites: Mapping[int, Budget] = field(default_factory=dict)
    rise: float | None = None
    rise_upper: float | None = None
    kinds: Mapping[str, float] = field(default_factory=dict)
    densities: Mapping[int, float] = field(default_factory=dict)

    def __str__(self) -> str:
        loss = "" if self.rise is None else f", loss {self.rise:+.3f} % (at most {self.rise_upper:+.3f} %)"
        verdict = "passed" if self.passed else "did not pass"
        return (f"at {self.length}: {self.budget} {verdict}, {self.mean:.2g} (at most {self.upper:.2g}, "
                f"{self.documents} documents){loss}, density {self.density:.3f}, "
                f"{'' if self.timed else 'estimated '}gain {self.gain:.0%}"
                + (f"; {self.why}" if self.why else ""))


@dataclass(frozen=True)
class SiteShape:
    """One attention site of the graph that a plan was made for. A size of 0 is not known: the site was left as it was.

    graph   number of the graph among those of the model: it may need several
    index   number of the site in its graph
    module  path of the module that it is in
    causal  whether its queries see no later keys, in the call that was traced: for timing it, no part of what it is
    """

    graph: int
    index: int
    module: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    causal: bool = False

    def is_like(self, other: "SiteShape") -> bool:
        """Whether both may be the same attention of a model: the module of one may be wrapped in others."""
        longer, shorter = sorted((self.module, other.module), key=len, reverse=True)
        same_module = longer == shorter or not shorter or longer.endswith(f".{shorter}")
        sizes = zip((self.heads, self.kv_heads, self.head_dim, self.value_dim),
                    (other.heads, other.kv_heads, other.head_dim, other.value_dim), strict=True)
        return same_module and self.index == other.index and all(x == y or 0 in (x, y) for x, y in sizes)

    def __str__(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.value_dim else f"{self.head_dim} and {self.value_dim}"
        return f"{self.module or '(no module)'}, {self.heads} / {self.kv_heads} heads of {dims}"


@dataclass(frozen=True)
class Bucket:
    """Half-open range of key lengths `[lo, hi)` (hi None: no end) and the budget that holds in it.

    sites   override the budget of single attention sites, by their index in the graph
    gates   what calibration found at the key lengths of this bucket; empty where none was calibrated
    bounds  what calibration promises of missed peaks, `Bounds.to_dict()`; empty: nothing
    """

    lo: int
    hi: int | None
    budget: Budget
    sites: Mapping[int, Budget] = field(default_factory=dict)
    gates: tuple[Gate, ...] = ()
    bounds: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_dense(self) -> bool:
        """Whether no site drops anything."""
        return all(budget.is_dense for budget in (self.budget, *self.sites.values()))

    def budget_of(self, site: int) -> Budget:
        """The budget of the attention site with this index."""
        return self.sites.get(site, self.budget)

    @property
    def headline(self) -> str:
        """The budget in a few words; that it is only of other sites, where sites with their own drop blocks."""
        sparse = sum(not budget.is_dense for budget in self.sites.values())
        return f"{sparse} sites by their own" if self.budget.is_dense and sparse else str(self.budget)

    def __contains__(self, length: int) -> bool:
        return self.lo <= length and (self.hi is None or length < self.hi)

    def __str__(self) -> str:
        return f"[{self.lo}, {'inf' if self.hi is None else self.hi})"


@dataclass(frozen=True)
class Plan:
    """Buckets that cover every key length from 1 on, without gap or overlap.

    fingerprint  where the plan was measured: graph (its hash), device, torch, triton, dtype ...; empty for the default
    calibration  how: metric, max_error, confidence, documents by kind ...; plain JSON data, empty for the default
    graph        the attention sites that it was made for; empty: it holds for any graph
    """

    buckets: tuple[Bucket, ...]
    name: str = "plan"
    fingerprint: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    graph: tuple[SiteShape, ...] = ()

    def __post_init__(self) -> None:
        if not self.buckets:
            raise PlanError("plan.buckets is empty. Give at least one bucket, from 1 to null.")
        end: int | None = 1
        for i, bucket in enumerate(self.buckets):
            where = f"plan.buckets[{i}]"
            if end is None:
                raise PlanError(f"{where} follows a bucket without end. Set plan.buckets[{i - 1}].hi to "
                                f"{bucket.lo}, or remove one of the two.")
            if bucket.lo != end:
                kind = "overlap" if bucket.lo < end else "leave a gap"
                raise PlanError(f"{where}.lo is {bucket.lo} but the bucket before ends at {end}: they {kind}. "
                                f"Buckets must touch: set lo to {end}.")
            if bucket.hi is not None and bucket.hi <= bucket.lo:
                raise PlanError(f"{where}.hi is {bucket.hi}, not above lo = {bucket.lo}. Set a larger hi, or null.")
            end = bucket.hi
        if end is not None:
            raise PlanError(f"plan.buckets end at {end}: longer sequences would have no budget. "
                            f"Set plan.buckets[{len(self.buckets) - 1}].hi to null.")

    @classmethod
    def dense(cls) -> "Plan":
        """Exact attention at every length: what a sparse result is compared with."""
        return cls((Bucket(1, None, Budget.dense()),), name="dense")

    @classmethod
    def default(cls, device_type: str) -> "Plan":
        """The plan that needs no calibration: dense below the crossover, a conservative tolerance above it.

        The first site stays dense in every bucket: the first layer spreads its attention widely in every model
        measured (73 % of the blocks for coverage 0.95 at 8K keys, where later layers need 6 to 47 %).

        device_type: "cpu" or "cuda"; the crossover differs. Where `sparsify tune` measured a lower one, that holds.
        """
        crossover = CROSSOVER.get(device_type, max(CROSSOVER.values()))
        measured = timings.crossover(device_type, DEFAULT_TOLERANCE, Budget.singles)
        crossover = crossover if measured is None else min(crossover, measured)
        first_dense = {0: Budget.dense()}
        return cls(
            (Bucket(1, crossover, Budget.dense()),
             Bucket(crossover, None, Budget(DEFAULT_TOLERANCE), first_dense)),
            name=f"default-{device_type}",
        )

    def bucket_of(self, length: int) -> Bucket:
        """The bucket that holds this key length (at least 1)."""
        if length < 1:
            raise PlanError(f"length is {length}. Key lengths start at 1.")
        return next(bucket for bucket in self.buckets if length in bucket)

    def guaranteed(self, target: float) -> "Plan":
        """The plan under which at least this share of query blocks keeps every key block with a peak.

        Peaks are those of at least the tolerance; the share is promised on average over documents like those the plan
        was calibrated on (`sparsify.bounds`). Sites without a bound stay dense. Raises PlanError for a bucket without
        bounds, or without this target.
        """
        if not (_is_number(target) and 0 < target < 1):
            raise PlanError(f"guarantee is {target!r}. Give a share of query blocks between 0 and 1, as 0.95.")
        buckets = []
        for i, bucket in enumerate(self.buckets):
            if bucket.is_dense:
                buckets.append(bucket)
                continue
            if not bucket.bounds:
                raise PlanError(f"guarantee is {target:g} and plan.buckets[{i}] {bucket} has no bounds: it was not "
                                "calibrated. Calibrate the plan, or leave guarantee out.")
            bounds = Bounds.from_dict(bucket.bounds, f"plan.buckets[{i}].bounds")
            promise = bounds.promise(target)
            if promise is None:
                known = ", ".join(f"{x:g}" for x in sorted(bounds.promises))
                raise PlanError(f"guarantee is {target:g} and plan.buckets[{i}] {bucket} was calibrated for {known}. "
                                "Give one of these.")
            sites = {site: replace(bucket.budget_of(site), shifts=shifts) for site, shifts in promise.shifts.items()
                     if not bucket.budget_of(site).is_dense}
            buckets.append(replace(bucket, budget=Budget.dense(), sites=sites))
        return replace(self, buckets=tuple(buckets), name=f"{self.name}, guarantee {target:g}")

    def merged(self) -> "Plan":
        """The same plan with equal neighbouring buckets joined, so that fewer graphs are compiled."""
        buckets: list[Bucket] = []
        for bucket in self.buckets:
            before = buckets[-1] if buckets else None
            if before is not None and (before.budget, dict(before.sites), dict(before.bounds)) == (
                    bucket.budget, dict(bucket.sites), dict(bucket.bounds)):
                buckets[-1] = replace(before, hi=bucket.hi, gates=(*before.gates, *bucket.gates))
            else:
                buckets.append(bucket)
        return replace(self, buckets=tuple(buckets))

    @property
    def hash(self) -> str:
        """Twelve hex digits that change when anything but the name changes."""
        facts = {**self.to_dict(), "name": ""}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def __hash__(self) -> int:
        return hash(self.hash)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `Plan.save` writes it."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "fingerprint": dict(self.fingerprint),
            "calibration": dict(self.calibration),
            "graph": [asdict(site) for site in self.graph],
            "buckets": [
                {"lo": b.lo, "hi": b.hi, "budget": b.budget.to_dict(), "sites": _sites_to_dict(b.sites),
                 "gates": [_gate_to_dict(gate) for gate in b.gates], "bounds": dict(b.bounds)}
                for b in self.buckets
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """Read what `to_dict` wrote. Raises PlanError for anything unknown, missing or newer."""
        if not isinstance(data, Mapping):
            raise PlanError(f"the plan is a {type(data).__name__}. It must be a JSON object with the key 'buckets'.")
        schema = data.get("schema")
        if not isinstance(schema, int) or schema < min(READABLE):
            raise PlanError(f"plan.schema is {schema!r}. This is not a sparsify plan; it must be {SCHEMA}.")
        if schema > SCHEMA:
            raise PlanError(f"plan.schema is {schema}, newer than the {SCHEMA} this version reads. "
                            "Update sparsify, or write the plan anew.")
        _refuse_unknown("plan", data, {"schema", "name", "fingerprint", "calibration", "graph", "buckets"})
        buckets = data.get("buckets")
        if not isinstance(buckets, list):
            raise PlanError(f"plan.buckets is {buckets!r}. It must be a list of buckets.")
        fingerprint, calibration = (_object(f"plan.{name}", data.get(name)) for name in ("fingerprint", "calibration"))
        return cls(tuple(_bucket_from_dict(i, b) for i, b in enumerate(buckets)), str(data.get("name", "plan")),
                   {str(k): str(v) for k, v in fingerprint.items()}, calibration,
                   tuple(_site_from_dict(i, site) for i, site in enumerate(_array("plan.graph", data.get("graph")))))

    @classmethod
    def load(cls, path: "str | Path") -> "Plan":
        """Read a plan file. Raises PlanError, naming the path, if it is missing, unreadable, newer or contradictory."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"plan {str(path)!r} cannot be read ({error.strerror}). Give the path of a plan file, "
                            "a Plan, or None for the default plan.") from error
        except ValueError as error:
            raise PlanError(f"plan {str(path)!r} is not JSON ({error}). Write it with Plan.save.") from error
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"plan {str(path)!r}: {error}") from error

    def save(self, path: "str | Path") -> None:
        """Write the plan as JSON, whole or not at all. Raises PlanError, naming the path."""
        place, text = Path(path), json.dumps(self.to_dict(), indent=2) + "\n"
        part = place.parent / f"{place.name}.{os.urandom(4).hex()}.part"  # others may be saving to the same path
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(place)
        except OSError as error:
            raise PlanError(f"plan {self.name} cannot be written to {str(path)!r} ({error.strerror}). Give the path of "
                            "a file, in a folder that exists and can be written to.") from error
        finally:
            with suppress(OSError):
                part.unlink()

    def __str__(self) -> str:
        lines = [f"plan {self.name} ({self.hash})"]
        for bucket in self.buckets:
            others = "".join(f", site {i}: {budget}" for i, budget in sorted(bucket.sites.items()))
            lines.append(f"  {bucket}: {bucket.budget}{others}")
            lines += [f"    {gate}" for gate in bucket.gates]
            if bucket.bounds:
                lines.append(f"    guarantee {Bounds.from_dict(bucket.bounds)}")
        for title, facts in (("calibrated", self.calibration), ("measured on", self.fingerprint)):
            if facts:
                lines.append(f"  {title}: " + ", ".join(f"{name} {_say(value)}" for name, value in facts.items()))
        if self.graph:
            lines.append(f"  for {len(self.graph)} attention sites; the first: {self.graph[0]}")
        return "\n".join(lines)

    def refuse_other_graph(self, sites: Sequence[SiteShape]) -> None:
        """Raise PlanError, naming the first difference, if these sites are of another graph than the plan's.

        sites: all of one graph; a graph without any is nobody's.
        """
        if not self.graph or not sites:
            return
        graphs: dict[int, list[SiteShape]] = {}
        for site in self.graph:
            graphs.setdefault(site.graph, []).append(site)
        differences = [_difference(known, sites) for known in graphs.values()]
        if all(differences):
            raise PlanError(f"plan {self.name} was made for another graph: {differences[0]}. Calibrate this model "
                            "with sparsify.calibrate, or give the plan that belongs to it.")


def graph_hash(sites: Sequence[SiteShape]) -> str:
    """Twelve hex digits for the attention sites of a model."""
    return hashlib.sha256(json.dumps([asdict(site) for site in sites]).encode()).hexdigest()[:12]


def resolve_plan(plan: "Plan | Mapping[str, Any] | str | Path | None", device_type: str) -> Plan:
    """A plan from whatever a caller may pass as `plan`: a Plan, its dict, its path, or None for the default."""
    if plan is None:
        return Plan.default(device_type)
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, Mapping):
        return Plan.from_dict(plan)
    if isinstance(plan, str | Path):
        return Plan.load(plan)
    raise PlanError(f"plan is a {type(plan).__name__}. Give a Plan, a dict, the path of a plan file, or None.")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _budget_from_dict(where: str, data: Any) -> Budget:
    if not isinstance(data, Mapping) or "tolerance" not in data:
        raise PlanError(f"{where} is {data!r}. It must be an object with the key 'tolerance'.")
    _refuse_unknown(where, data, {x.name for x in fields(Budget)})
    try:
        return Budget(**data)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


def _sites_to_dict(sites: Mapping[int, Budget]) -> dict[str, Any]:
    return {str(i): budget.to_dict() for i, budget in sorted(sites.items())}


def _sites_from_dict(where: str, data: Any) -> dict[int, Budget]:
    sites: dict[int, Budget] = {}
    for key, budget in _object(where, data).items():
        sites[_site_index(where, key)] = _budget_from_dict(f"{where}[{key}]", budget)
    return sites


def _site_index(where: str, key: Any) -> int:
    if not (str(key).isascii() and str(key).isdecimal()):
        raise PlanError(f"{where} has the key {key!r}. Keys are indices of attention sites: 0, 1, 2 ...")
    return int(key)


def _gate_to_dict(gate: Gate) -> dict[str, Any]:
    return {**{x.name: getattr(gate, x.name) for x in fields(gate)}, "budget": gate.budget.to_dict(),
            "sites": _sites_to_dict(gate.sites), "kinds": dict(gate.kinds),
            "densities": {str(i): density for i, density in sorted(gate.densities.items())}}


def _gate_from_dict(where: str, data: Any) -> Gate:
    data = _object(where, data)
    _refuse_unknown(where, data, {x.name for x in fields(Gate)})
    numbers = {"length": int, "documents": int, "mean": float, "upper": float, "density": float, "gain": float}
    for name, kind in numbers.items():
        value = data.get(name)
        if not _is_number(value) or (kind is int and not isinstance(value, int)):
            raise PlanError(f"{where}.{name} is {value!r}. It must be a {'whole ' if kind is int else ''}number.")
    if not all(isinstance(data.get(name), bool) for name in ("passed", "timed")):
        raise PlanError(f"{where}: passed and timed must be true or false.")
    rises = data.get("rise"), data.get("rise_upper")
    if rises != (None, None) and not all(map(_is_number, rises)):
        raise PlanError(f"{where}.rise is {rises[0]!r} and rise_upper is {rises[1]!r}. Both must be numbers, or both "
                        "null.")
    densities = {_site_index(f"{where}.densities", key): float(value)
                 for key, value in _numbers(f"{where}.densities", data.get("densities")).items()}
    return Gate(**{**data, "why": str(data.get("why", "")), "densities": densities,
                   "budget": _budget_from_dict(f"{where}.budget", data.get("budget")),
                   "sites": _sites_from_dict(f"{where}.sites", data.get("sites")),
                   "kinds": _numbers(f"{where}.kinds", data.get("kinds"))})


_SITE_TYPES = {"module": str, "causal": bool}


def _site_from_dict(i: int, data: Any) -> SiteShape:
    where, names = f"plan.graph[{i}]", {x.name for x in fields(SiteShape)}
    data = _object(where, data)
    _refuse_unknown(where, data, names)
    wrong = [name for name in sorted(names) if not isinstance(data.get(name), _SITE_TYPES.get(name, int))]
    if wrong:
        raise PlanError(f"{where}.{wrong[0]} is {data.get(wrong[0])!r}. Write the plan anew.")
    return SiteShape(**data)


def _difference(known: Sequence[SiteShape], found: Sequence[SiteShape]) -> str:
    """The first difference between the graph of a plan and another, in words; empty where there is none."""
    for here, there in zip(found, known, strict=False):
        if not here.is_like(there):
            return f"its site {there.index} is {there}; here site {here.index} is {here}"
    return "" if len(known) == len(found) else f"it has {len(known)} attention sites and this one {len(found)}"


def _object(where: str, data: Any) -> dict[str, Any]:
    if data is not None and not isinstance(data, Mapping):
        raise PlanError(f"{where} is {data!r}. It must be an object.")
    return dict(data or {})


def _numbers(where: str, data: Any) -> dict[str, float]:
    for key, value in _object(where, data).items():
        if not _is_number(value):
            raise PlanError(f"{where}[{key}] is {value!r}. It must be a number.")
    return _object(where, data)


def _array(where: str, data: Any) -> list[Any]:
    if data is not None and not isinstance(data, list):
        raise PlanError(f"{where} is {data!r}. It must be a list.")
    return list(data or [])


def _say(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name or 'unnamed'} {_say(x)}" for name, x in value.items()) + "}"
    return "/".join(map(_say, value)) if isinstance(value, list) else f"{value:g}" if _is_number(value) else str(value)


def _bucket_from_dict(i: int, data: Any) -> Bucket:
    where = f"plan.buckets[{i}]"
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} is {data!r}. It must be an object with the keys lo, hi and budget.")
    _refuse_unknown(where, data, {"lo", "hi", "budget", "sites", "gates", "bounds"})
    lo, hi = data.get("lo"), data.get("hi")
    for name, value in (("lo", lo), ("hi", hi)):
        if not (isinstance(value, int) and not isinstance(value, bool)) and not (name == "hi" and value is None):
            raise PlanError(f"{where}.{name} is {value!r}. It must be a whole number of keys.")
    assert isinstance(lo, int)  # checked above; for the type checker
    gates = tuple(_gate_from_dict(f"{where}.gates[{n}]", gate)
                  for n, gate in enumerate(_array(f"{where}.gates", data.get("gates"))))
    bounds = _object(f"{where}.bounds", data.get("bounds"))
    if bounds:
        Bounds.from_dict(bounds, f"{where}.bounds")
    return Bucket(lo, hi, _budget_from_dict(f"{where}.budget", data.get("budget")),
                  _sites_from_dict(f"{where}.sites", data.get("sites")), gates, bounds)


def _refuse_unknown(where: str, data: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(f"{where} has the unknown key {unknown[0]!r}. Known keys: {', '.join(sorted(known))}.")
