//! Counters that a caller can read while a save or a load runs, and the figures that remain after.
