"""compute-sanitizer over a small suite of the kernel tests: `python -m benchmarks.sanitize`, or `make sanitize`.

    memcheck    accesses out of bounds or misaligned; torch's caching of memory is off, so that bounds are a tensor's
    racecheck   hazards in shared memory

racecheck does not know an mbarrier as an order between warps: what it reports of benchmarks/handover.py, a kernel that
is right by construction, stands beside (see kernels/README.md).

The tests are those of benchmarks/sanitize.txt: each kernel, ragged ends, masks, small sizes. They run once plainly
first, which compiles the kernels. Logs and summary go to results/sanitize/, figures to figures.json. Needs a CUDA
device that the tool can instrument, and `compute-sanitizer` on the PATH or in COMPUTE_SANITIZER.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import records
from benchmarks.figures import Figure, record
from benchmarks.records import RESULTS, environment

ROOT = Path(__file__).resolve().parent.parent
TESTS = Path(__file__).with_name("sanitize.txt")
TOOLS = ("memcheck", "racecheck")
SECONDS = 120  # a tool may take
SUMMARIES = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
COMMAND = "python -m benchmarks.sanitize"
CONTROL = "benchmarks.handover"


@dataclass(frozen=True)
class Verdict:
    """What a tool says of a run: reports in all, and those that name a kernel of ours; -1: it came to no summary."""

    tool: str
    reports: int
    ours: int
    passed: int
    failed: int
    seconds: float

    @property
    def is_finished(self) -> bool:
        """Whether the tests ran to their end, and were right."""
        return self.reports >= 0 and self.passed > 0 and not self.failed

    @property
    def is_clean(self) -> bool:
        """Whether they did, and nothing of ours was reported."""
        return self.is_finished and not self.ours


def read_tests(file: Path = TESTS) -> list[str]:
    """Ids of the tests, one a line."""
    return file.read_text(encoding="utf-8").splitlines()


def kernel_names(folder: Path = ROOT / "kernels") -> list[str]:
    """Every kernel that some file launches."""
    found = {name for file in folder.glob("*.py") for name in re.findall(r"^\s+(_\w+)\[", file.read_text(), re.M)}
    return sorted(found)


def read_verdict(tool: str, log: str, kernels: Sequence[str], seconds: float) -> Verdict:
    """From what the tool and pytest printed."""
    summary = re.search(SUMMARIES[tool], log)
    ends = re.findall(r"^.*\d+ (?:passed|failed|error).* in [\d.]+s.*$", log, re.M)  # pytest's last line
    passed, failed = (sum(map(int, re.findall(rf"(\d+) {words}", ends[-1] if ends else "")))
                      for words in ("passed", "(?:failed|error)"))
    names = "|".join(map(re.escape, kernels))
    ours = len(re.findall(rf"^=+.*\bat .*?\b(?:{names})\b.*\+0x", log, re.M)) if names else 0
    return Verdict(tool, -1 if summary is None else int(summary[1]), ours, passed, failed, seconds)


def run_tool(tool: str, tests: Sequence[str], log: Path, seconds: float = SECONDS,
             options: Sequence[str] = ()) -> Verdict:
    """Run the tests, or without tests the control, under one tool, "" for none; what it prints goes to `log`.

    `options` are pytest's.
    """
    program = ["pytest", "-q", "-p", "no:cacheprovider", *options, *tests] if tests else [CONTROL]
    python = [sys.executable, "-m", *program]
    sanitizer = [os.environ.get("COMPUTE_SANITIZER", "compute-sanitizer"), "--tool", tool, "--print-limit", "50"]
    settings = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if tool == "memcheck" else dict(os.environ)
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        try:
            subprocess.run([*sanitizer, *python] if tool else python, cwd=ROOT, env=settings, stdout=file,
                           stderr=subprocess.STDOUT, timeout=seconds, check=False)
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {seconds} s\n")
    spent = time.perf_counter() - start
    return read_verdict(tool or "memcheck", log.read_text(encoding="utf-8", errors="replace"), kernel_names(), spent)


def figures_of(verdicts: Sequence[Verdict], where: str) -> list[Figure]:
    """Clean or not, and how long it took."""
    common: dict[str, Any] = {"issue": "kernels", "where": where, "command": COMMAND}
    return [figure for verdict in verdicts for figure in (
        Figure(figure=f"compute-sanitizer {verdict.tool}: reports about our kernels",
               value=float(verdict.ours if verdict.is_finished else -1), bar=">= 0, <= 0",
               unit="reports", **common),
        Figure(figure=f"compute-sanitizer {verdict.tool}: the small suite", value=verdict.seconds,
               bar=f"<= {SECONDS}", unit="s", **common))]


def main() -> None:
    """Run both tools."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="instead of both")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--workers", type=int, help="processes that compile in the plain run; needs pytest-xdist")
    parser.add_argument("--out", type=Path, default=RESULTS / "sanitize")
    arguments = parser.parse_args()
    tests = read_tests()
    options = ["-n", str(arguments.workers)] if arguments.workers else []
    plain = run_tool("", tests, arguments.out / "plain.log", 2 * arguments.seconds, options)
    print(f"plainly: {plain.passed} of {len(tests)} passed in {plain.seconds:.0f} s", flush=True)
    if not plain.passed:
        sys.exit(f"no test passed: see {arguments.out / 'plain.log'}")
    facts, verdicts = environment("cuda"), []
    for tool in arguments.tool or TOOLS:
        verdicts.append(run_tool(tool, tests, arguments.out / f"{tool}.log", arguments.seconds))
        print(verdicts[-1], flush=True)
        records.write_json(arguments.out / "summary.json",
                           {"environment": facts, "command": COMMAND, "tests": tests,
                            "verdicts": [asdict(verdict) for verdict in verdicts]})
        record(*figures_of(verdicts[-1:], facts["device"]))
    control = run_tool("racecheck", (), arguments.out / "control.log", arguments.seconds)
    record(Figure(issue="kernels", figure="compute-sanitizer racecheck: reports about a control that is right",
                  value=float(control.reports), bar=">= 0", unit="reports", where=facts["device"], command=COMMAND))
    if not all(verdict.is_clean for verdict in verdicts):
        sys.exit(f"not clean: see {arguments.out}")


if __name__ == "__main__":
    main()
