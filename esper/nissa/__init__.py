"""Nissa: what happened in a run, kept and shown. Audit trail, metrics, report."""
