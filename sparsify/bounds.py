"""Bounds: what calibration promises of a bucket, and the shifts that the promise takes. Plain data in a plan file.

A query block *misses a peak* if a key block that it dropped has a true peak of at least the tolerance. Under a target
of 0.95 at most 5 % of the query blocks of new documents do; for that each head's tolerance is multiplied by its
*shift*.

A leaf: imports nothing of sparsify but the errors.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsify.errors import PlanError


@dataclass(frozen=True)
class Promise:
    """What holds under one target.

    misses     upper confidence bound of the share of query blocks that miss a peak, mean over documents not fitted on
    elsewhere  the same on the worst kind of text when nothing of that kind was fitted on; None: one kind of text alone
    coverage   lower confidence bound of the true attention mass that is kept, mean over the same documents
    density    share of the allowed key blocks that calibrated sites keep, mean over documents
    shifts     per site a factor on the tolerance for each query head, 0 (keep everything) to 1
    """

    misses: float
    elsewhere: float | None
    coverage: float
    density: float
    shifts: Mapping[int, tuple[float, ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"misses": self.misses, "elsewhere": self.elsewhere, "coverage": self.coverage, "density": self.density,
                "shifts": {str(site): list(shifts) for site, shifts in sorted(self.shifts.items())}}


@dataclass(frozen=True)
class Bounds:
    """The promises of a bucket, by target, and what they were fitted on.

    device_type is "cpu" or "cuda": selection estimates peaks in other precisions there. "": not known.
    """

    documents: int
    query_blocks: int
    kinds: tuple[str, ...]
    promises: Mapping[float, Promise]
    device_type: str = ""

    def promise(self, target: float) -> Promise | None:
        """The promise under this target, or None if it was never calibrated."""
        return next((promise for known, promise in self.promises.items() if math.isclose(known, target)), None)

    def joined(self, other: "Bounds") -> "Bounds":
        """What holds wherever one of the two does, of targets and sites that both have: the lower shifts."""
        promises = {}
        for target, mine in self.promises.items():
            theirs = other.promise(target)
            if theirs is None:
                continue
            shifts = {site: tuple(map(min, mine.shifts[site], theirs.shifts[site]))
                      for site in mine.shifts if len(mine.shifts[site]) == len(theirs.shifts.get(site, ()))}
            known = [x for x in (mine.elsewhere, theirs.elsewhere) if x is not None]
            promises[target] = Promise(max(mine.misses, theirs.misses), max(known, default=None),
                                       min(mine.coverage, theirs.coverage), max(mine.density, theirs.density), shifts)
        return Bounds(min(self.documents, other.documents), self.query_blocks + other.query_blocks,
                      tuple(sorted({*self.kinds, *other.kinds})), promises,
                      self.device_type if self.device_type == other.device_type else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `Bucket.bounds` holds it."""
        return {"documents": self.documents, "query_blocks": self.query_blocks, "kinds": list(self.kinds),
                "device_type": self.device_type,
                "targets": {f"{target:g}": promise.to_dict() for target, promise in sorted(self.promises.items())}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "bounds") -> "Bounds":
        """Read what `to_dict` wrote. Raises PlanError, beginning with `where`, for anything else."""
        try:
            targets = {float(target): _promise(promise) for target, promise in data["targets"].items()}
            return cls(int(data["documents"]), int(data["query_blocks"]), tuple(map(str, data["kinds"])), targets,
                       str(data.get("device_type", "")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{where} cannot be read ({type(error).__name__}: {error}). Calibrate the plan anew, or "
                            "remove them.") from error

    def __str__(self) -> str:
        said = []
        for target, promise in sorted(self.promises.items()):
            new = "" if promise.elsewhere is None else f" (a new kind of text: {promise.elsewhere:.3f})"
            said.append(f"{target:g}: misses {promise.misses:.3f}{new}, coverage {promise.coverage:.3f}, "
                        f"density {promise.density:.3f}")
        return "; ".join(said)


def _promise(data: Mapping[str, Any]) -> Promise:
    elsewhere = data["elsewhere"]
    return Promise(float(data["misses"]), None if elsewhere is None else float(elsewhere), float(data["coverage"]),
                   float(data["density"]),
                   {int(site): tuple(map(float, shifts)) for site, shifts in data["shifts"].items()})
