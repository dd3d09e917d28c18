"""Urza: the library of blueprints, kernels, what is known of them, and who works on what."""
