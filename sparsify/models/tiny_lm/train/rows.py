"""Training rows: many items of `sparsify.models.tasks` planted in real text, near and far, dense and thin."""
import numpy as np

KINDS = ("kv", "mv", "chain", "copy", "agg")
KIND_P = (0.40, 0.15, 0.15, 0.15, 0.15)


def make_item(tasks, r, kind, text):
    kind = kind or KINDS[r.choice(len(KINDS), p=KIND_P)]
    if kind == "copy":
        return tasks.copy(r, text=text)
    if kind == "agg":
        mode = int(r.integers(0, 3))
        return tasks.count(r) if mode == 0 else tasks.price(r, highest=mode == 1)
    return {"kv": tasks.key_value, "mv": tasks.several_values, "chain": tasks.chain}[kind](r)


def train_row(tasks, r, L, filler):
    """One training row of L tokens: ids uint16 [L], weights float16 [L]; filler: real tokens, at least L of them."""
    dense = r.random() < 0.3
    budget = int(L * (0.97 if dense else r.uniform(0.08, 0.5)))
    only = KINDS[r.integers(0, len(KINDS))] if r.random() < 0.3 else ("kv" if r.random() < 0.3 else None)
    at_end = r.random() < 0.3 and not dense
    limit = 10**9 if dense else int(2 ** r.uniform(3, np.log2(max(16, L / 60))))
    placed, used, n = [], 0, 0
    while n < limit:
        item = make_item(tasks, r, only, filler)
        size = sum(len(plant.ids) for plant in item.plants) + len(item.query.ids)
        if used + size > budget:
            break
        count = len(item.plants)
        if r.random() < 0.25:                          # local instances help the circuit form early
            start = r.random() * 0.95
            ps = np.sort(start + r.random(count) * min(0.05, 600 / L))
            qp = ps[-1] + r.random() * min(0.05, 600 / L)
        else:
            ps = np.sort(r.random(count) * (1.0 if at_end else r.uniform(0.2, 1.0)))
            qp = 1.0 + r.random() if at_end else r.uniform(ps[-1], 1.0)
        placed += [*zip(ps, item.plants, strict=True), (qp + 1e-9, item.query)]
        used += size
        n += 1
    ids, weights, _ = tasks.assemble(L, placed, filler)
    return ids, weights
