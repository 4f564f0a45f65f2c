//! A network and a service that fail in every way, at every request and all the time.
//!
//! Whatever happens, judged by a reader that no fault reaches: every checkpoint that is visible is
//! whole and the one that was saved, every save that reported success exists, and every call has
//! ended in time, well or with an error that says what happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dtr_engine::config::Compression;
use dtr_engine::{Config, Engine, EngineError, Result};
use fastrand::Rng;

use crate::budget::{self, Budget};
use crate::place::{Place, config_at, open, owner, try_open};
use crate::proxy::{FAULTS, Fault, Plan, Proxy};
use crate::support::{State, config, finish, scratch};

/// Longer than any call may take with the timeouts of [`through`]: retention makes several
/// requests.
const CALL_MAX: Duration = Duration::from_mins(5);

/// The same store through a proxy, with little patience.
pub(crate) fn through(proxy: &Proxy, store: &Config) -> Config {
    let mut config = config_at(&proxy.url(), store.path.to_str().unwrap());
    config.compression = Compression::None;
    config.s3.connect_timeout_ms = 2_000;
    // More than a busy machine takes for a part, less than what is late.
    config.s3.request_timeout_ms = 2_000;
    config.s3.attempts = 3;
    config.gc_grace_seconds = 0;
    config
}

/// What is saved as a step: the small ones in one piece, every third in parts.
fn state_of(step: u64) -> State {
    State::training(step, if step % 3 == 2 { 2 } else { 0 })
}

/// What a run of [`scenario`] saw.
#[derive(Debug, Default)]
struct Seen {
    /// Steps whose save said that it succeeded.
    saved: Vec<u64>,
    /// Errors of any call.
    errors: Vec<EngineError>,
}

/// Saves, loads, lists, deletes and cleans, whatever fails in between.
fn scenario(config: Config, seen: &mut Seen) {
    let (key, secret) = owner();
    let Some(engine) = timed(seen, || try_open(config, (&key, &secret))) else { return };
    for step in 1..=3 {
        let save = || finish(&engine.save(state_of(step).request(step))?);
        if timed(seen, save).is_some() {
            seen.saved.push(step);
        }
    }
    timed(seen, || read_all(&engine));
    timed(seen, || engine.delete(1));
    seen.saved.retain(|step| *step != 1);
    timed(seen, || engine.gc(dtr_engine::engine::GcOptions::default()));
    // Whatever nobody looked at was looked at above.
    timed(seen, || engine.close());
}

/// Loads the newest checkpoint, and holds it against what was saved.
fn read_all(engine: &Engine) -> Result<()> {
    if let Some(step) = engine.survey()?.newest() {
        state_of(step).try_assert_equals(&engine.checkpoint(step)?)?;
    }
    Ok(())
}

fn timed<T>(seen: &mut Seen, call: impl FnOnce() -> Result<T>) -> Option<T> {
    let start = Instant::now();
    let outcome = call();
    assert!(start.elapsed() < CALL_MAX, "a call took {:?}", start.elapsed());
    outcome.map_err(|error| seen.errors.push(error)).ok()
}

/// What is wrong with the store, or with what was said about it.
fn judge(store: &Config, seen: &Seen) -> std::result::Result<(), String> {
    for error in &seen.errors {
        let text = error.to_string();
        let is_typed = matches!(
            error,
            EngineError::Unavailable { .. }
                | EngineError::Corrupt { .. }
                | EngineError::NotFound { .. }
                | EngineError::StepConflict { .. }
        );
        // A service that answered is quoted with its code and the request's id.
        let is_quoted = !text.contains("the proxy says so") || text.contains("request id proxy-");
        if !is_typed || !is_quoted || !text.contains("\nhint: ") || text.contains(&owner().1) {
            return Err(format!("an error that tells too little: {text}"));
        }
    }
    let reader = open(Config { read_only: true, ..store.clone() });
    let survey = reader.survey().map_err(|error| error.to_string())?;
    let steps = survey.committed_steps();
    if let Some(lost) = seen.saved.iter().find(|step| !steps.contains(step)) {
        return Err(format!("step {lost} was saved, and is not there: {steps:?}"));
    }
    for step in &survey.steps {
        if matches!(step.state, dtr_engine::recovery::StepState::Damaged { .. }) {
            return Err(format!("step {} is damaged: {:?}", step.step, step.state));
        }
    }
    for step in steps {
        let report = reader.verify(step, &()).map_err(|error| error.to_string())?;
        if !report.damage.is_empty() {
            return Err(format!("step {step}: {:?}", report.damage));
        }
        let checkpoint = reader.checkpoint(step).map_err(|error| error.to_string())?;
        state_of(step).assert_equals(&checkpoint);
    }
    Ok(())
}

/// Runs the scenario in a store of its own, each request done by as `plan` says.
fn run(place: &Place, plan: Plan) -> (Seen, u64, std::result::Result<(), String>) {
    let store = place.config();
    let proxy = Proxy::start(place.address(), plan);
    let mut seen = Seen::default();
    scenario(through(&proxy, &store), &mut seen);
    let judgement = judge(&store, &seen);
    (seen, proxy.requests(), judgement)
}

#[test]
fn without_faults_everything_succeeds() {
    let place = Place::new();
    let (seen, requests, judgement) = run(&place, Arc::new(|_| Fault::None));
    assert!(seen.errors.is_empty(), "{:?}", seen.errors);
    assert_eq!((seen.saved, judgement), (vec![2, 3], Ok(())));
    assert!((20..100).contains(&requests), "{requests}");
}

/// Saves step 2 by a writer that no fault reaches.
fn save_apart(store: &Config) -> State {
    let state = state_of(2);
    let writer = open(Config { compression: Compression::None, ..store.clone() });
    state.save(&writer, 2).unwrap();
    writer.close().unwrap();
    state
}

/// A reader through a proxy. Nothing comes late to it, but from a service that is busy itself.
fn reader_through(place: &Place, store: &Config, plan: Plan, attempts: u32) -> (Proxy, Engine) {
    let proxy = Proxy::start(place.address(), plan);
    let mut settings = Config { read_only: true, ..through(&proxy, store) };
    settings.s3.request_timeout_ms = 60_000;
    settings.s3.attempts = attempts;
    (proxy, open(settings))
}

#[test]
fn what_is_damaged_on_its_way_is_read_once_more() {
    let place = Place::new();
    let store = place.config();
    let state = save_apart(&store);
    let hit = Arc::new(AtomicU64::new(u64::MAX));
    let plan = Arc::clone(&hit);
    let plan = move |request| {
        let is_hit = request == plan.load(Ordering::SeqCst);
        if is_hit { Fault::Corrupted } else { Fault::None }
    };
    let (proxy, engine) = reader_through(&place, &store, Arc::new(plan), 3);
    // The survey knows from then on what does not change.
    engine.checkpoint(2).unwrap();
    let before = proxy.requests();
    let checkpoint = engine.checkpoint(2).unwrap();
    let opening = proxy.requests() - before;
    state.assert_equals(&checkpoint);
    let requests = proxy.requests() - before;
    assert!(requests > opening + 4, "{requests}");
    // Footer, header, index, and every chunk; a listing or a length have no checksum.
    for number in opening - 3..requests {
        let before = proxy.requests();
        hit.store(before + number, Ordering::SeqCst);
        state.assert_equals(&engine.checkpoint(2).unwrap());
        assert!(proxy.requests() - before > requests, "request {number} was not hit");
    }
}

/// On a line too slow for all that is under way, no body comes whole within its time.
#[test]
fn a_body_that_breaks_off_is_asked_for_from_there_and_costs_no_attempt() {
    let place = Place::new();
    let store = place.config();
    let state = save_apart(&store);
    let breaks_off = Arc::new(AtomicU64::new(0));
    let plan = Arc::clone(&breaks_off);
    let plan = move |request| {
        let breaks_off = request < plan.load(Ordering::SeqCst);
        if breaks_off { Fault::Truncated } else { Fault::None }
    };
    let (proxy, engine) = reader_through(&place, &store, Arc::new(plan), 1);
    let checkpoint = engine.checkpoint(2).unwrap();
    let before = proxy.requests();
    state.assert_equals(&checkpoint);
    let whole = proxy.requests() - before;
    assert!(whole > 1, "{whole}");
    breaks_off.store(proxy.requests() + 2 * whole, Ordering::SeqCst);
    let before = proxy.requests();
    state.assert_equals(&checkpoint);
    assert_eq!(proxy.requests() - before, 3 * whole);
}

/// What became of [`save_through`].
struct Saved {
    store: Config,
    /// From the first request of the save to the one after its last.
    requests: std::ops::Range<u64>,
    succeeded: bool,
    /// What is on its way arrives for as long as this exists.
    _proxy: Proxy,
}

/// Saves a step in a store of its own.
fn save_through(place: &Place, plan: Plan) -> Saved {
    let store = place.config();
    let proxy = Proxy::start(place.address(), plan);
    let (key, secret) = owner();
    let engine = try_open(through(&proxy, &store), (&key, &secret)).unwrap();
    let first = proxy.requests();
    let succeeded = state_of(1).save(&engine, 1).is_ok();
    Saved { store, requests: first..proxy.requests(), succeeded, _proxy: proxy }
}

/// When a request that is late takes effect: its writer, which asks again for a second and for
/// three times, has given up by then, also on a busy machine.
const LATE: Duration = Duration::from_secs(6);

/// The answer that reports a failure may be to the second attempt, and the first one still on its
/// way.
#[test]
fn a_manifest_that_lands_after_its_writer_gave_up_has_its_shard() {
    let place = Place::new();
    let requests = save_through(&place, Arc::new(|_| Fault::None)).requests;
    let hit = |request: u64| {
        let plan = move |asked: u64| match asked.checked_sub(request) {
            Some(0) => Fault::AppliedLate(LATE.as_secs()),
            Some(1) => Fault::Answer(409, "ConditionalRequestConflict"),
            Some(2..5) => Fault::Answer(503, "SlowDown"),
            _ => Fault::None,
        };
        let Saved { store, succeeded, _proxy, .. } = save_through(&place, Arc::new(plan));
        let reader = open(Config { read_only: true, ..store.clone() });
        let start = Instant::now();
        let is_visible = || !reader.survey().unwrap().committed_steps().is_empty();
        while !is_visible() && start.elapsed() < 2 * LATE {
            std::thread::sleep(Duration::from_millis(50));
        }
        let saved = if succeeded { vec![1] } else { Vec::new() };
        judge(&store, &Seen { saved, errors: Vec::new() }).unwrap();
        !succeeded && is_visible()
    };
    let late = std::thread::scope(|scope| {
        let threads: Vec<_> = requests.map(|request| scope.spawn(move || hit(request))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(late.contains(&true), "no manifest landed late: {late:?}");
}

/// Each fault alone is survived where the service may be asked again. A clock that is said to be
/// wrong, and is not, is no such place: nothing that could be corrected is known.
fn is_survivable(fault: Fault) -> bool {
    match fault {
        Fault::Answer(status, _) => [429, 500, 503].contains(&status),
        fault => fault != Fault::Corrupted,
    }
}

#[test]
fn one_fault_at_any_request_loses_nothing() {
    let place = Place::new();
    let (_, requests, _) = run(&place, Arc::new(|_| Fault::None));
    // One at each request, another one at the next; all of them where the environment asks.
    let faults = FAULTS.len() as u64 - 1;
    let budget = Budget::of(requests);
    budget::run(
        budget,
        faults * requests,
        |_| Place::new(),
        |place, number| {
            let (request, turn) = (number % requests, number / requests);
            let index = usize::try_from((request + turn) % faults).unwrap();
            let fault = FAULTS[index];
            let plan = move |asked| if asked == request { fault } else { Fault::None };
            let (seen, _, judgement) = run(place, Arc::new(plan));
            let told = |why| format!("number {number}, {fault:?} at request {request}: {why}");
            judgement.map_err(told)?;
            match seen.errors.first() {
                Some(error) if is_survivable(fault) => Err(told(error.to_string())),
                _ => Ok(true),
            }
        },
    );
}

/// Saves into a directory before the store, and has both steps uploaded there, whatever fails in
/// between; what is left to do is done by a process that no fault reaches. Gives the requests.
fn drain_through(place: &Place, plan: Plan) -> (u64, std::result::Result<(), String>) {
    let store = place.config();
    let directory = scratch();
    let (key, secret) = owner();
    let local = |s3| Config {
        s3,
        remote: Some(store.path.to_str().unwrap().into()),
        compression: Compression::None,
        ..config(directory.path())
    };
    // The first half of a life without faults: opening needs the store.
    let mut seen = Seen::default();
    let proxy = Proxy::start(place.address(), plan);
    if let Ok(engine) = try_open(local(through(&proxy, &store).s3), (&key, &secret)) {
        for step in 1..=2 {
            state_of(step).save(&engine, step).unwrap();
            seen.saved.push(step);
            // Well or not, once; it is tried again when all is drained.
            timed(&mut seen, || engine.drain(None));
        }
        timed(&mut seen, || engine.close());
    }
    let requests = proxy.requests();
    // What was visible meanwhile was whole.
    let visible = Seen { saved: Vec::new(), errors: seen.errors };
    let judgement = judge(&store, &visible);
    open(local(store.s3.clone())).close().unwrap();
    // An upload whose beginning was not answered is begun again, and nobody knows the name of the
    // first: it stays, without parts.
    let left = if place.unfinished_take_space() { Err("parts are left".into()) } else { Ok(()) };
    let all = Seen { saved: seen.saved, errors: Vec::new() };
    (requests, judgement.and_then(|()| judge(&store, &all)).and(left))
}

#[test]
fn one_fault_at_any_request_of_an_upload_behind_loses_nothing() {
    let place = Place::new();
    let (requests, judgement) = drain_through(&place, Arc::new(|_| Fault::None));
    assert_eq!(judgement, Ok(()));
    assert!((10..100).contains(&requests), "{requests}");
    let faults = FAULTS.len() as u64 - 1;
    budget::run(
        Budget::of(requests),
        faults * requests,
        |_| Place::new(),
        |place, number| {
            let (request, turn) = (number % requests, number / requests);
            let index = usize::try_from((request + turn) % faults).unwrap();
            let fault = FAULTS[index];
            let plan = move |asked| if asked == request { fault } else { Fault::None };
            let (_, judgement) = drain_through(place, Arc::new(plan));
            judgement.map_err(|why| format!("number {number}, {fault:?} at {request}: {why}"))?;
            Ok(true)
        },
    );
}

#[test]
fn whatever_the_schedule_nothing_wrong_is_visible() {
    let outcome = budget::run(
        Budget::of(24),
        u64::MAX,
        |_| Place::new(),
        |place, seed| {
            // Every second to every twentieth request.
            let one_in = Rng::with_seed(seed).u64(2..=20);
            let plan = move |request: u64| {
                // A fork: the first numbers of seeds so near to each other have a pattern.
                let mut random = Rng::with_seed(seed << 20 | request).fork();
                if random.u64(..one_in) > 0 {
                    return Fault::None;
                }
                FAULTS[random.usize(..FAULTS.len())]
            };
            let (_, _, judgement) = run(place, Arc::new(plan));
            judgement.map_err(|why| format!("seed {seed}: {why}"))?;
            Ok(true)
        },
    );
    assert!(outcome.tried >= 1);
}
