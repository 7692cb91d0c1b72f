"""Triton kernels and their launchers, one family a file."""
