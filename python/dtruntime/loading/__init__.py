"""Reading a checkpoint into fresh memory: which one, and which parts of it.

Always holds: no tensor is returned before every byte of it was checked, unless the caller opted
out.
"""
