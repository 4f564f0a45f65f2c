//! Histories of a store: what was done, the log of it, and what may be found at each point of it.
//!
//! A *view* says which checkpoints exist, and which save each of them is. What may be found after a
//! power loss is a set of *ranges*: a view is legal if it is between the least and the most of
//! one of them.
//!
//! ```text
//!     acknowledged           |     in flight                        |     acknowledged
//!     exactly what stands    |  what stood before, or the new one   |     exactly what stands
//!                            |  with none, some or all of what      |
//!                            |  makes way for it deleted            |
//! ```
//!
//! Always holds: what is legal follows from the calls that were made and from what they returned,
//! never from what the engine did below.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use dtr_engine::engine::GcOptions;
use dtr_engine::io::Io;
use dtr_engine::{Config, Engine, Result};

use super::budget::scratch;
use super::medium::Medium;
use super::recorder::Recorder;
use super::state::{self, CHUNK_BYTES, Counter, State};

/// Steps that exist, each with the save that it is.
pub(crate) type View = BTreeMap<u64, usize>;

/// All views between two.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Range {
    least: View,
    most: View,
}

impl Range {
    pub(crate) fn exactly(view: View) -> Self {
        Self { least: view.clone(), most: view }
    }

    pub(crate) fn between(least: View, most: View) -> Self {
        Self { least, most }
    }

    pub(crate) fn holds(&self, view: &View) -> bool {
        let within = |inner: &View, outer: &View| {
            inner.iter().all(|(step, save)| outer.get(step) == Some(save))
        };
        within(&self.least, view) && within(view, &self.most)
    }

    /// The least and the most.
    pub(crate) fn into_views(self) -> (View, View) {
        (self.least, self.most)
    }

    /// Whether every view of it has this save at this step.
    pub(crate) fn acknowledges(&self, step: u64, save: usize) -> bool {
        self.least.get(&step) == Some(&save)
    }

    pub(crate) fn without(&self, step: u64) -> Self {
        let mut range = self.clone();
        range.least.remove(&step);
        range.most.remove(&step);
        range
    }

    fn with(&self, step: u64, save: usize) -> Self {
        let mut range = self.clone();
        range.least.insert(step, save);
        range.most.insert(step, save);
        range
    }
}

/// What is legal from some position of the log on.
#[derive(Debug)]
struct Moment {
    from: usize,
    legal: Vec<Range>,
}

/// A history that is over.
#[derive(Debug)]
pub(crate) struct History {
    pub(crate) name: String,
    pub(crate) medium: Medium,
    pub(crate) length: usize,
    /// Points before this one are those of another history.
    pub(crate) first: usize,
    /// By save.
    pub(crate) states: Vec<Arc<State>>,
    moments: Vec<Moment>,
}

impl History {
    /// What may be found after a power loss at `point`.
    pub(crate) fn legal(&self, point: usize) -> &[Range] {
        &self.moments.iter().rev().find(|moment| moment.from <= point).unwrap().legal
    }
}

/// One call on an engine.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Call {
    Save(u64),
    /// A save that may go back.
    Rewind(u64),
    Delete(u64),
    /// With no grace.
    Clean,
    Reopen,
}

/// A history that goes on.
pub(crate) struct Player {
    /// Goes with the player, where it is the player's own.
    directory: Option<tempfile::TempDir>,
    recorder: Arc<Recorder>,
    ids: Arc<Counter>,
    engine: Option<Engine>,
    config: Config,
    states: Vec<Arc<State>>,
    /// What the engine shows.
    visible: View,
    /// What may be durable of it.
    durable: Vec<Range>,
    moments: Vec<Moment>,
    first: usize,
}

/// Where the store is, from the directory whose own name is taken for durable.
pub(crate) fn store() -> PathBuf {
    Path::new("runs").join("store")
}

impl Player {
    /// An empty place. `settings` changes the engine's configuration.
    pub(crate) fn new(settings: impl FnOnce(&mut Config)) -> Self {
        let directory = scratch();
        let mut player = Self::at(directory.path(), state::backend(), settings);
        player.directory = Some(directory);
        player.open().unwrap();
        player
    }

    /// A store below `root`, on `io`, that is not open yet.
    fn at(root: &Path, io: Arc<dyn Io>, settings: impl FnOnce(&mut Config)) -> Self {
        let mut config = state::config(&root.join(store()));
        settings(&mut config);
        let nothing = vec![Range::exactly(View::new())];
        Self {
            directory: None,
            recorder: Recorder::new(io, root),
            ids: Counter::starting_at(0),
            engine: None,
            config,
            states: Vec::new(),
            visible: View::new(),
            durable: nothing.clone(),
            moments: vec![Moment { from: 0, legal: nothing }],
            first: 0,
        }
    }

    fn open(&mut self) -> Result<()> {
        let io: Arc<dyn Io> = Arc::<Recorder>::clone(&self.recorder);
        self.engine = Some(state::open(self.config.clone(), &io, &self.ids)?);
        Ok(())
    }

    /// Opens a store below `root`, on `io`, and makes the calls until `is_cut`, when the device is
    /// gone under one of them. Returns what may be found then, and the states by save.
    pub(crate) fn play_until(
        (root, io): (&Path, Arc<dyn Io>),
        settings: impl FnOnce(&mut Config),
        calls: &[Call],
        is_cut: impl Fn() -> bool,
    ) -> (Vec<Range>, Vec<Arc<State>>) {
        let mut player = Self::at(root, io, settings);
        let opened = player.open();
        if is_cut() {
            return (player.durable, player.states);
        }
        opened.unwrap();
        for call in calls {
            let (mut in_flight, (visible, after)) = player.begin(*call);
            let outcome = player.make(*call);
            if is_cut() {
                if outcome.is_ok()
                    && let Call::Save(step) | Call::Rewind(step) = *call
                {
                    let save = player.states.len() - 1;
                    in_flight.retain(|range| range.acknowledges(step, save));
                }
                drop(player.engine.take());
                return (in_flight, player.states);
            }
            outcome.unwrap_or_else(|error| panic!("{call:?} on a healthy device: {error}"));
            player.end((visible, after));
        }
        drop(player.engine.take());
        (player.durable, player.states)
    }

    /// Makes the calls, one after the other, each of which succeeds.
    pub(crate) fn play(mut self, calls: &[Call]) -> Self {
        for call in calls {
            let (in_flight, after) = self.begin(*call);
            self.make(*call).unwrap();
            self.end(after);
            drop(in_flight);
            let steps: Vec<u64> = self.visible.keys().copied().collect();
            let shown = self.engine.as_ref().unwrap().steps().unwrap();
            assert_eq!(shown, steps, "after {call:?}");
        }
        self
    }

    /// Makes a call in which the process is killed when `operations` more have been performed, and
    /// opens the store with a new one. `None` if the call needs no more than that.
    pub(crate) fn play_killed(mut self, call: Call, operations: usize) -> Option<Self> {
        let (in_flight, _) = self.begin(call);
        self.recorder.kill_at(Some(self.recorder.position() + operations));
        let outcome = self.make(call);
        drop(self.engine.take());
        self.recorder.kill_at(None);
        outcome.err()?;
        self.first = self.recorder.position();
        let saves = self.states.len() - 1;
        let config = Config { read_only: true, ..self.config.clone() };
        let reader = state::open(config, &state::backend(), &self.ids).unwrap();
        self.visible = super::check::view(&reader, &self.states).unwrap();
        let legal = in_flight.iter().any(|range| range.holds(&self.visible));
        assert!(legal, "killed {operations} operations into {call:?}: {:?}", self.visible);
        if self.visible.values().any(|save| *save == saves) {
            self.durable = in_flight;
        }
        let legal = self.durable.clone();
        self.moments.push(Moment { from: self.first, legal });
        self.open().unwrap();
        Some(self)
    }

    /// The log, and what is legal at each point of it.
    pub(crate) fn over(mut self, name: impl Into<String>) -> History {
        let length = self.recorder.position();
        drop(self.engine.take());
        assert_eq!(self.recorder.position(), length, "closing changes nothing");
        drop(self.directory);
        History {
            name: name.into(),
            medium: Medium::new(&self.recorder.log()),
            length,
            first: self.first,
            states: self.states,
            moments: self.moments,
        }
    }

    fn make(&mut self, call: Call) -> Result<()> {
        if let Call::Reopen = call {
            drop(self.engine.take());
            return self.open();
        }
        let engine = self.engine.as_ref().unwrap();
        match call {
            Call::Save(step) | Call::Rewind(step) => {
                let save = self.states.len() - 1;
                let mut request = self.states[save].request(step, save);
                request.rewind = matches!(call, Call::Rewind(_));
                engine.save(request).and_then(|handle| state::finish(&handle)).map(drop)
            }
            Call::Delete(step) => engine.delete(step).map(drop),
            Call::Clean => {
                let options = GcOptions { dry_run: false, grace: Some(Duration::ZERO) };
                engine.gc(options).map(drop)
            }
            Call::Reopen => Ok(()),
        }
    }

    /// What may be found while `call` is in flight, and what is legal once it has returned.
    fn begin(&mut self, call: Call) -> (Vec<Range>, (View, Vec<Range>)) {
        let before = self.durable.clone();
        let (change, (visible, after)) = match call {
            Call::Save(step) | Call::Rewind(step) => self.begin_save(step),
            Call::Delete(step) => {
                let most = self.visible.clone();
                let mut visible = most.clone();
                visible.remove(&step);
                let settled = vec![Range::exactly(visible.clone())];
                (vec![Range { least: visible.clone(), most }], (visible, settled))
            }
            Call::Clean | Call::Reopen => {
                (vec![Range::exactly(self.visible.clone())], (self.visible.clone(), before.clone()))
            }
        };
        let mut in_flight = before;
        in_flight.extend(change);
        in_flight.dedup();
        let from = self.recorder.position() + 1;
        self.moments.push(Moment { from, legal: in_flight.clone() });
        (in_flight, (visible, after))
    }

    fn begin_save(&mut self, step: u64) -> (Vec<Range>, (View, Vec<Range>)) {
        let save = self.states.len();
        // A chunk and a half, so that writes can come in either order.
        let sizes = [CHUNK_BYTES as usize - 999, 20_000 + 1_000 * save];
        self.states.push(Arc::new(State::new(save as u64, &sizes)));
        let mut most = self.visible.clone();
        let retired: Vec<u64> = most.range(step + 1..).map(|(step, _)| *step).collect();
        most.retain(|later, _| !retired.contains(later));
        most.insert(step, save);
        let kept = self.config.keep_last_n.map_or(usize::MAX, |kept| kept as usize);
        let mut visible = most.clone();
        while visible.len() > kept {
            visible.pop_first();
        }
        let committed = self.durable.iter().map(|range| {
            let range = retired.iter().fold(range.clone(), |range, step| range.without(*step));
            range.with(step, save)
        });
        let committed: Vec<Range> = committed.collect();
        // Before anything is deleted, all that is seen is made durable.
        let deletes = visible.len() < most.len() || !retired.is_empty();
        let after = if deletes { vec![Range::exactly(visible.clone())] } else { committed.clone() };
        let mut change = committed;
        change.push(Range { least: visible.clone(), most });
        (change, (visible, after))
    }

    fn end(&mut self, (visible, durable): (View, Vec<Range>)) {
        let from = self.recorder.position();
        // A call that changed nothing was never in flight.
        self.moments.retain(|moment| moment.from <= from);
        self.moments.push(Moment { from, legal: durable.clone() });
        self.visible = visible;
        self.durable = durable;
    }
}
