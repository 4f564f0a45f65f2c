"""Datasets of a job: who reads which files, and where each rank is in them.

Always holds: only ``sharded_dataset`` and ``sharded_loader`` need torch.
"""

from dtruntime.datasets.registry import DatasetInfo, DatasetRegistry

__all__ = ["DatasetInfo", "DatasetRegistry"]
