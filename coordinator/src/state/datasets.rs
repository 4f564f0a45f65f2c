//! Who reads which files.
//!
//! The files of a dataset are dealt out by a pure function: each epoch of the data has its own
//! order, drawn from the seed, and rank `r` of `n` takes the places `r`, `r + n`, `r + 2n` and so
//! on.
//!
//! Always holds: the ranks of one epoch share all files, none twice, and their counts differ by at
//! most one; the order depends on seed, epoch and the number of files alone, on every machine and
//! in every version.

use dtr_proto::v1;

use super::{Change, Context, Job, Key, Level, NAMES_MAX, Refusal, RefusalKind, Reply};

/// Most files of one dataset.
pub(super) const FILES_MAX: usize = 200_000;

/// The files of one rank, as indices in the order to read them.
pub fn assign(
    spec: &v1::DatasetSpec,
    file_count: usize,
    epoch: u64,
    share: (u32, u32),
) -> Vec<usize> {
    let (rank, world_size) = share;
    let mut order: Vec<usize> = (0..file_count).collect();
    if spec.shuffle {
        let stream = mix(spec.seed ^ mix(epoch ^ 0x6474_725f_6670_6f63));
        order.sort_by_cached_key(|&index| {
            (mix(stream ^ u64::try_from(index).expect("an index fits 64 bits")), index)
        });
    }
    let start = usize::try_from(rank).expect("a rank fits");
    let stride = usize::try_from(world_size.max(1)).expect("a world size fits");
    order.into_iter().skip(start).step_by(stride).collect()
}

/// splitmix64's finaliser: every bit of the input changes about half of the output's.
fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

impl Job {
    pub(super) fn register_dataset(
        &mut self,
        context: &mut Context<'_>,
        request: v1::RegisterDatasetRequest,
    ) -> Result<Reply, Refusal> {
        if request.identity.is_some() {
            self.member_of(request.identity.as_ref())?;
        }
        let spec = request.spec.ok_or_else(|| invalid("a dataset is missing"))?;
        check(&spec, &request.files)?;
        // Nobody is registered yet: it is for the run that begins with the first worker.
        let run = self.record.run + u64::from(self.holders.is_empty());
        let record = v1::DatasetRecord { spec: Some(spec), files: request.files, run };
        let reply = reply_of(&record);
        let name = record.spec.as_ref().map_or("", |spec| &spec.name).to_owned();
        if let Some(known) = self.datasets.get(&name) {
            if same(known, &record) {
                return Ok(reply);
            }
            if known.run == run {
                return Err(differs(known, &record, self.holders.is_empty()));
            }
        } else if self.datasets.len() >= NAMES_MAX {
            return Err(invalid(&format!("job `{}` has {NAMES_MAX} datasets", self.name)));
        }
        let key = Key::Dataset { job: self.name.clone(), name: name.clone() };
        context.effects.changes.push(Change::put(key, &record));
        let count = record.files.len();
        let level = if count == 0 { Level::Warn } else { Level::Info };
        self.note(context, level, format!("dataset `{name}` is registered with {count} files"));
        self.datasets.insert(name, record);
        if self.holders.is_empty() {
            // It may be meant for workers that are still to come.
            self.note_end(context);
            self.keep_job(context);
        }
        Ok(reply)
    }

    pub(super) fn get_shard(&self, request: &v1::GetShardRequest) -> Result<Reply, Refusal> {
        let record = self.datasets.get(&request.name);
        let record = record.ok_or_else(|| unknown(&request.name, &self.name))?;
        let world_size = if request.world_size == 0 {
            self.record.world_size.max(1)
        } else {
            request.world_size
        };
        if request.rank >= world_size {
            return Err(Refusal::new(
                RefusalKind::Invalid,
                format!(
                    "rank {} was requested, but only ranks below {world_size} exist",
                    request.rank
                ),
                "ranks count from 0; pass the number of ranks as `world_size=`",
            ));
        }
        let spec = record.spec.clone().unwrap_or_default();
        let places = assign(&spec, record.files.len(), request.epoch, (request.rank, world_size));
        Ok(Reply::Shard(v1::GetShardReply {
            files: places.into_iter().map(|place| record.files[place].clone()).collect(),
            spec: Some(spec),
            file_count: u64::try_from(record.files.len()).expect("a count fits 64 bits"),
        }))
    }

    pub(super) fn list_datasets(&self) -> Reply {
        let datasets = self.datasets.values().filter_map(|record| record.spec.clone()).collect();
        Reply::Datasets(v1::ListDatasetsReply { datasets })
    }
}

pub(super) fn unknown(name: &str, job: &str) -> Refusal {
    Refusal::new(
        RefusalKind::NotFound,
        format!("dataset `{name}` is not registered in job `{job}`"),
        "register it on one rank, and let the others wait at a barrier until that is done",
    )
}

fn check(spec: &v1::DatasetSpec, files: &[String]) -> Result<(), Refusal> {
    if spec.total_samples == 0 || spec.shard_size == 0 {
        return Err(invalid("`total_samples` and `shard_size` are at least 1"));
    }
    if files.len() > FILES_MAX {
        return Err(invalid(&format!(
            "it has {} files, at most {FILES_MAX} are allowed",
            files.len()
        )));
    }
    let leaves = |file: &String| {
        file.is_empty() || file.starts_with('/') || file.split('/').any(|part| part == "..")
    };
    if let Some(file) = files.iter().find(|file| leaves(file)) {
        return Err(invalid(&format!("`{file}` is not a path below the dataset's own")));
    }
    Ok(())
}

fn reply_of(record: &v1::DatasetRecord) -> Reply {
    let shards =
        record.spec.as_ref().map_or(0, |spec| spec.total_samples.div_ceil(spec.shard_size));
    Reply::RegisterDataset(v1::RegisterDatasetReply {
        file_count: u64::try_from(record.files.len()).expect("a count fits 64 bits"),
        shard_count: shards,
    })
}

fn same(one: &v1::DatasetRecord, other: &v1::DatasetRecord) -> bool {
    one.spec == other.spec && one.files == other.files
}

fn differs(known: &v1::DatasetRecord, asked: &v1::DatasetRecord, is_ahead: bool) -> Refusal {
    let by = if is_ahead { "for the next run it is registered" } else { "this run registered it" };
    let why = if known.spec == asked.spec {
        format!("it had {} files, and now has {}, or others", known.files.len(), asked.files.len())
    } else {
        let spec = known.spec.clone().unwrap_or_default();
        format!(
            "{by} with other settings: path `{}`, format `{}`, {} samples, {} \
             in a shard, seed {}",
            spec.path, spec.format, spec.total_samples, spec.shard_size, spec.seed
        )
    };
    Refusal::new(RefusalKind::Conflict, why, "use another name, or the same settings on all ranks")
}

fn invalid(why: &str) -> Refusal {
    Refusal::new(RefusalKind::Invalid, why, "correct the call to `register`")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(seed: u64, shuffle: bool) -> v1::DatasetSpec {
        v1::DatasetSpec { seed, shuffle, ..v1::DatasetSpec::default() }
    }

    #[test]
    fn ranks_share_all_files_evenly() {
        for (files, world_size) in [(0, 3), (1, 4), (10, 4), (100, 7), (64, 1)] {
            let shares: Vec<Vec<usize>> = (0..world_size)
                .map(|rank| assign(&spec(5, true), files, 2, (rank, world_size)))
                .collect();
            let mut all: Vec<usize> = shares.concat();
            all.sort_unstable();
            assert_eq!(all, (0..files).collect::<Vec<_>>());
            let counts: Vec<usize> = shares.iter().map(Vec::len).collect();
            let (most, least) = (counts.iter().max(), counts.iter().min());
            assert!(most.expect("ranks") - least.expect("ranks") <= 1, "{counts:?}");
        }
    }

    #[test]
    fn the_order_is_the_same_for_ever() {
        assert_eq!(assign(&spec(0, false), 5, 9, (1, 2)), [1, 3]);
        assert_eq!(assign(&spec(0, true), 8, 0, (0, 1)), GOLDEN_FIRST);
        assert_eq!(assign(&spec(0, true), 8, 1, (0, 1)), GOLDEN_SECOND);
    }

    const GOLDEN_FIRST: [usize; 8] = [4, 1, 3, 5, 6, 2, 0, 7];
    const GOLDEN_SECOND: [usize; 8] = [4, 6, 2, 5, 3, 7, 1, 0];

    #[test]
    fn epochs_and_seeds_differ() {
        let order = |seed, epoch| assign(&spec(seed, true), 50, epoch, (0, 1));
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        assert_eq!(order(1, 3), order(1, 3));
    }
}
