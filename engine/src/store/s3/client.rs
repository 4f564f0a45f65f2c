//! The service's client, and the threads that it runs on.
//!
//! Always holds: nothing here is used in a forked child, which has none of the threads, and
//! dropping anything there waits for nobody; every request ends within [`Client::deadline`], or at
//! once after [`Client::interrupt`].

use std::fmt;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_s3::config::interceptors::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextRef,
    InterceptorContext,
};
use aws_sdk_s3::config::retry::{
    ClassifyRetry, RetryAction, RetryConfig, RetryPartition, TokenBucket,
};
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    ConfigBag, Credentials, Intercept, RequestChecksumCalculation, RuntimeComponents,
    SharedHttpClient, StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::BoxError;
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};
use aws_smithy_http_client::Connector;
use aws_smithy_http_client::proxy::ProxyConfig;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use tokio::runtime::Runtime;
use tokio::sync::watch;

use crate::config::{S3Credentials, S3Settings};
use crate::error::IoContext;
use crate::sync::unpoisoned;
use crate::{EngineError, Result};

/// Threads that requests run on: they move bytes, and encrypt them where the service is far.
const THREADS: usize = 2;
/// Connections that nobody used for so long are closed: the service is about to do so itself, and a
/// request on one that is half closed fails.
const IDLE_CONNECTION: Duration = Duration::from_secs(15);
/// First and longest pause before a request is tried again; each is drawn at random below it. With
/// ten attempts they add up to 13 s on average: a service that fails over, or throttles, for some
/// seconds ends no save.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Attempts at a request that may stand still until they time out; more are for refusals.
const SILENT_ATTEMPTS_MAX: u32 = 4;
/// What names a service that is not AWS.
const ENDPOINT_VARIABLES: [&str; 2] = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"];
/// Without one of our own and one of the user's, services that are not AWS take this region.
const REGION_OF_OTHERS: &str = "us-east-1";

/// A client of one store.
pub(super) struct Client {
    pub(super) s3: aws_sdk_s3::Client,
    /// Taken when it is dropped.
    runtime: Option<Runtime>,
    process: u32,
    pub(super) watch: Arc<Watch>,
    pub(super) settings: S3Settings,
    /// Whether nothing is waited for any more.
    interrupted: watch::Sender<bool>,
    /// The endpoint that was named, if one was.
    endpoint: Option<String>,
}

impl Client {
    /// Makes a client. Asks the usual chain for what is not given, not the service.
    pub(super) fn new(settings: &S3Settings, credentials: Option<S3Credentials>) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("dtr-s3")
            .enable_all()
            .build()
            .context("starting threads for", "S3")?;
        let http = http_client(settings)?;
        let shared = runtime.block_on(load(settings, http));
        let endpoint = endpoint_of(settings, &shared);
        if shared.region().is_none() {
            return Err(EngineError::invalid(
                "setting `s3.region`",
                "it is not given, and neither environment, profile nor instance names one",
                "pass `s3={\"region\": ...}`, or set AWS_REGION to the bucket's region",
            ));
        }
        let watch = Arc::new(Watch::default());
        let mut config = configure(settings, &shared, endpoint.is_some(), &watch);
        if let Some(S3Credentials { access_key_id, secret_access_key, session_token }) = credentials
        {
            let (id, secret) = (access_key_id, secret_access_key);
            let given = Credentials::new(id, secret, session_token, None, "given");
            config = config.credentials_provider(given);
        }
        Ok(Self {
            s3: aws_sdk_s3::Client::from_conf(config.build()),
            runtime: Some(runtime),
            process: std::process::id(),
            watch,
            settings: settings.clone(),
            interrupted: watch::Sender::new(false),
            endpoint,
        })
    }

    /// The endpoint for messages.
    pub(super) fn endpoint(&self) -> &str {
        self.endpoint.as_deref().unwrap_or("AWS")
    }

    pub(super) fn in_owner(&self) -> bool {
        std::process::id() == self.process
    }

    pub(super) fn process(&self) -> u32 {
        self.process
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("only dropping takes the runtime")
    }

    /// Waits for a request on the calling thread, which is none of ours.
    pub(super) fn block_on<T>(&self, request: impl Future<Output = T>) -> T {
        self.runtime().block_on(request)
    }

    /// Starts a request on our threads.
    pub(super) fn spawn(
        &self,
        request: impl Future<Output = ()> + Send + 'static,
    ) -> tokio::task::AbortHandle {
        self.runtime().spawn(request).abort_handle()
    }

    /// How long one attempt at a request may take.
    pub(super) fn attempt_timeout(&self) -> Duration {
        Duration::from_millis(self.settings.request_timeout_ms)
    }

    /// Settings of a request at which fewer attempts are made.
    pub(super) fn with_attempts(&self, most: u32) -> aws_sdk_s3::config::Builder {
        let attempts = self.settings.attempts.min(most);
        aws_sdk_s3::Config::builder().retry_config(retries(attempts))
    }

    /// How long a request may take with all its attempts.
    pub(super) fn deadline(&self) -> Duration {
        let attempts = self.settings.attempts;
        self.attempt_timeout() * attempts.min(SILENT_ATTEMPTS_MAX) + BACKOFF.1 * attempts
    }

    /// Ends every request, now and from now on, with an error.
    pub(super) fn interrupt(&self) {
        self.interrupted.send_replace(true);
    }

    /// Returns after [`Client::interrupt`].
    pub(super) async fn interruption(&self) {
        let mut interrupted = self.interrupted.subscribe();
        // The sender is our own: it exists for as long as this runs.
        drop(interrupted.wait_for(|is_interrupted| *is_interrupted).await);
    }

    /// The pause before attempt `attempt`, counted from 1, at what the SDK does not repeat itself.
    pub(super) fn pause(attempt: u32) -> Duration {
        (BACKOFF.0 * 2_u32.saturating_pow(attempt.saturating_sub(1))).min(BACKOFF.1)
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else { return };
        if self.in_owner() {
            // A thread that looks up a name may take its time: nobody waits for it.
            runtime.shutdown_background();
        } else {
            // The threads that dropping would wait for do not exist here.
            std::mem::forget(runtime);
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Client").field("endpoint", &self.endpoint()).finish_non_exhaustive()
    }
}

/// The usual chain: environment, profile, web identity, container, instance.
async fn load(settings: &S3Settings, http: SharedHttpClient) -> SdkConfig {
    let mut loader = aws_config::defaults(BehaviorVersion::latest()).http_client(http);
    if let Some(profile) = &settings.profile {
        loader = loader.profile_name(profile);
    }
    if let Some(region) = &settings.region {
        loader = loader.region(Region::new(region.clone()));
    } else if named_endpoint(settings).is_some_and(|url| !is_of_aws(&url)) {
        // Without the instance, the last of the chain: elsewhere it is long in not answering.
        let environment = aws_config::environment::EnvironmentVariableRegionProvider::new();
        let mut profile = aws_config::profile::ProfileFileRegionProvider::builder();
        if let Some(name) = &settings.profile {
            profile = profile.profile_name(name);
        }
        let chain = aws_config::meta::region::RegionProviderChain::first_try(environment);
        loader = loader.region(chain.or_else(profile.build()).or_else(REGION_OF_OTHERS));
    }
    loader.load().await
}

/// The endpoint that settings or environment name.
fn named_endpoint(settings: &S3Settings) -> Option<String> {
    let value = |name: &str| std::env::var(name).ok().filter(|url| !url.is_empty());
    settings.endpoint_url.clone().or_else(|| ENDPOINT_VARIABLES.into_iter().find_map(value))
}

/// Whether an endpoint is one of AWS, such as that of a private network: it has a region.
fn is_of_aws(url: &str) -> bool {
    let url = without_user(url);
    let (_, rest) = url.split_once("://").unwrap_or(("", &url));
    let host = rest.split(['/', ':', '?', '#']).next().unwrap_or_default().to_ascii_lowercase();
    [".amazonaws.com", ".amazonaws.com.cn", ".api.aws"].iter().any(|end| host.ends_with(end))
}

/// The endpoint that was named, if one was, for messages: without what may be a secret.
fn endpoint_of(settings: &S3Settings, shared: &SdkConfig) -> Option<String> {
    let named = named_endpoint(settings);
    named.or_else(|| shared.endpoint_url().map(Into::into)).map(|url| without_user(&url))
}

/// A URL without user and password.
fn without_user(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority_end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
    let (authority, path) = rest.split_at(authority_end);
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let separator = if scheme.is_empty() { "" } else { "://" };
    format!("{scheme}{separator}{host}{path}")
}

fn configure(
    settings: &S3Settings,
    shared: &SdkConfig,
    has_endpoint: bool,
    watch: &Arc<Watch>,
) -> aws_sdk_s3::config::Builder {
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(Duration::from_millis(settings.connect_timeout_ms))
        .operation_attempt_timeout(Duration::from_millis(settings.request_timeout_ms))
        .build();
    // How many requests are under way is bounded by us, and so are the attempts at each: a shared
    // budget would only make the failure of one request that of another.
    let budget = RetryPartition::custom("dtruntime").token_bucket(TokenBucket::unlimited()).build();
    let mut config = aws_sdk_s3::config::Builder::from(shared)
        .timeout_config(timeouts)
        .retry_config(retries(settings.attempts))
        .retry_partition(budget)
        .retry_classifier(TooManyRequests)
        .force_path_style(settings.path_style.unwrap_or(has_endpoint))
        // Ours is set already where it matters, and computed once.
        .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
        // It ends slow uploads; the timeout of an attempt ends those that stand still.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .interceptor(Observer(Arc::clone(watch)));
    if let Some(endpoint) = &settings.endpoint_url {
        config = config.endpoint_url(endpoint);
    }
    config
}

fn retries(attempts: u32) -> RetryConfig {
    RetryConfig::standard()
        .with_max_attempts(attempts)
        .with_initial_backoff(BACKOFF.0)
        .with_max_backoff(BACKOFF.1)
}

fn http_client(settings: &S3Settings) -> Result<SharedHttpClient> {
    let bundle = settings.ca_bundle.clone().or_else(|| {
        std::env::var_os("AWS_CA_BUNDLE").filter(|path| !path.is_empty()).map(PathBuf::from)
    });
    let mut trusted = TrustStore::default();
    if let Some(path) = &bundle {
        trusted = trusted.with_pem_certificate(read_certificates(path)?);
    }
    let context = TlsContext::builder().with_trust_store(trusted).build().map_err(|error| {
        let path = bundle.as_deref().unwrap_or(Path::new("the system's certificates"));
        EngineError::invalid(
            format!("setting `s3.ca_bundle` = `{}`", path.display()),
            error.to_string(),
            "name a file of certificates in PEM",
        )
    })?;
    let proxies = ProxyConfig::from_env();
    Ok(aws_smithy_http_client::Builder::new().build_with_connector_fn(
        move |timeouts, components| {
            let mut connector = Connector::builder()
                .tls_provider(Provider::Rustls(CryptoMode::AwsLc))
                .tls_context(context.clone())
                .pool_idle_timeout(IDLE_CONNECTION)
                .proxy_config(proxies.clone());
            connector.set_connector_settings(timeouts.cloned());
            if let Some(components) = components {
                connector.set_sleep_impl(components.sleep_impl());
            }
            connector.build()
        },
    ))
}

fn read_certificates(path: &Path) -> Result<Vec<u8>> {
    let refused = |why: String| {
        EngineError::invalid(
            format!("setting `s3.ca_bundle` = `{}`", path.display()),
            why,
            "name a readable file of certificates in PEM",
        )
    };
    let pem = std::fs::read(path).map_err(|error| refused(error.to_string()))?;
    let holds_one = pem.windows(27).any(|window| window == b"-----BEGIN CERTIFICATE-----");
    if holds_one { Ok(pem) } else { Err(refused("it holds no certificate in PEM".into())) }
}

/// The SDK asks again after the words of AWS; other services say it with the status alone.
#[derive(Debug)]
struct TooManyRequests;

impl ClassifyRetry for TooManyRequests {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let status = context.response().map(|response| response.status().as_u16());
        if status == Some(429) {
            RetryAction::throttling_error()
        } else {
            RetryAction::NoActionIndicated
        }
    }

    fn name(&self) -> &'static str {
        "status 429"
    }
}

/// What every answer carries besides its own content: the service's time; and how often requests
/// were tried.
#[derive(Debug, Default)]
pub(super) struct Watch {
    date: Mutex<Option<(SystemTime, Instant)>>,
    requests: AtomicU64,
    attempts: AtomicU64,
}

impl Watch {
    /// The service's present, from its last answer on, which is cut to seconds: the latest that it
    /// can mean. `None` before the first answer that had it.
    pub(super) fn now(&self) -> Option<SystemTime> {
        let (date, seen) = (*unpoisoned(self.date.lock()))?;
        Some(date + Duration::from_secs(1) + seen.elapsed())
    }

    /// How many attempts were repetitions.
    pub(super) fn retries(&self) -> u64 {
        let attempts = self.attempts.load(Ordering::Relaxed);
        attempts.saturating_sub(self.requests.load(Ordering::Relaxed))
    }

    /// A request is made again that the SDK takes for a new one.
    pub(super) fn note_repetition(&self) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
    }

    fn note_date(&self, text: &str) {
        let date = DateTime::from_str(text, DateTimeFormat::HttpDate);
        if let Some(date) = date.ok().and_then(|date| SystemTime::try_from(date).ok()) {
            let mut last = unpoisoned(self.date.lock());
            *last = Some((date, Instant::now()));
        }
    }
}

#[derive(Debug)]
struct Observer(Arc<Watch>);

impl Intercept for Observer {
    fn name(&self) -> &'static str {
        "dtruntime"
    }

    fn read_before_signing(
        &self,
        _context: &BeforeTransmitInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        self.0.attempts.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn read_after_serialization(
        &self,
        _context: &BeforeTransmitInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        self.0.requests.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _components: &RuntimeComponents,
        _config: &mut ConfigBag,
    ) -> std::result::Result<(), BoxError> {
        if let Some(date) = context.response().headers().get("date") {
            self.0.note_date(date);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_services_clock_goes_on_from_its_last_answer() {
        let watch = Watch::default();
        watch.note_date("no date");
        assert_eq!(watch.now(), None);
        watch.note_date("Sun, 06 Nov 1994 08:49:37 GMT");
        let since = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let seconds = since(watch.now().unwrap()).as_secs();
        assert!((784_111_778..784_111_788).contains(&seconds), "{seconds}");
    }

    #[test]
    fn an_endpoint_is_told_without_its_user() {
        for (url, told) in [
            ("http://user:hush@host:9000/a@b", "http://host:9000/a@b"),
            ("https://hush@[::1]:9000", "https://[::1]:9000"),
            ("http://u:p@q@host?x=@", "http://host?x=@"),
            ("user:hush@host", "host"),
            ("https://host", "https://host"),
            ("", ""),
        ] {
            assert_eq!(without_user(url), told);
        }
    }

    #[test]
    fn endpoints_of_aws_are_known() {
        for url in [
            "https://bucket.vpce-1a2b3c-x.s3.eu-west-1.vpce.amazonaws.com",
            "https://S3.cn-north-1.Amazonaws.com.cn:443/",
            "https://s3.dualstack.us-west-2.api.aws/x",
        ] {
            assert!(is_of_aws(url), "{url}");
        }
        for url in ["http://127.0.0.1:9000", "https://minio.example/s3.amazonaws.com", "garage"] {
            assert!(!is_of_aws(url), "{url}");
        }
    }

    #[test]
    fn pauses_grow_up_to_a_bound() {
        let pauses: Vec<_> = (1..9).map(|attempt| Client::pause(attempt).as_millis()).collect();
        assert_eq!(pauses, [200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    }

    #[test]
    fn a_bundle_without_certificates_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        for act in [|_: &Path| {}, |path: &Path| std::fs::write(path, "no PEM").unwrap()] {
            act(&path);
            let error = read_certificates(&path).unwrap_err();
            assert!(error.to_string().starts_with("setting `s3.ca_bundle` = "), "{error}");
        }
    }
}
