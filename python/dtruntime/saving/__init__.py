"""One save at a time: from the call to the end of its handle.

Always holds: until its handle has succeeded, a save is not a checkpoint.
"""
