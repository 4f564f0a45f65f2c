//! Uploading a shard into the bucket: in one piece, or as an upload in parts.
//!
//! Always holds: every body has its checksum, computed long before; bodies are the pools' buffers,
//! uncopied, and can be sent again; a shard's key is its attempt's alone, so whatever stands there
//! at its full length is ours, and an upload that is named again is too.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::SystemTime;

use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::primitives::{ByteStream, SdkBody};
use aws_sdk_s3::types::{
    ChecksumAlgorithm, ChecksumType, CompletedMultipartUpload, CompletedPart, MultipartUpload,
};
use bytes::Bytes;

use super::Shared;
use super::error::Failure;
use super::objects::{Asked, answer, bounded, checksum_header, next_page, within};
use super::parts::Part;
use crate::Result;
use crate::format::names;
use crate::store::UnfinishedUpload;

/// How much longer than others a request may take that makes the service put an object together.
const COMPLETION_FACTOR: u32 = 5;

/// An upload in parts that was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Upload {
    pub(super) key: String,
    pub(super) id: String,
    /// Whether the service checks the whole object.
    checks_whole: bool,
}

/// A part that exists already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Arrived {
    bytes: u64,
    tag: String,
    /// As the service's headers show it; a part without one is not trusted.
    checksum: String,
}

impl Arrived {
    /// The part as the completion names it, if it is what `part` would be.
    pub(super) fn as_completed(&self, part: &Part) -> Option<CompletedPart> {
        let is_same = self.bytes == part.bytes && self.checksum == checksum_header(part.crc32c);
        is_same.then(|| completed(part, Some(self.tag.clone())))
    }
}

/// A whole object's length and checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Whole {
    pub(super) bytes: u64,
    pub(super) crc32c: u32,
}

impl Shared {
    /// Writes a shard that is one part.
    pub(super) async fn put_whole(&self, key: &str, part: &Part) -> Asked<()> {
        let request = self
            .client
            .s3
            .put_object()
            .bucket(self.address.bucket())
            .key(key)
            .content_length(signed(part.bytes))
            .checksum_crc32_c(checksum_header(part.crc32c))
            .body(body_of(part));
        let sent = request.customize().disable_payload_signing().send();
        bounded(&self.client, answer(sent)).await.map(drop)
    }

    /// Begins an upload. A service that does not know checksums of whole objects is asked for those
    /// of parts alone.
    pub(super) async fn begin_upload(&self, key: &str) -> Asked<Upload> {
        if self.checks_whole_objects.get() != Some(&false) {
            match self.create_upload(key, Some(ChecksumType::FullObject)).await {
                Err(failure) if failure.is_unknown() => {}
                begun => {
                    let upload = begun?;
                    self.note_whole_objects(upload.checks_whole);
                    return Ok(upload);
                }
            }
        }
        let upload = self.create_upload(key, None).await?;
        self.note_whole_objects(false);
        Ok(upload)
    }

    async fn create_upload(&self, key: &str, checksum: Option<ChecksumType>) -> Asked<Upload> {
        let request = self
            .client
            .s3
            .create_multipart_upload()
            .bucket(self.address.bucket())
            .key(key)
            .checksum_algorithm(ChecksumAlgorithm::Crc32C)
            .set_checksum_type(checksum);
        let begun = bounded(&self.client, answer(request.send())).await?;
        let id = begun.upload_id().ok_or_else(|| Failure::new("the service gave no upload id"))?;
        Ok(Upload {
            key: key.into(),
            id: id.into(),
            checks_whole: begun.checksum_type() == Some(&ChecksumType::FullObject),
        })
    }

    fn note_whole_objects(&self, are_checked: bool) {
        if self.checks_whole_objects.set(are_checked).is_ok() && !are_checked {
            tracing::info!(
                store = %self.address,
                "the service does not check whole objects that come in parts: the parts are \
                 checked, and every chunk is when it is read"
            );
        }
    }

    /// Uploads one part.
    pub(super) async fn put_part(&self, upload: &Upload, part: &Part) -> Asked<CompletedPart> {
        let number = i32::try_from(part.number).unwrap_or(i32::MAX);
        let request = self
            .client
            .s3
            .upload_part()
            .bucket(self.address.bucket())
            .key(&upload.key)
            .upload_id(&upload.id)
            .part_number(number)
            .content_length(signed(part.bytes))
            .checksum_crc32_c(checksum_header(part.crc32c))
            .body(body_of(part));
        let sent = request.customize().disable_payload_signing().send();
        let output = bounded(&self.client, answer(sent)).await?;
        Ok(completed(part, output.e_tag().map(Into::into)))
    }

    /// An upload to this very key that was begun and not finished, with the parts that arrived. The
    /// newest of several.
    pub(super) async fn find_upload(
        &self,
        key: &str,
    ) -> Asked<Option<(Upload, BTreeMap<u32, Arrived>)>> {
        let uploads = self.list_uploads(key).await?;
        let ours = uploads.into_iter().filter(|upload| upload.key() == Some(key));
        let newest = ours.max_by_key(|upload| {
            upload.initiated().and_then(|begun| SystemTime::try_from(*begun).ok())
        });
        let Some(id) = newest.as_ref().and_then(MultipartUpload::upload_id) else {
            return Ok(None);
        };
        let Some((parts, checks_whole)) = self.list_parts(key, id).await? else {
            return Ok(None);
        };
        let arrived = parts.iter().filter_map(|part| {
            let number = u32::try_from(part.part_number()?).ok()?;
            let bytes = u64::try_from(part.size()?).ok()?;
            let (tag, checksum) = (part.e_tag()?.into(), part.checksum_crc32_c()?.into());
            Some((number, Arrived { bytes, tag, checksum }))
        });
        let arrived = arrived.collect();
        Ok(Some((Upload { key: key.into(), id: id.into(), checks_whole }, arrived)))
    }

    /// Makes the parts, by number, an object.
    pub(super) async fn complete(
        &self,
        upload: &Upload,
        parts: Vec<CompletedPart>,
        whole: Whole,
    ) -> Asked<()> {
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let mut request = self
            .client
            .s3
            .complete_multipart_upload()
            .bucket(self.address.bucket())
            .key(&upload.key)
            .upload_id(&upload.id)
            .multipart_upload(parts);
        if upload.checks_whole {
            request = request
                .checksum_type(ChecksumType::FullObject)
                .checksum_crc32_c(checksum_header(whole.crc32c))
                .mpu_object_size(signed(whole.bytes));
        }
        let patience = TimeoutConfig::builder()
            .operation_attempt_timeout(self.client.attempt_timeout() * COMPLETION_FACTOR)
            .build();
        let config = aws_sdk_s3::Config::builder().timeout_config(patience);
        let sent = answer(request.customize().config_override(config).send());
        let deadline = self.client.deadline() * COMPLETION_FACTOR;
        match within(&self.client, deadline, sent).await {
            Ok(_completed) => Ok(()),
            // The answer may be lost and the deed done.
            Err(failure) => match self.length(&upload.key).await {
                Ok(Some(bytes)) if bytes == whole.bytes => Ok(()),
                _ => Err(failure),
            },
        }
    }

    /// Gives an upload up, with the parts that arrived.
    pub(super) async fn abort(&self, key: &str, id: &str) -> Asked<()> {
        let request = self
            .client
            .s3
            .abort_multipart_upload()
            .bucket(self.address.bucket())
            .key(key)
            .upload_id(id);
        match bounded(&self.client, answer(request.send())).await {
            Err(failure) if failure.is_missing() => Ok(()),
            aborted => aborted.map(drop),
        }
    }

    /// Uploads to keys that begin with `prefix`.
    async fn list_uploads(&self, prefix: &str) -> Asked<Vec<MultipartUpload>> {
        let mut uploads = Vec::new();
        let mut marker: Option<(String, Option<String>)> = None;
        loop {
            let (key, id) = marker.clone().unzip();
            let request = self
                .client
                .s3
                .list_multipart_uploads()
                .bucket(self.address.bucket())
                .prefix(prefix)
                .set_key_marker(key)
                .set_upload_id_marker(id.flatten());
            let page = bounded(&self.client, answer(request.send())).await?;
            uploads.extend_from_slice(page.uploads());
            if page.is_truncated() != Some(true) {
                return Ok(uploads);
            }
            let next_id = page.next_upload_id_marker().map(String::from);
            let next = page.next_key_marker().map(|key| (key.to_owned(), next_id));
            marker = Some(next_page(marker.as_ref(), next)?);
        }
    }

    /// The parts of an upload that arrived, and whether the service checks the whole object. `None`
    /// if it has ended.
    async fn list_parts(
        &self,
        key: &str,
        id: &str,
    ) -> Asked<Option<(Vec<aws_sdk_s3::types::Part>, bool)>> {
        let mut parts = Vec::new();
        let mut marker: Option<String> = None;
        loop {
            let request = self
                .client
                .s3
                .list_parts()
                .bucket(self.address.bucket())
                .key(key)
                .upload_id(id)
                .set_part_number_marker(marker.clone());
            let page = match bounded(&self.client, answer(request.send())).await {
                // Finished or given up since it was listed.
                Err(failure) if failure.is_missing() => return Ok(None),
                page => page?,
            };
            parts.extend_from_slice(page.parts());
            if page.is_truncated() != Some(true) {
                let checks_whole = page.checksum_type() == Some(&ChecksumType::FullObject);
                return Ok(Some((parts, checks_whole)));
            }
            let next = page.next_part_number_marker().map(String::from);
            marker = Some(next_page(marker.as_ref(), next)?);
        }
    }
}

/// Lists the uploads that were begun and neither finished nor given up, of one step or of all.
pub(super) fn unfinished(shared: &Shared, step: Option<u64>) -> Result<Vec<UnfinishedUpload>> {
    let what = format!("listing the unfinished uploads of `{}`", shared.address);
    let prefix = step.map_or_else(|| shared.address.key("step-"), |step| shared.file_key(step, ""));
    let uploads = match shared.ask_raw(&what, shared.list_uploads(&prefix))? {
        Err(failure) if failure.is_unknown() => {
            tracing::info!(store = %shared.address, "the service does not list unfinished uploads");
            return Ok(Vec::new());
        }
        // Reading needs no right to this, and writing can do without.
        Err(failure) if failure.is_denied() => {
            tracing::warn!(
                store = %shared.address,
                ?failure,
                "unfinished uploads may not be listed, and are left alone: allow \
                 `s3:ListBucketMultipartUploads`, or have a lifecycle rule abort them"
            );
            return Ok(Vec::new());
        }
        listed => listed.map_err(|failure| shared.refused(&what, failure))?,
    };
    let ours = uploads.iter().filter_map(|upload| named(shared, upload));
    let with_parts = ours.map(|upload| {
        let key = shared.file_key(upload.step, &upload.file);
        let parts = shared.ask(&what, shared.list_parts(&key, &upload.id))?;
        Ok(parts.map(|(parts, _)| with_parts(upload, &parts)))
    });
    with_parts.filter_map(Result::transpose).collect()
}

fn with_parts(upload: UnfinishedUpload, parts: &[aws_sdk_s3::types::Part]) -> UnfinishedUpload {
    let sizes = parts.iter().filter_map(|part| u64::try_from(part.size()?).ok());
    let arrivals =
        parts.iter().filter_map(|part| SystemTime::try_from(*part.last_modified()?).ok());
    let last_active = arrivals.fold(upload.last_active, SystemTime::max);
    UnfinishedUpload { bytes: sizes.sum(), last_active, ..upload }
}

/// An upload, if a writer of ours began it.
fn named(shared: &Shared, upload: &MultipartUpload) -> Option<UnfinishedUpload> {
    let (step, file) = shared.parse_key(upload.key()?)?;
    names::parse_shard_file(&file)?;
    Some(UnfinishedUpload {
        step,
        file,
        id: upload.upload_id()?.into(),
        bytes: 0,
        last_active: SystemTime::try_from(*upload.initiated()?).ok()?,
    })
}

/// Gives up an upload that this process is not at; see [`crate::store::Store::abort_upload`].
pub(super) fn abort_unfinished(shared: &Shared, upload: &UnfinishedUpload) -> Result<bool> {
    if shared.own().live.contains(&(upload.step, upload.file.clone())) {
        return Ok(false);
    }
    let key = shared.file_key(upload.step, &upload.file);
    let what = shared.naming("giving up the upload of", &key);
    shared.ask(&what, shared.abort(&key, &upload.id))?;
    Ok(true)
}

/// A part as the completion of its upload names it.
fn completed(part: &Part, tag: Option<String>) -> CompletedPart {
    CompletedPart::builder()
        .part_number(i32::try_from(part.number).unwrap_or(i32::MAX))
        .set_e_tag(tag)
        .checksum_crc32_c(checksum_header(part.crc32c))
        .build()
}

/// Lengths as the service's messages have them.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// A body of several buffers that can be sent again.
fn body_of(part: &Part) -> ByteStream {
    let (segments, bytes) = (part.segments.clone(), part.bytes);
    ByteStream::new(SdkBody::retryable(move || {
        SdkBody::from_body_1_x(Segments { segments: segments.clone().into(), left: bytes })
    }))
}

/// Buffers, one after the other.
struct Segments {
    segments: VecDeque<Bytes>,
    left: u64,
}

impl http_body::Body for Segments {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _context: &mut Context<'_>,
    ) -> Poll<Option<std::result::Result<http_body::Frame<Bytes>, Infallible>>> {
        let segment = self.segments.pop_front();
        self.left -= segment.as_ref().map_or(0, |segment| segment.len() as u64);
        Poll::Ready(segment.map(|segment| Ok(http_body::Frame::data(segment))))
    }

    fn is_end_stream(&self) -> bool {
        self.segments.is_empty()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        http_body::SizeHint::with_exact(self.left)
    }
}
