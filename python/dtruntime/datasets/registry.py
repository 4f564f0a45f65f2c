"""Which rank reads which files of a dataset.

>>> registry = DatasetRegistry("http://coordinator:50051")
>>> registry.register("train", "/data/train", "parquet", total_samples=1_000_000, shard_size=10_000)
>>> files = registry.get_shard("train", worker_rank=0, epoch=0)

``ShardedDataset`` reads them.

The worker that registers a dataset lists its files; the coordinator keeps the list and divides it,
so that all ranks agree on it even if one of them sees another state of a shared directory.

Always holds: in an epoch, each file is assigned to exactly one rank, and the ranks' counts differ
by at most one; the order depends only on seed and epoch.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import NamedTuple

from dtruntime import settings
from dtruntime.errors import CoordinatorUnavailable, DatasetNotFound, InvalidArgument
from dtruntime.ranks import connecting, embedded, launch, membership
from dtruntime.ranks.connecting import PATIENCE_SECONDS, Security

_SUFFIXES = {
    "arrow": (".arrow", ".feather"),
    "csv": (".csv", ".csv.gz", ".tsv"),
    "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".jsonl.zst"),
    "jsonl": (".jsonl", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet", ".pq"),
    "text": (".txt", ".txt.gz"),
    "tfrecord": (".tfrecord", ".tfrecords"),
    "webdataset": (".tar", ".tar.gz", ".tar.zst"),
}
"""File suffixes of each format; for any other format, every file is included."""

_DEFAULT_SHARD_SIZE = 10_000


class DatasetInfo(NamedTuple):
    """A registered dataset.

    Attributes:
        name: Its name within the job.
        path: The directory of its files.
        format: Their format.
        total_samples: Total samples.
        shard_size: Samples per shard.
        file_count: Total files.
        shard_count: The number of shards that the samples make up.

    """

    name: str
    path: str
    format: str
    total_samples: int
    shard_size: int
    file_count: int
    shard_count: int


class Share(NamedTuple):
    """Files of an epoch, in reading order, and their dataset.

    Attributes:
        folder: The dataset's directory.
        files: Their paths relative to it.
        file_count: The number of files in the whole dataset.
        format: Their format.
        total_samples: Samples of the whole dataset, as registered.
        seed: The seed of the order, combined with the epoch.
        shuffle: Whether each epoch has a different order.

    """

    folder: str
    files: list[str]
    file_count: int
    format: str
    total_samples: int
    seed: int
    shuffle: bool


class DatasetRegistry:
    """The datasets of a job, as the coordinator keeps them.

    Args:
        coordinator_url: Default: the environment's ``COORDINATOR_URL``; under ``torchrun``, or with
            a process group, the coordinator that rank 0 hosts; else ``http://localhost:50051``.
        job: Default: the environment's ``DTRUNTIME_JOB``, else ``default``.
        security: Token and certificates.
        patience: How long to retry while the coordinator does not answer, in seconds.

    """

    def __init__(
        self,
        coordinator_url: str | None = None,
        *,
        job: str | None = None,
        security: Security | None = None,
        patience: float = PATIENCE_SECONDS,
    ) -> None:
        self.job = connecting.job_of(job)
        if coordinator_url is None and not os.environ.get("COORDINATOR_URL"):
            found = _hosted_by_rank_0(patience)
            if found is not None:
                coordinator_url, hosted = found
                security = security or hosted
        url = connecting.url_of(coordinator_url)
        self._coordinator = connecting.connect(url, security or Security(), patience)

    def register(
        self,
        name: str,
        path: str | os.PathLike[str],
        format: str,  # noqa: A002  (documented usage)
        total_samples: int,
        shard_size: int | None = None,
        *,
        seed: int = 0,
        shuffle: bool = True,
    ) -> DatasetInfo:
        """Make a dataset known to all ranks. One rank calls it; the others wait at a barrier.

        Repeating the same registration is allowed; a different one under the same name is an error
        within a run.

        Args:
            name: Its name within the job.
            path: A directory that every worker sees at the same path. Files are searched
                recursively, without following links to directories; names that begin with ``.`` or
                ``_`` are ignored.
            format: ``parquet``, ``webdataset``, ``jsonl``, ``csv``, ``arrow``, ``tfrecord``,
                ``text``: files with the suffixes of that format. Anything else: every file.
            total_samples: Total samples.
            shard_size: Samples per shard, which determines the returned number of shards; files are
                always assigned whole. Default: the coordinator's setting, else 10,000.
            seed: The seed of the order of files, combined with the epoch.
            shuffle: False keeps the files sorted by name in every epoch.

        Raises:
            DatasetNotFound: There is not a directory at ``path`` on this worker.

        """
        folder = _directory(name, path)
        files = _list_files(folder, format)
        if not files:
            warnings.warn(
                f"dataset `{name}`: `{folder}` has no {format} files; every rank gets none",
                stacklevel=2,
            )
        worker = membership.worker_at(self._coordinator.url, self.job)
        if shard_size is None:
            job_settings = {} if worker is None else worker.settings
            shard_size = int(job_settings.get("dataset.default_shard_size", _DEFAULT_SHARD_SIZE))
        samples = settings.integer("total_samples", total_samples)
        shard_size = settings.integer("shard_size", shard_size)
        options = (
            str(folder),
            format,
            samples,
            shard_size,
            settings.integer("seed", seed),
            shuffle,
        )
        file_count, shard_count = self._coordinator.register_dataset(
            (self.job, name), options, files, worker
        )
        return DatasetInfo(name, str(folder), format, samples, shard_size, file_count, shard_count)

    def get_shard(
        self,
        name: str,
        worker_rank: int | None = None,
        epoch: int = 0,
        *,
        world_size: int | None = None,
    ) -> list[str]:
        """Return the files that a rank reads in an epoch, in reading order.

        Args:
            name: The dataset.
            worker_rank: Default: as for a ``CheckpointManager``.
            epoch: The epoch of the data, counted from 0; each has its own order.
            world_size: The number of ranks. Default: as for a ``CheckpointManager``; in a process
                that nothing launched, the job's.

        """
        rank, ranks, _ = self.place(worker_rank, world_size)
        # The job's number is that of its last run until a worker of this one is registered.
        is_known = world_size is not None or launch.is_launched()
        is_known |= membership.membership_at(self._coordinator.url, self.job) is not None
        place = (rank, ranks if is_known else 0)
        share = self.share(name, place, settings.integer("epoch", epoch))
        return [os.path.join(share.folder, file) for file in share.files]  # noqa: PTH118  (str)

    def share(self, name: str, place: tuple[int, int], epoch: int) -> Share:
        """Return a rank's files, and their dataset.

        Args:
            name: The dataset.
            place: The rank and the number of ranks; 0 means the job's number.
            epoch: The epoch of the data, counted from 0.

        """
        folder, files, file_count, parts = self._coordinator.get_shard(self.job, name, place, epoch)
        format_name, total_samples, _, seed, shuffle = parts
        return Share(folder, files, file_count, format_name, total_samples, seed, shuffle)

    def place(
        self, rank: int | str | None, world_size: int | str | None
    ) -> tuple[int, int, dict[str, str]]:
        """Return this process's rank, the number of ranks, and the coordinator's settings.

        Arguments take precedence; then what this process registered as; then the process group and
        the environment, as for a ``CheckpointManager``.
        """
        found = membership.membership_at(self._coordinator.url, self.job)
        if found is not None:
            rank = found.identity.rank if rank is None else rank
            world_size = found.identity.world_size if world_size is None else world_size
        job_settings = {} if found is None else found.worker.settings
        return (*launch.rank_and_world_size(rank, world_size), job_settings)


def _hosted_by_rank_0(patience: float) -> tuple[str, Security] | None:
    rank, _ = launch.rank_and_world_size(None, None)
    try:
        return embedded.find(rank, patience)
    except embedded.NotOpened as error:
        raise CoordinatorUnavailable(
            "looking for the coordinator that rank 0 hosts",
            f"rank 0 has opened neither a manager nor a registry in {patience:g} s",
            "open one on every rank, or start a coordinator and pass `coordinator_url=`",
        ) from error


def _directory(name: str, path: str | os.PathLike[str]) -> Path:
    text = os.fspath(path)
    if "://" in text:
        raise InvalidArgument(
            f"registering dataset `{name}`: `path` = {text!r}",
            "only local directories are supported",
            "mount the data, and pass the directory",
        )
    folder = Path(text).absolute()
    if not folder.is_dir():
        why = "it is not a directory" if folder.exists() else "it does not exist on this worker"
        raise DatasetNotFound(
            f"registering dataset `{name}`: `{folder}`",
            why,
            "mount the shared storage at the same path on every worker, or correct `path`",
        )
    return folder


def _list_files(folder: Path, format_name: str) -> list[str]:
    """Return the files' paths below ``folder``, sorted by their bytes."""
    suffixes = _SUFFIXES.get(format_name.lower(), ("",))
    found: list[str] = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        below = os.path.relpath(parent, folder)
        found += [
            name if below == "." else f"{below}/{name}"
            for name in files
            if name.endswith(suffixes) and not name.startswith((".", "_"))
        ]
    return sorted(found, key=os.fsencode)
