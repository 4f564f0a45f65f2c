//! On how many threads a stage runs: pure figures, one probe.
//!
//! Always holds: a number that was set is kept; without one, the ranks of a machine together take
//! no more threads than it has cores. A stage runs on one thread at least, and on no more than it
//! has tasks.

use std::fs;
use std::num::NonZero;
use std::thread::available_parallelism;

/// Threads of a stage with so many `tasks`: as many as are `set`, else one for each of `cores`, at
/// most `most`.
pub(crate) fn thread_count(set: Option<u32>, cores: usize, most: usize, tasks: usize) -> usize {
    set.map_or(cores.min(most), |threads| threads as usize).min(tasks).max(1)
}

/// Cores that this process may use.
pub(crate) fn cores() -> usize {
    available_parallelism().map_or(1, NonZero::get)
}

/// Cores of one of `local_world_size` ranks that share the machine.
pub(crate) fn cores_of_rank(local_world_size: u32) -> usize {
    let allowed = cores();
    let online = fs::read_to_string("/sys/devices/system/cpu/online").ok();
    let online = online.as_deref().and_then(counted).unwrap_or(allowed);
    part_of(allowed, online, local_world_size)
}

/// This rank's part of the cores that are `online`, of which it may use those that are `allowed`:
/// where ranks are bound to cores, these are its own already.
fn part_of(allowed: usize, online: usize, local_world_size: u32) -> usize {
    allowed.min(online / local_world_size as usize).max(1)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_wins_over_the_cores_and_tasks_over_both() {
        assert_eq!(thread_count(None, 8, 16, 100), 8);
        assert_eq!(thread_count(None, 64, 16, 100), 16);
        assert_eq!(thread_count(Some(2), 64, 16, 100), 2);
        assert_eq!(thread_count(Some(32), 8, 16, 100), 32);
        assert_eq!(thread_count(Some(32), 8, 16, 3), 3);
        assert_eq!(thread_count(None, 8, 16, 0), 1);
    }

    #[test]
    fn ranks_of_one_machine_share_its_cores() {
        assert_eq!([1, 4, 8, 64].map(|cores| part_of(cores, cores, 4)), [1, 1, 2, 16]);
        assert_eq!(part_of(64, 64, 1), 64);
        // Each bound to its own twelve of 96.
        assert_eq!(part_of(12, 96, 8), 12);
    }

    #[test]
    fn lists_of_cores_are_counted() {
        let lists = ["0\n", "0-95\n", "0-3,8,10-11", "", "3-1", "x"];
        assert_eq!(lists.map(counted), [Some(1), Some(96), Some(7), None, None, None]);
    }
}
