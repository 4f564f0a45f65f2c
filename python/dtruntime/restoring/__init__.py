"""What was saved, into a live state: decided as a whole first, then carried out.

Always holds: what does not fit is known before the first live object is changed.
"""
