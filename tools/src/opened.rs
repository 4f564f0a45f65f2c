//! Opening stores and checkpoints as a reader.
//!
//! Always holds: a path that is no store is wrong usage, told with what is there instead; nothing
//! is created by looking.

use std::path::{Path, PathBuf};

use clap::Args;
use dtr_engine::config::IoBackend;
use dtr_engine::format::names::parse_step_dir;
use dtr_engine::load::Checkpoint;
use dtr_engine::recovery::{StepState, Survey};
use dtr_engine::{Config, Engine, EngineError, Result};

/// The store that a command looks at.
#[derive(Args, Clone, Debug)]
pub(crate) struct StoreArgument {
    /// Directory of the store.
    #[arg(value_name = "STORE")]
    path: PathBuf,
}

impl StoreArgument {
    /// Its path for messages.
    pub(crate) fn display(&self) -> String {
        self.path.display().to_string()
    }

    /// Opens it read-only.
    pub(crate) fn open(&self) -> Result<Engine> {
        self.check()?;
        Engine::open(Config { read_only: true, ..self.config() })
    }

    /// Opens it as its one writer, if it is there.
    pub(crate) fn open_as_writer(&self) -> Result<Engine> {
        self.check()?;
        Engine::open(self.config())
    }

    fn config(&self) -> Config {
        Config { io_backend: IoBackend::Auto, ..Config::new(&self.path) }
    }

    /// That the path can be a store.
    fn check(&self) -> Result<()> {
        let refused = |why: &str, hint: &str| {
            EngineError::invalid(format!("opening store `{}`", self.display()), why, hint)
        };
        match std::fs::metadata(&self.path) {
            Ok(found) if !found.is_dir() => Err(refused(
                "it is a file, and a store is a directory",
                "name the directory that was given to `CheckpointManager`",
            )),
            Ok(_) if is_step_directory(&self.path) => Err(refused(
                "it is the directory of one step, and a store is the directory around it",
                "name its parent, and choose the step with `--step`",
            )),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err(refused(
                "there is no such directory",
                "name the directory that was given to `CheckpointManager`",
            )),
            // Others are the engine's to tell.
            _ => Ok(()),
        }
    }
}

fn is_step_directory(path: &Path) -> bool {
    let name = std::path::absolute(path).ok();
    let name = name.as_deref().and_then(Path::file_name).and_then(std::ffi::OsStr::to_str);
    name.and_then(parse_step_dir).is_some()
}

/// The newest step that exists, whole or damaged.
pub(crate) fn newest_existing(survey: &Survey) -> Option<u64> {
    let exists = |state: &StepState| {
        matches!(state, StepState::Committed | StepState::Damaged { .. } | StepState::Newer { .. })
    };
    survey.steps.iter().rev().find(|step| exists(&step.state)).map(|step| step.step)
}

/// There is nothing to look at.
pub(crate) fn no_checkpoint(doing: &str, store: &StoreArgument) -> EngineError {
    EngineError::NotFound {
        what: format!("{doing} `{}`", store.display()),
        why: "it holds no committed checkpoint".into(),
        hint: "check the path: `ckpt-tool ls` shows what a store holds".into(),
    }
}

/// Opens the checkpoint of `step`, the newest committed one if none is given.
pub(crate) fn checkpoint(
    engine: &Engine,
    store: &StoreArgument,
    step: Option<u64>,
    doing: &str,
) -> Result<Checkpoint> {
    let step = match step {
        Some(step) => step,
        None => engine.survey()?.newest().ok_or_else(|| no_checkpoint(doing, store))?,
    };
    let checkpoint = engine.checkpoint(step)?;
    let ranks = checkpoint.manifest().world_size;
    if ranks != 1 {
        return Err(EngineError::UnsupportedFormat {
            what: format!("{doing} `{}`, step {step}", store.display()),
            why: format!("it was saved by {ranks} ranks, and this version reads those of one"),
            hint: "use the version of ckpt-tool that belongs to the dtruntime that saved it".into(),
        });
    }
    Ok(checkpoint)
}
