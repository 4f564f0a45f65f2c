//! A coordinator inside another process, for a run that was given none.
//!
//! Always holds: it listens on a free port and lets in only who has the token that it drew; what it
//! keeps is in a directory of its own, which goes with it.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;

use tempfile::TempDir;
use tokio::sync::oneshot;

use crate::config::Config;
use crate::server::{self, ServeError};

/// A running coordinator. Dropping it ends it.
#[derive(Debug)]
pub struct Embedded {
    address: SocketAddr,
    token: String,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
    state: Option<TempDir>,
}

impl Embedded {
    /// Starts one that listens on `ip`.
    pub fn start(ip: &str) -> Result<Self, ServeError> {
        Self::start_with(ip, &[])
    }

    /// The same with these settings, each `section.key=value`.
    pub fn start_with(ip: &str, settings: &[String]) -> Result<Self, ServeError> {
        let token = drawn_token().map_err(|error| not_started(&error))?;
        let state = tempfile::Builder::new()
            .prefix("dtruntime-coordinator-")
            .tempdir()
            .map_err(|error| not_started(&error))?;
        let config = config_in(state.path(), &token, settings)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("dtr-embedded")
            .enable_all()
            .build()
            .map_err(|error| not_started(&error))?;
        let address = format!("{ip}:0");
        let listener = runtime.block_on(server::listen("address", &address))?;
        let address = listener.local_addr().map_err(|error| not_started(&error))?;
        let (end, ended) = oneshot::channel::<()>();
        // The caller goes on when it serves, or hears why it does not.
        let (sender, started) = sync_channel(1);
        let serve = move || {
            let serving = runtime.block_on(async {
                let shutdown = async {
                    // The owner drops or uses the sender to ask for the end: both mean the same.
                    let _either = ended.await;
                };
                let _gone = sender.send(());
                server::run(&config, listener, None, shutdown).await
            });
            if let Err(error) = serving {
                tracing::error!(%error, "the embedded coordinator ended");
            }
        };
        let thread = std::thread::Builder::new()
            .name("dtr-embedded".into())
            .spawn(serve)
            .map_err(|error| not_started(&error))?;
        started.recv().map_err(|_| ServeError::Serve("its thread ended".into()))?;
        Ok(Self { address, token, end: Some(end), thread: Some(thread), state: Some(state) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What callers have to present; it is also in a file of its directory.
    pub fn token(&self) -> &str {
        &self.token
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            // A panic was printed by its thread, and there is nothing left to end.
            let _panicked = thread.join();
        }
        if let Some(Err(error)) = self.state.take().map(TempDir::close) {
            tracing::warn!(%error, "the embedded coordinator's directory stays behind");
        }
    }
}

fn config_in(folder: &Path, token: &str, settings: &[String]) -> Result<Config, ServeError> {
    let token_path = folder.join("token");
    let written = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&token_path)
        .and_then(|mut file| file.write_all(token.as_bytes()));
    written.map_err(|error| not_started(&error))?;
    let overrides = [
        ("token", token_path.display().to_string()),
        ("state_path", folder.join("state.redb").display().to_string()),
        ("metrics_address", "off".to_owned()),
    ];
    let mut overrides = overrides.map(|(key, value)| format!("coordinator.{key}={value}")).to_vec();
    overrides.extend_from_slice(settings);
    Ok(Config::of(&overrides)?)
}

fn drawn_token() -> io::Result<String> {
    let draw = || getrandom::u64().map_err(io::Error::other);
    Ok(format!("{:016x}{:016x}{:016x}", draw()?, draw()?, draw()?))
}

fn not_started(error: &io::Error) -> ServeError {
    ServeError::Serve(format!("starting a coordinator in this process: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_listens_until_it_is_dropped_and_leaves_nothing() {
        let embedded = Embedded::start("127.0.0.1").unwrap();
        let address = embedded.address();
        std::net::TcpStream::connect(address).unwrap();
        let folder = embedded.state.as_ref().unwrap().path().to_owned();
        assert!(folder.exists() && embedded.token().len() == 48);
        drop(embedded);
        std::net::TcpStream::connect(address).unwrap_err();
        assert!(!folder.exists());
    }

    #[test]
    fn an_address_that_this_machine_has_not_is_told() {
        let error = Embedded::start("192.0.2.1").unwrap_err();
        assert!(error.to_string().contains("hint: "), "{error}");
    }
}
