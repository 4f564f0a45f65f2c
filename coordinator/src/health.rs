//! `coordinator health`: asks a coordinator whether it serves, as the probes of containers do.
//!
//! Slim images have neither curl nor grpcurl, and the program that is probed is there anyway.
//!
//! Always holds: the question ends within its timeout, with an answer or with an error that says
//! what to look at; it needs no token, because the health service reveals nothing of a job.

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dtr_proto::v1::membership_server::MembershipServer;
use tonic::server::NamedService as _;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::service::Service;

/// Whom to ask, and how.
#[derive(Clone, Debug)]
pub struct Question {
    /// `host:port`. The addresses that mean "all of this machine" are asked on loopback.
    pub address: String,
    /// How long everything together may take.
    pub timeout: Duration,
    /// By TLS, if the coordinator listens so.
    pub tls: Option<Tls>,
}

/// What TLS needs.
#[derive(Clone, Debug)]
pub struct Tls {
    /// PEM file of what signed the coordinator's certificate.
    pub ca: PathBuf,
    /// The name in that certificate, if it is not the address's host.
    pub name: Option<String>,
    /// PEM files of a certificate and its key, where the coordinator asks for one.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// A coordinator that does not serve, or that could not be asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the coordinator at `{address}`: {why}\nhint: {hint}")]
pub struct Unhealthy {
    address: String,
    why: String,
    hint: &'static str,
}

const ABSENT: &str = "name where it listens: `coordinator health HOST:PORT`; its log says whether \
                      it runs, and if it ended, why";
const SILENT: &str = "it hangs, has too many connections, or a firewall drops what is sent there: \
                      look at its log and at `/readyz` on its metrics address";
const TLS: &str = "if it has `coordinator.tls`, ask by TLS: `--ca FILE`, `--name` as in its \
                   certificate, and `--cert`, `--key` where it has a `client_ca`; if it has not, \
                   ask without them";
const STRANGER: &str = "another service has this port: name where the coordinator listens";
const ENDING: &str = "wait until it has been started again; its log says who told it to end";
const FILES: &str = "name PEM files that this user can read";

/// Gives the address that was asked, if a coordinator serves there.
pub fn check(question: &Question) -> Result<String, Unhealthy> {
    let address = reachable(&question.address);
    let unhealthy = |why: String, hint| Unhealthy { address: address.clone(), why, hint };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| unhealthy(error.to_string(), SILENT))?;
    let asked = async { tokio::time::timeout(question.timeout, ask(&address, question)).await };
    let outcome = runtime.block_on(asked).unwrap_or_else(|_| {
        Err((format!("no answer within {} s", question.timeout.as_secs_f64()), SILENT))
    });
    outcome.map_err(|(why, hint)| unhealthy(why, hint))?;
    Ok(address)
}

/// What is wrong, and what to do.
type Reason = (String, &'static str);

async fn ask(address: &str, question: &Question) -> Result<(), Reason> {
    let channel = connect(address, question).await?;
    // By name: any other server with a health service says that the whole of it serves.
    let service = MembershipServer::<Service>::NAME.to_owned();
    let reply = HealthClient::new(channel).check(HealthCheckRequest { service }).await;
    match reply.map(|reply| reply.into_inner().status()) {
        Ok(ServingStatus::Serving) => Ok(()),
        Ok(_) => Err(("it is shutting down".to_owned(), ENDING)),
        Err(status) => Err(refused(&status)),
    }
}

async fn connect(address: &str, question: &Question) -> Result<Channel, Reason> {
    let scheme = if question.tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
        .map_err(|error| (told(&error), ABSENT))?;
    if let Some(tls) = &question.tls {
        endpoint = endpoint.tls_config(tls.config()?).map_err(|error| (told(&error), TLS))?;
    }
    endpoint.connect().await.map_err(|error| {
        let why = told(&error);
        let hint = if question.tls.is_some() && why.contains("certificate") { TLS } else { ABSENT };
        (why, hint)
    })
}

fn refused(status: &Status) -> Reason {
    match status.code() {
        Code::NotFound | Code::Unimplemented => {
            ("it answers, but is not a coordinator".to_owned(), STRANGER)
        }
        _ => (told(status), TLS),
    }
}

impl Tls {
    fn config(&self) -> Result<ClientTlsConfig, Reason> {
        let mut tls = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(&self.ca)?));
        if let Some(name) = &self.name {
            tls = tls.domain_name(name);
        }
        if let Some((cert, key)) = &self.identity {
            tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?));
        }
        Ok(tls)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Reason> {
    fs::read(path).map_err(|error| (format!("reading `{}`: {error}", path.display()), FILES))
}

/// An error with all that caused it.
fn told(error: &dyn Error) -> String {
    let mut why = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let text = inner.to_string();
        if !why.contains(&text) {
            why = format!("{why}: {text}");
        }
        source = inner.source();
    }
    why
}

/// An address that can be connected to, of one that can be listened on.
fn reachable(address: &str) -> String {
    let address = address.trim();
    match address.rsplit_once(':') {
        Some(("0.0.0.0" | "", port)) => format!("127.0.0.1:{port}"),
        Some(("[::]", port)) => format!("[::1]:{port}"),
        _ => address.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_listens_everywhere_is_asked_on_loopback() {
        for (given, asked) in [
            ("0.0.0.0:50051", "127.0.0.1:50051"),
            (":7", "127.0.0.1:7"),
            ("[::]:7", "[::1]:7"),
            ("coordinator:50051", "coordinator:50051"),
            (" 10.0.0.7:1 ", "10.0.0.7:1"),
        ] {
            assert_eq!(reachable(given), asked);
        }
    }

    #[test]
    fn what_is_no_address_is_explained() {
        let question =
            Question { address: "a b".into(), timeout: Duration::from_secs(5), tls: None };
        let error = check(&question).unwrap_err();
        assert!(error.to_string().contains("hint: name where it listens"), "{error}");
    }
}
