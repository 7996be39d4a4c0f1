"""Kernel tests: on the GPU where there is one, else in Triton's interpreter (small shapes, fp16 and fp32)."""

import tests.interpreter  # noqa: F401
