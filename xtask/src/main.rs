//! Repository tasks, run as `cargo xtask TASK`: the demo, everything CI runs, the fixture, and the checks against other
//! programs. One module a task; nothing here is linked into what is shipped, and nothing of the workspace is linked in
//! here: the tasks drive the `edgellm` command as a user would.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "tasks talk to a person")]

mod android;
mod architecture;
mod binary;
mod bindings;
mod browser;
mod checks;
mod compare;
mod cross;
mod demo;
mod device;
mod doctor;
mod edgellm;
mod fixture;
mod golden;
mod ios;
mod jetson;
mod latency;
mod package;
mod python;
mod repo;
mod streaming;
mod suite;
mod sweep;
mod synth_model;
mod telemetry;
mod toolchain;
mod train_fixture;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Repository tasks.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Demo(demo::Demo),
    Test(suite::Test),
    Bindings(bindings::Bindings),
    FixtureText(fixture::FixtureText),
    TrainFixture(train_fixture::TrainFixture),
    SynthModel(synth_model::SynthModel),
    CompareLlama(compare::llama::CompareLlama),
    ComparePeft(compare::peft::ComparePeft),
    ComparePolicies(compare::policies::ComparePolicies),
    Golden(golden::Golden),
    CheckGguf(checks::CheckGguf),
    CheckAdapter(checks::CheckAdapter),
    CheckPeft(checks::CheckPeft),
    CheckLoraGguf(checks::CheckLoraGguf),
    CheckLatency(latency::CheckLatency),
    CheckReport(browser::CheckReport),
    CheckStreaming(streaming::CheckStreaming),
    RegressionSweep(sweep::RegressionSweep),
    CheckTelemetry(telemetry::CheckTelemetry),
    ArchCheck(architecture::ArchCheck),
    BenchDevice(device::BenchDevice),
    BuildAndroid(android::BuildAndroid),
    BuildIos(ios::BuildIos),
    BuildJetson(jetson::BuildJetson),
    Doctor(doctor::Doctor),
}

fn main() -> ExitCode {
    let result = match Cli::parse().task {
        Task::Demo(task) => task.run(),
        Task::Test(task) => task.run(),
        Task::Bindings(task) => task.run(),
        Task::FixtureText(task) => task.run(),
        Task::TrainFixture(task) => task.run(),
        Task::SynthModel(task) => task.run(),
        Task::CompareLlama(task) => task.run(),
        Task::ComparePeft(task) => task.run(),
        Task::ComparePolicies(task) => task.run(),
        Task::Golden(task) => task.run(),
        Task::CheckGguf(task) => task.run(),
        Task::CheckAdapter(task) => task.run(),
        Task::CheckPeft(task) => task.run(),
        Task::CheckLoraGguf(task) => task.run(),
        Task::CheckLatency(task) => task.run(),
        Task::CheckReport(task) => task.run(),
        Task::CheckStreaming(task) => task.run(),
        Task::RegressionSweep(task) => task.run(),
        Task::CheckTelemetry(task) => task.run(),
        Task::ArchCheck(task) => task.run(),
        Task::BenchDevice(task) => task.run(),
        Task::BuildAndroid(task) => task.run(),
        Task::BuildIos(task) => task.run(),
        Task::BuildJetson(task) => task.run(),
        Task::Doctor(task) => task.run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Ends the program as one whose command line cannot be meant.
fn usage(error: &anyhow::Error) -> ! {
    eprintln!("error: {error:#}");
    std::process::exit(2)
}
