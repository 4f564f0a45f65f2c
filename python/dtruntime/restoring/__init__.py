"""Restoring a checkpoint into a live state: planned as a whole first, then executed.

Always holds: what does not fit is known before the first live object is changed.
"""
