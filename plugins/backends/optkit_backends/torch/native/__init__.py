"""Kernels of our own for decoders on a CPU; docs/native-kernels.md explains each."""
