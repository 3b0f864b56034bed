"""Benchmarks, ahead-of-time checks of the kernels, and the one call that proves everything on a GPU."""
