//! The `edgellm` command: the facade for people and scripts. Everything it does is a call into the library crates;
//! here are the arguments, the progress, the printing and the exit codes.
#![forbid(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
