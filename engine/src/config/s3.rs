//! Settings of a store in S3, and its address.
//!
//! Always holds: an address that was accepted makes keys of printable segments below its prefix and
//! nowhere else; a setting that is left out is what the AWS tools would take.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::{EngineError, Result};

/// What every address of an S3 store begins with.
pub const S3_SCHEME: &str = "s3://";
/// Default of [`S3Settings::part_bytes`].
const PART_BYTES_DEFAULT: u64 = 16 << 20;
/// Smallest part that the service takes, but for the last one.
const PART_BYTES_MIN: u64 = 5 << 20;
/// Largest part that the service takes.
const PART_BYTES_MAX: u64 = 5 << 30;
/// Longest prefix: what it leaves of a key's 1,024 bytes is enough for our own names.
const PREFIX_BYTES_MAX: usize = 900;

/// How a store in S3 is reached. Credentials come from the usual chain: environment, profile, web
/// identity, container, instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct S3Settings {
    /// Region of the bucket. Default: the usual chain's (`AWS_REGION`, profile, instance).
    pub region: Option<String>,
    /// Service to ask instead of AWS. Default: the usual chain's (`AWS_ENDPOINT_URL_S3`,
    /// `AWS_ENDPOINT_URL`, profile), else AWS.
    pub endpoint_url: Option<String>,
    /// Profile of the shared configuration files. Default: `AWS_PROFILE`, else `default`.
    pub profile: Option<String>,
    /// Whether the bucket stands in the path and not in the host's name. Default: true where an
    /// endpoint is named, here or in the environment.
    pub path_style: Option<bool>,
    /// File of PEM certificates that are trusted besides the system's. Default: `AWS_CA_BUNDLE`.
    pub ca_bundle: Option<PathBuf>,
    /// Milliseconds until a connection stands. Default 5,000; from 1 to 600,000.
    pub connect_timeout_ms: u64,
    /// Milliseconds until one attempt at a request, its body included, has its answer. Default
    /// 60,000; from 1 to 3,600,000.
    pub request_timeout_ms: u64,
    /// Attempts at a request before its failure is the caller's. Default 10; from 1 to 20.
    pub attempts: u32,
    /// Bytes of a part of an upload. Default 16 MiB, raised so that 10,000 parts suffice; from 5
    /// MiB to 5 GiB. A shard that is no larger is uploaded in one piece.
    pub part_bytes: u64,
    /// Bytes of parts in flight. Default 128 MiB; one part always may be.
    pub in_flight_bytes: u64,
}

impl Default for S3Settings {
    fn default() -> Self {
        Self {
            region: None,
            endpoint_url: None,
            profile: None,
            path_style: None,
            ca_bundle: None,
            connect_timeout_ms: 5_000,
            request_timeout_ms: 60_000,
            attempts: 10,
            part_bytes: PART_BYTES_DEFAULT,
            in_flight_bytes: 128 << 20,
        }
    }
}

impl S3Settings {
    pub(super) fn validate(&self) -> Result<()> {
        let ranges = [
            ("connect_timeout_ms", self.connect_timeout_ms, 1, 600_000),
            ("request_timeout_ms", self.request_timeout_ms, 1, 3_600_000),
            ("attempts", u64::from(self.attempts), 1, 20),
            ("part_bytes", self.part_bytes, PART_BYTES_MIN, PART_BYTES_MAX),
            ("in_flight_bytes", self.in_flight_bytes, PART_BYTES_MIN, 1 << 40),
        ];
        for (name, value, least, most) in ranges {
            if !(least..=most).contains(&value) {
                return Err(EngineError::invalid(
                    format!("setting `s3.{name}` = {value}"),
                    format!("from {least} to {most} is expected"),
                    "leave it at its default",
                ));
            }
        }
        let is_url = |url: &str| url.starts_with("http://") || url.starts_with("https://");
        match &self.endpoint_url {
            // Not shown: what stands before the `@` may be a secret.
            Some(url) if url.contains('@') => Err(EngineError::invalid(
                "setting `s3.endpoint_url`",
                "it holds an `@`: a URL with credentials in it is not accepted",
                "leave them out, and give them by AWS_PROFILE, or AWS_ACCESS_KEY_ID and \
                 AWS_SECRET_ACCESS_KEY",
            )),
            Some(url) if !is_url(url) => Err(EngineError::invalid(
                format!("setting `s3.endpoint_url` = `{url}`"),
                "a URL that begins with `http://` or `https://` is expected",
                "name scheme, host and port, as in `https://minio.example:9000`",
            )),
            _ => Ok(()),
        }
    }
}

/// Credentials that are given by the program instead of found by the usual chain. Never stored, and
/// not shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct S3Credentials {
    /// The public half.
    pub access_key_id: String,
    /// The secret half.
    pub secret_access_key: String,
    /// Of temporary credentials.
    pub session_token: Option<String>,
}

impl fmt::Debug for S3Credentials {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("S3Credentials")
            .field("access_key_id", &self.access_key_id)
            .finish_non_exhaustive()
    }
}

/// A bucket, and the prefix in it that is the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct S3Address {
    bucket: String,
    /// Segments between single slashes; none at its ends; may be empty.
    prefix: String,
}

impl S3Address {
    /// Reads `s3://bucket/prefix`; `None` if the text does not begin with the scheme.
    pub(crate) fn parse(text: &str) -> Option<Result<Self>> {
        let rest = text.strip_prefix(S3_SCHEME)?;
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
        let why = objection(bucket, prefix);
        Some(why.map_or_else(
            || Ok(Self { bucket: bucket.into(), prefix: prefix.into() }),
            |why| {
                Err(EngineError::invalid(
                    format!("setting `path` = `{text}`"),
                    why,
                    "name a bucket and, if it holds more than one store, a prefix: \
                     `s3://bucket/runs/gpt`",
                ))
            },
        ))
    }

    /// The bucket.
    pub(crate) fn bucket(&self) -> &str {
        &self.bucket
    }

    /// The key of what is called `name` in the store.
    pub(crate) fn key(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.into() } else { format!("{}/{name}", self.prefix) }
    }
}

impl fmt::Display for S3Address {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        write!(formatter, "{S3_SCHEME}{}{slash}{}", self.bucket, self.prefix)
    }
}

/// What is wrong with a bucket's name or a prefix, if anything is.
fn objection(bucket: &str, prefix: &str) -> Option<String> {
    let in_bucket = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
    if !(3..=63).contains(&bucket.len()) || !bucket.bytes().all(in_bucket) {
        return Some(format!(
            "`{bucket}` is no bucket's name: 3 to 63 letters, digits, dots and hyphens are expected"
        ));
    }
    if prefix.len() > PREFIX_BYTES_MAX {
        return Some(format!("its prefix has {} bytes of {PREFIX_BYTES_MAX}", prefix.len()));
    }
    let is_odd =
        |segment: &str| ["", ".", ".."].contains(&segment) || segment.chars().any(char::is_control);
    let odd = prefix.split('/').find(|segment| is_odd(segment)).filter(|_| !prefix.is_empty())?;
    Some(format!("its prefix has the segment {odd:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> S3Address {
        S3Address::parse(text).unwrap().unwrap()
    }

    #[test]
    fn addresses_are_read_and_shown() {
        assert!(S3Address::parse("runs/gpt").is_none());
        let bare = parse("s3://bucket/");
        assert_eq!((bare.bucket(), bare.key("x")), ("bucket", "x".into()));
        assert_eq!(bare.to_string(), "s3://bucket");
        let store = parse("s3://my-bucket/runs/gpt/");
        assert_eq!((store.bucket(), store.key("x")), ("my-bucket", "runs/gpt/x".into()));
        assert_eq!(store.to_string(), "s3://my-bucket/runs/gpt");
    }

    #[test]
    fn what_could_leave_the_store_is_refused() {
        for text in [
            "s3://",
            "s3:///key",
            "s3://ab",
            "s3://bu cket/x",
            "s3://bucket?x/y",
            "s3://user:secret@bucket/x",
            "s3://bucket//x",
            "s3://bucket/x//y",
            "s3://bucket/x/../y",
            "s3://bucket/./y",
            "s3://bucket/x\ny",
            "s3://bucket/x//",
        ] {
            let error = S3Address::parse(text).unwrap().unwrap_err();
            assert!(matches!(error, EngineError::InvalidArgument { .. }), "{text}: {error}");
        }
        assert!(S3Address::parse(&format!("s3://bucket/{}", "x".repeat(901))).unwrap().is_err());
    }

    #[test]
    fn settings_have_ranges() {
        S3Settings::default().validate().unwrap();
        let wrong = [
            S3Settings { attempts: 0, ..S3Settings::default() },
            S3Settings { part_bytes: 1 << 20, ..S3Settings::default() },
            S3Settings { request_timeout_ms: 0, ..S3Settings::default() },
            S3Settings { endpoint_url: Some("localhost:9000".into()), ..S3Settings::default() },
        ];
        for settings in wrong {
            assert!(settings.validate().is_err(), "{settings:?}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        let credentials = S3Credentials {
            access_key_id: "AKID".into(),
            secret_access_key: "hush".into(),
            session_token: Some("hush too".into()),
        };
        assert_eq!(format!("{credentials:?}"), "S3Credentials { access_key_id: \"AKID\", .. }");
        let endpoint_url = Some("https://user:hush@host".into());
        let error = S3Settings { endpoint_url, ..S3Settings::default() }.validate().unwrap_err();
        assert!(!error.to_string().contains("hush"), "{error}");
    }

    proptest! {
        #[test]
        fn every_key_lies_below_the_prefix(text in "s3://[a-z./\\\\%\u{0}-\u{1f} ]{0,40}") {
            if let Some(Ok(address)) = S3Address::parse(&text) {
                let key = address.key("step-000000000001/manifest.json");
                prop_assert!(!key.starts_with('/') && !key.contains("//") && !key.contains("/../"));
                let whole = format!("{S3_SCHEME}{}/{key}", address.bucket());
                prop_assert!(whole.starts_with(text.strip_suffix('/').unwrap_or(&text)));
            }
        }
    }
}
