"""Which checkpoint is read, and what of it: fresh memory, filled.

Always holds: no tensor is returned before every byte of it was checked, unless the caller said so.
"""
