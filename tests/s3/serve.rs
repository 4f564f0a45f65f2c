//! The tests' S3 server as a program, for tests that are not written in Rust.
//!
//! `s3-server ROOT [PORT]`: keeps its objects in ROOT, prints its URL and the credentials, and
//! serves until its standard input ends, so that it never outlives the process that started it.
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    dead_code,
    reason = "a program of the tests fails as they do, and uses a part of their server"
)]

use std::io::{Read, Write};
use std::path::Path;

mod server;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let root = arguments.next().expect("usage: s3-server ROOT [PORT]");
    let port = arguments.next().map_or(0, |port| port.parse().expect("a port"));
    let server = server::Server::start(Path::new(&root), port);
    let (key, secret) = server::OWNER;
    println!("{} {} {key} {secret}", server.url(), server::BUCKET);
    std::io::stdout().flush().unwrap();
    let mut until_the_end = Vec::new();
    std::io::stdin().read_to_end(&mut until_the_end).unwrap();
}
