"""What the pass adds to torch.compile: `python -m benchmarks.compile_time`.

A random Llama with a padding mask, dynamic shapes, inference, CPU; every number comes from a process of its own with an
empty Inductor cache. The width is small, since compile time does not depend on it. The time of the pass is all of it:
Dynamo may call a backend twice for one graph.

    share      seconds of the pass over seconds of plain torch.compile, 32 layers, Inductor; the first calls whole too
    linearity  seconds of the pass at 64 and 128 layers over 2 and 4 times those at 32
    bucket     seconds until the first call in a second bucket over those in the first, Inductor
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch

import sparsify
from benchmarks.figures import Figure, record
from sparsify import passes
from sparsify.plan import Bucket, Budget, Plan

LAYERS = (32, 64, 128)
EDGE = 64
LENGTHS = (24, 100)
"""One length in each bucket."""
PLAN = Plan((Bucket(1, EDGE, Budget.dense()), Bucket(EDGE, None, Budget(0.02))))


def main() -> None:
    """Measure and record; a child process compiles one model."""
    if len(sys.argv) > 1:
        print(json.dumps(compile_once(**json.loads(sys.argv[1]))))
        return
    plain = in_own_process(layers=LAYERS[0], backend="inductor", ours=False)
    ours = in_own_process(layers=LAYERS[0], backend="inductor", ours=True)
    alone = {layers: in_own_process(layers=layers, backend="eager", ours=True)["pass"][0] for layers in LAYERS}
    print(json.dumps({"plain": plain, "ours": ours, "pass alone": alone}))
    where = f"{platform.processor() or platform.machine()}, 1 thread"
    common: dict[str, Any] = {"issue": "pass", "unit": "x", "where": where,
                              "command": "python -m benchmarks.compile_time"}
    record(
        Figure(figure="compile time of the pass over torch.compile's own, 32 layers",
               value=ours["pass"][0] / plain["whole"][0], bar="<= 0.15", **common),
        Figure(figure="first call, sparsify.compile over torch.compile, 32 layers",
               value=ours["whole"][0] / plain["whole"][0], bar="<= 1.15", **common),
        *(Figure(figure=f"compile time of the pass, {layers} layers over {layers // LAYERS[0]} times 32 layers",
                 value=alone[layers] / alone[LAYERS[0]] / (layers / LAYERS[0]), bar="<= 1.1", **common)
          for layers in LAYERS[1:]),
        Figure(figure="compile time of the second bucket over the first, 32 layers",
               value=ours["whole"][1] / ours["whole"][0], bar="<= 1", **common),
    )


def in_own_process(**arguments: Any) -> dict[str, list[float]]:
    """`compile_once` in a fresh process on one thread, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
        output = subprocess.run([sys.executable, "-m", "benchmarks.compile_time", json.dumps(arguments)], check=True,
                                stdout=subprocess.PIPE, text=True, env=environment).stdout
    result: dict[str, list[float]] = json.loads(output.splitlines()[-1])
    return result


def compile_once(layers: int, backend: str, ours: bool) -> dict[str, list[float]]:
    """Seconds of the first call at each length, and seconds of the pass in it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, use_cache=False)).eval()
    spent = 0.0
    run = passes.run

    def timed(*args: Any, **options: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        try:
            return run(*args, **options)
        finally:
            spent += time.perf_counter() - start

    passes.run = timed
    if ours:
        sparsify.compile(model, PLAN, backend=backend)
    else:
        model.compile(backend=backend, dynamic=True)
    result: dict[str, list[float]] = {"whole": [], "pass": []}
    for length in LENGTHS:
        ids, mask = torch.randint(0, 128, (2, length)), torch.ones(2, length, dtype=torch.long)
        mask[0, -3:] = 0
        start, before = time.perf_counter(), spent
        with torch.no_grad():
            model(ids, attention_mask=mask)
        result["whole"].append(time.perf_counter() - start)
        result["pass"].append(spent - before)
    return result


if __name__ == "__main__":
    main()
