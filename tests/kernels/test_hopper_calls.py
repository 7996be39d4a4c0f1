"""hopper_calls.h launches what hopper_code.py compiles, with the parameters that the kernels have.

And a package launches what Python does.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.kernels import native

pytestmark = [pytest.mark.skipif(torch.cuda.is_available(), reason="the driver of these tests runs nothing"),
              pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")]
# As in recorded_launches.py, which does not import under Triton's interpreter.
SINGLES, B, H, HKV, L, S, D = 6, 2, 8, 2, 300, 500, 64
LONG = 5000  # keys of the calls whose lists are cut
BLOCKS, ROOM, LOG2_E = 8, 32, 1.4426950408889634
SIZES = {"query_blocks": 3, "H": H, "GROUP": H // HKV, "L": L, "S": S, "offset": S - L}
KERNELS = ["_sample_keys", "_quantise_keys", "_estimate_peaks", "_pack_lists", "_fill_queue", "_gather_facts",
           "_block_sparse_attention"]
MASK_ROWS = [0, B, 1]
OF_BYTES, OF_BFLOAT16, SWIZZLE_64, SWIZZLE_128 = 0, 9, 2, 3  # the driver's words


@pytest.fixture(scope="module")
def recorded() -> dict[str, list[list[dict[str, Any]]]]:
    """The launches of a call for each of MASK_ROWS, from Python and in a package."""
    told = subprocess.run([sys.executable, "-m", "tests.kernels.recorded_launches"], capture_output=True, text=True,
                          cwd=Path(__file__).resolve().parents[2], env={**os.environ, "TRITON_INTERPRET": "0"})
    assert told.returncode == 0, told.stderr[-2000:]
    return json.loads(told.stdout)


@pytest.fixture(params=range(3), ids=["no key mask", "a key mask", "one key mask for all"])
def call(recorded, request) -> tuple[int, dict[str, dict[str, Any]]]:
    """Rows of the key mask, and the launches from Python by kernel."""
    launches = recorded["python"][request.param]
    rows = MASK_ROWS[request.param]
    assert [launch["kernel"] for launch in launches] == [x for x in KERNELS if rows or x != "_gather_facts"]
    return rows, {launch["kernel"]: launch for launch in launches}


def parameters(launch: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Those of a launch, which are as expected as far as that says."""
    given = launch["parameters"]
    assert {name: given[name] for name in expected} == expected
    return given


def test_every_launch_is_that_of_its_machine_code(call):
    for launch in call[1].values():
        assert launch["threads"] == launch["compiled_threads"] == launch["threads_of_code"]
        assert launch["shared"] == launch["compiled_shared"]
        assert launch["parameters"]["scratch of Triton"] == launch["parameters"]["scratch of its profiler"] == 0


def test_memory_goes_from_kernel_to_kernel(call):
    rows, launches = call
    sample, quantise, estimate, pack, fill, attend = (launches[x]["parameters"] for x in KERNELS if x != KERNELS[5])
    assert sample["ranges"] == quantise["ranges"]
    assert quantise["vectors"] == estimate["vectors"][0] and quantise["whole"] == estimate["whole"][0]
    assert quantise["counts"] == estimate["counts"] and quantise["units"] == estimate["units_of_keys"]
    assert estimate["peaks"] == pack["peaks"]
    assert fill["queue"] == attend["queue"] and f"{fill['cursors']}, counter" == attend["counter"]
    assert len({*sample.values()} & {"k"}) == 1
    places = [quantise[x] for x in ("ranges", "vectors", "whole", "counts", "units")] + [estimate["peaks"],
                                                                                        estimate["scratch"]]
    assert len(set(places)) == len(places) and all(place.startswith("m") for place in places)
    if rows:
        facts = launches["_gather_facts"]["parameters"]
        assert facts["facts"] == attend["key_facts"] and facts["shown"] == "key_mask"
        assert pack["single_count"] == pack["rest_count"] == quantise["counts"]


def test_keys_are_summarised(call):
    rows, launches = call
    mask = {"key_mask": "key_mask" if rows else launches["_estimate_peaks"]["parameters"]["counts"],
            "stride_mask_batch": S if rows > 1 else 0}
    keys = {"k": "k", "stride_b": HKV * S * D, "stride_h": S * D, "stride_s": D, "S": S, "Hkv": HKV, **mask}
    parameters(launches["_sample_keys"], {**keys, "spacing": 1})
    parameters(launches["_quantise_keys"], {**keys, "room": ROOM, "MASKS": max(rows, 1)})
    assert launches["_sample_keys"]["grid"] == [D // 16, B * HKV]
    assert launches["_quantise_keys"]["grid"] == [BLOCKS, B * HKV]


def test_peaks_are_estimated(call):
    rows, launches = call
    given = parameters(launches["_estimate_peaks"], {
        **SIZES, "heads": B * H, "key_blocks": BLOCKS, "room": ROOM, "q": "q", "stride_qb": L * H * D, "stride_qh": D,
        "stride_qs": H * D, "stride_mask_batch": S if rows > 1 else 0, "stride_counts": ROOM if rows > 1 else 0})
    assert given["scale_log2"] == pytest.approx(0.125 * LOG2_E)
    assert given["spread_log2"] == pytest.approx(0.125 ** 2 * LOG2_E)
    assert 2 ** given["log2_count"] == pytest.approx(64 - SINGLES)
    assert launches["_estimate_peaks"]["grid"] == [B * H * 3, 1]  # fewer query blocks than the card has room for
    tall = {"vectors": (B * HKV * (SINGLES + 2) * ROOM, 32), "whole": (B * HKV * ROOM * 64, 128)}
    for name, (length, box) in tall.items():
        assert given[name][1:] == [2, OF_BYTES, SWIZZLE_64, D, length, 0, 0, D, box, 0, 0, D, 0, 0, 0]
        assert [given[f"{name}.{part}"] for part in ("size0", "size1", "stride0", "stride1")] == [length, D, D, 1]


def test_lists_are_packed_and_queued(call):
    rows, launches = call
    given = parameters(launches["_pack_lists"], {
        **{name: SIZES[name] for name in ("query_blocks", "H", "L", "offset")}, "key_blocks": BLOCKS, "kept": "kept",
        "counts": "counts", "list_capacity": BLOCKS + 2, "sinks": 1, "local": 2,
        "stride_count_batch": ROOM if rows > 1 else 0})
    assert given["tolerance"] == pytest.approx(0.03) and given["max_density"] == pytest.approx(0.9)
    assert ("single_count" in given) == (rows > 0)
    parameters(launches["_fill_queue"], {"counts": "counts", "rows": B * H * 3, "pair_capacity": BLOCKS // 2 + 1})
    assert launches["_pack_lists"]["grid"] == [B * H * 3, 1] and launches["_fill_queue"]["grid"] == [1, 1]
    if rows:
        parameters(launches["_gather_facts"], {"length": S, "blocks": BLOCKS + 2, "stride_ids": 0,
                                               "stride_batch": S if rows > 1 else 0})
        assert launches["_gather_facts"]["grid"] == [1, rows]


def test_attention_is_over_the_lists(call):
    rows, launches = call
    given = parameters(launches["_block_sparse_attention"], {
        **SIZES, "blocks": B * H * 3, "pair_capacity": BLOCKS // 2 + 1, "kept_pairs": "kept", "lse": "lse",
        "window": 0, "cap_log2": 0.0, "stride_key_facts": (BLOCKS + 2) * 3 if rows > 1 else 0})
    assert given["scale_log2"] == pytest.approx(0.125 * LOG2_E)
    heads, lengths = {"q": H, "k": HKV, "v": HKV, "out": H}, {"q": L, "k": S, "v": S, "out": L}
    for name, count in heads.items():
        length, by_row = lengths[name], name in ("q", "out")
        strides = [length * count * D, D if by_row else length * D, count * D if by_row else D, 1]
        assert given[name] == [name, 4, OF_BFLOAT16, SWIZZLE_128, D, length, count, B, 64, 64, 1, 1,
                               *(2 * stride for stride in reversed(strides[:3])), 0]
        parts = [given[f"{name}.{part}{d}"] for part in ("size", "stride") for d in range(4)]
        assert parts == [B, count, length, D, *strides]


@pytest.mark.parametrize("which", range(3))
def test_exact_attention_goes_without_lists(recorded, which):
    rows = MASK_ROWS[which]
    launches = {launch["kernel"]: launch for launch in recorded["without lists"][which]}
    assert list(launches) == (["_gather_facts"] if rows else []) + ["_block_sparse_attention"]
    attend, over_lists = launches["_block_sparse_attention"], recorded["python"][which][-1]
    given = parameters(attend, {**SIZES, "blocks": B * H * 3, "pair_capacity": 0, "lse": "lse",
                                "stride_key_facts": (BLOCKS + 2) * 3 if rows > 1 else 0})
    assert given["counter"].startswith("m") and given["counter"] != given["queue"]
    of_lists = ("kept_pairs", "queue", "counter", "pair_capacity", "key_facts", "row_facts")
    same = [name for name in given if name not in of_lists]
    assert {name: given[name] for name in same} == {name: over_lists["parameters"][name] for name in same}
    assert attend["threads"] == attend["threads_of_code"] and attend["shared"] == attend["compiled_shared"]


@pytest.mark.parametrize("masked", [False, True])
def test_lists_of_few_query_blocks_are_cut(recorded, masked):
    launches = recorded["python"][3 + masked]
    assert [launch["kernel"] for launch in launches] == [
        *KERNELS[:4], "_cut_lists", *(["_gather_facts"] if masked else []), "_block_sparse_attention", "_merge_pieces"]
    by_kernel = {launch["kernel"]: launch for launch in launches}
    rows, key_blocks, programs = B * H * 3, 79, 132
    slots = rows + programs
    cut = parameters(by_kernel["_cut_lists"], {"counts": "counts", "rows": rows, "slots": slots, "wanted": programs,
                                               "shortest": 4, "idle": programs})
    attend = parameters(by_kernel["_block_sparse_attention"], {
        "kept_pairs": "kept", "queue": cut["units"], "counter": cut["counter"], "blocks": slots,
        "pair_capacity": key_blocks // 2 + 2, "query_blocks": 3, "S": LONG, "offset": LONG - L,
        "stride_key_facts": (key_blocks + 2) * 3 if masked else 0})
    merge = parameters(by_kernel["_merge_pieces"], {
        "partial": attend["out"], "sums": attend["lse"], "firsts": cut["firsts"], "out": "out", "lse": "lse",
        "query_blocks": 3, "H": H, "L": L})
    assert len({merge["partial"], merge["sums"], merge["firsts"], cut["units"], cut["counter"]}) == 5
    assert by_kernel["_cut_lists"]["grid"] == [rows, 1] and by_kernel["_block_sparse_attention"]["grid"] == [132, 1]
    assert by_kernel["_merge_pieces"]["grid"] == [rows * 128 * D // 512, 1]
    for launch in launches:
        assert launch["threads"] == launch["threads_of_code"] and launch["shared"] == launch["compiled_shared"]


@pytest.mark.parametrize("which", range(5))
def test_a_package_launches_what_python_does(recorded, which):
    def without_places(launches):
        """All but which memory is which: torch gives what was freed to the next."""
        def blurred(value):
            if isinstance(value, list):
                return [blurred(value[0]), *value[1:]]
            return "memory" if isinstance(value, str) and value not in ("q", "k", "v", "key_mask") else value

        return [{**launch, "parameters": {name: blurred(value) for name, value in launch["parameters"].items()}}
                for launch in launches]

    assert without_places(recorded["package"][which]) == without_places(recorded["python"][which])


def test_what_is_left_to_python(recorded):
    """Of calls that differ from one that is not in one thing each."""
    assert recorded["refused"] == ["strides of 8 elements", "a negative scale", "a mask with gaps", "another Triton",
                                   "a window"]


def test_the_constants_are_those_of_the_kernels():
    """What hopper_calls.h says again of numbers that Python has."""
    code = ("from sparsify.kernels import blocks, hopper_facts, hopper_queue, hopper_select, splits\n"
            "print(dict(ROWS=blocks.QUERY_BLOCK, KEYS=blocks.KEY_BLOCK, TILE=blocks.TILE, CHUNK=hopper_select.CHUNK, "
            "PEAK_PROGRAMS=hopper_select.PROGRAMS_PER_MULTIPROCESSOR, SAMPLES=hopper_select.SAMPLES, "
            "CHANNELS=hopper_select.CHANNELS, LEVELS=hopper_queue.LEVELS, FACTS=hopper_facts.CHUNK, "
            "MOST_ROWS=splits.MOST_ROWS, MOST_UNITS=splits.MOST_UNITS, FEWEST_KEY_BLOCKS=splits.FEWEST_KEY_BLOCKS, "
            "SHORTEST=splits.SHORTEST, MERGED_VALUES=splits.MERGED_VALUES))")
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "TRITON_INTERPRET": "0"}).stdout
    source = (native.FOLDER / "hopper_calls.h").read_text()
    lines = re.findall(r"^constexpr int64_t (.*?);", source, re.MULTILINE)
    written = {name: int(value) for line in lines for name, value in re.findall(r"(\w+) = (\d+)", line)}
    assert written == ast.literal_eval(told)
