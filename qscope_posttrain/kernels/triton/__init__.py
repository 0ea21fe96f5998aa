"""Triton kernels, one file per operator; imported when a CUDA tensor arrives, never before."""
