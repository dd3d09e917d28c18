"""Tolaria: the trainer. Steps, epochs, optimizer surgery, rollback."""
