"""Urabrask: proves kernels right and measures how fast they are.

A kernel arrives as PENDING_BENCHMARKING and leaves as VALIDATED or REJECTED, with a report.
It runs only in child processes: what it breaks there, it breaks alone.
"""
