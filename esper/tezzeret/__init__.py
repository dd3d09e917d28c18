"""Tezzeret: checks blueprints without running them, and forges kernels that train."""
