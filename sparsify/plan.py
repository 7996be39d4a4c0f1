"""Plans: which budget holds for which key length. JSON on disk, versioned, hashable, readable by a person.

A leaf: imports nothing of sparsify but the other leaves, so anyone may import it.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsify import timings
from sparsify.bounds import Bounds
from sparsify.errors import PlanError

SCHEMA = 1

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
    shifts       a factor on the tolerance for each query head, 0 (keep everything) to 1; None: 1 for all.
                 `Plan.guaranteed` sets them
    """

    tolerance: float | None
    max_density: float = 0.9
    sinks: int = 1
    local: int = 1
    singles: int = 6
    shifts: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.tolerance is not None and not (_is_number(self.tolerance) and 0 <= self.tolerance <= 1):
            raise PlanError(f"budget.tolerance is {self.tolerance!r}. It is a share of attention: "
                            "give a number from 0 to 1, or null for dense.")
        if not (_is_number(self.max_density) and 0 < self.max_density <= 1):
            raise PlanError(f"budget.max_density is {self.max_density!r}. Give a share above 0 and up to 1.")
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

    def __str__(self) -> str:
        if self.is_dense:
            return "dense"
        times = "" if self.shifts is None else f" times {min(self.shifts):.3g} to {max(self.shifts):.3g} by head"
        return f"tolerance {self.tolerance:g}{times}"


@dataclass(frozen=True)
class Bucket:
    """Half-open range of key lengths `[lo, hi)` (hi None: no end) and the budget that holds in it.

    `sites` overrides the budget of single attention sites, by their index in the graph. `bounds` is what calibration
    promises here, `Bounds.to_dict()`; empty: nothing.
    """

    lo: int
    hi: int | None
    budget: Budget
    sites: Mapping[int, Budget] = field(default_factory=dict)
    bounds: Mapping[str, Any] = field(default_factory=dict)

    def budget_of(self, site: int) -> Budget:
        """The budget of the attention site with this index."""
        return self.sites.get(site, self.budget)

    def __contains__(self, length: int) -> bool:
        return self.lo <= length and (self.hi is None or length < self.hi)

    def __str__(self) -> str:
        return f"[{self.lo}, {'inf' if self.hi is None else self.hi})"


@dataclass(frozen=True)
class Plan:
    """Buckets that cover every key length from 1 on, without gap or overlap.

    `fingerprint` says where the plan was measured (device, dtype, model ...); empty for the default plan.
    """

    buckets: tuple[Bucket, ...]
    name: str = "plan"
    fingerprint: Mapping[str, str] = field(default_factory=dict)

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
            if all(budget.is_dense for budget in (bucket.budget, *bucket.sites.values())):
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
            if buckets and buckets[-1].budget == bucket.budget and dict(buckets[-1].sites) == dict(bucket.sites):
                buckets[-1] = replace(buckets[-1], hi=bucket.hi)
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
            "buckets": [
                {"lo": b.lo, "hi": b.hi, "budget": _budget_to_dict(b.budget),
                 "sites": {str(i): _budget_to_dict(budget) for i, budget in sorted(b.sites.items())},
                 **({"bounds": dict(b.bounds)} if b.bounds else {})}
                for b in self.buckets
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """Read what `to_dict` wrote. Raises PlanError for anything unknown, missing or newer."""
        if not isinstance(data, Mapping):
            raise PlanError(f"the plan is a {type(data).__name__}. It must be a JSON object with the key 'buckets'.")
        schema = data.get("schema")
        if not isinstance(schema, int) or schema < 1:
            raise PlanError(f"plan.schema is {schema!r}. This is not a sparsify plan; it must be {SCHEMA}.")
        if schema > SCHEMA:
            raise PlanError(f"plan.schema is {schema}, newer than the {SCHEMA} this version reads. "
                            "Update sparsify, or write the plan anew.")
        _refuse_unknown("plan", data, {"schema", "name", "fingerprint", "buckets"})
        buckets = data.get("buckets")
        if not isinstance(buckets, list):
            raise PlanError(f"plan.buckets is {buckets!r}. It must be a list of buckets.")
        return cls(tuple(_bucket_from_dict(i, b) for i, b in enumerate(buckets)), str(data.get("name", "plan")),
                   {str(k): str(v) for k, v in dict(data.get("fingerprint") or {}).items()})

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
        """Write the plan as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    def __str__(self) -> str:
        lines = [f"plan {self.name} ({self.hash})"]
        for bucket in self.buckets:
            others = "".join(f", site {i}: {budget}" for i, budget in sorted(bucket.sites.items()))
            lines.append(f"  {bucket}: {bucket.budget}{others}")
            if bucket.bounds:
                lines.append(f"    guarantee {Bounds.from_dict(bucket.bounds)}")
        return "\n".join(lines)



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


def _budget_to_dict(budget: Budget) -> dict[str, Any]:
    if budget.is_dense:
        return {"tolerance": None}
    return {"tolerance": budget.tolerance, "max_density": budget.max_density, "sinks": budget.sinks,
            "local": budget.local, "singles": budget.singles,
            **({} if budget.shifts is None else {"shifts": list(budget.shifts)})}


def _budget_from_dict(where: str, data: Any) -> Budget:
    if not isinstance(data, Mapping) or "tolerance" not in data:
        raise PlanError(f"{where} is {data!r}. It must be an object with the key 'tolerance'.")
    _refuse_unknown(where, data, {"tolerance", "max_density", "sinks", "local", "singles", "shifts"})
    try:
        return Budget(**data)
    except PlanError as error:
        raise PlanError(f"{where}: {error}") from error


def _bucket_from_dict(i: int, data: Any) -> Bucket:
    where = f"plan.buckets[{i}]"
    if not isinstance(data, Mapping):
        raise PlanError(f"{where} is {data!r}. It must be an object with the keys lo, hi and budget.")
    _refuse_unknown(where, data, {"lo", "hi", "budget", "sites", "bounds"})
    lo, hi = data.get("lo"), data.get("hi")
    for name, value in (("lo", lo), ("hi", hi)):
        if not (isinstance(value, int) and not isinstance(value, bool)) and not (name == "hi" and value is None):
            raise PlanError(f"{where}.{name} is {value!r}. It must be a whole number of keys.")
    sites: dict[int, Budget] = {}
    for key, budget in dict(data.get("sites") or {}).items():
        if not str(key).isdigit():
            raise PlanError(f"{where}.sites has the key {key!r}. Keys are indices of attention sites: 0, 1, 2 ...")
        sites[int(key)] = _budget_from_dict(f"{where}.sites[{key}]", budget)
    assert isinstance(lo, int)  # checked above; for the type checker
    bounds = data.get("bounds") or {}
    if bounds:
        Bounds.from_dict(bounds, f"{where}.bounds")
    return Bucket(lo, hi, _budget_from_dict(f"{where}.budget", data.get("budget")), sites, bounds)


def _refuse_unknown(where: str, data: Mapping[str, Any], known: set[str]) -> None:
    unknown = sorted(set(data) - known)
    if unknown:
        raise PlanError(f"{where} has the unknown key {unknown[0]!r}. Known keys: {', '.join(sorted(known))}.")
