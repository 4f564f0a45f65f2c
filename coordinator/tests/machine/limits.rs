//! What is forgotten at a limit, and what never is.

use coordinator::state::{Event, Key, Policy, RefusalKind, Reply, State};
use dtr_proto::v1::{self, wait_barrier_reply::Outcome};

use crate::table::{Table, outcome, refused};

/// The same coordinator, started again from what it kept.
fn restarted(table: &mut Table) {
    let mut disk = std::collections::BTreeMap::new();
    for change in &table.changes {
        match &change.value {
            Some(value) => drop(disk.insert(change.key.encode(), value.clone())),
            None => drop(disk.remove(&change.key.encode())),
        }
    }
    let kept = disk.iter().map(|(key, value)| (key.as_slice(), value.as_slice()));
    let policy = table.state.policy().clone();
    table.state = State::recover(policy, 2, table.now_ms, kept).unwrap();
}

#[test]
fn at_the_limit_the_job_that_is_longest_without_workers_is_forgotten() {
    let mut table = Table::with(Policy { jobs_max: 3, ..Policy::default() });
    for job in ["c", "a", "b"] {
        table.register_in(job);
    }
    let (kind, why) = refused(table.register_in("d"));
    assert_eq!((kind, why.contains("3 jobs have living workers")), (RefusalKind::Conflict, true));
    for job in ["b", "c"] {
        table.leave_job(job);
    }
    restarted(&mut table);
    assert!(matches!(table.register_in("d"), Reply::Register(_)));
    assert_eq!(table.jobs(), ["a", "c", "d"], "`b` ended before `c`, and `a` lives");
    assert!(matches!(table.register_in("e"), Reply::Register(_)));
    restarted(&mut table);
    assert_eq!(table.jobs(), ["a", "d", "e"], "nothing is left of what was forgotten");
    refused(table.register_in("c"));
}

#[test]
fn a_registration_that_is_refused_costs_no_other_job_its_place() {
    let mut table = Table::with(Policy { jobs_max: 1, ..Policy::default() });
    table.register_in("a");
    table.leave_job("a");
    let request = v1::RegisterRequest { job: "b".into(), rank: 7, ..Default::default() };
    refused(table.ask(Event::Register(request)).unwrap());
    assert_eq!(table.jobs(), ["a"]);
}

#[test]
fn an_ended_job_leaves_the_metrics_after_an_hour() {
    let mut table = Table::new();
    for job in ["a", "b"] {
        table.register_in(job);
    }
    table.leave_job("b");
    let alive = v1::Identity { job: "a".into(), worker_id: "w".into(), incarnation: 5, epoch: 1 };
    table.pass(3_599_000, &[&alive]);
    assert_eq!(table.jobs_told(), 2);
    table.pass(2_000, &[&alive]);
    assert_eq!((table.jobs_told(), table.jobs().len()), (1, 2));
}

#[test]
fn at_the_limit_the_barrier_that_was_released_the_longest_ago_is_forgotten() {
    let mut table = Table::with(Policy { barriers_max: 3, ..Policy::default() });
    let world = table.world(1);
    let worker = &world[0];
    let mut arrival = 0;
    let mut pass = |table: &mut Table, name: &str| {
        arrival += 1;
        table.arrive_at(worker, name, arrival);
        table.take_late();
        arrival
    };
    let first = pass(&mut table, "a");
    let again = pass(&mut table, "b");
    pass(&mut table, "c");
    pass(&mut table, "a");
    restarted(&mut table);
    // `b` goes, then `c`, then `a`.
    pass(&mut table, "d");
    let released = |generation| Outcome::Released(v1::BarrierReleased { generation });
    assert_eq!(outcome(table.arrive_at(worker, "a", 4)), released(1), "its record is kept");
    // A copy of what arrived at the one that was forgotten makes no new one.
    let late = outcome(table.arrive_at(worker, "b", again));
    assert!(matches!(late, Outcome::TimedOut(_)), "{late:?}");
    assert!(first < again);
    for name in ["e", "f"] {
        pass(&mut table, name);
    }
    let kept = |table: &Table| {
        let mut names: Vec<String> = Vec::new();
        for change in &table.changes {
            if let Key::Barrier { name, .. } = &change.key {
                names.retain(|known| known != name);
                names.extend(change.value.is_some().then(|| name.clone()));
            }
        }
        names.sort();
        names
    };
    assert_eq!(kept(&table), ["d", "e", "f"]);
}

#[test]
fn a_barrier_that_somebody_waits_at_is_never_forgotten() {
    let mut table = Table::with(Policy { barriers_max: 1, ..Policy::default() });
    let world = table.world(2);
    assert!(table.arrive_at(&world[0], "a", 1).is_none());
    let (kind, why) = refused(table.arrive_at(&world[0], "b", 2).unwrap());
    assert_eq!((kind, why.contains("somebody waits")), (RefusalKind::Conflict, true));
    let released = outcome(table.arrive_at(&world[1], "a", 1));
    assert_eq!(released, Outcome::Released(v1::BarrierReleased { generation: 0 }));
    assert_eq!(table.take_late().len(), 1, "who waited is released, too");
}
