//! Buffers and the inbox in every order of their threads' steps: see [`crate::sync`].
//!
//! Always holds here: a thread that waits forever ends the test, as does a callback that runs
//! twice or never.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use loom::thread;

use super::buffer::BufferPool;
use super::inbox::{Inbox, Next, complete};
use super::{ALIGNMENT, Direction, File, Transfer};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, unpoisoned, wait_while};

/// Takes a buffer, of which `holders` counts those that are out, and returns it.
fn borrow(pool: &Arc<BufferPool>, holders: &AtomicUsize, holders_max: usize) {
    let buffer = pool.take();
    assert!(holders.fetch_add(1, Ordering::Relaxed) < holders_max, "a buffer is held twice");
    holders.fetch_sub(1, Ordering::Relaxed);
    drop(buffer);
}

#[test]
fn every_taker_gets_the_buffer_and_one_at_a_time() {
    loom::model(|| {
        let pool = BufferPool::new(ALIGNMENT, 1).unwrap();
        let holders = Arc::new(AtomicUsize::new(0));
        let takers = [(); 2].map(|()| {
            let (pool, holders) = (Arc::clone(&pool), Arc::clone(&holders));
            thread::spawn(move || borrow(&pool, &holders, 1))
        });
        borrow(&pool, &holders, 1);
        takers.into_iter().for_each(|taker| taker.join().unwrap());
        assert_eq!(pool.free(), 1);
    });
}

#[test]
fn a_lost_buffer_leaves_the_other_one_for_everybody() {
    loom::model(|| {
        let pool = BufferPool::new(ALIGNMENT, 2).unwrap();
        let holders = Arc::new(AtomicUsize::new(0));
        let lost = pool.take();
        let taker = thread::spawn({
            let (pool, holders) = (Arc::clone(&pool), Arc::clone(&holders));
            move || borrow(&pool, &holders, 1)
        });
        let loser = thread::spawn(move || drop(lost.abandon()));
        borrow(&pool, &holders, 1);
        taker.join().unwrap();
        loser.join().unwrap();
        assert_eq!(pool.free(), 1);
    });
}

#[test]
fn whoever_waits_for_a_buffer_learns_that_the_last_one_is_lost() {
    loom::model(|| {
        let pool = BufferPool::new(ALIGNMENT, 1).unwrap();
        let buffer = pool.take();
        let taker =
            thread::spawn(move || catch_unwind(AssertUnwindSafe(|| drop(pool.take()))).is_err());
        drop(buffer.abandon());
        assert!(taker.join().unwrap(), "there is nothing to take");
    });
}

/// Transfers that count how they ended.
struct Counted {
    pool: Arc<BufferPool>,
    file: Arc<File>,
    done: Arc<[AtomicUsize; 2]>,
    failed: Arc<AtomicUsize>,
}

impl Counted {
    fn new() -> Self {
        let descriptor = std::fs::File::open("/dev/null").unwrap().into();
        Self {
            pool: BufferPool::new(ALIGNMENT, 2).unwrap(),
            file: Arc::new(File { descriptor, path: PathBuf::new(), direct: false }),
            done: Arc::default(),
            failed: Arc::default(),
        }
    }

    fn transfer(&self, number: usize) -> Transfer {
        let (done, failed) = (Arc::clone(&self.done), Arc::clone(&self.failed));
        Transfer {
            file: Arc::clone(&self.file),
            offset: 0,
            buffer: self.pool.take(),
            range: 0..1,
            direction: Direction::Write,
            done: Box::new(move |outcome, _buffer| {
                done[number].fetch_add(1, Ordering::Relaxed);
                failed.fetch_add(usize::from(outcome.is_err()), Ordering::Relaxed);
            }),
        }
    }

    fn assert_each_ended_once(&self) {
        for done in &*self.done {
            assert_eq!(done.load(Ordering::Relaxed), 1);
        }
        assert_eq!(self.pool.free(), 2, "every buffer came back");
    }
}

#[test]
fn every_transfer_ends_once_when_the_backend_fails() {
    loom::model(|| {
        let counted = Counted::new();
        let inbox = Arc::new(Inbox::new());
        let worker = thread::spawn({
            let inbox = Arc::clone(&inbox);
            move || {
                complete(inbox.next().expect("nobody closes"), Ok(1));
                inbox.fail("the ring broke");
            }
        });
        inbox.push(counted.transfer(0));
        inbox.push(counted.transfer(1));
        worker.join().unwrap();
        counted.assert_each_ended_once();
        assert_eq!(counted.failed.load(Ordering::Relaxed), 1);
    });
}

#[test]
fn workers_do_all_that_waits_before_they_end() {
    loom::model(|| {
        let counted = Counted::new();
        let inbox = Arc::new(Inbox::new());
        let workers = [(); 2].map(|()| {
            let inbox = Arc::clone(&inbox);
            thread::spawn(move || {
                while let Some(transfer) = inbox.next() {
                    complete(transfer, Ok(1));
                }
            })
        });
        inbox.push(counted.transfer(0));
        inbox.push(counted.transfer(1));
        inbox.close();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        counted.assert_each_ended_once();
    });
}

/// An event descriptor: set by the thread that finds the queue empty, waited for by the ring's
/// thread.
struct Event {
    set: Mutex<bool>,
    changed: Condvar,
}

impl Event {
    fn set(&self) {
        *unpoisoned(self.set.lock()) = true;
        self.changed.notify_one();
    }

    fn wait(&self) {
        let mut set = wait_while(&self.changed, unpoisoned(self.set.lock()), None, |set| !*set);
        *set = false;
    }
}

#[test]
fn a_ring_that_sleeps_is_woken_for_what_arrives() {
    loom::model(|| {
        let counted = Counted::new();
        let inbox = Arc::new(Inbox::new());
        let event = Arc::new(Event { set: Mutex::new(false), changed: Condvar::new() });
        let ring = thread::spawn({
            let (inbox, event) = (Arc::clone(&inbox), Arc::clone(&event));
            move || {
                loop {
                    match inbox.try_next() {
                        Next::Transfer(transfer) => complete(transfer, Ok(1)),
                        Next::Empty => event.wait(),
                        Next::Closed => return,
                    }
                }
            }
        });
        let push = |number| {
            let (inbox, event) = (Arc::clone(&inbox), Arc::clone(&event));
            let transfer = counted.transfer(number);
            move || {
                if inbox.push(transfer) {
                    event.set();
                }
            }
        };
        let pusher = thread::spawn(push(0));
        push(1)();
        pusher.join().unwrap();
        // Before the close, which wakes the ring as well; a sleep forever exceeds loom's bound.
        while counted.done.iter().any(|done| done.load(Ordering::Relaxed) == 0) {
            thread::yield_now();
        }
        inbox.close();
        event.set();
        ring.join().unwrap();
        counted.assert_each_ended_once();
    });
}
