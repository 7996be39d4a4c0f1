"""What a caller can do wrong. Every message names the argument, its value and the way out.

Attention that the pass cannot rewrite is not an error: it stays as it was and `sparsify.explain` says why.
"""


class SparsifyError(ValueError):
    """Base of every error that sparsify raises for a caller's mistake."""


class PlanError(SparsifyError):
    """A plan that cannot be read, or that contradicts itself."""


class ShapeError(SparsifyError):
    """Tensors handed to an op that do not fit together."""


class DeviceError(SparsifyError):
    """A device for which there is no kernel."""


class ModelError(SparsifyError):
    """A model that cannot be compiled or loaded."""


class TextError(SparsifyError):
    """Text that cannot be read, or is too short for the lengths asked for."""


class OptionError(SparsifyError):
    """An option, or a combination of options, that does not exist."""


class MaskError(SparsifyError):
    """A mask that contradicts its proof at run time; only `verify_masks` looks."""


class SampleError(SparsifyError):
    """Samples that no plan can be calibrated on: too few, too short, or not what the model takes."""


class ExportError(SparsifyError):
    """A model that torch cannot export as asked, or a file that is not what it should be."""
