//! What every state of a store must give, however it came about: it opens, shows a legal view with
//! every byte right, and takes the next save; cleaning leaves no file that no checkpoint
//! needs.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dtr_engine::engine::GcOptions;
use dtr_engine::io::Io;
use dtr_engine::recovery::StepState;
use dtr_engine::{Config, Engine, EngineError};

use super::history::{Range, View};
use super::state::{self, Counter, State, save_of};

/// What is needed to open stores, again and again.
#[derive(Debug)]
pub(crate) struct Tools {
    pub(crate) io: Arc<dyn Io>,
    /// Ids that no history draws.
    pub(crate) ids: Arc<Counter>,
    next: State,
}

impl Tools {
    pub(crate) fn new() -> Self {
        Self {
            io: state::backend(),
            ids: Counter::starting_at(1 << 32),
            next: State::new(u64::MAX, &[30_000]),
        }
    }
}

/// The checkpoints that a store shows. Each is read whole and must be one of `states`; a step that
/// is neither a checkpoint, nor an attempt, nor retired is an error.
pub(crate) fn view(engine: &Engine, states: &[Arc<State>]) -> Result<View, String> {
    let survey = engine.survey().map_err(|error| format!("it cannot be listed: {error}"))?;
    let mut view = BTreeMap::new();
    for step in &survey.steps {
        match &step.state {
            StepState::Committed => {
                let save = read(engine, step.step, states)?;
                view.insert(step.step, save);
            }
            StepState::Incomplete | StepState::Retired { .. } => {}
            other => return Err(format!("step {} is {other:?}", step.step)),
        }
    }
    Ok(view)
}

fn read(engine: &Engine, step: u64, states: &[Arc<State>]) -> Result<usize, String> {
    let failed = |error: EngineError| format!("step {step} is shown and not readable: {error}");
    let checkpoint = engine.checkpoint(step).map_err(failed)?;
    let save = save_of(&checkpoint);
    if states[save].is_in(&checkpoint).map_err(failed)? {
        Ok(save)
    } else {
        Err(format!("step {step} gave wrong bytes for save {save}"))
    }
}

/// Checks the store at `path`, which `exists` or not, and says what is wrong.
pub(crate) fn check(
    path: &Path,
    exists: bool,
    legal: &[Range],
    states: &[Arc<State>],
    tools: &Tools,
) -> Result<(), String> {
    let found = check_reader(path, exists, states, tools)?;
    if !legal.iter().any(|range| range.holds(&found)) {
        return Err(format!("it shows {found:?}, and legal is {legal:?}"));
    }
    check_writer(path, &found, states, tools)
}

fn check_reader(
    path: &Path,
    exists: bool,
    states: &[Arc<State>],
    tools: &Tools,
) -> Result<View, String> {
    let config = Config { read_only: true, ..state::config(path) };
    match state::open(config, &tools.io, &tools.ids) {
        Ok(reader) => view(&reader, states),
        Err(EngineError::NotFound { .. }) if !exists => Ok(View::new()),
        Err(error) => Err(format!("a reader cannot open it: {error}")),
    }
}

fn check_writer(
    path: &Path,
    found: &View,
    states: &[Arc<State>],
    tools: &Tools,
) -> Result<(), String> {
    let engine = state::open(state::config(path), &tools.io, &tools.ids)
        .map_err(|error| format!("a writer cannot open it: {error}"))?;
    let step = found.last_key_value().map_or(1, |(newest, _)| newest + 1);
    engine
        .save(tools.next.request(step, states.len()))
        .and_then(|handle| state::finish(&handle))
        .map_err(|error| format!("the next save, of step {step}, fails: {error}"))?;
    let report = engine
        .gc(GcOptions { dry_run: false, grace: Some(Duration::ZERO) })
        .map_err(|error| format!("cleaning fails: {error}"))?;
    if !report.kept.is_empty() {
        return Err(format!("cleaning leaves {:?}", report.kept));
    }
    check_after(&engine, step, found, tools)
}

/// After the next save and cleaning: what existed, the new checkpoint, and nothing else.
fn check_after(engine: &Engine, step: u64, found: &View, tools: &Tools) -> Result<(), String> {
    let survey = engine.survey().map_err(|error| format!("it cannot be listed: {error}"))?;
    let mut expected: Vec<u64> = found.keys().copied().collect();
    expected.push(step);
    let steps = survey.committed_steps();
    if steps != expected {
        return Err(format!("after the next save it shows {steps:?}, expected {expected:?}"));
    }
    for survey in &survey.steps {
        // An empty directory is all that may stay of an attempt; the next save of its step uses it.
        let is_empty = survey.state == StepState::Incomplete && survey.bytes == 0;
        if !(is_empty || survey.state == StepState::Committed) || !survey.orphans.is_empty() {
            return Err(format!("cleaning left {survey:?}"));
        }
    }
    let checkpoint = engine.checkpoint(step).map_err(|error| error.to_string())?;
    match tools.next.is_in(&checkpoint) {
        Ok(true) => Ok(()),
        Ok(false) => Err("the next save gave wrong bytes".into()),
        Err(error) => Err(format!("the next save is not readable: {error}")),
    }
}
