"""Simic: trains policies offline from field reports, and promotes what beats the one before."""
