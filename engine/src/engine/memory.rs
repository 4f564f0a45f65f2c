//! How much of the machine the engine takes when nobody says: pure figures, one probe.

use std::fs;

use crate::config::{Config, STAGING_CHUNKS_MIN};

/// Most worker threads when the setting is left to us.
const WORKERS_MAX: usize = 16;
/// Without a setting, the arenas of all ranks on a machine take at most this part of its memory.
const MEMORY_DIVISOR: u64 = 4;

/// Threads that checksum and encode.
pub(super) fn worker_count(config: &Config) -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let online = fs::read_to_string("/sys/devices/system/cpu/online").ok();
    let online = online.as_deref().and_then(counted).unwrap_or(allowed);
    let own = own_workers(allowed, online, config.local_world_size);
    config.workers.map_or(own, |workers| workers as usize)
}

/// This rank's part of the cores that are `online`, of which it may use those that are `allowed`:
/// where ranks are bound to cores, these are its own already.
fn own_workers(allowed: usize, online: usize, local_world_size: u32) -> usize {
    allowed.min(online / local_world_size as usize).clamp(1, WORKERS_MAX)
}

/// How many there are in a list such as `0-3,8`.
fn counted(ranges: &str) -> Option<usize> {
    let count = |range: &str| {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        let (from, to) = (from.parse::<usize>().ok()?, to.parse::<usize>().ok()?);
        to.checked_sub(from)?.checked_add(1)
    };
    ranges.trim().split(',').map(count).sum()
}

/// Chunks that the staging arena holds for a state of `raw_bytes` on a machine with
/// `memory_bytes`.
pub(super) fn arena_chunks(config: &Config, raw_bytes: u64, memory_bytes: u64) -> u64 {
    let chunk_bytes = u64::from(config.chunk_bytes);
    let state_chunks = raw_bytes.div_ceil(chunk_bytes);
    let own_bytes = memory_bytes / MEMORY_DIVISOR / u64::from(config.local_world_size);
    let chunks_max = config.staging_bytes.unwrap_or(own_bytes) / chunk_bytes;
    state_chunks.min(chunks_max).max(STAGING_CHUNKS_MIN)
}

/// Memory that this process may use: the machine's, or its control group's if that is less.
pub(super) fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    let machine = info.totalram.saturating_mul(u64::from(info.mem_unit));
    // Version 2 and version 1 of the interface, as a container sees it.
    let limits = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];
    limits
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok())
        .fold(machine, u64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn the_arena_has_the_size_of_the_state_up_to_a_quarter_of_memory() {
        let config = Config::new("x");
        assert_eq!(arena_chunks(&config, GIB, 16 * GIB), 256);
        assert_eq!(arena_chunks(&config, 100 * GIB, 16 * GIB), 1024);
        assert_eq!(arena_chunks(&config, 1, 16 * GIB), STAGING_CHUNKS_MIN);
    }

    #[test]
    fn ranks_of_one_machine_share_its_memory_and_its_cores() {
        let config = Config { local_world_size: 8, ..Config::new("x") };
        assert_eq!(arena_chunks(&config, 100 * GIB, 64 * GIB), 512);
        assert_eq!([1, 4, 8, 64].map(|cores| own_workers(cores, cores, 4)), [1, 1, 2, 16]);
        assert_eq!(own_workers(64, 64, 1), WORKERS_MAX);
        // Each bound to its own twelve of 96.
        assert_eq!(own_workers(12, 96, 8), 12);
    }

    #[test]
    fn lists_of_cores_are_counted() {
        let lists = ["0\n", "0-95\n", "0-3,8,10-11", "", "3-1", "x"];
        assert_eq!(lists.map(counted), [Some(1), Some(96), Some(7), None, None, None]);
    }

    #[test]
    fn the_setting_bounds_the_arena() {
        let config = Config { staging_bytes: Some(64 << 20), ..Config::new("x") };
        assert_eq!(arena_chunks(&config, GIB, 16 * GIB), 16);
        assert_eq!(arena_chunks(&config, 5 << 20, 16 * GIB), STAGING_CHUNKS_MIN);
    }

    #[test]
    fn this_machine_has_memory() {
        assert!(memory_bytes() > 64 << 20);
    }
}
