//! `ckpt-tool` as a program of its own. The Python package brings it along, too.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    ckpt_tool::run(std::env::args_os()).into()
}
