"""Triton kernels: they take tensors, launch, and return; no autograd."""
