"""Measure a model before and after: time, attention's share of it, density, and the quality that dropped blocks cost.

Two sides share one set of weights: dense is the model under torch.compile, sparse the model under sparsify.compile.
Both are compiled with symbolic lengths, see the same windows of one text, and run in turns. The model itself is not
compiled and not changed.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sparsify import __version__
from sparsify.backend import compile
from sparsify.errors import DeviceError, ModelError, OptionError, TextError
from sparsify.explanation import explain
from sparsify.frames import Uncompiled
from sparsify.plan import Bucket, Plan, resolve_plan
from sparsify.report import Report, Row

LENGTHS = {"cpu": (512, 1024, 2048, 4096, 8192, 16384), "cuda": (2048, 4096, 8192, 16384, 32768)}
"""Lengths measured by default, per device type."""

MEASURED_SECONDS = 3.0  # per side and length: at 512 tokens three runs would be all noise
QUALITY_TOKENS = 16_384  # per length: 32 windows of 512, one of 16K
CHUNK_ELEMENTS = 2**24  # logits compared at once: 64 MB a temporary
ENCODE_PIECE = 20_000  # characters: tokenizers work on pieces in parallel, and warn about long ones


def benchmark(model: nn.Module, text: str | Tensor, lengths: Sequence[int] | None = None, *, tokenizer: Any = None,
              plan: Plan | Mapping[str, Any] | str | Path | None = None, repeats: int = 3, name: str | None = None,
              progress: Callable[[str], None] | None = None) -> Report:
    """Time and compare `model`, dense and sparse, at several lengths of one text, on the device it is on.

    model      a causal language model: token ids [1, length] to logits, or to something with `.logits`
    text       held-out text, or its token ids [tokens] or [1, tokens]; at least as long as the longest length
    lengths    tokens; None: LENGTHS of the device, up to what the model was made for
    tokenizer  None: the one that belongs to a Hugging Face model
    plan       a Plan, a dict, the path of a plan file, or None for the default plan of the device
    repeats    runs of each side that every median is made of, at least; short lengths get more
    name       of the model, for the report
    progress   called with a line of text now and then

    Raises TextError, OptionError, ModelError, PlanError, DeviceError.
    """
    model = getattr(model, "_orig_mod", model)
    device, dtype = device_and_dtype(model)
    check_compiler(device)
    plan = resolve_plan(plan, device.type)
    lengths = _check_lengths(lengths, device, model)
    if repeats < 1:
        raise OptionError(f"repeats is {repeats}. Give at least 1.")
    tell = progress or (lambda line: None)
    tell("reading the text")
    ids = (encode(text, tokenizer or tokenizer_of(model)) if isinstance(text, str) else text).to(device)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise TextError(f"text is a tensor of shape {list(ids.shape)}. Give the token ids of one text: [tokens] or "
                        "[1, tokens].")
    if ids.numel() < lengths[-1]:
        raise TextError(f"text has {ids.numel()} tokens and the longest length is {lengths[-1]}. "
                        "Give a longer text, or shorter lengths.")

    dense, sparse = compile_sides(model, plan)
    rows = []
    with measuring(model):
        for place, length in enumerate(lengths, start=1):
            def tell_step(step: str, where: str = f"[{place}/{len(lengths)}] {length} tokens") -> None:
                tell(f"{where}: {step}")

            rows.append(_measure(dense, sparse, _windows(ids, length), plan.bucket_of(length), repeats, tell_step))
            tell_step(f"dense {rows[-1].dense_ms:.1f} ms, sparse {rows[-1].sparse_ms:.1f} ms, "
                      f"{rows[-1].speedup:.2f}x, KL {rows[-1].kl:.5f}")
    return Report(_environment(device), _describe(model, dtype, name), plan, tuple(rows))


class Side(Uncompiled):
    """Token ids to logits through a model that stays as it is."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, length] to logits [batch, length, vocabulary]."""
        output = self.run(ids)
        return output if isinstance(output, Tensor) else output.logits


def compile_sides(model: nn.Module, plan: Plan) -> tuple[Side, Side]:
    """The dense and the sparse side of a model, each compiled for any length at its first call."""
    dense, sparse = Side(model), Side(model)
    dense.compile(dynamic=True)
    compile(sparse, plan)
    return dense, sparse


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, undone at the end; a graph that stops being compiled is an error, not a slow run."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def device_name(device: torch.device) -> str:
    """What the maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())


def checkout_commit() -> str | None:
    """The commit of the checkout that this file is in, "-dirty" if it was edited since; None for an installed copy.

    What benchmarks write is no edit. A copy of a checkout without its history says it in the environment, as
    SPARSIFY_COMMIT.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10,
                              check=True).stdout.strip()

    try:
        if not (root / ".git").exists():
            return os.environ.get("SPARSIFY_COMMIT")
        edited = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results",
                     ":!benchmarks/figures.json")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if edited else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("SPARSIFY_COMMIT")


@dataclass
class Quality:
    """Sums over positions, made from the logits of both sides, window by window."""

    positions: int = 0
    targets: int = 0
    kl: float = 0.0
    dense_loss: float = 0.0
    sparse_loss: float = 0.0
    agreements: int = 0

    @property
    def mean_kl(self) -> float:
        """Mean over positions; NaN stays NaN."""
        mean = self.kl / self.positions
        return 0.0 if mean < 0 else mean  # rounding alone can make it negative

    def add(self, dense: Tensor, sparse: Tensor, ids: Tensor) -> None:
        """Compare logits [length, vocabulary] a few rows at a time: both whole in float32 would double the memory."""
        step = max(1, CHUNK_ELEMENTS // dense.shape[-1])
        for start in range(0, len(ids), step):
            log_p, log_q = (x[start:start + step].float().log_softmax(-1) for x in (dense, sparse))
            targets = ids[start + 1:start + step + 1, None]
            self.dense_loss -= float(log_p[:len(targets)].gather(-1, targets).sum(dtype=torch.float64))
            self.sparse_loss -= float(log_q[:len(targets)].gather(-1, targets).sum(dtype=torch.float64))
            self.agreements += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            terms = log_p.exp() * (log_p - log_q)
            self.kl += float(terms.masked_fill(log_p == -torch.inf, 0.0).sum(dtype=torch.float64))  # 0 log 0 is 0
            self.targets += len(targets)
        self.positions += len(ids)


def _measure(dense: Side, sparse: Side, windows: list[Tensor], bucket: Bucket, repeats: int,
             tell: Callable[[str], None]) -> Row:
    tell("compiling and comparing the logits")
    quality = Quality()
    for window in windows:  # the first run of a graph compiles it
        quality.add(dense(window)[0], sparse(window)[0], window[0])
    ids = windows[0]
    tell("counting kept blocks")
    density = _density(sparse, ids, bucket)
    tell("timing")
    dense_seconds, sparse_seconds = time_in_turns(dense, sparse, ids, repeats)
    return Row(
        length=ids.shape[1], bucket=str(bucket), budget=bucket.headline,
        dense_ms=1e3 * dense_seconds, sparse_ms=1e3 * sparse_seconds,
        attention_share=_attention_share(dense, ids), density=density,
        dense_loss=quality.dense_loss / max(1, quality.targets),
        sparse_loss=quality.sparse_loss / max(1, quality.targets),
        kl=quality.mean_kl,
        top1_agreement=quality.agreements / quality.positions,
    )


def time_in_turns(dense: Side, sparse: Side, ids: Tensor, repeats: int) -> tuple[float, float]:
    """Median seconds of each side; who goes first changes from turn to turn, so that neither gains by it."""
    times: dict[Side, list[float]] = {dense: [], sparse: []}
    order = [dense, sparse]
    while len(times[sparse]) < repeats or min(map(sum, times.values())) < MEASURED_SECONDS:
        for side in order:
            times[side].append(_seconds(side, ids))
        order.reverse()
    return statistics.median(times[dense]), statistics.median(times[sparse])


def _seconds(side: Side, ids: Tensor) -> float:
    _synchronise(ids.device)
    start = time.perf_counter()
    side(ids)
    _synchronise(ids.device)
    return time.perf_counter() - start


def _attention_share(dense: Side, ids: Tensor) -> float | None:
    """Share of one dense run that its SDPA calls take; None where there are none, as in hand-written attention."""
    on_cuda = ids.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as profiler:
        elapsed = _seconds(dense, ids)
    events = profiler.key_averages()
    # The ops behind F.scaled_dot_product_attention: one is called per site, none inside another.
    calls = [event for event in events if event.key.startswith("aten::_scaled_dot_product")]
    if not calls:
        return None
    if on_cuda:
        kernels = sum(event.self_device_time_total for event in events
                      if event.device_type == DeviceType.CUDA and not event.is_user_annotation)
        return sum(event.device_time_total for event in calls) / kernels
    return sum(event.cpu_time_total for event in calls) / (1e6 * elapsed)


def _density(sparse: Side, ids: Tensor, bucket: Bucket) -> float:
    """Kept share of the allowed blocks, mean over all attention sites; what did not run sparse kept all."""
    if bucket.is_dense:
        return 1.0
    densities = [1.0 if site.density is None else site.density for site in explain(sparse, ids).sites]
    return statistics.mean(densities) if densities else 1.0


def _windows(ids: Tensor, length: int) -> list[Tensor]:
    """Windows [1, length] spread evenly over the text, together QUALITY_TOKENS or what the text allows."""
    count = max(1, min(QUALITY_TOKENS, ids.numel()) // length)
    step = (ids.numel() - length) // max(1, count - 1)
    return [ids[None, i * step:i * step + length] for i in range(count)]


def _check_lengths(lengths: Sequence[int] | None, device: torch.device, model: nn.Module) -> list[int]:
    most = getattr(getattr(model, "config", None), "max_position_embeddings", None) or sys.maxsize
    if lengths is None:
        lengths = [length for length in LENGTHS.get(device.type, LENGTHS["cpu"]) if length <= most]
    if not lengths or min(lengths) < 1:
        raise OptionError(f"lengths is {list(lengths)}. Give at least one length, each at least 1.")
    if max(lengths) > most:
        raise OptionError(f"lengths holds {max(lengths)} and the model has {most} positions. "
                          f"Give lengths up to {most}.")
    return sorted(set(lengths))


def device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Of the first floating-point parameter. Raises ModelError."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    raise ModelError("model has no floating-point parameter, so its device is not known. Give a language model.")


def check_compiler(device: torch.device) -> None:
    """Raises DeviceError where torch.compile finds no C++ compiler for a CPU."""
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise DeviceError("device is cpu and torch.compile finds no C++ compiler. Install g++, or set CXX.") from error


def tokenizer_of(model: nn.Module) -> Any:
    """The tokenizer that belongs to a Hugging Face model. Raises ModelError."""
    from sparsify.models.loading import load_tokenizer

    place = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not place:
        raise ModelError("model names no tokenizer. Give one as tokenizer=, or give token ids as text.")
    return load_tokenizer(place)


def encode(text: str, tokenizer: Any) -> Tensor:
    """Token ids [tokens] of a text of any length, nothing added."""
    pieces = [text[start:start + ENCODE_PIECE] for start in range(0, len(text), ENCODE_PIECE)]
    encoded = tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []
    return torch.tensor([token for piece in encoded for token in piece], dtype=torch.long)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(model: nn.Module, dtype: torch.dtype, name: str | None) -> dict[str, Any]:
    place = getattr(getattr(model, "config", None), "_name_or_path", "")
    if Path(place).is_dir():
        place = Path(place).resolve().name
    return {
        "name": name or place or type(model).__name__,
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _environment(device: torch.device) -> dict[str, Any]:
    return {
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "sparsify": __version__,
        "commit": checkout_commit(),
    }


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
