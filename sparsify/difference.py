"""How two plans differ, in lines."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from sparsify.plan import Gate, Plan


def differences(before: Plan, after: Plan) -> list[str]:
    """One line for each range of key lengths with another budget, and for each fact that changed; empty: none did."""
    edges = sorted({bucket.lo for plan in (before, after) for bucket in plan.buckets})
    lines: list[str] = []
    for lo, hi in zip(edges, [*edges[1:], None], strict=True):
        old, new = before.bucket_of(lo), after.bucket_of(lo)
        where = f"[{lo}, {'inf' if hi is None else hi})"
        if old.budget != new.budget:
            lines.append(f"{where}: {old.budget} -> {new.budget}")
        for site in sorted({*old.sites, *new.sites}):
            if old.budget_of(site) != new.budget_of(site):
                lines.append(f"{where}, site {site}: {old.budget_of(site)} -> {new.budget_of(site)}")
        if old.bounds != new.bounds:
            lines.append(f"{where}: other bounds")
    old_gates, new_gates = _gates(before), _gates(after)
    for length in sorted({*old_gates, *new_gates}):
        if length in old_gates and length in new_gates:
            lines += _changed(f"gate at {length}", _facts(old_gates[length]), _facts(new_gates[length]))
        else:
            lines.append(f"gate: {old_gates.get(length, 'none')} -> {new_gates.get(length, 'none')}")
    for title, old_facts, new_facts in (("measured on", before.fingerprint, after.fingerprint),
                                        ("calibrated", before.calibration, after.calibration)):
        lines += _changed(title, old_facts, new_facts)
    if before.graph != after.graph:
        lines.append(f"graph: {_graph(before)} -> {_graph(after)}")
    return lines


def _gates(plan: Plan) -> dict[int, Gate]:
    """By key length, whatever buckets hold them."""
    return {gate.length: gate for bucket in plan.buckets for gate in bucket.gates}


def _facts(gate: Gate) -> dict[str, Any]:
    """What a gate says, each site and kind by itself."""
    facts: dict[str, Any] = {}
    for field in fields(gate):
        value = getattr(gate, field.name)
        facts |= {f"{field.name} {key}": x for key, x in value.items()} if isinstance(value, Mapping) else {
            field.name: value}
    return facts


def _changed(title: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [f"{title}, {name}: {before.get(name, 'not said')} -> {after.get(name, 'not said')}"
            for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def _graph(plan: Plan) -> str:
    return f"{len(plan.graph)} attention sites, the first {plan.graph[0]}" if plan.graph else "any"
