//! Requests on single objects and listings: what the rest of the store is made of.
//!
//! Always holds: what is read is complete or an error; a body that breaks off, or stands still, is
//! asked for again, from where it broke off; every call ends within the client's deadline.

use std::future::Future;
use std::pin::{Pin, pin};
use std::task::Poll;
use std::time::{Duration, SystemTime};

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;

use super::Shared;
use super::client::Client;
use super::error::{Failure, chain};
use crate::format::checksum::crc32c;

/// Attempts at [`Shared::look`].
const LOOK_ATTEMPTS_MAX: u32 = 5;

/// Outcome of a request.
pub(super) type Asked<T> = Result<T, Failure>;

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) key: String,
    pub(super) bytes: u64,
    pub(super) modified: SystemTime,
}

/// An object's bytes, and the tag of this version of it.
#[derive(Clone, Debug)]
pub(super) struct Object {
    pub(super) bytes: Vec<u8>,
    pub(super) tag: String,
}

/// When a write is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// Whatever stands there.
    Always,
    /// If nothing stands there.
    Absent,
    /// If the version with this tag stands there.
    Tag(String),
}

/// Why a body was not read.
enum Broken {
    /// The service said so.
    Refused(Failure),
    /// It broke off: another attempt may succeed.
    OnTheWay(Failure),
}

impl Shared {
    /// Asks whether the store can be reached and read, with less patience than others have: what
    /// keeps it apart is most often a mistake, and the caller that opens a store waits for the
    /// answer.
    pub(super) async fn look(&self, prefix: &str) -> Asked<()> {
        let request = self
            .client
            .s3
            .list_objects_v2()
            .bucket(self.address.bucket())
            .prefix(prefix)
            .max_keys(1)
            .customize()
            .config_override(self.client.with_attempts(LOOK_ATTEMPTS_MAX));
        bounded(&self.client, answer(request.send())).await.map(drop)
    }

    /// Lists the objects whose keys begin with `prefix`, by key.
    pub(super) async fn list_objects(&self, prefix: &str) -> Asked<Vec<Listed>> {
        let mut objects = Vec::new();
        let mut token: Option<String> = None;
        loop {
            let request = self
                .client
                .s3
                .list_objects_v2()
                .bucket(self.address.bucket())
                .prefix(prefix)
                .set_continuation_token(token.clone());
            let page = bounded(&self.client, answer(request.send())).await?;
            objects.extend(page.contents().iter().filter_map(listed));
            if page.is_truncated() != Some(true) {
                return Ok(objects);
            }
            let next = page.next_continuation_token().map(String::from);
            token = Some(next_page(token.as_ref(), next)?);
        }
    }

    /// An object's length; `None` if it is not there.
    pub(super) async fn length(&self, key: &str) -> Asked<Option<u64>> {
        let request = self.client.s3.head_object().bucket(self.address.bucket()).key(key);
        match bounded(&self.client, answer(request.send())).await {
            Ok(head) => match head.content_length().and_then(|bytes| u64::try_from(bytes).ok()) {
                Some(bytes) => Ok(Some(bytes)),
                None => Err(Failure::new("the service gave no length")),
            },
            Err(failure) if failure.is_missing() => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// A whole object of at most `bytes_max` bytes; `None` if it is not there. A longer one is cut
    /// just beyond that.
    pub(super) async fn get(&self, key: &str, bytes_max: usize) -> Asked<Option<Object>> {
        let all = async {
            let mut attempt = 1;
            loop {
                match self.get_once(key, bytes_max).await {
                    Ok(object) => return Ok(Some(object)),
                    Err(Broken::Refused(failure)) if failure.is_missing() => return Ok(None),
                    Err(broken) => self.pause_before_next(&mut attempt, broken).await?,
                }
            }
        };
        bounded(&self.client, all).await
    }

    async fn get_once(&self, key: &str, bytes_max: usize) -> Result<Object, Broken> {
        let request = self.client.s3.get_object().bucket(self.address.bucket()).key(key);
        let output = answer(request.send()).await.map_err(Broken::Refused)?;
        let tag = output.e_tag().unwrap_or_default().to_owned();
        let length = output.content_length().and_then(|bytes| usize::try_from(bytes).ok());
        let mut bytes = Vec::new();
        drain(&self.client, output.body, |frame| {
            bytes.extend_from_slice(&frame);
            bytes.len() <= bytes_max
        })
        .await?;
        match length {
            Some(length) if bytes.len() < length.min(bytes_max) => Err(Broken::OnTheWay(
                Failure::new(format!("its body ended after {} of {length} bytes", bytes.len())),
            )),
            _ => Ok(Object { bytes, tag }),
        }
    }

    /// Fills `memory` with the bytes of an object from `offset` on.
    pub(super) async fn get_range(&self, key: &str, offset: u64, memory: &mut [u8]) -> Asked<()> {
        let all = async {
            let (mut attempt, mut came) = (1, 0);
            while came < memory.len() {
                let rest = &mut memory[came..];
                let (more, outcome) = self.get_range_once(key, offset + came as u64, rest).await;
                came += more;
                // On a slow line each attempt receives a part: only those that receive none count.
                attempt = if more > 0 { 0 } else { attempt };
                if let Err(broken) = outcome {
                    self.pause_before_next(&mut attempt, broken).await?;
                }
            }
            Ok(())
        };
        bounded(&self.client, all).await
    }

    /// Gives how many bytes came and are in place, and why no more did.
    async fn get_range_once(
        &self,
        key: &str,
        offset: u64,
        memory: &mut [u8],
    ) -> (usize, Result<(), Broken>) {
        let wanted = memory.len();
        let last = (offset + wanted as u64).saturating_sub(1);
        let request = self.client.s3.get_object().bucket(self.address.bucket()).key(key);
        let request = request.range(format!("bytes={offset}-{last}"));
        let output = match answer(request.send()).await {
            Ok(output) => output,
            Err(failure) => return (0, Err(Broken::Refused(failure))),
        };
        let mut came = 0;
        let drained = drain(&self.client, output.body, |frame| {
            if let Some(place) = memory.get_mut(came..came + frame.len()) {
                place.copy_from_slice(&frame);
            }
            came += frame.len();
            came <= wanted
        })
        .await;
        let broken = |came| {
            let text = format!("{came} bytes came of the {wanted} at offset {offset}");
            Err(Broken::OnTheWay(Failure::new(text)))
        };
        match drained {
            // It is not the range that was asked for.
            _ if came > wanted => (0, broken(came)),
            Ok(()) if came < wanted => (came, broken(came)),
            drained => (came, drained),
        }
    }

    /// What the service refuses was repeated already; what broke off on its way is asked for again.
    async fn pause_before_next(&self, attempt: &mut u32, broken: Broken) -> Asked<()> {
        match broken {
            Broken::OnTheWay(failure) if *attempt < self.client.settings.attempts => {
                tracing::debug!(attempt, ?failure, "a body broke off and is asked for again");
                self.client.watch.note_repetition();
                tokio::time::sleep(Client::pause(*attempt)).await;
                *attempt += 1;
                Ok(())
            }
            Broken::OnTheWay(failure) | Broken::Refused(failure) => Err(failure),
        }
    }

    /// Writes a small object.
    pub(super) async fn put(&self, key: &str, bytes: &[u8], condition: &Condition) -> Asked<()> {
        let request = self
            .client
            .s3
            .put_object()
            .bucket(self.address.bucket())
            .key(key)
            .checksum_crc32_c(checksum_header(crc32c(bytes)))
            .body(ByteStream::from(Bytes::copy_from_slice(bytes)));
        let request = match condition {
            Condition::Always => request,
            Condition::Absent => request.if_none_match("*"),
            Condition::Tag(tag) => request.if_match(tag),
        };
        bounded(&self.client, answer(request.send())).await.map(drop)
    }

    /// Deletes an object; that it is gone already is fine.
    pub(super) async fn delete(&self, key: &str) -> Asked<()> {
        let request = self.client.s3.delete_object().bucket(self.address.bucket()).key(key);
        match bounded(&self.client, answer(request.send())).await {
            Err(failure) if failure.is_missing() => Ok(()),
            deleted => deleted.map(drop),
        }
    }

    /// Deletes an object if this version of it stands there; false if another one does. Services
    /// that do not know the condition delete what stands there.
    pub(super) async fn delete_version(&self, key: &str, tag: &str) -> Asked<bool> {
        let request = self.client.s3.delete_object().bucket(self.address.bucket()).key(key);
        match bounded(&self.client, answer(request.if_match(tag).send())).await {
            Err(failure) if failure.is_race() => {
                // The other writer may be done after that.
                tokio::time::sleep(Client::pause(1)).await;
                Ok(false)
            }
            Err(failure) if failure.is_missing() => Ok(true),
            Err(failure) if failure.is_unknown() => self.delete(key).await.map(|()| true),
            deleted => deleted.map(|_| true),
        }
    }
}

/// Ends a request with an error when the client's deadline is over.
pub(super) async fn bounded<T>(
    client: &Client,
    request: impl Future<Output = Asked<T>>,
) -> Asked<T> {
    within(client, client.deadline(), request).await
}

/// Ends a request with an error when the deadline is over, or the client is interrupted.
pub(super) async fn within<T>(
    client: &Client,
    deadline: Duration,
    request: impl Future<Output = Asked<T>>,
) -> Asked<T> {
    let mut interruption = pin!(client.interruption());
    let mut request = pin!(tokio::time::timeout(deadline, request));
    std::future::poll_fn(|context| {
        if interruption.as_mut().poll(context).is_ready() {
            return Poll::Ready(Err(Failure::new("it was interrupted")));
        }
        request.as_mut().poll(context).map(|answered| match answered {
            Ok(answered) => answered,
            Err(_late) => Err(late(client, deadline)),
        })
    })
    .await
}

/// Where a listing that was cut short goes on after the page that began at `this`. One that cannot
/// go on, or gives the same page forever, is not the whole: what it lacks would count as gone.
pub(super) fn next_page<T: PartialEq>(this: Option<&T>, next: Option<T>) -> Asked<T> {
    match next {
        Some(next) if this != Some(&next) => Ok(next),
        _ => Err(Failure::new("the service cut the listing short, and does not say how to go on")),
    }
}

fn late(client: &Client, deadline: Duration) -> Failure {
    Failure::new(format!(
        "no answer within {} s, in {} attempts at most",
        deadline.as_secs_f64(),
        client.settings.attempts
    ))
}

/// What the service answered. Boxed: the SDK's futures take tens of kilobytes.
pub(super) fn answer<T, E>(
    request: impl Future<Output = Result<T, SdkError<E, HttpResponse>>> + Send + 'static,
) -> Pin<Box<dyn Future<Output = Asked<T>> + Send>>
where
    E: ProvideErrorMetadata + std::error::Error + 'static,
{
    Box::pin(async move { request.await.map_err(|error| Failure::of(&error)) })
}

/// Gives the frames of a body to `take` until it says that it has enough. Fails if the body takes
/// longer than an attempt may.
async fn drain(
    client: &Client,
    mut body: ByteStream,
    mut take: impl FnMut(Bytes) -> bool,
) -> Result<(), Broken> {
    let frames = async {
        while let Some(frame) = body.next().await {
            if !take(frame.map_err(|error| Failure::new(chain(&error)))?) {
                break;
            }
        }
        Ok(())
    };
    match tokio::time::timeout(client.attempt_timeout(), frames).await {
        Ok(drained) => drained.map_err(Broken::OnTheWay),
        Err(_late) => Err(Broken::OnTheWay(Failure::new(format!(
            "its body did not come within {} s",
            client.attempt_timeout().as_secs_f64()
        )))),
    }
}

fn listed(object: &aws_sdk_s3::types::Object) -> Option<Listed> {
    Some(Listed {
        key: object.key()?.to_owned(),
        bytes: u64::try_from(object.size()?).ok()?,
        modified: SystemTime::try_from(*object.last_modified()?).ok()?,
    })
}

/// A checksum as the service's headers show it: base 64 of its bytes, the highest first.
pub(super) fn checksum_header(crc: u32) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = u64::from(crc) << 4;
    let digit = |index: u32| char::from(DIGITS[((bits >> (6 * index)) & 63) as usize]);
    (0..6).rev().map(digit).chain("==".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_that_is_cut_short_goes_on_or_is_an_error() {
        assert_eq!(next_page(None, Some("b")), Ok("b"));
        assert_eq!(next_page(Some(&"a"), Some("b")), Ok("b"));
        assert!(next_page(None::<&&str>, None).is_err());
        assert!(next_page(Some(&"a"), None).is_err());
        assert!(next_page(Some(&"a"), Some("a")).is_err());
    }

    #[test]
    fn checksums_look_as_the_service_writes_them() {
        // base64(big-endian 0xe3069283), as in the service's documentation of CRC32C.
        assert_eq!(checksum_header(crc32c(b"123456789")), "4waSgw==");
        assert_eq!(checksum_header(0), "AAAAAA==");
        assert_eq!(checksum_header(u32::MAX), "/////w==");
    }
}
