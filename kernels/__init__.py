"""Kernels: tensors in, tensors out. Reached through `sparsify.ops` only."""

if __name__ != "sparsify.kernels":
    raise ImportError(
        f"this room was imported as {__name__!r}; import it as 'sparsify.kernels' so that its modules exist once."
    )
