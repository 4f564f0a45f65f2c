"""One save at a time: from the call to the handle that stands for it.

Always holds: what a handle has not resolved is not a checkpoint.
"""
