"""The three modes of a kernel call; csrc/seed_kernel.h has the same numbers."""

TRAINING = 0
"""The output is the input; parameters learn as at alpha = 1, the host as if nothing were there."""
GRAFTING = 1
"""The output is blended; no gradient reaches the host through the seed."""
FULL = 2
"""The output is blended; the gradient flows through both branches."""

MODE_NAMES = ("TRAINING", "GRAFTING", "FULL")
