"""sparsify: adaptive sparse attention for any PyTorch model, as a compiler pass."""
