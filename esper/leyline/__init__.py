"""Leyline: the contracts between the rooms. Frozen models, state tables, the IR's meaning.

Nothing here imports another room of esper. `esper.leyline.reference` is the only module
that needs torch, and nothing else here imports it.
"""
