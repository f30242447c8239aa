"""Kernels: a target-neutral description, printed as Triton and as C++."""
