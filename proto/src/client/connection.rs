//! One connection and the native thread that serves it.
//!
//! Always holds: the thread ends with the [`Connection`], and with it every call that is under way;
//! a call that is dropped is given up; the token is shown nowhere.

use std::future::Future;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;
use tokio::task::AbortHandle;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Response, Status};
use tracing::warn;

use super::error::{ClientError, ErrorKind};
use super::retry::{self, Failed, Next};

/// How long making a connection may take.
pub(super) const CONNECT: Duration = Duration::from_secs(5);
/// How often an idle connection is asked whether it is still there, and how long it may think.
pub(super) const KEEPALIVE: (Duration, Duration) =
    (Duration::from_secs(10), Duration::from_secs(5));
/// How long a call that does not wait for others may take before it is sent again.
const ATTEMPT: Duration = Duration::from_secs(10);

/// How to reach the coordinator.
#[derive(Clone, Default)]
pub struct Options {
    /// `http://host:port`, or `https://host:port` for TLS; the port may be left out: 50051.
    pub url: String,
    /// The bearer token, if the coordinator asks for one.
    pub token: Option<String>,
    /// PEM file of what signed the coordinator's certificate; else the system's.
    pub ca_file: Option<PathBuf>,
    /// PEM files of this worker's certificate and key, for mutual TLS.
    pub identity_files: Option<(PathBuf, PathBuf)>,
    /// How long to look for a coordinator that does not answer.
    pub patience: Duration,
}

impl std::fmt::Debug for Options {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Options").field("url", &self.url).finish_non_exhaustive()
    }
}

/// A connection with its thread. Ends when dropped.
#[derive(Debug)]
pub struct Connection {
    inner: Arc<Inner>,
    handle: Handle,
    /// Dropped to end the thread.
    _alive: oneshot::Sender<()>,
}

/// What calls share.
#[derive(Debug)]
pub(crate) struct Inner {
    url: String,
    endpoint: Endpoint,
    channel: Mutex<Channel>,
    token: Option<MetadataValue<Ascii>>,
    pub(crate) patience: Duration,
}

/// A call in progress; dropping it gives it up.
#[derive(Debug)]
pub struct Pending<T> {
    outcome: Receiver<Result<T, ClientError>>,
    task: AbortHandle,
    what: String,
}

impl<T> Pending<T> {
    /// Waits at most `timeout`; None means that it is still going on.
    pub fn wait(&self, timeout: Duration) -> Option<Result<T, ClientError>> {
        match self.outcome.recv_timeout(timeout) {
            Ok(outcome) => Some(outcome),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Err(ClientError::closed(&self.what))),
        }
    }

    /// Waits to the end.
    pub fn join(self) -> Result<T, ClientError> {
        self.outcome.recv().unwrap_or_else(|_| Err(ClientError::closed(&self.what)))
    }
}

impl<T> Drop for Pending<T> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Connection {
    /// Starts the thread. Nothing is sent yet, so a coordinator that is not there is no error.
    pub fn open(options: &Options) -> Result<Self, ClientError> {
        let (url, endpoint) = endpoint_of(options)?;
        let token = options.token.as_deref().map(token_of).transpose()?;
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| no_thread(&url, &error))?;
        let handle = runtime.handle().clone();
        let channel = {
            let _inside = handle.enter();
            endpoint.connect_lazy()
        };
        let (alive, ended) = oneshot::channel::<()>();
        std::thread::Builder::new()
            .name("dtr-coordinator".into())
            .spawn(move || {
                // Ends with an error when the sender is dropped: that is the signal.
                let _ended = runtime.block_on(ended);
                runtime.shutdown_background();
            })
            .map_err(|error| no_thread(&url, &error))?;
        let inner = Inner {
            url,
            endpoint,
            channel: Mutex::new(channel),
            token,
            patience: options.patience,
        };
        Ok(Self { inner: Arc::new(inner), handle, _alive: alive })
    }

    /// The coordinator's address.
    pub fn url(&self) -> &str {
        &self.inner.url
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Runs `work` on the thread.
    pub(crate) fn start<T: Send + 'static>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, ClientError>> + Send + 'static,
    ) -> Pending<T> {
        let (sender, outcome) = sync_channel(1);
        let task = self.handle.spawn(async move {
            // Nobody listens any more if the caller gave up.
            let _gone = sender.send(work.await);
        });
        Pending { outcome, task: task.abort_handle(), what: what.to_owned() }
    }

    /// Runs `work` on the thread; nobody waits for it.
    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.handle.spawn(work).abort_handle()
    }

    /// Asks once and again until there is an answer or patience ends.
    pub fn ask<Q, R, F>(
        &self,
        what: &str,
        message: Q,
        call: impl Fn(Channel, Request<Q>) -> F + Send + Sync + 'static,
    ) -> Pending<R>
    where
        Q: Clone + Send + Sync + 'static,
        R: Send + 'static,
        F: Future<Output = Result<Response<R>, Status>> + Send,
    {
        let inner = Arc::clone(&self.inner);
        let name = what.to_owned();
        self.start(what, async move { inner.ask(&name, Wait::Short, message, call).await })
    }
}

/// How long the coordinator may take to answer.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Wait {
    /// It answers at once.
    Short,
    /// It answers when others come; a connection that is gone is noticed by keep-alive.
    Long,
    /// It answers at once, and one try is all there is.
    Once(Duration),
}

impl Inner {
    /// Sends `message` until it is answered, or [`retry::next`] says that it is over.
    pub(crate) async fn ask<Q, R, F>(
        &self,
        what: &str,
        wait: Wait,
        message: Q,
        call: impl Fn(Channel, Request<Q>) -> F,
    ) -> Result<R, ClientError>
    where
        Q: Clone,
        F: Future<Output = Result<Response<R>, Status>>,
    {
        let mut failures = 0;
        let mut away_since = Instant::now();
        loop {
            let started = Instant::now();
            let mut request = Request::new(message.clone());
            if let Some(token) = &self.token {
                request.metadata_mut().insert("authorization", token.clone());
            }
            let reply = call(self.channel(), request);
            let outcome = match wait {
                Wait::Long => reply.await,
                Wait::Short => within(ATTEMPT, reply).await,
                Wait::Once(limit) => within(limit, reply).await,
            };
            let status = match outcome {
                Ok(reply) => return Ok(reply.into_inner()),
                Err(status) => status,
            };
            let error = ClientError::of(what, &self.url, &status);
            let next = retry::next(Failed {
                kind: error.kind,
                is_only_try: matches!(wait, Wait::Once(_)),
                is_long: matches!(wait, Wait::Long),
                took: started.elapsed(),
                failures,
                away: away_since.elapsed(),
                patience: self.patience,
            });
            let Next::Again { failures: so_far, was_there, renews } = next else {
                return Err(error);
            };
            failures = so_far;
            if was_there {
                away_since = Instant::now();
            }
            if failures == 1 {
                warn!("{what}: {}; asking again for {} s", error.why, self.patience.as_secs());
            }
            if renews {
                self.renew();
            }
            tokio::time::sleep(retry::pause(failures, chance())).await;
        }
    }

    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Makes the connection again, its host name resolved again.
    pub(crate) fn renew(&self) {
        let fresh = self.endpoint.connect_lazy();
        *self.channel.lock().unwrap_or_else(PoisonError::into_inner) = fresh;
    }
}

async fn within<R>(
    limit: Duration,
    reply: impl Future<Output = Result<R, Status>>,
) -> Result<R, Status> {
    match tokio::time::timeout(limit, reply).await {
        Ok(outcome) => outcome,
        Err(_) => {
            Err(Status::deadline_exceeded(format!("no reply within {} ms", limit.as_millis())))
        }
    }
}

/// A random number.
pub(crate) fn chance() -> u64 {
    // A system without random bits cannot make a TLS connection either; the number need not be
    // secret, only different from other workers'.
    getrandom::u64().unwrap_or_else(|_| {
        let now = std::time::SystemTime::now().duration_since(std::time::SystemTime::UNIX_EPOCH);
        (u64::from(std::process::id()) << 32) ^ u64::from(now.unwrap_or_default().subsec_nanos())
    })
}

fn endpoint_of(options: &Options) -> Result<(String, Endpoint), ClientError> {
    let given = options.url.trim();
    let bad = |why: &str| {
        ClientError::new(
            ErrorKind::Invalid,
            format!("coordinator URL `{given}`"),
            why,
            "write it as `http://host:50051`, or `https://` for TLS: argument `coordinator_url`, \
             or environment COORDINATOR_URL",
        )
    };
    let with_scheme =
        if given.contains("://") { given.to_owned() } else { format!("http://{given}") };
    let url = with_port(&with_scheme).ok_or_else(|| bad("a host is expected"))?;
    let is_tls = url.starts_with("https://");
    if !is_tls && !url.starts_with("http://") {
        return Err(bad("its scheme is neither http nor https"));
    }
    let mut endpoint = Endpoint::from_shared(url.clone())
        .map_err(|error| bad(&error.to_string()))?
        .connect_timeout(CONNECT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1)
        .keep_alive_while_idle(true);
    if is_tls {
        let tls = tls_of(options)?;
        endpoint = endpoint.tls_config(tls).map_err(|error| bad(&error.to_string()))?;
    } else if options.ca_file.is_some() || options.identity_files.is_some() {
        return Err(bad("certificates are given, but `http://` does not use them"));
    }
    Ok((url, endpoint))
}

/// The URL with its port: 50051 where it has none.
fn with_port(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://")?;
    let host = rest.trim_end_matches('/');
    if host.is_empty() || host.starts_with(':') {
        return None;
    }
    let after_address = host.rsplit(']').next().unwrap_or(host);
    let port = if after_address.contains(':') { "" } else { ":50051" };
    Some(format!("{scheme}://{host}{port}"))
}

fn tls_of(options: &Options) -> Result<ClientTlsConfig, ClientError> {
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|error| {
            ClientError::new(
                ErrorKind::Invalid,
                format!("reading the certificate `{}`", path.display()),
                error.to_string(),
                "name a PEM file that this process can read",
            )
        })
    };
    let mut tls = ClientTlsConfig::new();
    tls = match &options.ca_file {
        Some(path) => tls.ca_certificate(Certificate::from_pem(read(path)?)),
        None => tls.with_native_roots(),
    };
    if let Some((cert, key)) = &options.identity_files {
        tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
    }
    Ok(tls)
}

fn token_of(token: &str) -> Result<MetadataValue<Ascii>, ClientError> {
    let mut value: MetadataValue<Ascii> =
        format!("Bearer {}", token.trim()).parse().map_err(|_| {
            ClientError::new(
                ErrorKind::Invalid,
                "the coordinator's token",
                "it is not plain ASCII",
                "set COORDINATOR_TOKEN, or pass `token=`, as the operator gave it out",
            )
        })?;
    value.set_sensitive(true);
    Ok(value)
}

fn no_thread(url: &str, error: &std::io::Error) -> ClientError {
    ClientError::new(
        ErrorKind::Internal,
        format!("starting the thread for the coordinator at `{url}`"),
        error.to_string(),
        "raise the limit of threads (`ulimit -u`)",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_get_scheme_and_port() {
        let url = |text: &str| {
            let options = Options { url: text.into(), ..Options::default() };
            endpoint_of(&options).map(|(url, _)| url)
        };
        for (given, expected) in [
            ("http://localhost:50051", "http://localhost:50051"),
            ("http://localhost:50051/", "http://localhost:50051"),
            ("coordinator", "http://coordinator:50051"),
            ("coordinator:7000", "http://coordinator:7000"),
            ("http://[::1]", "http://[::1]:50051"),
            ("http://[::1]:7", "http://[::1]:7"),
        ] {
            assert_eq!(url(given).expect(given), expected);
        }
        for bad in ["", "http://", "ftp://host", "http://:50051", "http://a b"] {
            let error = url(bad).expect_err(bad);
            assert_eq!(error.kind, ErrorKind::Invalid, "{error}");
        }
    }

    /// Asks a coordinator that does not answer.
    fn ask_in_vain(options: &Options) -> ClientError {
        let connection = Connection::open(options).expect("nothing is sent yet");
        let asked = connection.ask("listing", crate::v1::ListWorkersRequest::default(), {
            |channel, request| async move {
                let mut client = crate::v1::membership_client::MembershipClient::new(channel);
                client.list_workers(request).await
            }
        });
        asked.join().expect_err("nobody answers")
    }

    /// A coordinator that is stopped: its system takes connections for it.
    #[test]
    fn one_that_takes_connections_and_never_answers_is_not_asked_for_ever() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let patience = Duration::from_millis(1);
        let error = ask_in_vain(&Options { url, patience, ..Options::default() });
        assert_eq!(error.kind, ErrorKind::Unavailable, "{error}");
    }

    #[test]
    fn nobody_listening_is_explained() {
        let error =
            ask_in_vain(&Options { url: "http://127.0.0.1:9".into(), ..Options::default() });
        assert_eq!(error.kind, ErrorKind::Unavailable);
        let text = error.to_string();
        assert!(text.contains("`http://127.0.0.1:9` does not answer: "), "{text}");
        assert!(text.contains("refused") && text.contains("hint: start it"), "{text}");
    }
}
