"""Fences around foreign work: what a child shuts itself into, and what its owner watches."""
