//! A coordinator for tests: the real program on a free port, with a journal of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dtr_proto::client::{ClientError, Connection, Options, Registration, Worker};

/// How long anything may take on a slow machine.
pub(crate) const LONG: Duration = Duration::from_mins(1);

/// The program, running.
pub(crate) struct Program {
    folder: PathBuf,
    pub(crate) port: u16,
    pub(crate) metrics_port: u16,
    arguments: Vec<String>,
    environment: Vec<(String, String)>,
    child: Option<Child>,
}

impl Program {
    /// Starts it in `folder`, where its journal and its log go.
    pub(crate) fn start(folder: &Path, arguments: &[&str]) -> Self {
        Self::start_in(folder, arguments, &[])
    }

    /// The same, with variables of the environment.
    pub(crate) fn start_in(
        folder: &Path,
        arguments: &[&str],
        environment: &[(&str, &str)],
    ) -> Self {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let mut program = Self {
            environment: environment.iter().map(owned).collect(),
            folder: folder.to_owned(),
            port: 0,
            metrics_port: 0,
            arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(),
            child: None,
        };
        program.start_again();
        program
    }

    /// Starts it on the same ports and journal; at first on ports that it chooses.
    pub(crate) fn start_again(&mut self) {
        let mut command = program();
        command
            .arg(format!("127.0.0.1:{}", self.port))
            .arg(format!("--metrics-address=127.0.0.1:{}", self.metrics_port))
            .arg(format!("--state-path={}", self.folder.join("journal.redb").display()))
            .args(&self.arguments)
            .envs(self.environment.clone())
            .current_dir(&self.folder)
            .stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let mut lines = BufReader::new(child.stderr.take().expect("it is piped"));
        let mut seen = String::new();
        // An error has the address in quotes.
        while port_after("listening on 127.0.0.1:", &seen).is_none() {
            let read = lines.read_line(&mut seen).expect("it writes text");
            assert!(read > 0, "the coordinator ended: {seen}");
        }
        let told = |what: &str| port_after(what, &seen).unwrap_or_default();
        self.port = told("listening on 127.0.0.1:");
        self.metrics_port = told("metrics on http://127.0.0.1:");
        // A full pipe would stop it.
        std::thread::spawn(move || std::io::copy(&mut lines, &mut std::io::sink()));
        self.child = Some(child);
    }

    /// Kills it without a word, as the kernel would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }

    /// Asks it to end, as an operator does.
    pub(crate) fn terminate(&self) {
        let child = self.child.as_ref().expect("it runs");
        let sent = Command::new("kill").arg(child.id().to_string()).status();
        assert!(sent.expect("kill is there").success());
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The program, not yet started, with nothing of this environment's settings.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_coordinator"));
    command.env_remove("COORDINATOR_TOKEN").env_remove("RUST_LOG").env_remove("LOG_FORMAT");
    command
}

/// Runs it to its end.
pub(crate) fn run_to_end(folder: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        program().args(arguments).current_dir(folder).output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it writes text");
    (status.code(), text(stdout), text(stderr))
}

/// The port that a log names after these words.
fn port_after(words: &str, log: &str) -> Option<u16> {
    let (_, rest) = log.split_once(words)?;
    rest.split(|character: char| !character.is_ascii_digit()).next()?.parse().ok()
}

/// What a page says: its status line and its body.
pub(crate) fn page(port: u16, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("it listens");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("open");
    let mut reply = String::new();
    stream.read_to_string(&mut reply).expect("it replies in text");
    let (head, body) = reply.split_once("\r\n\r\n").expect("a reply has a head");
    (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
}

/// A connection with the patience of a test.
pub(crate) fn connect(url: &str) -> Arc<Connection> {
    let options = Options { url: url.to_owned(), patience: LONG, ..Options::default() };
    Arc::new(Connection::open(&options).expect("the URL is right"))
}

/// A worker called `worker-<rank>`.
pub(crate) fn register(
    connection: &Arc<Connection>,
    rank: u32,
    world_size: u32,
) -> Result<Worker, ClientError> {
    let registration = Registration {
        job: "default".into(),
        worker_id: format!("worker-{rank}"),
        rank,
        world_size,
        ip: "127.0.0.1".into(),
        port: 0,
        advertise_address: String::new(),
    };
    Worker::register(connection, registration).join()
}

/// Waits until it holds.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !holds() {
        assert!(Instant::now() < deadline, "{what} did not come to be");
        std::thread::sleep(Duration::from_millis(10));
    }
}
