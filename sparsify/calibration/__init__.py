"""Calibration: what a plan may promise, from documents."""
