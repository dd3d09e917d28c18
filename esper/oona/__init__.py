"""Oona: events from room to room, and what happens when there are too many of them."""
