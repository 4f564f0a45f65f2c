//! Every key: its kind, default, range and meaning, in one table.
//!
//! Always holds: a key's default, if it has one, is TOML and within the key's range; a name stands
//! in one section.

use toml::{Table, Value};

/// One setting.
#[derive(Debug)]
pub struct Key {
    pub(super) section: &'static str,
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    /// As TOML; empty if the key is unset by default.
    pub(super) default: &'static str,
    /// What it means, with its unit.
    pub(super) meaning: &'static str,
}

/// What values a key takes.
#[derive(Debug)]
pub(super) enum Kind {
    Text,
    Path,
    Address,
    /// Both ends count.
    Integer(i64, i64),
    Flag,
    Choice(&'static [&'static str]),
    /// A table of paths.
    Paths(&'static [&'static str]),
}

const DAY_MS: i64 = 86_400_000;

/// Every key.
pub const KEYS: &[Key] = &[
    key("coordinator", "address", Kind::Address, "\"127.0.0.1:50051\"", "where workers connect"),
    key(
        "coordinator",
        "heartbeat_interval_ms",
        Kind::Integer(10, 60_000),
        "1000",
        "how often workers send heartbeats, in milliseconds",
    ),
    key(
        "coordinator",
        "heartbeat_timeout_ms",
        Kind::Integer(50, 3_600_000),
        "30000",
        "after how long without a heartbeat a worker is dead, in milliseconds",
    ),
    key(
        "coordinator",
        "max_worker_failures",
        Kind::Integer(1, 1_000_000),
        "3",
        "at how many failures since the last checkpoint a job is aborted",
    ),
    key(
        "coordinator",
        "failure_backoff_ms",
        Kind::Integer(0, 3_600_000),
        "5000",
        "how long a dead worker's rank is kept for it before another may take it, in milliseconds",
    ),
    key(
        "coordinator",
        "progress_timeout_ms",
        Kind::Integer(0, DAY_MS),
        "600000",
        "after how long without progress a worker that reports it counts as stalled; 0 is never",
    ),
    key(
        "coordinator",
        "checkpoint_timeout_ms",
        Kind::Integer(1_000, DAY_MS),
        "3600000",
        "how long a checkpoint of many ranks may take, in milliseconds",
    ),
    key(
        "coordinator",
        "metrics_address",
        Kind::Address,
        "\"0.0.0.0:9090\"",
        "where Prometheus connects; \"off\" for nowhere",
    ),
    key(
        "coordinator",
        "connections_max",
        Kind::Integer(1, 1_000_000),
        "20000",
        "how many connections are accepted at a time",
    ),
    key(
        "coordinator",
        "state_path",
        Kind::Path,
        "",
        "the file that survives restarts; by default below $STATE_DIRECTORY, $XDG_STATE_HOME or \
         ~/.local/state",
    ),
    key(
        "coordinator",
        "token",
        Kind::Path,
        "",
        "a file of tokens: lines of `TOKEN` or `JOB TOKEN`",
    ),
    key(
        "coordinator",
        "tls",
        Kind::Paths(&["cert", "key", "client_ca"]),
        "",
        "PEM files: the certificate, its key, and what signs clients' certificates (mutual TLS)",
    ),
    key("storage", "backend", Kind::Choice(&["local", "s3"]), "", "where checkpoints are stored"),
    key("storage", "bucket", Kind::Text, "", "the S3 bucket"),
    key("storage", "region", Kind::Text, "", "the AWS region"),
    key("storage", "endpoint", Kind::Text, "", "the URL of an S3-compatible store"),
    key("storage", "path", Kind::Text, "", "the directory, or the prefix within the bucket"),
    key(
        "checkpoint",
        "interval_steps",
        Kind::Integer(1, 1_000_000_000),
        "",
        "save every so many steps",
    ),
    key("checkpoint", "keep_last_n", Kind::Integer(1, 1_000_000), "", "keep so many checkpoints"),
    key(
        "checkpoint",
        "compression",
        Kind::Choice(&["auto", "none", "float", "zstd", "gzip"]),
        "",
        "how checkpoints are compressed",
    ),
    key("checkpoint", "async_write", Kind::Flag, "", "whether training goes on during a write"),
    key(
        "dataset",
        "default_shard_size",
        Kind::Integer(1, 1_000_000_000_000),
        "",
        "samples in a shard where a dataset does not say",
    ),
    key("dataset", "prefetch_shards", Kind::Integer(0, 1_024), "", "shards to read ahead"),
    key("dataset", "cache_size_gb", Kind::Integer(0, 1_000_000), "", "gigabytes of cached shards"),
];

const fn key(
    section: &'static str,
    name: &'static str,
    kind: Kind,
    default: &'static str,
    meaning: &'static str,
) -> Key {
    Key { section, name, kind, default, meaning }
}

impl Key {
    /// A value that was written outside TOML, as the key's kind wants it.
    pub(super) fn value_of(&self, text: &str) -> Value {
        let parsed: Option<Value> = match self.kind {
            Kind::Integer(..) => text.parse().ok().map(Value::Integer),
            Kind::Flag => text.parse().ok().map(Value::Boolean),
            Kind::Paths(_) => toml::from_str::<Table>(&format!("x = {text}"))
                .ok()
                .and_then(|mut table| table.remove("x")),
            Kind::Text | Kind::Path | Kind::Address | Kind::Choice(_) => None,
        };
        parsed.unwrap_or_else(|| Value::String(text.to_owned()))
    }

    /// Whether the value is of the key's kind and within its range.
    pub(super) fn takes(&self, value: &Value) -> bool {
        match (&self.kind, value) {
            (Kind::Text | Kind::Path, Value::String(text)) => !text.is_empty(),
            (Kind::Address, Value::String(text)) => is_address(text) || self.is_off(text),
            (Kind::Integer(least, most), Value::Integer(number)) => {
                (*least..=*most).contains(number)
            }
            (Kind::Flag, Value::Boolean(_)) => true,
            (Kind::Choice(choices), Value::String(text)) => choices.contains(&text.as_str()),
            (Kind::Paths(names), Value::Table(table)) => {
                table.iter().all(|(name, path)| names.contains(&name.as_str()) && path.is_str())
            }
            _ => false,
        }
    }

    fn is_off(&self, text: &str) -> bool {
        self.name == "metrics_address" && text == "off"
    }

    /// What it takes, in words.
    pub(super) fn range(&self) -> String {
        match &self.kind {
            Kind::Text => "a text".to_owned(),
            Kind::Path => "a path".to_owned(),
            Kind::Address => "`host:port`".to_owned(),
            Kind::Integer(least, most) => format!("a whole number from {least} to {most}"),
            Kind::Flag => "true or false".to_owned(),
            Kind::Choice(choices) => format!("one of `{}`", choices.join("`, `")),
            Kind::Paths(names) => format!("a table with paths for `{}`", names.join("`, `")),
        }
    }
}

fn is_address(text: &str) -> bool {
    text.rsplit_once(':')
        .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_within_its_range_and_no_key_is_there_twice() {
        for key in KEYS {
            let value: Option<Table> = (!key.default.is_empty())
                .then(|| toml::from_str(&format!("x = {}", key.default)).unwrap());
            assert!(value.is_none_or(|table| key.takes(&table["x"])), "{}", key.name);
            let namesakes = KEYS.iter().filter(|other| other.name == key.name);
            assert_eq!(namesakes.count(), 1, "{}", key.name);
        }
    }
}
