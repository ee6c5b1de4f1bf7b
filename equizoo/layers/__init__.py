"""Blocks that architectures share; they know the interface of a tensor product, never a name."""
