"""Flattening and rebuilding a training state: its tree, and the memory of its tensors.

Always holds: nothing here reads or writes a store.
"""
