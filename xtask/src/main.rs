//! Repository tasks.
mod fixture;
mod repo;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    FixtureText(fixture::FixtureText),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::FixtureText(args) => args.run(),
    }
}
