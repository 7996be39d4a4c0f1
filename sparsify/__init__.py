"""sparsify: adaptive sparse attention for any PyTorch model, as a compiler pass.

    model = sparsify.compile(model)            # in place: attention follows the default plan
    print(sparsify.explain(model, input_ids))  # what became of each attention site
    plan = sparsify.calibrate(model, samples)  # a plan fitted to a model and its texts
    report = sparsify.benchmark(model, text)   # before and after, per length
    sparsify.export(model, inputs, "model.pt2")   # a file that holds the plan
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsify.errors import (
    DeviceError,
    ExportError,
    MaskError,
    ModelError,
    OptionError,
    PlanError,
    SampleError,
    ShapeError,
    SparsifyError,
    TextError,
)
from sparsify.plan import Bucket, Budget, Plan

if TYPE_CHECKING:
    from sparsify.backend import compile
    from sparsify.calibration import Sample, calibrate
    from sparsify.explanation import explain
    from sparsify.exporters import ExportReport, export
    from sparsify.measurement import benchmark

__version__ = "0.1.0"

__all__ = [
    "Bucket",
    "Budget",
    "DeviceError",
    "ExportError",
    "ExportReport",
    "MaskError",
    "ModelError",
    "OptionError",
    "Plan",
    "PlanError",
    "Sample",
    "SampleError",
    "ShapeError",
    "SparsifyError",
    "TextError",
    "benchmark",
    "calibrate",
    "compile",
    "explain",
    "export",
]

# Imported at first use: Dynamo takes seconds, and brings Triton where that is installed.
_LAZY = {"ExportReport": "sparsify.exporters", "Sample": "sparsify.calibration", "benchmark": "sparsify.measurement",
         "calibrate": "sparsify.calibration", "compile": "sparsify.backend", "explain": "sparsify.explanation",
         "export": "sparsify.exporters"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sparsify' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
