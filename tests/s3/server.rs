//! A server that speaks S3, started by the tests: s3s answers, s3s-fs keeps the objects, and what
//! is here adds the rules that the real service has and that one lacks.
//!
//! Always holds: conditions are decided under a lock, one writer after the other; a body is checked
//! against its checksum before it becomes an object or a part; a listing has pages, and reports
//! times to the second.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use dtr_engine::format::checksum::{combine, crc32c};
use hyper_util::rt::TokioIo;
use s3s::auth::SimpleAuth;
use s3s::dto::{
    AbortMultipartUploadInput, AbortMultipartUploadOutput, ChecksumType,
    CompleteMultipartUploadInput, CompleteMultipartUploadOutput, CopyObjectInput, CopyObjectOutput,
    CreateMultipartUploadInput, CreateMultipartUploadOutput, DeleteObjectInput, DeleteObjectOutput,
    ETag, GetObjectInput, GetObjectOutput, HeadObjectInput, HeadObjectOutput,
    ListMultipartUploadsInput, ListMultipartUploadsOutput, ListObjectsV2Input, ListObjectsV2Output,
    ListPartsInput, ListPartsOutput, MultipartUpload, Part, PutObjectInput, PutObjectOutput, Range,
    StreamingBlob, Timestamp, TimestampFormat, UploadPartInput, UploadPartOutput,
};
use s3s::service::{S3Service, S3ServiceBuilder};
use s3s::{Body, S3, S3Error, S3ErrorCode, S3Request, S3Response, S3Result, s3_error};
use s3s_fs::FileSystem;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

/// Who may do everything.
pub(crate) const OWNER: (&str, &str) = ("AKIDOWNER", "owner-secret-7f3a9c");
/// Who may read, and nothing else.
pub(crate) const READER: (&str, &str) = ("AKIDREADER", "reader-secret-1b2d4e");
/// The bucket that exists.
pub(crate) const BUCKET: &str = "checkpoints";
/// A bucket that the service says is elsewhere.
pub(crate) const BUCKET_ELSEWHERE: &str = "elsewhere";
/// The largest body that is taken.
const BODY_BYTES_MAX: usize = 1 << 30;

type Answer<T> = S3Result<S3Response<T>>;

/// A server on a port of its own, which ends when it is dropped.
pub(crate) struct Server {
    pub(crate) rules: Arc<Rules>,
    address: SocketAddr,
    /// Ends with it.
    _runtime: Runtime,
}

impl Server {
    /// Starts one that keeps its objects in `root`, at `port`, or at any if that is 0.
    pub(crate) fn start(root: &Path, port: u16) -> Self {
        std::fs::create_dir_all(root.join(BUCKET)).unwrap();
        let rules = Arc::new(Rules::default());
        let files = FileSystem::new(root).unwrap();
        let mut service = S3ServiceBuilder::new(Bucket { files, rules: Arc::clone(&rules) });
        let mut users = SimpleAuth::from_single(OWNER.0, OWNER.1);
        users.register(READER.0.into(), READER.1.into());
        service.set_auth(users);
        let service = service.build();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", port))).unwrap();
        let address = listener.local_addr().unwrap();
        runtime.spawn(serve(listener, service));
        Self { rules, address, _runtime: runtime }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

async fn serve(listener: TcpListener, service: S3Service) {
    while let Ok((stream, _)) = listener.accept().await {
        let service = service.clone();
        tokio::spawn(async move {
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(stream), service);
            // A client that breaks off is what some tests are about.
            let _broken_off = connection.await;
        });
    }
}

/// How the server behaves, and what it was asked.
#[derive(Debug)]
pub(crate) struct Rules {
    pub(crate) ignores_conditions: AtomicBool,
    pub(crate) checks_whole_objects: AtomicBool,
    pub(crate) refuses_aborts: AtomicBool,
    pub(crate) refuses_writes: AtomicBool,
    /// How many deletions with a condition are said to have met another version.
    pub(crate) refused_deletions: AtomicU32,
    /// Entries on a page of a listing.
    pub(crate) page: AtomicI32,
    uploads: Mutex<BTreeMap<String, UploadState>>,
    ranges: Mutex<Vec<(String, u64, u64)>>,
    /// One conditional write at a time.
    writing: tokio::sync::Mutex<()>,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            ignores_conditions: AtomicBool::new(false),
            checks_whole_objects: AtomicBool::new(true),
            refuses_aborts: AtomicBool::new(false),
            refuses_writes: AtomicBool::new(false),
            refused_deletions: AtomicU32::new(0),
            page: AtomicI32::new(1000),
            uploads: Mutex::default(),
            ranges: Mutex::default(),
            writing: tokio::sync::Mutex::default(),
        }
    }
}

#[derive(Clone, Debug)]
struct UploadState {
    key: String,
    /// What is checked when it is completed.
    checksum: Option<ChecksumType>,
    begun: SystemTime,
    parts: BTreeMap<i32, PartState>,
}

#[derive(Clone, Debug)]
struct PartState {
    tag: ETag,
    crc32c: u32,
    bytes: u64,
}

impl Rules {
    /// Keys of the uploads that were begun and are neither complete nor given up.
    pub(crate) fn unfinished(&self) -> Vec<String> {
        self.uploads().values().map(|upload| upload.key.clone()).collect()
    }

    /// How many parts have arrived in all of these.
    pub(crate) fn arrived_parts(&self) -> usize {
        self.uploads().values().map(|upload| upload.parts.len()).sum()
    }

    /// Key, offset and length of every range that was read since the last call.
    pub(crate) fn take_ranges(&self) -> Vec<(String, u64, u64)> {
        std::mem::take(&mut *self.ranges.lock().unwrap())
    }

    fn uploads(&self) -> MutexGuard<'_, BTreeMap<String, UploadState>> {
        self.uploads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(flag: &AtomicBool) -> bool {
        flag.load(Ordering::Relaxed)
    }
}

struct Bucket {
    files: FileSystem,
    rules: Arc<Rules>,
}

impl Bucket {
    /// Everybody reads; only the owner writes.
    fn check_owner<T>(&self, request: &S3Request<T>) -> S3Result<()> {
        match &request.credentials {
            Some(user) if user.access_key == OWNER.0 => {
                if Rules::has(&self.rules.refuses_writes) {
                    return Err(s3_error!(AccessDenied, "nobody may write now"));
                }
                Ok(())
            }
            _ => Err(s3_error!(AccessDenied, "this user may only read")),
        }
    }

    fn check_place(bucket: &str) -> S3Result<()> {
        if bucket != BUCKET_ELSEWHERE {
            return Ok(());
        }
        let code = S3ErrorCode::PermanentRedirect;
        let mut error = S3Error::with_message(code, "this bucket must be addressed elsewhere");
        let mut headers = hyper::HeaderMap::new();
        headers.insert("x-amz-bucket-region", "eu-west-1".parse().unwrap());
        error.set_headers(headers);
        Err(error)
    }
}

/// A request's body, whole and checked.
async fn whole(
    body: Option<StreamingBlob>,
    checksum: Option<&String>,
) -> S3Result<(Body, u32, u64)> {
    let mut body = Body::from(body.ok_or_else(|| s3_error!(IncompleteBody))?);
    let bytes = body.store_all_limited(BODY_BYTES_MAX).await;
    let bytes = bytes.map_err(|_| s3_error!(IncompleteBody))?;
    let crc = crc32c(&bytes);
    if checksum.is_some_and(|checksum| *checksum != header_of(crc)) {
        return Err(s3_error!(BadDigest, "the body's checksum is another"));
    }
    let length = bytes.len() as u64;
    Ok((Body::from(bytes), crc, length))
}

/// The time as the real service reports it.
fn whole_seconds(time: &Timestamp) -> Timestamp {
    let mut text = Vec::new();
    time.format(TimestampFormat::EpochSeconds, &mut text).unwrap();
    let text = String::from_utf8(text).unwrap();
    let seconds = text.split('.').next().unwrap().parse().unwrap();
    (SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).into()
}

/// Base 64 of a checksum's bytes, the highest first.
fn header_of(crc: u32) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = u64::from(crc) << 4;
    let digit = |index: u32| char::from(DIGITS[((bits >> (6 * index)) & 63) as usize]);
    (0..6).rev().map(digit).chain("==".chars()).collect()
}

#[async_trait::async_trait]
impl S3 for Bucket {
    async fn list_objects_v2(
        &self,
        mut request: S3Request<ListObjectsV2Input>,
    ) -> Answer<ListObjectsV2Output> {
        Self::check_place(&request.input.bucket)?;
        let page = self.rules.page.load(Ordering::Relaxed);
        request.input.max_keys = Some(request.input.max_keys.map_or(page, |keys| keys.min(page)));
        let mut answer = self.files.list_objects_v2(request).await?;
        for object in answer.output.contents.iter_mut().flatten() {
            object.last_modified = object.last_modified.take().map(|time| whole_seconds(&time));
        }
        Ok(answer)
    }

    async fn head_object(&self, request: S3Request<HeadObjectInput>) -> Answer<HeadObjectOutput> {
        self.files.head_object(request).await
    }

    /// The engine never asks for it; others that are measured beside it do.
    async fn copy_object(&self, request: S3Request<CopyObjectInput>) -> Answer<CopyObjectOutput> {
        self.files.copy_object(request).await
    }

    async fn get_object(&self, request: S3Request<GetObjectInput>) -> Answer<GetObjectOutput> {
        if let Some(Range::Int { first, last: Some(last) }) = request.input.range {
            let range = (request.input.key.clone(), first, last - first + 1);
            self.rules.ranges.lock().unwrap().push(range);
        }
        self.files.get_object(request).await
    }

    async fn put_object(&self, mut request: S3Request<PutObjectInput>) -> Answer<PutObjectOutput> {
        self.check_owner(&request)?;
        let checksum = request.input.checksum_crc32c.clone();
        let (body, ..) = whole(request.input.body.take(), checksum.as_ref()).await?;
        request.input.body = Some(body.into());
        if Rules::has(&self.rules.ignores_conditions) {
            request.input.if_none_match = None;
            request.input.if_match = None;
        }
        let _one_at_a_time = self.rules.writing.lock().await;
        self.files.put_object(request).await
    }

    async fn delete_object(
        &self,
        request: S3Request<DeleteObjectInput>,
    ) -> Answer<DeleteObjectOutput> {
        self.check_owner(&request)?;
        let (order, less_one) = (Ordering::SeqCst, |left: u32| left.checked_sub(1));
        if request.input.if_match.is_some()
            && self.rules.refused_deletions.fetch_update(order, order, less_one).is_ok()
        {
            return Err(s3_error!(PreconditionFailed, "ETag does not match"));
        }
        self.files.delete_object(request).await
    }

    async fn create_multipart_upload(
        &self,
        request: S3Request<CreateMultipartUploadInput>,
    ) -> Answer<CreateMultipartUploadOutput> {
        self.check_owner(&request)?;
        let key = request.input.key.clone();
        let checksum = request.input.checksum_type.clone();
        let checksum = checksum.filter(|_| Rules::has(&self.rules.checks_whole_objects));
        let mut answer = self.files.create_multipart_upload(request).await?;
        answer.output.checksum_type.clone_from(&checksum);
        let id = answer.output.upload_id.clone().unwrap();
        let begun = SystemTime::now();
        self.rules
            .uploads()
            .insert(id, UploadState { key, checksum, begun, parts: BTreeMap::new() });
        Ok(answer)
    }

    async fn upload_part(
        &self,
        mut request: S3Request<UploadPartInput>,
    ) -> Answer<UploadPartOutput> {
        let (id, number) = (request.input.upload_id.clone(), request.input.part_number);
        if !self.rules.uploads().contains_key(&id) {
            return Err(s3_error!(NoSuchUpload));
        }
        let checksum = request.input.checksum_crc32c.clone();
        let (body, crc32c, bytes) = whole(request.input.body.take(), checksum.as_ref()).await?;
        request.input.body = Some(body.into());
        let mut answer = self.files.upload_part(request).await?;
        let tag = answer.output.e_tag.clone().unwrap();
        let mut uploads = self.rules.uploads();
        let upload = uploads.get_mut(&id).ok_or_else(|| s3_error!(NoSuchUpload))?;
        upload.parts.insert(number, PartState { tag, crc32c, bytes });
        answer.output.checksum_crc32c = checksum;
        Ok(answer)
    }

    async fn list_parts(&self, request: S3Request<ListPartsInput>) -> Answer<ListPartsOutput> {
        let input = request.input;
        let uploads = self.rules.uploads();
        let upload = uploads.get(&input.upload_id).ok_or_else(|| s3_error!(NoSuchUpload))?;
        let after = input.part_number_marker.unwrap_or(0);
        let page = usize::try_from(self.rules.page.load(Ordering::Relaxed)).unwrap();
        let parts: Vec<Part> = upload
            .parts
            .range(after + 1..)
            .take(page)
            .map(|(number, part)| Part {
                part_number: Some(*number),
                size: i64::try_from(part.bytes).ok(),
                e_tag: Some(part.tag.clone()),
                checksum_crc32c: Some(header_of(part.crc32c)),
                ..Part::default()
            })
            .collect();
        let last = parts.last().and_then(|part| part.part_number);
        let is_truncated = upload.parts.range(last.unwrap_or(after) + 1..).next().is_some();
        Ok(S3Response::new(ListPartsOutput {
            parts: Some(parts),
            is_truncated: Some(is_truncated),
            next_part_number_marker: last.filter(|_| is_truncated),
            checksum_type: upload.checksum.clone(),
            ..ListPartsOutput::default()
        }))
    }

    async fn list_multipart_uploads(
        &self,
        request: S3Request<ListMultipartUploadsInput>,
    ) -> Answer<ListMultipartUploadsOutput> {
        // A right of its own, which the policy for readers leaves out.
        if request.credentials.as_ref().is_none_or(|user| user.access_key != OWNER.0) {
            return Err(s3_error!(AccessDenied, "this user may not list uploads"));
        }
        let prefix = request.input.prefix.unwrap_or_default();
        let uploads = self.rules.uploads();
        let listed = uploads.iter().filter(|(_, upload)| upload.key.starts_with(&prefix));
        let listed = listed.map(|(id, upload)| MultipartUpload {
            upload_id: Some(id.clone()),
            key: Some(upload.key.clone()),
            initiated: Some(upload.begun.into()),
            ..MultipartUpload::default()
        });
        Ok(S3Response::new(ListMultipartUploadsOutput {
            uploads: Some(listed.collect()),
            is_truncated: Some(false),
            ..ListMultipartUploadsOutput::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        request: S3Request<CompleteMultipartUploadInput>,
    ) -> Answer<CompleteMultipartUploadOutput> {
        let _one_at_a_time = self.rules.writing.lock().await;
        let input = &request.input;
        let upload = self.rules.uploads().get(&input.upload_id).cloned();
        let upload = upload.ok_or_else(|| s3_error!(NoSuchUpload))?;
        let named = input.multipart_upload.as_ref().and_then(|parts| parts.parts.as_ref());
        let mut whole = crc32c(&[]);
        for part in named.into_iter().flatten() {
            let state = part.part_number.and_then(|number| upload.parts.get(&number));
            let state = state.ok_or_else(|| s3_error!(InvalidPart))?;
            if part.e_tag.as_ref() != Some(&state.tag) {
                return Err(s3_error!(InvalidPart, "the tag is another"));
            }
            whole = combine(whole, state.crc32c, usize::try_from(state.bytes).unwrap());
        }
        if input.checksum_crc32c.as_ref().is_some_and(|given| *given != header_of(whole)) {
            return Err(s3_error!(BadDigest, "the object's checksum is another"));
        }
        if upload.checksum.is_some() && input.checksum_crc32c.is_none() {
            return Err(s3_error!(InvalidRequest, "the object's checksum was promised"));
        }
        let id = input.upload_id.clone();
        let answer = self.files.complete_multipart_upload(request).await?;
        self.rules.uploads().remove(&id);
        Ok(answer)
    }

    async fn abort_multipart_upload(
        &self,
        request: S3Request<AbortMultipartUploadInput>,
    ) -> Answer<AbortMultipartUploadOutput> {
        if Rules::has(&self.rules.refuses_aborts) {
            return Err(s3_error!(AccessDenied, "nobody may give up an upload"));
        }
        if self.rules.uploads().remove(&request.input.upload_id).is_none() {
            return Err(s3_error!(NoSuchUpload));
        }
        self.files.abort_multipart_upload(request).await
    }
}
