"""Benchmarks: each writes under results/, and records the figures it was asked for in figures.json."""
