"""Models to measure on: the small trained one that is shipped, and what Hugging Face folder or GGUF file is on disk.

Needs the extra `models`. Nothing else of sparsify imports this package before it is asked for a model.
"""
