"""Does the budget have to follow the signal? Experiments on trained models; `python -m benchmarks.thesis --help`."""
