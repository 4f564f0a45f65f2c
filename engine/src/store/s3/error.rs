//! What the service, or the way to it, refused: as errors that say what to do.
//!
//! Always holds: a message names the operation, bucket and key, what the service said with its code
//! and the request's id, and a hint; none holds a credential.

use std::error::Error;
use std::fmt::Debug;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::RequestId;

use crate::EngineError;

/// A request that failed, for good.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// The service's own word for it, such as `NoSuchKey`; empty where it gave none.
    pub(super) code: String,
    /// The status of the answer; 0 where there was none.
    pub(super) status: u16,
    /// All that is known, for people.
    text: String,
    /// The region that the service says the bucket is in.
    region: Option<String>,
}

impl Failure {
    pub(super) fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + Debug + 'static,
    {
        let service = error.as_service_error();
        let response = error.raw_response();
        let code = service.and_then(ProvideErrorMetadata::code).unwrap_or_default().to_owned();
        let status = response.map_or(0, |response| response.status().as_u16());
        let header = |name: &str| response.and_then(|response| response.headers().get(name));
        let mut text = match service {
            Some(service) => told(&code, status, service.message()),
            None => chain(error),
        };
        let id = service.and_then(|_| error.request_id()).or_else(|| header("x-amz-request-id"));
        if let Some(id) = id {
            text = format!("{text} (request id {id})");
        }
        Self { code, status, text, region: header("x-amz-bucket-region").map(Into::into) }
    }

    /// One that only the message identifies.
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self { code: String::new(), status: 0, text: text.into(), region: None }
    }

    /// The object, or the upload, is not there; the bucket is.
    pub(super) fn is_missing(&self) -> bool {
        ["NoSuchKey", "NotFound", "NoSuchUpload"].contains(&self.code.as_str())
            || (self.code.is_empty() && self.status == 404)
    }

    /// A condition of the request does not hold.
    fn is_precondition(&self) -> bool {
        self.code == "PreconditionFailed" || self.status == 412
    }

    /// Another request for the same key was under way.
    fn is_conflict(&self) -> bool {
        ["ConditionalRequestConflict", "OperationAborted"].contains(&self.code.as_str())
            || self.status == 409
    }

    /// Another writer may have been there: look again.
    pub(super) fn is_race(&self) -> bool {
        self.is_precondition() || self.is_conflict()
    }

    /// The service does not know a part of the request.
    pub(super) fn is_unknown(&self) -> bool {
        ["NotImplemented", "InvalidRequest", "InvalidArgument", "UnsupportedArgument"]
            .contains(&self.code.as_str())
            || self.status == 501
    }

    /// The credentials do not allow it.
    pub(super) fn is_denied(&self) -> bool {
        self.code == "AccessDenied" || (self.code.is_empty() && [401, 403].contains(&self.status))
    }

    /// As an error of what was being done.
    pub(super) fn into_error(self, what: impl Into<String>) -> EngineError {
        let (what, why) = (what.into(), self.text.clone());
        match self.advice() {
            Advice::NoBucket => EngineError::NotFound {
                what,
                why,
                hint: "check the bucket's name, or create it in this account and region".into(),
            },
            Advice::NoSpace => EngineError::NoSpace {
                what,
                why,
                hint: "free space or raise the quota, then save again; earlier checkpoints are \
                       untouched"
                    .into(),
            },
            Advice::Region => EngineError::InvalidArgument {
                what,
                why,
                hint: match &self.region {
                    Some(region) => format!(
                        "the bucket is in `{region}`: pass `s3={{\"region\": \"{region}\"}}`, or \
                         set AWS_REGION"
                    ),
                    None => "name the bucket's region: `s3={\"region\": ...}` or AWS_REGION".into(),
                },
            },
            Advice::Retry(hint) => EngineError::Unavailable { what, why, hint: hint.into() },
        }
    }

    fn advice(&self) -> Advice {
        let retry = |hint| Advice::Retry(hint);
        match (self.code.as_str(), self.status) {
            ("NoSuchBucket", _) => Advice::NoBucket,
            ("QuotaExceeded" | "QuotaExceededException" | "XMinioStorageFull", _) | (_, 507) => {
                Advice::NoSpace
            }
            (
                "PermanentRedirect"
                | "TemporaryRedirect"
                | "AuthorizationHeaderMalformed"
                | "IllegalLocationConstraintException",
                _,
            )
            | (_, 301 | 307) => Advice::Region,
            ("ExpiredToken" | "ExpiredTokenException" | "RequestExpired", _) => retry(
                "the credentials have expired: renew them and open the store again, or use \
                     some that renew themselves (a role, SSO, `credential_process`); earlier \
                     checkpoints are untouched",
            ),
            ("InvalidObjectState", _) => retry(
                "a lifecycle rule has archived it: restore the object (`aws s3api restore-object`) \
                 and exempt checkpoints from that rule",
            ),
            ("RequestTimeTooSkewed", _) => {
                retry("this machine's clock is wrong: set it, for example with `chronyc makestep`")
            }
            (
                "InvalidAccessKeyId"
                | "NotSignedUp"
                | "SignatureDoesNotMatch"
                | "InvalidToken"
                | "InvalidSecurity",
                _,
            ) => retry("check the credentials: `aws sts get-caller-identity` shows whose they are"),
            ("AccessDenied" | "AllAccessDisabled" | "AccountProblem", _) | (_, 401 | 403) => retry(
                "allow this on the bucket and its keys: engine/docs/s3.md has the policy that \
                 suffices",
            ),
            ("SlowDown" | "ServiceUnavailable" | "Throttling" | "ThrottlingException", _)
            | (_, 429 | 503) => retry(
                "the service is busy: it was asked again, to no avail; lower `s3.in_flight_bytes` \
                 or raise `s3.attempts`",
            ),
            ("BadDigest" | "InvalidDigest" | "XAmzContentChecksumMismatch", _) => retry(
                "the bytes changed on their way: look for a faulty proxy or network card, then \
                 save again",
            ),
            (_, 0) if self.text.contains("redential") => retry(
                "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this \
                 machine a role",
            ),
            (_, 0) => retry(
                "check `s3.endpoint_url`, the network and the service; earlier checkpoints are \
                 untouched",
            ),
            _ => retry("look up the code in the service's log; earlier checkpoints are untouched"),
        }
    }
}

enum Advice {
    NoBucket,
    NoSpace,
    Region,
    Retry(&'static str),
}

/// What an answer reported.
fn told(code: &str, status: u16, message: Option<&str>) -> String {
    let message = message.map(str::trim).filter(|message| !message.is_empty());
    match (code.is_empty(), message) {
        (false, Some(message)) => format!("{code}: {message}"),
        (false, None) => format!("{code}, status {status}"),
        (true, Some(message)) => format!("status {status}: {message}"),
        (true, None) => format!("the service answered with status {status}"),
    }
}

/// An error with all its causes. Neighbours often say the same: then once.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut texts: Vec<String> = Vec::new();
    let mut cause = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !texts.last().is_some_and(|last| last.ends_with(&text)) {
            texts.push(text);
        }
        cause = error.source();
    }
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(code: &str, status: u16) -> Failure {
        Failure { code: code.into(), status, text: "it failed".into(), region: None }
    }

    #[test]
    fn what_to_do_follows_from_code_and_status() {
        let kind = |failure: Failure| match failure.into_error("opening") {
            EngineError::NotFound { .. } => "not found",
            EngineError::NoSpace { .. } => "no space",
            EngineError::InvalidArgument { .. } => "invalid",
            EngineError::Unavailable { .. } => "unavailable",
            other => panic!("{other}"),
        };
        assert_eq!(kind(failure("NoSuchBucket", 404)), "not found");
        assert_eq!(kind(failure("QuotaExceeded", 403)), "no space");
        assert_eq!(kind(failure("PermanentRedirect", 301)), "invalid");
        for (code, status) in [("AccessDenied", 403), ("SlowDown", 503), ("", 0), ("", 403)] {
            assert_eq!(kind(failure(code, status)), "unavailable");
        }
    }

    #[test]
    fn the_region_that_the_service_names_is_in_the_hint() {
        let redirect = Failure { region: Some("eu-west-1".into()), ..failure("", 301) };
        let error = redirect.into_error("opening store `s3://b`");
        assert!(error.hint().contains("`eu-west-1`"), "{error}");
    }

    #[test]
    fn conditions_are_told_apart() {
        assert!(failure("PreconditionFailed", 412).is_precondition());
        assert!(failure("", 412).is_precondition());
        assert!(failure("ConditionalRequestConflict", 409).is_conflict());
        assert!(failure("", 404).is_missing());
        assert!(!failure("NoSuchBucket", 404).is_missing());
        assert!(failure("NotImplemented", 501).is_unknown());
    }
}
