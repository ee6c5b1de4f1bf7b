"""Interchangeable equivariant products, one per file; none owns a parameter."""
