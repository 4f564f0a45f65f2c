"""A training state, taken apart and put together: its tree, and the memory of its tensors.

Always holds: nothing here reads or writes a store.
"""
