"""The C kernels, their definition in numpy, and their version in torch operations."""
