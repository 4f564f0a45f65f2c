//! Opening stores and checkpoints as a reader.
//!
//! Always holds: a path that is no store is wrong usage, told with what is there instead; nothing
//! is created by looking.

use std::path::{Path, PathBuf};

use clap::Args;
use dtr_engine::config::{IoBackend, S3_SCHEME, S3Settings};
use dtr_engine::format::names::parse_step_dir;
use dtr_engine::load::Checkpoint;
use dtr_engine::recovery::{StepState, Survey};
use dtr_engine::{Config, Engine, EngineError, Result};

use crate::console::note;

/// The store that a command looks at.
#[derive(Args, Clone, Debug)]
pub(crate) struct StoreArgument {
    /// Directory of the store, or `s3://bucket/prefix`.
    #[arg(value_name = "STORE")]
    path: PathBuf,
    #[command(flatten)]
    s3: S3Arguments,
}

/// How a store in S3 is reached; the rest is found as the AWS tools find it.
#[derive(Args, Clone, Debug)]
pub(crate) struct S3Arguments {
    /// Service to use instead of AWS [default: AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL]
    #[arg(long, value_name = "URL")]
    endpoint_url: Option<String>,
    /// Region of the bucket [default: AWS_REGION, the profile's, the instance's]
    #[arg(long, value_name = "NAME")]
    region: Option<String>,
    /// Profile of the shared configuration files [default: AWS_PROFILE]
    #[arg(long, value_name = "NAME")]
    profile: Option<String>,
}

/// How the other one of two stores in S3 is reached, where that differs.
#[derive(Args, Clone, Debug)]
pub(crate) struct OtherS3Arguments {
    /// Service of the destination [default: the source's]
    #[arg(id = "to_endpoint_url", long = "to-endpoint-url", value_name = "URL")]
    endpoint_url: Option<String>,
    /// Region of the destination's bucket [default: the source's]
    #[arg(id = "to_region", long = "to-region", value_name = "NAME")]
    region: Option<String>,
    /// Profile for the destination [default: the source's]
    #[arg(id = "to_profile", long = "to-profile", value_name = "NAME")]
    profile: Option<String>,
}

impl OtherS3Arguments {
    /// That they are not given to no avail: a bucket without its scheme is the name of a directory.
    fn check(&self, path: &Path) -> Result<()> {
        let given = [&self.endpoint_url, &self.region, &self.profile];
        if is_in_s3(path) || given.iter().all(|value| value.is_none()) {
            return Ok(());
        }
        Err(EngineError::invalid(
            format!("copying to `{}`", path.display()),
            "it is a directory, and `--to-endpoint-url`, `--to-region` and `--to-profile` say how \
             a bucket is reached",
            format!("write `{S3_SCHEME}` before the name of a bucket, or leave them out"),
        ))
    }
}

/// Whether a checkpoint's directory is in it, or the lock of whoever writes the first.
pub(crate) fn is_store(directory: &Path) -> bool {
    let is_lock = |name: &str| {
        name.strip_prefix("writer").is_some_and(|rest| rest.strip_suffix(".lock").is_some())
    };
    holds(directory, |name| parse_step_dir(name).is_some() || is_lock(name))
}

/// Whether an entry of a directory has a name that is sought; false of what is none.
pub(crate) fn holds(directory: &Path, is_sought: impl Fn(&str) -> bool) -> bool {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names = entries.map(|entry| entry.file_name());
    names.any(|name| is_sought(&name.to_string_lossy()))
}

fn is_in_s3(path: &Path) -> bool {
    path.to_str().is_some_and(|path| path.starts_with(S3_SCHEME))
}

impl S3Arguments {
    /// As the engine takes them.
    pub(crate) fn settings(&self) -> S3Settings {
        S3Settings {
            endpoint_url: self.endpoint_url.clone(),
            region: self.region.clone(),
            profile: self.profile.clone(),
            ..S3Settings::default()
        }
    }
}

impl StoreArgument {
    /// Its path for messages.
    pub(crate) fn display(&self) -> String {
        self.path.display().to_string()
    }

    /// Stores in the directory that it names, by name, where it names none itself.
    pub(crate) fn stores_below(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(&self.path).into_iter().flatten().flatten();
        let mut stores: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        stores.retain(|path| is_store(path));
        stores.sort();
        stores
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
        let s3 = self.s3.settings();
        Config { io_backend: IoBackend::Auto, s3, ..Config::new(&self.path) }
    }

    /// Opens another store as its one writer, created if need be; reached as this one is, but for
    /// what `other` says.
    pub(crate) fn open_other(&self, path: &Path, other: &OtherS3Arguments) -> Result<Engine> {
        other.check(path)?;
        let S3Settings { endpoint_url, region, profile, .. } = self.s3.settings();
        let s3 = S3Settings {
            endpoint_url: other.endpoint_url.clone().or(endpoint_url),
            region: other.region.clone().or(region),
            profile: other.profile.clone().or(profile),
            ..S3Settings::default()
        };
        Engine::open(Config { s3, ..Config::new(path) })
    }

    /// How stores in S3 are reached.
    pub(crate) fn s3(&self) -> S3Settings {
        self.s3.settings()
    }

    /// That the path can be a store.
    fn check(&self) -> Result<()> {
        if is_in_s3(&self.path) {
            // What is there is the service's to tell.
            return Ok(());
        }
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
                "name what was given to `CheckpointManager`: a directory, or `s3://bucket/prefix`",
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

/// Steps that exist, whole or damaged, ascending: what cannot be read is never passed over in
/// silence.
fn existing_steps(survey: &Survey) -> impl DoubleEndedIterator<Item = u64> + '_ {
    survey.steps.iter().filter(|step| exists(&step.state)).map(|step| step.step)
}

/// Whether a step in this state is a checkpoint, whole or damaged.
pub(crate) fn exists(state: &StepState) -> bool {
    !matches!(state, StepState::Incomplete | StepState::Retired { .. })
}

/// The step that is named, all that exist, or the newest that does.
pub(crate) fn chosen_steps(
    survey: &Survey,
    step: Option<u64>,
    all: bool,
    doing: &str,
    store: &StoreArgument,
) -> Result<Vec<u64>> {
    let steps: Vec<u64> = match step {
        Some(step) => vec![step],
        None if all => existing_steps(survey).collect(),
        None => existing_steps(survey).next_back().into_iter().collect(),
    };
    if steps.is_empty() { Err(no_checkpoint(doing, store)) } else { Ok(steps) }
}

/// There is nothing to look at.
pub(crate) fn no_checkpoint(doing: &str, store: &StoreArgument) -> EngineError {
    EngineError::NotFound {
        what: format!("{doing} `{}`", store.display()),
        why: "it holds no committed checkpoint".into(),
        hint: "check the path: `ckpt-tool ls` shows what a store holds".into(),
    }
}

/// The newest step that is whole; says so if that is not the newest that exists.
fn newest_whole(survey: &Survey) -> Option<u64> {
    let newest = survey.newest()?;
    for later in existing_steps(survey).filter(|step| *step > newest) {
        note(&format!("step {later} is damaged or of a newer version, and is skipped"));
    }
    Some(newest)
}

/// Opens what `rank` saved of `step`, of the newest committed one if none is given; without a rank,
/// what rank 0 did.
pub(crate) fn any_rank(
    engine: &Engine,
    store: &StoreArgument,
    step: Option<u64>,
    rank: Option<u32>,
    doing: &str,
) -> Result<Checkpoint> {
    let step = match step {
        Some(step) => step,
        None => newest_whole(&engine.survey()?).ok_or_else(|| no_checkpoint(doing, store))?,
    };
    engine.checkpoint_of_rank(step, rank.unwrap_or(0))
}

/// [`any_rank`]; without a rank the checkpoint has to be of one rank: which of several is meant is
/// not guessed.
pub(crate) fn checkpoint(
    engine: &Engine,
    store: &StoreArgument,
    step: Option<u64>,
    rank: Option<u32>,
    doing: &str,
) -> Result<Checkpoint> {
    let checkpoint = any_rank(engine, store, step, rank, doing)?;
    if checkpoint.manifest().world_size != 1 && rank.is_none() {
        return Err(which_rank(doing, store, &checkpoint));
    }
    Ok(checkpoint)
}

/// Asks which of several ranks is meant.
pub(crate) fn which_rank(
    doing: &str,
    store: &StoreArgument,
    checkpoint: &Checkpoint,
) -> EngineError {
    let ranks = checkpoint.manifest().world_size;
    EngineError::invalid(
        format!("{doing} `{}`, step {}", store.display(), checkpoint.step()),
        format!("{ranks} ranks saved it"),
        format!(
            "choose a rank with `--rank R`, from 0 to {}; replicated entries are in every part",
            ranks - 1
        ),
    )
}
