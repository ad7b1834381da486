"""Tensor functions that two methods or more share, and the layer masses of optimal transport."""
