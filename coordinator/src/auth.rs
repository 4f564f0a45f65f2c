//! Who may call: tokens, compared in constant time and never shown.
//!
//! A token file has a line per token: `TOKEN` alone holds for every job and for operators,
//! `JOB TOKEN` for one job. Lines that are empty or begin with `#` mean nothing.
//!
//! Always holds: with any token configured, a call without the right one does nothing and learns
//! nothing; without tokens, operators' calls are taken from this machine only.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

use subtle::ConstantTimeEq as _;
use tonic::Status;

/// Shortest token that is taken: shorter ones are guessed.
const TOKEN_BYTES_MIN: usize = 16;
/// Longest one.
const TOKEN_BYTES_MAX: usize = 4_096;

/// Who may call what.
#[derive(Clone, Default)]
pub struct Auth {
    /// Hold for every job and for operators.
    all: Vec<String>,
    of_job: BTreeMap<String, Vec<String>>,
}

impl fmt::Debug for Auth {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Auth({} tokens, not shown)", self.all.len() + self.of_job.len())
    }
}

impl Auth {
    /// Reads the lines of a token file; an error says which line and why, without the token.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut auth = Self::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let number = index + 1;
            let words: Vec<&str> = line.split_whitespace().collect();
            let (job, token) = match words[..] {
                [token] => (None, token),
                [job, token] => (Some(job), token),
                _ => return Err(format!("line {number}: `TOKEN` or `JOB TOKEN` is expected")),
            };
            if !(TOKEN_BYTES_MIN..=TOKEN_BYTES_MAX).contains(&token.len()) || !token.is_ascii() {
                return Err(format!(
                    "line {number}: a token has {TOKEN_BYTES_MIN} to {TOKEN_BYTES_MAX} ASCII \
                     characters"
                ));
            }
            match job {
                None => auth.all.push(token.to_owned()),
                Some(job) => auth.of_job.entry(job.to_owned()).or_default().push(token.to_owned()),
            }
        }
        if auth.is_open() {
            return Err("it has no token".to_owned());
        }
        Ok(auth)
    }

    /// Whether anybody may call.
    pub fn is_open(&self) -> bool {
        self.all.is_empty() && self.of_job.is_empty()
    }

    /// Lets a call about `job` in, or not.
    pub(crate) fn admit(&self, header: Option<&str>, job: &str) -> Result<(), Status> {
        if self.is_open() {
            return Ok(());
        }
        let given = bearer(header)?;
        let of_job = self.of_job.get(job).map_or(&[][..], Vec::as_slice);
        if is_one_of(given, self.all.iter().chain(of_job)) {
            return Ok(());
        }
        Err(Status::unauthenticated(
            "the token is not valid for this job\nhint: use the token that its operator issued",
        ))
    }

    /// Lets an operator's call in, or not.
    pub(crate) fn admit_operator(
        &self,
        header: Option<&str>,
        from: Option<SocketAddr>,
    ) -> Result<(), Status> {
        if !self.is_open() {
            let given = bearer(header)?;
            let is_operator = is_one_of(given, self.all.iter());
            return is_operator.then_some(()).ok_or_else(|| {
                Status::permission_denied(
                    "the token is not valid for operators' calls\nhint: use one that is valid for \
                     all jobs",
                )
            });
        }
        if from.is_some_and(|from| from.ip().to_canonical().is_loopback()) {
            return Ok(());
        }
        Err(Status::permission_denied(
            "without tokens, operators' calls are accepted only from the coordinator's own \
             machine\nhint: call from there, or configure `token`",
        ))
    }
}

fn bearer(header: Option<&str>) -> Result<&str, Status> {
    header.and_then(|header| header.strip_prefix("Bearer ")).ok_or_else(|| {
        Status::unauthenticated(
            "the coordinator asks for a token\nhint: set COORDINATOR_TOKEN, or pass `token=`",
        )
    })
}

/// Compares with all of them, so that the time does not say which was close.
fn is_one_of<'a>(given: &str, tokens: impl Iterator<Item = &'a String>) -> bool {
    let equal = tokens.map(|token| token.as_bytes().ct_eq(given.as_bytes()));
    equal.fold(subtle::Choice::from(0), |any, one| any | one).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# tokens\n\nall-jobs-0123456789\ngpt of-gpt-0123456789\n";

    #[test]
    fn a_token_holds_where_it_was_given() {
        let auth = Auth::parse(TEXT).expect("it is well-formed");
        for (header, job, admitted) in [
            (Some("Bearer all-jobs-0123456789"), "gpt", true),
            (Some("Bearer all-jobs-0123456789"), "other", true),
            (Some("Bearer of-gpt-0123456789"), "gpt", true),
            (Some("Bearer of-gpt-0123456789"), "other", false),
            (Some("Bearer all-jobs-012345678"), "gpt", false),
            (Some("all-jobs-0123456789"), "gpt", false),
            (None, "gpt", false),
        ] {
            assert_eq!(auth.admit(header, job).is_ok(), admitted, "{header:?} {job}");
        }
        assert!(auth.admit_operator(Some("Bearer all-jobs-0123456789"), None).is_ok());
        assert!(auth.admit_operator(Some("Bearer of-gpt-0123456789"), None).is_err());
    }

    #[test]
    fn without_tokens_operators_are_local() {
        let auth = Auth::default();
        let from = |text: &str| Some(text.parse().expect("an address"));
        assert!(auth.admit(None, "gpt").is_ok());
        assert!(auth.admit_operator(None, from("127.0.0.1:5")).is_ok());
        assert!(auth.admit_operator(None, from("[::ffff:127.0.0.1]:5")).is_ok());
        assert!(auth.admit_operator(None, from("10.0.0.1:5")).is_err());
        assert!(auth.admit_operator(None, None).is_err());
    }

    #[test]
    fn mistakes_are_named_and_tokens_are_not() {
        for (text, part) in [
            ("short", "line 1: a token has"),
            ("a b c", "line 1: `TOKEN`"),
            ("# only a remark", "no token"),
        ] {
            let error = Auth::parse(text).expect_err("it is wrong");
            assert!(error.contains(part) && !error.contains("short"), "{error}");
        }
        assert!(!format!("{:?}", Auth::parse(TEXT)).contains("0123"));
    }
}
