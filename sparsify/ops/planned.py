"""The op `sparsify::planned_attention`: a whole plan inside one op, for graphs in which nobody checks a guard.

torch.export holds one graph for all lengths, and a comparison of a length while it is traced narrows the range of the
file in silence. So the exported graph carries the table, and the op looks up the bucket of each call.
"""

from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsify.errors import OptionError
from sparsify.kernels.masks import Masks
from sparsify.ops import counters, exact
from sparsify.ops.attend import attend_kept, empty_out
from sparsify.ops.checks import check_inputs, check_protected, check_shifts, check_tolerance
from sparsify.ops.lists import has_kernels

FEW_QUERIES = 32
"""Up to so many queries a call is exact: summaries would read as many keys as attention does. Files in other formats
hold to it too."""


@torch.library.custom_op("sparsify::planned_attention", mutates_args=())
def planned_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal_offset: int | None, window: int | None,
                      key_mask: Tensor | None, query_documents: Tensor | None, key_documents: Tensor | None,
                      attn_mask: Tensor | None, softcap: float, sink_logits: Tensor | None, edges: Sequence[int],
                      tolerances: Sequence[float], max_densities: Sequence[float], sinks: Sequence[int],
                      local: Sequence[int], singles: Sequence[int], peaks: Sequence[float], site: int, version: int,
                      shifts: Sequence[float] | None = None, protected: Tensor | None = None) -> Tensor:
    """Attention under the budget of the bucket that the key length is in: `adaptive_attention`, or exact.

    Shapes and masks as in `sparsify.ops`. `edges` are the first key lengths of every bucket but the first, ascending;
    the other sequences hold one budget a bucket (see `sparsify.Budget`), `shifts` one factor a bucket and query head, a
    bucket's heads together. A tolerance of 0.0 is exact attention, and so is a call of at most `FEW_QUERIES`. `peaks`
    is carried for who reads the table: the plan alone decides, whatever was measured on a machine, so that a file gives
    the same everywhere. `site` and `version` as in `adaptive_attention`. Returns out [B, H, q_len, Dv] in the dtype of
    q, laid out in memory as [B, q_len, H, Dv].
    Raises ShapeError, DeviceError, OptionError.
    """
    masks = check_inputs(q, k, v, Masks(causal_offset, window, key_mask, query_documents, key_documents, attn_mask,
                                        softcap, sink_logits))
    columns = {"tolerances": tolerances, "max_densities": max_densities, "sinks": sinks, "local": local,
               "singles": singles, "peaks": peaks}
    for name, column in columns.items():
        if len(column) != len(edges) + 1:
            raise OptionError(f"{name} has {len(column)} entries and edges has {len(edges)}. Give one for each bucket: "
                              "one more than there are edges.")
    if list(edges) != sorted(set(edges)):
        raise OptionError(f"edges is {list(edges)}. Give the first key lengths of the buckets in ascending order.")
    bucket, heads = bisect_right(edges, k.shape[2]), q.shape[1]
    factors: Sequence[float] | None = None
    if shifts is not None:
        if len(shifts) != len(tolerances) * heads:
            raise OptionError(f"shifts has {len(shifts)} factors. Give one for each of {len(tolerances)} buckets and "
                              f"{heads} query heads.")
        factors = shifts[bucket * heads: (bucket + 1) * heads]
        check_shifts(factors, q)
    check_tolerance(tolerances[bucket])
    check_protected(protected, k)
    if not tolerances[bucket] or q.shape[2] <= FEW_QUERIES or not has_kernels(q, v):
        if counters.is_counting():
            counters.record_all(site)
        return exact.run(exact.usual_kernel(q, k, v, masks), q, k, v, scale, masks)
    return attend_kept(site, q, k, v, scale, masks, tolerances[bucket], max_densities[bucket], sinks[bucket],
                       local[bucket], singles[bucket], factors, protected)


@planned_attention.register_fake
def _(q, k, v, scale, causal_offset, window, key_mask, query_documents, key_documents, attn_mask, softcap, sink_logits,
      edges, tolerances, max_densities, sinks, local, singles, peaks, site, version, shifts=None, protected=None):
    return empty_out(q, v)
