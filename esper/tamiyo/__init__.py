"""Tamiyo: when, where, which kernel. She sees measurements and the catalog, and commands."""
