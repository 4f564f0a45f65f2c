//! What the criterion bench measures, as a list of cases, and how each is measured.
//!
//! | group | from | to |
//! |---|---|---|
//! | `save` | the call of [`Engine::save`] | its handle's result: durable, published, read back |
//! | `load` | the call of [`Engine::checkpoint`] | every byte checked and in memory |
//! | `stall` | the call of [`Engine::save`] | its return: what a training loop loses |
//!
//! Always holds: whatever was measured is compared with the state byte by byte at the end, so no
//! work can be left out; what prepares or checks a measurement is outside its time; a store keeps
//! one checkpoint, so a case never needs more disk than two.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dtr_engine::config::{Compression, DirectIo, IoBackend};
use dtr_engine::io::{EntryOp, OpenMode, open_backend};
use dtr_engine::{Config, Engine, EngineError, Result};
use tempfile::TempDir;

use crate::state::{Memory, State};

/// How large everything is.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Sizes of the states, in bytes.
    pub raw_bytes: &'static [u64],
    /// The same for codecs that take a minute where others take a second.
    pub slow_raw_bytes: &'static [u64],
    /// Bytes of a chunk.
    pub chunk_bytes: u32,
    /// Whether the page cache must be out of the way.
    pub direct_io: DirectIo,
}

impl Scale {
    /// For figures. Loads come from the device, not from the page cache, or are not measured.
    pub const FULL: Self = Self {
        raw_bytes: &[16 << 20, 64 << 20, 256 << 20],
        slow_raw_bytes: &[16 << 20],
        chunk_bytes: 4 << 20,
        direct_io: DirectIo::On,
    };

    /// For tests: several chunks, on any filesystem.
    pub const TINY: Self = Self {
        raw_bytes: &[1 << 20],
        slow_raw_bytes: &[256 << 10],
        chunk_bytes: 64 << 10,
        direct_io: DirectIo::Auto,
    };
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Figure {
    /// Time until a save is durable.
    Save,
    /// Time until a checkpoint is in memory.
    Load,
    /// Time until a save returns, after an earlier one: the arena exists.
    StallWarm,
    /// Time until an engine's first save returns: it maps its arena and touches it first.
    StallFirst,
    /// Time until an engine's first save returns after [`Engine::prewarm`].
    StallPrewarmed,
}

/// One figure at one size.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// What is measured.
    pub figure: Figure,
    /// How chunks are encoded.
    pub compression: Compression,
    /// Which way bytes reach the device.
    pub io_backend: IoBackend,
    /// Size of the state.
    pub raw_bytes: u64,
}

impl Case {
    /// Every case of a scale, group by group.
    pub fn all(scale: &Scale) -> Vec<Self> {
        let mut cases = Vec::new();
        for figure in [Figure::Save, Figure::Load] {
            for compression in CODECS {
                for io_backend in [IoBackend::Uring, IoBackend::Threads] {
                    let slow = compression == Compression::Gzip;
                    let sizes = if slow { scale.slow_raw_bytes } else { scale.raw_bytes };
                    let case = |&raw_bytes| Self { figure, compression, io_backend, raw_bytes };
                    cases.extend(sizes.iter().map(case));
                }
            }
        }
        // A stall is over before anything is encoded or written: the defaults stand for all.
        let (compression, io_backend) = (Compression::default(), IoBackend::default());
        for figure in [Figure::StallWarm, Figure::StallFirst, Figure::StallPrewarmed] {
            let case = |&raw_bytes| Self { figure, compression, io_backend, raw_bytes };
            cases.extend(scale.raw_bytes.iter().map(case));
        }
        cases
    }

    /// Its whole name.
    pub fn name(&self) -> String {
        format!("{}/{}/{}", self.group(), self.function(), self.size())
    }

    /// The group of the report that it belongs to.
    pub fn group(&self) -> &'static str {
        match self.figure {
            Figure::Save => "save",
            Figure::Load => "load",
            Figure::StallWarm | Figure::StallFirst | Figure::StallPrewarmed => "stall",
        }
    }

    /// Its name within the group, without the size.
    pub fn function(&self) -> String {
        match self.figure {
            Figure::Save | Figure::Load => {
                format!("{}/{}", lower(self.compression), lower(self.io_backend))
            }
            Figure::StallWarm => "warm".into(),
            Figure::StallFirst => "first".into(),
            Figure::StallPrewarmed => "first, prewarmed".into(),
        }
    }

    /// Its size, for people.
    pub fn size(&self) -> String {
        match self.raw_bytes {
            small @ ..0x10_0000 => format!("{} KiB", small >> 10),
            large => format!("{} MiB", large >> 20),
        }
    }
}

/// In the order in which they are measured.
const CODECS: [Compression; 5] = [
    Compression::None,
    Compression::Float,
    Compression::Zstd,
    Compression::Gzip,
    Compression::Auto,
];

/// As it is written in settings.
fn lower(setting: impl std::fmt::Debug) -> String {
    format!("{setting:?}").to_lowercase()
}

/// The states that cases share, each made when the first case asks for it.
#[derive(Debug, Default)]
pub struct States(BTreeMap<u64, Arc<State>>);

impl States {
    /// Everything is drawn from this.
    const SEED: u64 = 42;

    /// The state of about `raw_bytes`.
    pub fn get(&mut self, raw_bytes: u64) -> Arc<State> {
        let make = || Arc::new(State::generate(Self::SEED, raw_bytes));
        Arc::clone(self.0.entry(raw_bytes).or_insert_with(make))
    }
}

/// Whether a backend can be measured in `directory`; the error says why not.
pub fn check_backend(io_backend: IoBackend, scale: &Scale, directory: &Path) -> Result<()> {
    let io = open_backend(io_backend, scale.direct_io)?;
    let path = directory.join("probe");
    let refused = |source| EngineError::Io {
        what: format!("opening a file in `{}` as the bench does", directory.display()),
        source,
        hint: format!(
            "name a directory on a disk that takes direct I/O in {}",
            crate::machine::DIRECTORY_VARIABLE
        ),
    };
    io.open(&path, OpenMode::Create).map_err(refused)?;
    io.entry(&EntryOp::RemoveFile(path)).map_err(refused)?;
    Ok(())
}

/// A case with everything that it needs.
#[derive(Debug)]
pub struct Run {
    case: Case,
    config: Config,
    state: Arc<State>,
    /// `None` where each measurement opens its own.
    engine: Option<Engine>,
    /// What a load fills.
    memory: Option<Memory>,
    /// The newest step.
    step: u64,
    directory: TempDir,
}

impl Run {
    /// Opens a store below `directory` and saves once, so that nothing is done for the first time
    /// while it is measured.
    pub fn prepare(case: Case, scale: &Scale, state: Arc<State>, directory: &Path) -> Result<Self> {
        let directory = tempfile::tempdir_in(directory).map_err(|source| EngineError::Io {
            what: format!("making a scratch directory in `{}`", directory.display()),
            source,
            hint: format!("name another one in {}", crate::machine::DIRECTORY_VARIABLE),
        })?;
        let config = Config {
            compression: case.compression,
            io_backend: case.io_backend,
            chunk_bytes: scale.chunk_bytes,
            direct_io: scale.direct_io,
            keep_last_n: Some(1),
            ..Config::new(directory.path())
        };
        let mut run = Self { case, config, state, engine: None, memory: None, step: 0, directory };
        let engine = Engine::open(run.config.clone())?;
        run.save(&engine)?;
        match case.figure {
            Figure::StallFirst | Figure::StallPrewarmed => engine.close()?,
            Figure::Save | Figure::StallWarm => run.engine = Some(engine),
            Figure::Load => {
                run.engine = Some(engine);
                run.memory = Some(run.state.memory());
            }
        }
        Ok(run)
    }

    /// Measures it so many times; returns the sum.
    pub fn measure(&mut self, iterations: u64) -> Result<Duration> {
        if let Some(memory) = &mut self.memory {
            memory.spoil();
        }
        let mut total = Duration::ZERO;
        for _ in 0..iterations {
            total += self.measure_once()?;
        }
        Ok(total)
    }

    fn measure_once(&mut self) -> Result<Duration> {
        let Some(engine) = self.engine.take() else { return self.measure_first() };
        let time = if let Some(memory) = self.memory.as_mut() {
            let start = Instant::now();
            memory.fill_from(&engine.checkpoint(self.step)?)?;
            start.elapsed()
        } else {
            let times = self.save(&engine)?;
            if self.case.figure == Figure::Save { times.durable } else { times.stall }
        };
        self.engine = Some(engine);
        Ok(time)
    }

    /// The stall of an engine's first save.
    fn measure_first(&mut self) -> Result<Duration> {
        let engine = Engine::open(self.config.clone())?;
        if self.case.figure == Figure::StallPrewarmed {
            engine.prewarm(self.state.raw_bytes())?;
        }
        let times = self.save(&engine)?;
        engine.close()?;
        Ok(times.stall)
    }

    /// Saves the next step and waits for it.
    fn save(&mut self, engine: &Engine) -> Result<SaveTimes> {
        self.step += 1;
        let request = self.state.request(self.step);
        let start = Instant::now();
        let handle = engine.save(request)?;
        let stall = start.elapsed();
        handle.result(None).expect("no time limit was given")?;
        Ok(SaveTimes { stall, durable: start.elapsed() })
    }

    /// Compares what is there now with the state: what the last load filled, or else what the last
    /// save left on disk. Returns its CRC-32C.
    ///
    /// # Panics
    ///
    /// If a byte differs.
    pub fn finish(self) -> Result<u32> {
        let memory = if let Some(filled) = self.memory {
            filled
        } else {
            let engine = self.engine.map_or_else(|| Engine::open(self.config), Ok)?;
            let mut memory = self.state.memory();
            memory.fill_from(&engine.checkpoint(self.step)?)?;
            memory
        };
        let difference = self.state.difference(&memory);
        assert!(difference.is_none(), "{:?}: {}", self.case, difference.unwrap_or_default());
        self.directory.close().map_err(|source| EngineError::Io {
            what: "removing a scratch directory".into(),
            source,
            hint: "remove it by hand".into(),
        })?;
        Ok(memory.crc32c())
    }
}

/// Times of one save, from its call.
#[derive(Clone, Copy, Debug)]
struct SaveTimes {
    /// Until it returned.
    stall: Duration,
    /// Until its result was available.
    durable: Duration,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The bench itself, as far as a test needs it: every case once.
    #[test]
    fn every_case_runs_and_brings_its_bytes_back() {
        let directory = crate::machine::scratch_directory();
        let mut states = States::default();
        let mut measured = 0;
        for case in Case::all(&Scale::TINY) {
            let id = case.name();
            if let Err(error) = check_backend(case.io_backend, &Scale::TINY, &directory) {
                assert_eq!(case.io_backend, IoBackend::Uring, "{id}: {error}");
                println!("skipped: {id}, because {error}");
                continue;
            }
            let state = states.get(case.raw_bytes);
            let crc32c = state.crc32c();
            let mut run = Run::prepare(case, &Scale::TINY, state, &directory).unwrap();
            assert!(run.measure(2).unwrap() > Duration::ZERO, "{id}");
            let hash = run.finish().unwrap();
            assert_eq!(hash, crc32c, "{id}");
            println!("{id}: crc32c {hash:08x}");
            measured += 1;
        }
        // Those of the threads, at least: 5 saves, 5 loads, 3 stalls.
        assert!(measured >= 13, "only {measured} cases were measured");
    }

    #[test]
    fn names_are_unique_and_sizes_read_well() {
        for scale in [&Scale::FULL, &Scale::TINY] {
            let names: Vec<_> = Case::all(scale).iter().map(Case::name).collect();
            let unique: std::collections::BTreeSet<_> = names.iter().collect();
            assert_eq!(unique.len(), names.len());
        }
        let case = Case { raw_bytes: 256 << 10, ..Case::all(&Scale::TINY)[0] };
        assert_eq!(case.size(), "256 KiB");
        assert_eq!(Case { raw_bytes: 256 << 20, ..case }.size(), "256 MiB");
    }

    #[test]
    #[should_panic(expected = "came back changed")]
    fn other_bytes_are_noticed() {
        let case = Case { figure: Figure::Load, ..Case::all(&Scale::TINY)[0] };
        let case = Case { io_backend: IoBackend::Threads, ..case };
        let state = Arc::new(State::generate(1, case.raw_bytes));
        let directory = crate::machine::scratch_directory();
        let mut run = Run::prepare(case, &Scale::TINY, state, &directory).unwrap();
        run.measure(1).unwrap();
        run.state = Arc::new(State::generate(2, case.raw_bytes));
        let _hash = run.finish();
    }
}
