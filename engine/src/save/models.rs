//! What the threads of one save signal to each other, in every order of their steps: see
//! [`crate::sync`].
//!
//! Always holds here: a thread that waits forever ends the test.

use std::sync::Arc;

use crossbeam_channel::Receiver;
use loom::thread;

use super::adapt::Adaptation;
use super::handle::SaveHandle;
use super::job::{Conduct, Job, Message};
use crate::EngineError;
use crate::clock::Manual;
use crate::config::Compression;
use crate::format::layout::Layout;
use crate::store::flow::Flow;

/// A save without chunks, and the committer's end of its queue, which holds one message.
fn job() -> (Arc<Job>, Receiver<Message>) {
    let (encoded, queue) = crossbeam_channel::bounded(1);
    let layout = Arc::new(Layout::plan(&[], 4096).unwrap());
    let conduct = Conduct {
        workers: 1,
        flow: Arc::new(Flow::new(Arc::new(Manual::default()), None)),
        adaptation: Arc::new(Adaptation::new()),
    };
    (Arc::new(Job::new(1, layout, Compression::None, conduct, encoded)), queue)
}

fn error(why: &str) -> EngineError {
    EngineError::internal("saving", why)
}

#[test]
fn a_save_that_has_failed_says_why_and_the_first_reason_stays() {
    loom::model(|| {
        let (job, _queue) = job();
        let failing = ["one", "two"].map(|why| {
            let job = Arc::clone(&job);
            thread::spawn(move || job.fail(error(why)))
        });
        let seen = job.has_failed().then(|| job.failure().expect("the flag comes last"));
        failing.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(job.has_failed());
        let last = job.failure().unwrap().to_string();
        assert!(seen.is_none_or(|seen| seen.to_string() == last));
    });
}

#[test]
fn the_committer_is_woken_by_a_failure() {
    loom::model(|| {
        let (job, queue) = job();
        // A full queue: the failure's own message finds no room until this one is taken.
        job.encoded.try_send(Message::Failed).unwrap();
        let failing = thread::spawn({
            let job = Arc::clone(&job);
            move || job.fail(error("one"))
        });
        // As `write_chunks` does it; a message that never comes exceeds loom's bound.
        loop {
            match queue.try_recv() {
                Ok(_) if job.failure().is_some() => break,
                _ => thread::yield_now(),
            }
        }
        failing.join().unwrap();
    });
}

#[test]
fn every_reader_gets_the_one_outcome() {
    loom::model(|| {
        let (job, _queue) = job();
        let handle = SaveHandle::new(job);
        let readers = [(); 2].map(|()| {
            let handle = handle.clone();
            thread::spawn(move || handle.result(None).unwrap().unwrap_err().to_string())
        });
        handle.resolve(Err(error("one")));
        for reader in readers {
            assert_eq!(reader.join().unwrap(), error("one").to_string());
        }
        assert!(handle.take_unseen_error().is_none(), "it was seen");
    });
}

#[test]
fn an_error_that_nobody_saw_is_given_once() {
    loom::model(|| {
        let (job, _queue) = job();
        let handle = SaveHandle::new(job);
        let takers = [(); 2].map(|()| {
            let handle = handle.clone();
            thread::spawn(move || {
                handle.wait(None);
                handle.take_unseen_error().is_some()
            })
        });
        handle.resolve(Err(error("one")));
        let given = takers.map(|taker| taker.join().unwrap());
        assert_eq!(given.into_iter().filter(|given| *given).count(), 1);
    });
}
