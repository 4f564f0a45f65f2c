//! `coordinator.toml`: where values come from, what they must be together, and what they say.
//!
//! Values come, the later one winning, from: the defaults, the file, the environment
//! (`DTRUNTIME_<SECTION>_<KEY>`), the command line.
//!
//! Always holds: a key that is not in [`KEYS`] is an error that suggests the nearest one; a value
//! that is out of its range is an error that names key, value, range and where it came from; what
//! is printed by `--print-config` can be read again; the environment is asked at
//! [`Config::load`] alone.

mod keys;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::auth::Auth;
use crate::state::Policy;

pub use keys::{KEYS, Key};

/// A configuration that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {why}\nhint: {hint}")]
pub struct ConfigError {
    what: String,
    why: String,
    hint: String,
}

impl ConfigError {
    fn new(what: impl Into<String>, why: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.into(), hint: hint.into() }
    }

    /// What failed and why, and how to go on.
    pub(crate) fn parts(&self) -> (String, &str) {
        (format!("{}: {}", self.what, self.why), &self.hint)
    }
}

/// Every setting with its value.
#[derive(Clone, Debug)]
pub struct Config {
    values: BTreeMap<&'static str, BTreeMap<&'static str, Value>>,
    surroundings: Surroundings,
}

/// What the environment says beside the keys.
#[derive(Clone, Default)]
struct Surroundings {
    /// Where the journal is if no key says it.
    state_folder: PathBuf,
    /// Who may call if no key says it.
    token: Option<String>,
}

impl fmt::Debug for Surroundings {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Surroundings({}, a token is not shown)", self.state_folder.display())
    }
}

impl Surroundings {
    fn of(environment: impl Fn(&str) -> Option<OsString>) -> Self {
        let of = |name: &str| environment(name).filter(|value| !value.is_empty());
        let state_folder = of("STATE_DIRECTORY")
            .map(PathBuf::from)
            .or_else(|| of("XDG_STATE_HOME").map(|home| Path::new(&home).join("dtruntime")))
            .or_else(|| of("HOME").map(|home| Path::new(&home).join(".local/state/dtruntime")))
            .unwrap_or_default();
        let token = environment("COORDINATOR_TOKEN").and_then(|token| token.into_string().ok());
        Self { state_folder, token }
    }
}

/// PEM files, read.
#[derive(Debug)]
pub struct TlsFiles {
    /// The certificate and what signed it.
    pub cert: Vec<u8>,
    /// Its key.
    pub key: Vec<u8>,
    /// What signs clients' certificates, if they are asked for one.
    pub client_ca: Option<Vec<u8>>,
}

/// Where a configuration comes from.
#[derive(Debug, Default)]
pub struct Sources {
    /// The file that was named; else `coordinator.toml` in the working directory, if it is there.
    pub file: Option<PathBuf>,
    /// `section.key=value`, in order.
    pub overrides: Vec<String>,
}

impl Default for Config {
    fn default() -> Self {
        let mut values: BTreeMap<&'static str, BTreeMap<&'static str, Value>> = BTreeMap::new();
        for key in KEYS {
            let section = values.entry(key.section).or_default();
            if !key.default.is_empty() {
                let parsed: Table = toml::from_str(&format!("x = {}", key.default))
                    .expect("the table's defaults are TOML");
                section.insert(key.name, parsed["x"].clone());
            }
        }
        Self { values, surroundings: Surroundings::default() }
    }
}

impl Config {
    /// Puts all sources together and checks the result.
    pub fn load(
        sources: &Sources,
        environment: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, ConfigError> {
        let surroundings = Surroundings::of(&environment);
        let mut config = Self { surroundings, ..Self::default() };
        let found = Path::new("coordinator.toml");
        let file = sources.file.as_deref().or_else(|| found.exists().then_some(found));
        if let Some(file) = file {
            config.read_file(file)?;
        }
        for key in KEYS {
            let name = format!("DTRUNTIME_{}_{}", key.section, key.name).to_uppercase();
            if let Some(text) = environment(&name).and_then(|text| text.into_string().ok()) {
                config.set(key, key.value_of(&text), &format!("environment `{name}`"))?;
            }
        }
        for text in &sources.overrides {
            config.set_override(text)?;
        }
        config.check()?;
        Ok(config)
    }

    /// The defaults with these changes, whatever is in the working directory and the environment.
    pub fn of(overrides: &[String]) -> Result<Self, ConfigError> {
        let mut config = Self::default();
        for text in overrides {
            config.set_override(text)?;
        }
        config.check()?;
        Ok(config)
    }

    fn read_file(&mut self, file: &Path) -> Result<(), ConfigError> {
        let shown = file.display();
        let text = fs::read_to_string(file).map_err(|error| {
            ConfigError::new(
                format!("reading `{shown}`"),
                error.to_string(),
                "name a file that exists and can be read: `--config coordinator.toml`",
            )
        })?;
        self.read(&text, &format!("`{shown}`"))
    }

    fn read(&mut self, text: &str, origin: &str) -> Result<(), ConfigError> {
        let table: Table = toml::from_str(text).map_err(|error| {
            ConfigError::new(origin, error.to_string().trim_end(), "correct the TOML at this place")
        })?;
        for (section, body) in table {
            let sections = KEYS.iter().map(|key| key.section);
            if !sections.clone().any(|known| known == section) {
                let what = format!("section `[{section}]` in {origin}");
                return Err(unknown(what, &section, sections));
            }
            let Value::Table(body) = body else {
                return Err(ConfigError::new(
                    format!("key `{section}` in {origin}"),
                    "a section is expected",
                    format!("write `[{section}]` on a line of its own, its keys below"),
                ));
            };
            for (name, value) in body {
                self.set(find(&section, &name, origin)?, value, origin)?;
            }
        }
        Ok(())
    }

    fn set_override(&mut self, text: &str) -> Result<(), ConfigError> {
        let origin = "the command line";
        let parts = text.split_once('=').and_then(|(name, value)| {
            let (section, name) = name.trim().split_once('.')?;
            Some((section, name, value.trim()))
        });
        let Some((section, name, value)) = parts else {
            return Err(ConfigError::new(
                format!("`--set {text}`"),
                "`section.key=value` is expected",
                "for example `--set coordinator.heartbeat_timeout_ms=10000`",
            ));
        };
        let key = find(section, name, origin)?;
        self.set(key, key.value_of(value), origin)
    }

    fn set(&mut self, key: &Key, value: Value, origin: &str) -> Result<(), ConfigError> {
        check_value(key, &value, origin)?;
        self.values.entry(key.section).or_default().insert(key.name, value);
        Ok(())
    }

    /// Rules about more than one key.
    fn check(&self) -> Result<(), ConfigError> {
        let interval = self.integer("heartbeat_interval_ms");
        let timeout = self.integer("heartbeat_timeout_ms");
        if timeout < 3 * interval {
            return Err(ConfigError::new(
                format!("`coordinator.heartbeat_timeout_ms` = {timeout}"),
                format!(
                    "at least three times `heartbeat_interval_ms`, {}, is expected: one lost \
                     heartbeat must not kill a worker",
                    3 * interval
                ),
                "raise the timeout, or lower the interval",
            ));
        }
        let storage = &self.values["storage"];
        if storage.get("backend").and_then(Value::as_str) == Some("s3")
            && !storage.contains_key("bucket")
        {
            return Err(ConfigError::new(
                "`storage.backend` = \"s3\"",
                "`storage.bucket` is not set",
                "name the bucket: `bucket = \"my-checkpoints\"`",
            ));
        }
        Ok(())
    }

    fn get(&self, name: &str) -> Option<&Value> {
        self.values["coordinator"].get(name)
    }

    fn integer(&self, name: &str) -> u64 {
        let value = self.get(name).and_then(Value::as_integer).unwrap_or_default();
        u64::try_from(value).unwrap_or_default()
    }

    /// Where workers connect.
    pub fn address(&self) -> &str {
        self.get("address").and_then(Value::as_str).unwrap_or_default()
    }

    /// Where Prometheus connects, if it may.
    pub fn metrics_address(&self) -> Option<&str> {
        let address = self.get("metrics_address").and_then(Value::as_str);
        address.filter(|address| *address != "off")
    }

    /// How many connections are taken at a time.
    pub fn connections_max(&self) -> usize {
        usize::try_from(self.integer("connections_max")).unwrap_or(usize::MAX)
    }

    /// The file that survives restarts, for a coordinator that listens on `port`.
    pub fn state_path(&self, port: u16) -> PathBuf {
        if let Some(path) = self.get("state_path").and_then(Value::as_str) {
            return path.into();
        }
        self.surroundings.state_folder.join(format!("coordinator-{port}.redb"))
    }

    /// How patient the coordinator is, and what it tells workers.
    pub fn policy(&self) -> Policy {
        let told = ["storage", "checkpoint", "dataset"].iter().flat_map(|section| {
            let keys = self.values[section].iter();
            keys.map(move |(name, value)| (format!("{section}.{name}"), value.to_string()))
        });
        Policy {
            heartbeat_interval_ms: self.integer("heartbeat_interval_ms"),
            heartbeat_timeout_ms: self.integer("heartbeat_timeout_ms"),
            max_worker_failures: u32::try_from(self.integer("max_worker_failures"))
                .unwrap_or(u32::MAX),
            failure_backoff_ms: self.integer("failure_backoff_ms"),
            progress_timeout_ms: self.integer("progress_timeout_ms"),
            checkpoint_timeout_ms: self.integer("checkpoint_timeout_ms"),
            settings: told.collect(),
            ..Policy::default()
        }
    }

    /// Who may call: the file of `token`, else the environment's COORDINATOR_TOKEN, else anybody.
    pub fn auth(&self) -> Result<Auth, ConfigError> {
        let Some(path) = self.get("token").and_then(Value::as_str) else {
            let Some(token) = &self.surroundings.token else { return Ok(Auth::default()) };
            return Auth::parse(token).map_err(|why| {
                ConfigError::new("environment `COORDINATOR_TOKEN`", why, "set one long token")
            });
        };
        let text = read_named("token", path)?;
        let text = String::from_utf8_lossy(&text);
        Auth::parse(&text).map_err(|why| {
            ConfigError::new(
                format!("`coordinator.token` = \"{path}\""),
                why,
                "write a line `TOKEN` for all jobs, or `JOB TOKEN` for one",
            )
        })
    }

    /// The PEM files, if TLS is on.
    pub fn tls(&self) -> Result<Option<TlsFiles>, ConfigError> {
        let Some(table) = self.get("tls").and_then(Value::as_table) else { return Ok(None) };
        let file = |name: &str| -> Result<Option<Vec<u8>>, ConfigError> {
            let path = table.get(name).and_then(Value::as_str);
            path.map(|path| read_named(&format!("tls.{name}"), path)).transpose()
        };
        let (Some(cert), Some(key)) = (file("cert")?, file("key")?) else {
            return Err(ConfigError::new(
                "`coordinator.tls`",
                "`cert` and `key` are both needed",
                "write `tls = { cert = \"server.pem\", key = \"server.key\" }`",
            ));
        };
        Ok(Some(TlsFiles { cert, key, client_ca: file("client_ca")? }))
    }

    /// The error for PEM files that TLS does not take.
    pub(crate) fn tls_refused(&self, why: &str) -> ConfigError {
        let shown = self.get("tls").map(Value::to_string).unwrap_or_default();
        ConfigError::new(
            format!("`coordinator.tls` = {shown}"),
            why,
            "check that the files are PEM, and that the key belongs to the certificate: \
             `openssl x509 -in cert -noout -text`",
        )
    }

    /// The whole configuration as TOML that can be read again, each key with its meaning.
    pub fn print(&self) -> String {
        let mut text = String::new();
        let mut section = "";
        for key in KEYS {
            if key.section != section {
                section = key.section;
                let gap = if text.is_empty() { "" } else { "\n" };
                writeln!(text, "{gap}[{section}]").expect("strings grow");
            }
            let meaning = format!("{}; {}", key.meaning, key.range());
            match self.values[section].get(key.name) {
                Some(value) => writeln!(text, "{} = {value}  # {meaning}", key.name),
                None => writeln!(text, "# {} =  # {meaning}; unset", key.name),
            }
            .expect("strings grow");
        }
        text
    }
}

fn find(section: &str, name: &str, origin: &str) -> Result<&'static Key, ConfigError> {
    let of_section = KEYS.iter().filter(|key| key.section == section);
    if let Some(key) = of_section.clone().find(|key| key.name == name) {
        return Ok(key);
    }
    let what = format!("key `{section}.{name}` in {origin}");
    if let Some(other) = KEYS.iter().find(|key| key.name == name) {
        return Err(ConfigError::new(
            what,
            "no such key",
            format!("it belongs in section `[{}]`", other.section),
        ));
    }
    Err(unknown(what, name, of_section.map(|key| key.name)))
}

fn unknown(
    what: String,
    given: &str,
    known: impl Iterator<Item = &'static str> + Clone,
) -> ConfigError {
    let near = known
        .clone()
        .map(|name| (strsim::jaro_winkler(given, name), name))
        .max_by(|one, other| one.0.total_cmp(&other.0))
        .filter(|(likeness, _)| *likeness > 0.7);
    let mut names: Vec<&str> = known.collect();
    names.dedup();
    let hint = near.map_or_else(
        || format!("known: `{}`", names.join("`, `")),
        |(_, name)| format!("did you mean `{name}`?"),
    );
    ConfigError::new(what, "no such name", hint)
}

fn check_value(key: &Key, value: &Value, origin: &str) -> Result<(), ConfigError> {
    if key.takes(value) {
        return Ok(());
    }
    let expected = key.range();
    let hint = if key.default.is_empty() {
        format!("it is {}; leave it out to keep it unset", key.meaning)
    } else {
        format!("it is {}; the default is {}", key.meaning, key.default)
    };
    Err(ConfigError::new(
        format!("`{}.{}` = {value} in {origin}", key.section, key.name),
        format!("{expected} is expected"),
        hint,
    ))
}

/// Reads the file that a key of `[coordinator]` names.
fn read_named(name: &str, path: &str) -> Result<Vec<u8>, ConfigError> {
    fs::read(path).map_err(|error| {
        ConfigError::new(
            format!("`coordinator.{name}` = \"{path}\""),
            error.to_string(),
            "name a file that the coordinator's user can read",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        config.read(text, "`test.toml`")?;
        config.check()?;
        Ok(config)
    }

    fn loaded(overrides: &[&str], environment: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().expect("a scratch directory");
        let file = folder.path().join("c.toml");
        fs::write(&file, "[coordinator]\nheartbeat_interval_ms = 2000\n").expect("it is ours");
        let overrides = overrides.iter().map(|&text| text.to_owned()).collect();
        Config::load(&Sources { file: Some(file), overrides }, |name| {
            let found = environment.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).into())
        })
    }

    #[test]
    fn the_guides_file_is_read() {
        let config = read(include_str!("../../tests/guide.toml")).expect("the guide is right");
        let policy = config.policy();
        assert_eq!(config.address(), "0.0.0.0:50051");
        assert_eq!(policy.heartbeat_timeout_ms, 30_000);
        assert_eq!(policy.settings["storage.bucket"], "\"my-checkpoints\"");
        assert_eq!(policy.settings["checkpoint.keep_last_n"], "5");
        assert_eq!(policy.settings["dataset.cache_size_gb"], "10");
    }

    #[test]
    fn later_sources_win() {
        let interval = |config: Config| config.policy().heartbeat_interval_ms;
        let name = "DTRUNTIME_COORDINATOR_HEARTBEAT_INTERVAL_MS";
        assert_eq!(interval(loaded(&[], &[]).expect("file")), 2_000);
        assert_eq!(interval(loaded(&[], &[(name, "500")]).expect("environment")), 500);
        let set = ["coordinator.heartbeat_interval_ms=250"];
        assert_eq!(interval(loaded(&set, &[(name, "500")]).expect("flag")), 250);
    }

    #[test]
    fn the_environment_says_where_the_journal_lies_and_who_may_call() {
        let path = |environment: &[(&str, &str)]| {
            loaded(&[], environment).expect("it is right").state_path(7)
        };
        assert_eq!(path(&[]), Path::new("coordinator-7.redb"));
        let home = ("HOME", "/home/a");
        let below_home = Path::new("/home/a/.local/state/dtruntime/coordinator-7.redb");
        assert_eq!(path(&[home]), below_home);
        let (xdg, none) = (("XDG_STATE_HOME", "/x"), ("STATE_DIRECTORY", ""));
        assert_eq!(path(&[home, xdg, none]), Path::new("/x/dtruntime/coordinator-7.redb"));
        let given = ("STATE_DIRECTORY", "/s");
        assert_eq!(path(&[home, xdg, given]), Path::new("/s/coordinator-7.redb"));
        let token = ("COORDINATOR_TOKEN", "a-token-that-is-long");
        let config = loaded(&[], &[token]).expect("it is right");
        assert!(!config.auth().expect("it is long").is_open());
        assert!(!format!("{config:?}").contains(token.1));
        let error = loaded(&[], &[("COORDINATOR_TOKEN", "short")]).expect("it is read").auth();
        assert!(error.expect_err("it is short").to_string().contains("COORDINATOR_TOKEN"));
    }

    #[test]
    fn what_is_printed_can_be_read() {
        let config = read("[storage]\nbackend = \"local\"\n[coordinator]\ntls = {cert = \"a\"}\n")
            .expect("it is right");
        let again = read(&config.print()).expect("it was printed");
        assert_eq!(again.print(), config.print());
    }

    #[test]
    fn mistakes_are_named() {
        for (text, expected) in [
            (
                "[coordinator]\nheartbeat_timeot_ms = 5",
                "key `coordinator.heartbeat_timeot_ms` in `test.toml`: no such name\n\
                 hint: did you mean `heartbeat_timeout_ms`?",
            ),
            (
                "[cordinator]",
                "section `[cordinator]` in `test.toml`: no such name\n\
                 hint: did you mean `coordinator`?",
            ),
            (
                "[coordinator]\nbucket = \"b\"",
                "key `coordinator.bucket` in `test.toml`: no such key\nhint: it belongs in \
                 section `[storage]`",
            ),
            (
                "[coordinator]\nmax_worker_failures = 0",
                "`coordinator.max_worker_failures` = 0 in `test.toml`: a whole number from 1 to \
                 1000000 is expected\nhint: it is at how many failures since the last checkpoint a \
                 job is aborted; the default is 3",
            ),
            (
                "[checkpoint]\ncompression = \"gzpi\"",
                "`checkpoint.compression` = \"gzpi\" in `test.toml`: one of `auto`, `none`, \
                 `float`, `zstd`, `gzip` is expected\nhint: it is how checkpoints are compressed; \
                 leave it out to keep it unset",
            ),
            (
                "[coordinator]\nheartbeat_timeout_ms = 2000",
                "`coordinator.heartbeat_timeout_ms` = 2000: at least three times \
                 `heartbeat_interval_ms`, 3000, is expected: one lost heartbeat must not kill a \
                 worker\nhint: raise the timeout, or lower the interval",
            ),
            (
                "[storage]\nbackend = \"s3\"",
                "`storage.backend` = \"s3\": `storage.bucket` is not set\n\
                 hint: name the bucket: `bucket = \"my-checkpoints\"`",
            ),
            (
                "coordinator = 5",
                "key `coordinator` in `test.toml`: a section is expected\n\
                 hint: write `[coordinator]` on a line of its own, its keys below",
            ),
        ] {
            assert_eq!(read(text).expect_err(text).to_string(), expected);
        }
    }

    #[test]
    fn every_key_has_its_range_checked() {
        for key in KEYS {
            let wrong =
                if matches!(key.kind, keys::Kind::Text | keys::Kind::Path) { "7" } else { "\"?\"" };
            let text = format!("[{}]\n{} = {wrong}", key.section, key.name);
            let error = read(&text).expect_err(&text).to_string();
            assert!(error.contains(&format!("`{}.{}`", key.section, key.name)), "{error}");
            assert!(error.contains("is expected") && error.contains("hint: "), "{error}");
        }
    }
}
