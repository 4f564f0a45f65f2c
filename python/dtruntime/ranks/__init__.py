"""How the ranks of a job find each other, register as workers, and get the job's settings.

Always holds: a process has one worker per job and rank, shared by all of its users.
"""
