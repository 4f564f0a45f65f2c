//! A proxy between client and server that does to requests what networks and services do to them.
//!
//! Always holds: the plan alone decides what happens to the request with a number; requests are
//! numbered as they come, from 0.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

/// What is done to one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// Nothing: it is passed on, and so is its answer.
    None,
    /// An answer of the service's own: status, code, message.
    Answer(u16, &'static str),
    /// The connection breaks before the body was read.
    ResetBeforeBody,
    /// The request takes effect; the connection breaks instead of the answer.
    AnswerLost,
    /// The request is read, and the way back closed without an answer.
    HalfClosed,
    /// The answer breaks off in the middle.
    Truncated,
    /// A bit of the answer's body is another.
    Corrupted,
    /// The answer comes at 1 KB/s.
    Slow,
    /// The answer comes 3 seconds late.
    Late,
    /// An answer that says 200 first, and an error in its body; for those that complete an upload.
    ErrorIn200,
    /// The connection breaks after a second, and the request takes effect so many seconds after it
    /// came.
    AppliedLate(u64),
    /// There is never an answer.
    Stalled,
}

/// Every fault that ends by itself.
pub(crate) const FAULTS: [Fault; 17] = [
    Fault::Answer(500, "InternalError"),
    Fault::Answer(503, "SlowDown"),
    Fault::Answer(429, "TooManyRequests"),
    Fault::Answer(403, "ExpiredToken"),
    Fault::Answer(403, "RequestTimeTooSkewed"),
    Fault::Answer(409, "ConditionalRequestConflict"),
    Fault::Answer(412, "PreconditionFailed"),
    Fault::ResetBeforeBody,
    Fault::AnswerLost,
    Fault::HalfClosed,
    Fault::Truncated,
    Fault::Corrupted,
    Fault::Slow,
    Fault::Late,
    Fault::ErrorIn200,
    Fault::AppliedLate(2),
    Fault::None,
];

/// What is done to the request with a number.
pub(crate) type Plan = Arc<dyn Fn(u64) -> Fault + Send + Sync>;

/// A proxy on a port of its own, which ends when it is dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    requests: Arc<AtomicU64>,
    _runtime: Runtime,
}

impl Proxy {
    pub(crate) fn start(server: SocketAddr, plan: Plan) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&requests);
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (plan, counter) = (Arc::clone(&plan), Arc::clone(&counter));
                tokio::spawn(async move {
                    // Broken connections are what this is for.
                    let _broken = relay(client, server, plan, counter).await;
                });
            }
        });
        Self { address, requests, _runtime: runtime }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests that came so far.
    pub(crate) fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }
}

/// Passes the requests of a connection on, one after the other.
async fn relay(
    mut client: TcpStream,
    server: SocketAddr,
    plan: Plan,
    counter: Arc<AtomicU64>,
) -> std::io::Result<()> {
    while let Some(head) = read_head(&mut client).await? {
        let number = counter.fetch_add(1, Ordering::Relaxed);
        let fault = plan(number);
        if fault == Fault::ResetBeforeBody {
            // What is unread makes closing a reset.
            return Ok(());
        }
        let body = read_body(&mut client, &head).await?;
        match before(fault, number, &mut client, server, &head.text, &body).await? {
            Some(Handled::Answered) => {}
            Some(Handled::Ended) => return Ok(()),
            None => {
                let reply = forward(server, &head.text, &body).await?;
                return after(fault, &mut client, reply).await;
            }
        }
    }
    Ok(())
}

/// What became of a request that is not passed on at once.
enum Handled {
    /// It has its answer, and the next one may come.
    Answered,
    /// The connection is over.
    Ended,
}

/// Does what is done to a request before the server has it; None if it is passed on now.
async fn before(
    fault: Fault,
    number: u64,
    client: &mut TcpStream,
    server: SocketAddr,
    head: &str,
    body: &[u8],
) -> std::io::Result<Option<Handled>> {
    let is_completion = head.starts_with("POST ") && head.contains("uploadId=");
    match fault {
        Fault::Answer(status, code) => {
            client.write_all(&answer(status, code, number)).await?;
            Ok(Some(Handled::Answered))
        }
        Fault::ErrorIn200 if is_completion => {
            client.write_all(&answer(200, "InternalError", number)).await?;
            Ok(Some(Handled::Answered))
        }
        Fault::Stalled => std::future::pending().await,
        Fault::HalfClosed => {
            client.shutdown().await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(Some(Handled::Ended))
        }
        Fault::AppliedLate(seconds) => {
            let (head, body) = (head.to_owned(), body.to_vec());
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_secs(seconds)).await;
                let _late = forward(server, &head, &body).await;
            });
            tokio::time::sleep(Duration::from_secs(1)).await;
            Ok(Some(Handled::Ended))
        }
        _ => Ok(None),
    }
}

/// Does what is done to the server's answer; the connection is over then.
async fn after(fault: Fault, client: &mut TcpStream, mut reply: Vec<u8>) -> std::io::Result<()> {
    match fault {
        Fault::AnswerLost => {
            client.set_zero_linger()?;
            return Ok(());
        }
        Fault::Truncated => {
            client.write_all(&reply[..reply.len() - reply.len() / 3 - 1]).await?;
            client.flush().await?;
            return Ok(());
        }
        Fault::Corrupted => {
            let start = find(&reply, b"\r\n\r\n").map_or(reply.len(), |at| at + 4);
            if start < reply.len() {
                let place = start + (reply.len() - start) / 2;
                reply[place] ^= 1;
            }
        }
        Fault::Slow => {
            for piece in reply.chunks(100) {
                client.write_all(piece).await?;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            return Ok(());
        }
        Fault::Late => tokio::time::sleep(Duration::from_secs(3)).await,
        _ => {}
    }
    client.write_all(&reply).await?;
    // The server closed its end, and says so in the answer.
    client.shutdown().await
}

struct Head {
    text: String,
    /// What came behind it.
    rest: Vec<u8>,
    body_bytes: usize,
}

async fn read_head(client: &mut TcpStream) -> std::io::Result<Option<Head>> {
    let mut bytes = Vec::new();
    loop {
        if let Some(end) = find(&bytes, b"\r\n\r\n") {
            let rest = bytes.split_off(end + 4);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let length = text.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
            });
            return Ok(Some(Head { text, rest, body_bytes: length.unwrap_or(0) }));
        }
        if client.read_buf(&mut bytes).await? == 0 {
            return Ok(None);
        }
    }
}

/// Reads what is left of a request's body; gives all of it.
async fn read_body(client: &mut TcpStream, head: &Head) -> std::io::Result<Vec<u8>> {
    let mut body = head.rest.clone();
    let missing = head.body_bytes.saturating_sub(body.len());
    let read = body.len();
    body.resize(read + missing, 0);
    client.read_exact(&mut body[read..]).await?;
    Ok(body)
}

/// Sends a request to the server on a connection of its own; gives the whole answer.
async fn forward(server: SocketAddr, head: &str, body: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let (request, headers) = head.split_once("\r\n").unwrap_or((head, ""));
    let head = format!("{request}\r\nconnection: close\r\n{headers}");
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body).await?;
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).await?;
    Ok(reply)
}

/// An answer as the service gives it.
fn answer(status: u16, code: &str, number: u64) -> Vec<u8> {
    let body = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code>\
         <Message>the proxy says so</Message><RequestId>proxy-{number}</RequestId></Error>"
    );
    format!(
        "HTTP/1.1 {status} Injected\r\ncontent-type: application/xml\r\ncontent-length: {}\r\n\
         x-amz-request-id: proxy-{number}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}
