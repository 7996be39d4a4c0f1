"""The command line: `sparsify bench`, `explain`, `calibrate`, `tune`, `export`, `plan show | diff | check`.

Results go to stdout, everything else to stderr. A caller's mistake is one line and exit code 2.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from sparsify.errors import DeviceError, ModelError, OptionError, SparsifyError, TextError
from sparsify.plan import Budget, Plan, resolve_plan

if TYPE_CHECKING:
    import torch

    from sparsify.models.loading import Loaded

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Device(StrEnum):
    CPU = "cpu"
    CUDA = "cuda"


class Dtype(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Metric(StrEnum):
    KL = "kl"
    LOSS = "loss"


class Target(StrEnum):
    EXPORT = "export"
    AOT_INDUCTOR = "aot_inductor"
    ORT = "ort"
    TENSORRT = "tensorrt"


class Form(StrEnum):
    FUNCTION = "function"
    INLINE = "inline"


class _Group(TyperGroup):
    """Commands whose SparsifyError ends as one line."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SparsifyError as error:
            console.print(f"error: {error}", markup=False)
            raise typer.Exit(2) from error


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="Adaptive sparse attention for any PyTorch model, as a torch.compile pass.")
plan_app = typer.Typer(no_args_is_help=True, help="Plans: which budget holds for which key length.")
app.add_typer(plan_app, name="plan")

ModelOption = Annotated[str | None, typer.Option(
    "--model", metavar="PATH_OR_ID", show_default="the shipped tiny-lm",
    help="Hugging Face model folder, GGUF file, or id of a model in the local cache.")]
TextOption = Annotated[Path | None, typer.Option(
    "--text", metavar="FILE", show_default="the shipped held-out text", help="UTF-8 text to run on.")]
DeviceOption = Annotated[Device | None, typer.Option("--device", show_default="cuda if there is one")]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", show_default="float32 on cpu, bfloat16 on cuda")]
PlanOption = Annotated[Path | None, typer.Option(
    "--plan", metavar="FILE", show_default="the default plan of the device", help="Plan file.")]
GuaranteeOption = Annotated[float | None, typer.Option(
    "--guarantee", metavar="SHARE", show_default="none",
    help="Share of query blocks that must keep all peaks, as the plan was calibrated for: 0.95.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


EXPLAIN_LENGTH = 4096
"""Tokens that a model is explained on, if it has as many positions."""
TUNE_HEAD_DIM = 128
"""Head dim of a layer that is given by its heads."""


@app.command()
def bench(
    model: ModelOption = None,
    text: TextOption = None,
    lengths: Annotated[str | None, typer.Option(
        metavar="N,N,...", show_default="512 to 16384 on cpu, 2048 to 32768 on cuda",
        help="Lengths in tokens.")] = None,
    out: Annotated[Path | None, typer.Option(
        metavar="DIR", show_default="this folder; none with --exported",
        help="Folder for report.json and report.md.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    plan: PlanOption = None,
    guarantee: GuaranteeOption = None,
    exported: Annotated[Path | None, typer.Option(
        "--exported", metavar="FILE", help="Time a file that `sparsify export` wrote, in its own runtime, in place of "
                                           "a model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model before and after: time, density and quality per length."""
    numbers = None if lengths is None else _parse_lengths(lengths)
    if exported is not None:
        _refuse_beside("exported", exported, model=model, text=text, plan=plan, guarantee=guarantee, device=device,
                       dtype=dtype)
        _time_exported(exported, numbers, as_json, out)
        return
    out = Path(".") if out is None else out
    _check_new_folder(out)
    loaded, chosen_plan, words = _prepare(model, text, device, dtype, plan, guarantee)
    from sparsify.measurement import benchmark

    with _progress() as tell:
        report = benchmark(loaded.model, words, numbers, tokenizer=loaded.tokenizer, plan=chosen_plan,
                           name=loaded.name, progress=tell)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    with _writing_report(out):
        report.save(out)


@app.command()
def explain(
    file: Annotated[Path | None, typer.Argument(
        metavar="[FILE]", show_default="a model",
        help="A file that `sparsify export` wrote, in place of a model: what is in it.")] = None,
    model: ModelOption = None,
    text: TextOption = None,
    length: Annotated[int | None, typer.Option(
        show_default=f"{EXPLAIN_LENGTH}, or as many as the model has positions",
        help="Tokens of text to run on.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    plan: PlanOption = None,
    guarantee: GuaranteeOption = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page to FILE as well.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what becomes of each attention of a model, and why; or what is in an exported file."""
    if file is not None:
        _refuse_beside("file", file, model=model, text=text, plan=plan, guarantee=guarantee, html=html, device=device,
                       dtype=dtype, length=length)
        _explain_exported(file, as_json)
        return
    if html is not None:
        try:
            html.touch()
        except OSError as error:
            raise OptionError(f"html is {str(html)!r} and cannot be written ({error.strerror}). "
                              "Give a file.") from error
    loaded, chosen_plan, words = _prepare(model, text, device, dtype, plan, guarantee)
    import torch

    from sparsify.backend import compile
    from sparsify.explanation import explain as explain_model
    from sparsify.measurement import encode

    most = getattr(loaded.model.config, "max_position_embeddings", None) or sys.maxsize
    if length is None:
        length = min(EXPLAIN_LENGTH, most)
    if length > most:
        raise OptionError(f"length is {length} and the model has {most} positions. Give a length up to {most}.")
    ids = encode(words, loaded.tokenizer)[:length]
    if length < 1 or len(ids) < length:
        raise TextError(f"text has {len(ids)} tokens and length is {length}. Give a longer text, or a length from 1.")
    with _progress() as tell, torch.no_grad():
        tell("tracing")
        compile(loaded.model, chosen_plan)
        explanation = explain_model(loaded.model, ids[None].to(next(loaded.model.parameters()).device))
    if html is not None:
        html.write_text(explanation.to_html(), encoding="utf-8")
        console.print(f"wrote {html}", markup=False)
    typer.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else str(explanation))


@app.command()
def tune(
    model: Annotated[str | None, typer.Argument(
        metavar="[MODEL]", show_default="the shipped tiny-lm",
        help="Folder, GGUF file or id, as for --model elsewhere; only its configuration is read.")] = None,
    heads: Annotated[int | None, typer.Option(help="Query heads, in place of a model.")] = None,
    kv_heads: Annotated[int | None, typer.Option(show_default="as many as query heads", help="KV heads.")] = None,
    head_dim: Annotated[int | None, typer.Option(
        show_default=f"{TUNE_HEAD_DIM}", help="Head dim, with --heads.")] = None,
    lengths: Annotated[str | None, typer.Option(
        metavar="N,N,...", show_default="1024 to 8192 on cpu, 1024 to 32768 on cuda",
        help="Lengths in tokens.")] = None,
    batch: Annotated[int, typer.Option(help="Batch size.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Every query sees every key, in place of causal.")] = False,
    singles: Annotated[int, typer.Option(help="Surprising keys of a split summary, as in the plan.")] = Budget.singles,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure which exact kernel is fastest here and from where on sparse attention pays, and keep it.

    The ops read it: exact attention takes the fastest kernel, sparse buckets run exact where sparse would be slower.
    On a GPU they measure by themselves what is missing; SPARSIFY_TUNE=read in the environment forbids that,
    SPARSIFY_TUNE=0 leaves everything to built-in constants.
    """
    numbers = None if lengths is None else _parse_lengths(lengths)
    for name, value in (("kv_heads", kv_heads), ("head_dim", head_dim)):
        if heads is None and value is not None:
            raise OptionError(f"{name} is {value} and heads is not given. Give --heads too, or a model alone.")
    if heads is not None and model is not None:
        raise OptionError(f"model is {model!r} and heads is {heads}. Give one of the two.")
    Budget(0.0, singles=singles)  # refuses what no plan may hold
    place = _find_device(device)
    import torch

    from sparsify import timings
    from sparsify.tuning import Layer, table
    from sparsify.tuning import tune as tune_layer

    if heads is not None:
        dims = TUNE_HEAD_DIM if head_dim is None else head_dim
        layer = Layer(heads, heads if kv_heads is None else kv_heads, dims, dims)
    else:
        layer = Layer.of_config(_load_config(model))
    with _progress() as tell:
        rows = tune_layer(layer, numbers, device=torch.device(place), dtype=_find_dtype(dtype, place), batch=batch,
                          causal=not full, singles=singles, progress=tell)
    measured = [row for row in rows if row.times is not None]
    stored = bool(measured) and all(row.stored for row in measured)
    if as_json:
        typer.echo(json.dumps({"stored": str(timings.path()) if stored else None,
                               "rows": [row.to_dict() for row in rows]}, indent=2))
    else:
        typer.echo(table(rows))
    if stored:
        console.print(f"stored in {timings.path()}", markup=False)
    elif measured:
        console.print(f"not stored: {timings.path()} cannot be written, so the ops will not find these times. Set "
                      "XDG_CACHE_HOME to a folder that can be, and tune again", markup=False)


@app.command()
def calibrate(
    arguments: Annotated[list[str] | None, typer.Argument(
        metavar="[MODEL] [FILE]...", show_default="the shipped tiny-lm",
        help="Model, as for --model elsewhere; and more files of text.")] = None,
    text: Annotated[list[str] | None, typer.Option(
        "--text", metavar="[KIND=]FILE...", show_default="the shipped held-out text",
        help="UTF-8 texts of what the model will run on, separated by <|endoftext|> within a file.")] = None,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Plan file. A run that was killed goes on from the journal "
                                                           "beside it.")] = Path("plan.json"),
    max_error: Annotated[float, typer.Option(help="Upper bound that the mean error must not exceed.")] = 0.005,
    metric: Annotated[Metric, typer.Option(help="KL(dense || sparse) or rise of the loss, nats a token.")] = Metric.KL,
    lengths: Annotated[str | None, typer.Option(
        metavar="N,N,...", show_default="512 to 8192 on cpu, 512 to 32768 on cuda",
        help="Key lengths, upper ends of the buckets.")] = None,
    holdout: Annotated[float, typer.Option(help="Share of the texts that judge and choose nothing.")] = 0.3,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fit a plan to a model and to texts: per length, the most time saved whose error stays below a bound."""
    numbers = None if lengths is None else _parse_lengths(lengths)
    model, more = (arguments[0] if arguments else None), (arguments or [])[1:]
    files = [*(text or []), *more]
    if more and not text:
        raise OptionError(f"texts are {', '.join(map(repr, more))}. Give them behind --text.")
    loaded, _, _ = _prepare(model, None, device, dtype, None)
    from sparsify.calibration import calibrate as calibrate_model
    from sparsify.calibration.request import check_arguments, lengths_of
    from sparsify.calibration.texts import read_samples
    from sparsify.models.loading import HELDOUT_TEXT

    place, _ = check_arguments(loaded.model, max_error, metric.value, numbers, holdout)
    wanted = lengths_of(numbers, loaded.model, place)  # refused before texts are read
    with _progress() as tell:
        tell("reading the texts")
        samples = read_samples(files or [str(HELDOUT_TEXT)], loaded.tokenizer, wanted, holdout,
                               asked=numbers is not None)
        plan = calibrate_model(loaded.model, samples, max_error=max_error, metric=metric.value, lengths=numbers,
                               holdout=holdout, progress=tell, out=out)
    typer.echo(json.dumps(plan.to_dict(), indent=2) if as_json else str(plan))
    console.print(f"wrote {out}", markup=False)


@app.command()
def export(
    model: Annotated[str | None, typer.Argument(
        metavar="[MODEL]", show_default="the shipped tiny-lm", help="Model, as for --model elsewhere.")] = None,
    out: Annotated[Path, typer.Option(
        "--out", "-o", metavar="FILE",
        help="File to write; its suffix says the format. A report goes beside it.")] = Path("model.pt2"),
    target: Annotated[Target | None, typer.Option(
        show_default="export for .pt2, ort for .onnx",
        help="For .pt2: export (an ExportedProgram) or aot_inductor (compiled; runs without sparsify). For .onnx: ort "
             "(one file) or tensorrt (one file a bucket, for its parser).")] = None,
    opset: Annotated[int | None, typer.Option(show_default="the format's", help="Opset of an ONNX file.")] = None,
    form: Annotated[Form | None, typer.Option(
        show_default="the format's", help="Attention in an ONNX file: a function, or inlined.")] = None,
    past: Annotated[bool, typer.Option(
        "--with-past", help="Keys and values as inputs and outputs, past_key_values and present: for loops that "
                            "generate.")] = False,
    text: TextOption = None,
    lengths: Annotated[str | None, typer.Option(
        metavar="N,N,...", show_default="one for each bucket",
        help="Key lengths at which the file is checked.")] = None,
    atol: Annotated[float | None, typer.Option(
        show_default="rounding", help="How far logits of the file may be from those of the graph.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    plan: PlanOption = None,
    guarantee: GuaranteeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model to a file that runs its attention under a plan, check the file, and report."""
    from sparsify.exporters.formats import find_format

    kind = None if target is None else target.value
    find_format(out, kind)
    numbers = None if lengths is None else _parse_lengths(lengths)
    loaded, chosen_plan, words = _prepare(model, text, device, dtype, plan, guarantee)
    import torch

    from sparsify.exporters import export as export_model
    from sparsify.measurement import encode

    rows, tokens = EXPORT_EXAMPLE
    ids = encode(words, loaded.tokenizer)[: rows * tokens]
    if len(ids) < rows * tokens:
        raise TextError(f"text has {len(ids)} tokens and the example takes {rows * tokens}. Give a longer text.")
    network: Any = loaded.model
    inputs: dict[str, Any] = {"input_ids": ids.view(rows, tokens).to(network.device)}
    shapes = None
    if past:
        from sparsify.exporters.decoder import with_past

        network, inputs, shapes = with_past(network)
    else:
        network.config.use_cache = False  # keys and values of a call would be outputs of the file
    options = {name: value for name, value in (("opset", opset), ("form", form and form.value)) if value is not None}
    with _progress() as tell, torch.no_grad():
        report = export_model(network, inputs, out, plan=chosen_plan, dynamic_shapes=shapes, target=kind,
                              lengths=numbers, atol=atol, progress=tell, **options)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else str(report))
    console.print(f"wrote {', '.join(report.files)} and {report.report_path.name} in {out.parent}", markup=False)


EXPORT_EXAMPLE = (2, 256)
"""Rows and tokens that a model is exported with: more than one of either, so that both stay free."""


def _refuse_beside(name: str, value: Path, **others: Any) -> None:
    """A file that is exported already holds its model and plan."""
    given = next((other for other, x in others.items() if x is not None), None)
    if given is not None:
        raise OptionError(f"{name} is {str(value)!r} and {given} is {str(others[given])!r}. The file holds its model "
                          f"and plan; leave {given} out.")


def _check_folder(out: Path, folder: Path) -> None:
    """Refuse, before minutes of measuring, an `out` that begins in a folder that cannot be written."""
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise OptionError(f"out is {str(out)!r} and {str(folder)!r} is no folder that can be written. Give a place in "
                          "one.")


def _check_new_folder(out: Path) -> None:
    """The same for a folder that may have to be made."""
    _check_folder(out, next(place for place in (out, *out.parents) if os.path.lexists(place)))


@contextmanager
def _writing_report(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OptionError(f"out is {str(out)!r} and cannot be written ({error.strerror}). Give a folder.") from error
    console.print(f"wrote {out / 'report.json'} and {out / 'report.md'}", markup=False)


def _time_exported(file: Path, lengths: list[int] | None, as_json: bool, out: Path | None) -> None:
    from sparsify.exporters.timing import time_file

    if out is not None:
        _check_new_folder(out)
    with _progress() as tell:
        rows = time_file(file, lengths, progress=tell)
    data = json.dumps([asdict(row) for row in rows], indent=2)
    table = "\n".join(["| key length | batch | bucket | ms |", "|---|---|---|---|", *(
        f"| {'as given' if row.length is None else row.length} | {row.batch} | {row.bucket} | {row.ms:.1f} |"
        for row in rows)])
    typer.echo(data if as_json else table)
    if out is not None:
        with _writing_report(out):
            out.mkdir(parents=True, exist_ok=True)
            (out / "report.json").write_text(f"{data}\n", encoding="utf-8")
            (out / "report.md").write_text(f"# {file.name}\n\n{table}\n", encoding="utf-8")


def _explain_exported(file: Path, as_json: bool) -> None:
    from sparsify.exporters.formats import format_of

    contents = format_of(file).describe(file)
    typer.echo(contents.to_json() if as_json else str(contents))


@plan_app.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="FILE")],
    after: Annotated[Path, typer.Argument(metavar="FILE")],
) -> None:
    """Say how two plan files differ. Exit code 1 if they do."""
    from sparsify.difference import differences

    lines = differences(Plan.load(before), Plan.load(after))
    typer.echo("\n".join(lines) if lines else "no difference")
    raise typer.Exit(1 if lines else 0)


@plan_app.command()
def check(
    file: Annotated[Path, typer.Argument(metavar="FILE")],
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Measure the crossover again on this machine, and write the plan for it.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Check a plan against a model and this machine: another graph is an error, other hardware is named."""
    plan = Plan.load(file)
    if out is not None:
        if out.is_dir():
            raise OptionError(f"out is {str(out)!r}, a folder. Give the path of a plan file.")
        _check_folder(out, out.parent)
    if model is not None:
        _check_graph(plan, model, device, dtype)
        typer.echo("the model has the graph of the plan")
    place = _find_device(device)
    import torch

    from sparsify.calibration.buckets import remeasure
    from sparsify.calibration.request import fingerprint
    from sparsify.difference import differences

    here = fingerprint(torch.device(place), _find_dtype(dtype, place))
    changed = [f"{name}: the plan says {plan.fingerprint[name]}, here it is {value}" for name, value in here.items()
               if plan.fingerprint.get(name, value) != value]
    typer.echo("\n".join(changed) if changed else "this is where the plan was measured" if plan.fingerprint else
               "the plan does not say where it was measured")
    if out is None:
        if changed:
            typer.echo("thresholds hold here too; --out measures again where they save time")
        return
    with _progress() as tell:
        tell("measuring")
        new = remeasure(plan, torch.device(place), _find_dtype(dtype, place))
    lines = differences(plan, new)
    if all(line.startswith("gate") for line in lines):  # gains are measured anew, and hardly ever the same
        lines.append("no budget changed")
    typer.echo("\n".join(lines))
    new.save(out)
    console.print(f"wrote {out}", markup=False)


@plan_app.command()
def show(
    file: Annotated[Path | None, typer.Argument(show_default="the default plan")] = None,
    device: Annotated[Device | None, typer.Option(show_default="cpu", help="Device of the default plan.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a plan file and print it."""
    if file is not None and device is not None:
        raise OptionError(f"file is {str(file)!r} and device is {device.value!r}. A plan file is the same on every "
                          "device; leave device out, or file for the default plan.")
    plan = Plan.default((device or Device.CPU).value) if file is None else Plan.load(file)
    typer.echo(json.dumps(plan.to_dict(), indent=2) if as_json else str(plan))


def _check_graph(plan: Plan, model: str, device: Device | None, dtype: Dtype | None) -> None:
    """Raises PlanError if the plan was made for another graph than this model's."""
    loaded, _, _ = _prepare(model, None, device, dtype, None)
    import torch

    from sparsify.backend import compile

    compile(loaded.model, plan, backend="eager")
    with torch.no_grad():
        loaded.model(torch.zeros(1, 64, dtype=torch.long, device=next(loaded.model.parameters()).device))


def _load_config(model: str | None) -> Any:
    try:
        from sparsify.models.loading import load_config
    except ModuleNotFoundError as error:
        raise ModelError(f"{error.name} is missing. Reading a model needs: "
                         "pip install 'sparsify-attention[models]'; or give --heads.") from error
    return load_config(model)


def _prepare(model: str | None, text: Path | None, device: Device | None, dtype: Dtype | None,
             plan: Path | None, guarantee: float | None = None) -> "tuple[Loaded, Plan, str]":
    """What bench and explain run on. What is cheap to refuse is refused before torch is imported."""
    loaded_plan = None if plan is None else Plan.load(plan)
    if guarantee is not None:
        if loaded_plan is None:
            raise OptionError(f"guarantee is {guarantee} and no plan is given. The default plan promises nothing: give "
                              "--plan, a calibrated one.")
        loaded_plan = loaded_plan.guaranteed(guarantee)
    try:
        from transformers.utils.logging import disable_progress_bar

        from sparsify.models.loading import HELDOUT_TEXT, load_model, read_text
    except ModuleNotFoundError as error:
        raise ModelError(f"{error.name} is missing. Loading models needs: "
                         "pip install 'sparsify-attention[models]'") from error
    words = read_text(text or HELDOUT_TEXT)
    place = _find_device(device)
    disable_progress_bar()
    loaded = load_model(model, device=place, dtype=_find_dtype(dtype, place))
    return loaded, resolve_plan(loaded_plan, place), words


def _find_device(device: Device | None) -> str:
    import torch

    if device is Device.CUDA and not torch.cuda.is_available():
        raise DeviceError("device is 'cuda' and torch finds no CUDA device here. Use --device cpu.")
    return device.value if device else "cuda" if torch.cuda.is_available() else "cpu"


def _find_dtype(dtype: Dtype | None, device: str) -> "torch.dtype":
    import torch

    return getattr(torch, dtype or {"cpu": Dtype.FLOAT32, "cuda": Dtype.BFLOAT16}[device])


def _parse_lengths(lengths: str) -> list[int]:
    try:
        return [int(length) for length in lengths.split(",")]
    except ValueError as error:
        raise OptionError(f"lengths is {lengths!r}. Give whole numbers with commas between: 512,2048,8192.") from error


class _LogLines(logging.Handler):
    """The log of sparsify, above whatever shows progress."""

    def emit(self, record: logging.LogRecord) -> None:
        console.print(record.getMessage(), markup=False)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Progress on stderr: a moving line on a terminal, plain lines elsewhere; and the log of what is compiled."""
    log, handler = logging.getLogger("sparsify"), _LogLines(logging.INFO)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        if console.is_terminal:
            with console.status("starting") as status:
                yield status.update
        else:
            yield lambda line: console.print(line, markup=False)
    finally:
        log.removeHandler(handler)
