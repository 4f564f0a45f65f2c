"""How the ranks of a job meet: through what, as which worker, and what they are told.

Always holds: a process is one worker for a job and rank, whoever asks.
"""
