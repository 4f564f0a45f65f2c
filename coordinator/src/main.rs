//! The program: parse, build, run.
//!
//! Always holds: an error is one message on standard error with a `hint:` line, and exit status 1;
//! wrong usage is clap's message and status 2; SIGTERM and SIGINT end it in good order, status 0.
#![forbid(unsafe_code)]

use std::error::Error;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use coordinator::config::{Config, ConfigError, Sources};
use coordinator::health::{self, Question, Tls};
use coordinator::server::{self, ServeError};
use coordinator::telemetry;
use tokio::signal::unix::{SignalKind, signal};

/// Every call makes and drops hundreds of small things on several threads, which the C library's
/// allocator makes wait for one another.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Knows who is alive in a training run, holds barriers, completes checkpoints across ranks and
/// deals out datasets.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Arguments {
    /// Where workers connect, as host:port [default: 127.0.0.1:50051]
    address: Option<String>,
    #[command(flatten)]
    sources: SourceArguments,
    /// Print the whole configuration, with ranges, and end
    #[arg(long)]
    print_config: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, clap::Args)]
struct SourceArguments {
    /// The configuration file [default: coordinator.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where Prometheus connects, as host:port, or off [default: 0.0.0.0:9090]
    #[arg(long, value_name = "ADDRESS")]
    metrics_address: Option<String>,
    /// The file that survives restarts
    #[arg(long, value_name = "FILE")]
    state_path: Option<String>,
    /// Any setting; may be given several times
    #[arg(long, value_name = "SECTION.KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check the configuration and its files, and end
    CheckConfig(SourceArguments),
    /// Ask a coordinator whether it serves: status 0 if it does, else 1
    Health(HealthArguments),
}

#[derive(Debug, clap::Args)]
struct HealthArguments {
    /// Where it listens, as host:port [default: the address of this configuration]
    address: Option<String>,
    /// The configuration file [default: coordinator.toml, if it is there]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How long it may take to answer
    #[arg(long, value_name = "SECONDS", default_value = "3", value_parser = seconds)]
    timeout: Duration,
    /// Ask by TLS: the PEM file of what signed its certificate
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// The name in its certificate, if it is not the host that is asked
    #[arg(long, requires = "ca")]
    name: Option<String>,
    /// The PEM file of a certificate to show, if it asks for one
    #[arg(long, value_name = "FILE", requires_all = ["ca", "key"])]
    cert: Option<PathBuf>,
    /// The PEM file of that certificate's key
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "a number of seconds is expected".to_owned())?;
    if (0.01..=3_600.0).contains(&seconds) {
        return Ok(Duration::from_secs_f64(seconds));
    }
    Err("from 0.01 to 3600 seconds are expected".to_owned())
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match act(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be reading any more.
            let _gone = writeln!(std::io::stderr(), "error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn act(arguments: Arguments) -> Result<(), Box<dyn Error>> {
    match arguments.command {
        Some(Command::CheckConfig(sources)) => check_config(sources),
        Some(Command::Health(arguments)) => ask_health(arguments),
        None => start(arguments),
    }
}

fn check_config(sources: SourceArguments) -> Result<(), Box<dyn Error>> {
    let config = load(sources, None)?;
    config.tls()?;
    config.auth()?;
    say("the configuration is right\n");
    Ok(())
}

fn ask_health(arguments: HealthArguments) -> Result<(), Box<dyn Error>> {
    let HealthArguments { address, config, timeout, ca, name, cert, key } = arguments;
    let address = match address {
        Some(address) => address,
        None => configured_address(config)?,
    };
    let tls = ca.map(|ca| Tls { ca, name, identity: cert.zip(key) });
    let asked = health::check(&Question { address, timeout, tls })?;
    say(&format!("the coordinator at `{asked}` serves\n"));
    Ok(())
}

fn configured_address(file: Option<PathBuf>) -> Result<String, ConfigError> {
    let sources = Sources { file, overrides: Vec::new() };
    let config = Config::load(&sources, |name| std::env::var_os(name))?;
    Ok(config.address().to_owned())
}

fn start(arguments: Arguments) -> Result<(), Box<dyn Error>> {
    let config = load(arguments.sources, arguments.address)?;
    if arguments.print_config {
        say(&config.print());
        return Ok(());
    }
    telemetry::start("coordinator", "info");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| ServeError::Serve(error.to_string()))?;
    let outcome = runtime.block_on(serve(&config));
    runtime.shutdown_background();
    telemetry::stop();
    Ok(outcome?)
}

fn load(sources: SourceArguments, address: Option<String>) -> Result<Config, ConfigError> {
    let mut overrides = sources.set;
    for (key, value) in [
        ("address", address),
        ("metrics_address", sources.metrics_address),
        ("state_path", sources.state_path),
    ] {
        overrides.extend(value.map(|value| format!("coordinator.{key}={value}")));
    }
    let sources = Sources { file: sources.config, overrides };
    Config::load(&sources, |name| std::env::var_os(name))
}

async fn serve(config: &Config) -> Result<(), ServeError> {
    let listener = server::listen("coordinator.address", config.address()).await?;
    let metrics = match config.metrics_address() {
        Some(address) => Some(server::listen("coordinator.metrics_address", address).await?),
        None => None,
    };
    let failed = |error: std::io::Error| ServeError::Serve(error.to_string());
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let shutdown = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    server::run(config, listener, metrics, shutdown).await
}

fn say(text: &str) {
    // Nobody may be reading any more.
    let _gone = std::io::stdout().write_all(text.as_bytes());
}
