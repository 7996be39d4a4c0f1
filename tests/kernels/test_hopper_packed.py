"""hopper_shim.cpp launches what hopper_packed.py compiles, with the parameters that the kernels have."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.recorded_launches import HKV, SINGLES, B, D, H, L, S

pytestmark = [pytest.mark.skipif(torch.cuda.is_available(), reason="its driver is one that runs nothing"),
              pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")]
BLOCKS, ROOM = 8, 32
SIZES = {"query_blocks": 3, "H": H, "GROUP": H // HKV, "L": L, "S": S, "offset": S - L}


@pytest.fixture(scope="module")
def launches() -> list[dict[str, Any]]:
    """Of peaks and attention, without and with a key mask; from a process without Triton's interpreter."""
    told = subprocess.run([sys.executable, "-m", "tests.kernels.recorded_launches"], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parents[2], env={**os.environ, "TRITON_INTERPRET": "0"})
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(told.stdout)


def test_every_launch_is_that_of_its_machine_code(launches):
    assert [launch["kernel"] for launch in launches] == ["_estimate_peaks", "_block_sparse_attention"] * 2
    for launch in launches:
        assert launch["threads"] == launch["compiled_threads"] == launch["threads_of_code"]
        assert launch["shared"] == launch["compiled_shared"]
        assert launch["grid"] == B * H * 3  # fewer query blocks than the card has room for
        assert launch["parameters"]["scratch of Triton"] == launch["parameters"]["scratch of its profiler"] == 0


@pytest.mark.parametrize("masked", [False, True])
def test_peaks_are_estimated_of_the_given_tensors(launches, masked):
    launch = launches[2 * masked]
    assert launch["shape"] == [B * H * 3 * BLOCKS]
    given = launch["parameters"]
    expected = {**SIZES, "heads": B * H, "key_blocks": BLOCKS, "room": ROOM, "q": "q", "counts": "counts",
                "units_of_keys": "units_of_keys", "key_mask": "key_mask" if masked else "counts",
                "stride_qb": L * H * D, "stride_qh": D, "stride_qs": H * D, "stride_mask_batch": S if masked else 0,
                "stride_counts": ROOM if masked else 0}
    assert {name: given[name] for name in expected} == expected
    assert given["scale_log2"] == pytest.approx(0.125 * 1.4426950408889634)
    assert given["spread_log2"] == pytest.approx(0.125 ** 2 * 1.4426950408889634)
    assert 2 ** given["log2_count"] == pytest.approx(64 - SINGLES)
    rows = {"vectors": (B * HKV * (SINGLES + 2) * ROOM, 32), "whole": (B * HKV * ROOM * 64, 128)}
    for name, (length, box) in rows.items():
        bytes_of_e4m3, swizzle_of_64_bytes = 0, 2
        assert given[name] == [name, 2, bytes_of_e4m3, swizzle_of_64_bytes, D, length, 0, 0, D, box, 0, 0, D, 0, 0, 0]
        assert [given[f"{name}.{part}"] for part in ("size0", "size1", "stride0", "stride1")] == [length, D, D, 1]


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_over_the_given_lists(launches, masked):
    launch = launches[2 * masked + 1]
    assert launch["shape"] == [B, H, L, D] and launch["strides"] == [L * H * D, D, H * D, 1]
    given = launch["parameters"]
    facts = {"key_facts": "key_facts", "stride_key_facts": (BLOCKS + 2) * 3} if masked else {"stride_key_facts": 0}
    expected = {**SIZES, **facts, "blocks": B * H * 3, "pair_capacity": (BLOCKS + 2) // 2, "kept_pairs": "kept_pairs",
                "queue": "queue", "counter": "counter", "window": 0, "cap_log2": 0.0}
    assert {name: given[name] for name in expected} == expected
    assert given["scale_log2"] == pytest.approx(0.125 * 1.4426950408889634)
    heads, lengths = {"q": H, "k": HKV, "v": HKV, "out": H}, {"q": L, "k": S, "v": S, "out": L}
    for name, count in heads.items():
        length, by_row = lengths[name], name in ("q", "out")
        strides = [length * count * D, D if by_row else length * D, count * D if by_row else D, 1]
        of_bfloat16, swizzle_of_128_bytes = 9, 3
        assert given[name] == ["own" if name == "out" else name, 4, of_bfloat16, swizzle_of_128_bytes, D, length, count,
                               B, 64, 64, 1, 1, *(2 * stride for stride in reversed(strides[:3])), 0]
        parts = [given[f"{name}.{part}{d}"] for part in ("size", "stride") for d in range(4)]
        assert parts == [B, count, length, D, *strides]
