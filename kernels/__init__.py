"""Kernels: tensors in, tensors out. Reached through `sparsify.ops` only; imported as `sparsify.kernels` only."""

if __name__ != "sparsify.kernels":
    # With the repository's root on sys.path this folder answers to the name of Hugging Face's `kernels` package, which
    # transformers looks for. Under that name it is empty: no module of it can be imported twice, and transformers,
    # which skips packages without version and file, sees none.
    __path__ = []
    del __file__
