"""Datasets of a job: which rank reads which files, and its position in them.

Always holds: only ``sharded_dataset`` and ``sharded_loader`` need torch.
"""

from dtruntime.datasets.registry import DatasetInfo, DatasetRegistry

__all__ = ["DatasetInfo", "DatasetRegistry"]
