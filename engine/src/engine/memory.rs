//! How much of the machine the engine takes when nobody says: pure figures, and a probe
//! of its memory.

use std::fs;

use crate::config::{Config, STAGING_CHUNKS_MIN};
use crate::threads::{cores_of_rank, thread_count};

/// Most worker threads when the setting is left to us.
const WORKERS_MAX: usize = 16;
/// Without a setting, the arenas of all ranks on a machine take at most this part of its memory.
const MEMORY_DIVISOR: u64 = 4;

/// Threads that checksum, encode and decode.
pub(super) fn worker_count(config: &Config) -> usize {
    thread_count(config.workers, cores_of_rank(config.local_world_size), WORKERS_MAX, usize::MAX)
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
    fn ranks_of_one_machine_share_its_memory() {
        let config = Config { local_world_size: 8, ..Config::new("x") };
        assert_eq!(arena_chunks(&config, 100 * GIB, 64 * GIB), 512);
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
