//! `edgellm devices`: what this build can compute on here; with `-v`, which kernels run.

use clap::Args;
use edgellm::device::DeviceChoice;
use edgellm::kernels::{Isa, active_isa, kernels};
use serde_json::json;

use super::Context;

/// Show the devices here, and with -v the kernels that run on them
#[derive(Args)]
pub(crate) struct Devices {}

impl Devices {
    pub(crate) fn run(&self, ctx: &Context) -> anyhow::Result<()> {
        let default = DeviceChoice::Flex;
        let mut rows = Vec::new();
        let mut devices = Vec::new();
        for choice in DeviceChoice::ALL {
            let state = match choice.device() {
                Ok(_) if choice == default => "available (default)".to_string(),
                Ok(_) => "available".to_string(),
                Err(error) => error.to_string(),
            };
            let what = match choice {
                DeviceChoice::Flex | DeviceChoice::Auto => "CPU, this project's kernels on packed weights",
                DeviceChoice::NdArray => "CPU, an independent implementation on expanded weights",
                DeviceChoice::Wgpu => "GPU, on expanded weights",
            };
            devices.push(json!({
                "device": choice.name(), "available": choice.device().is_ok(), "compiled_in": choice.is_compiled_in(),
                "state": state,
            }));
            rows.push(vec![choice.name().to_string(), what.to_string(), state]);
        }
        let available: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
        let threads = rayon::current_num_threads();
        let list: Vec<_> = kernels()
            .iter()
            .map(|k| json!({ "operator": k.operator, "method": k.method, "isa": k.isa.name() }))
            .collect();
        let json = json!({
            "devices": devices, "threads": threads, "isa": active_isa().name(), "isa_available": available,
            "kernels": list,
        });
        ctx.result(json, || {
            let mut text = left_table(&rows);
            text.push_str(&format!("\n{threads} threads, instruction set {}", active_isa()));
            text.push_str(&format!(" (of {})\n", available.join(", ")));
            if ctx.verbose > 0 {
                let rows: Vec<Vec<String>> = kernels()
                    .iter()
                    .map(|k| vec![k.operator.to_string(), k.method.to_string(), k.isa.name().to_string()])
                    .collect();
                text.push_str("\nkernels on flex; other devices run the operators' definitions in Burn primitives\n");
                text.push_str(&left_table(&rows));
            }
            text
        })
    }
}

/// Rows with all columns to the left.
fn left_table(rows: &[Vec<String>]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    rows.iter().map(|row| format!("{:<first$}  {:<second$}  {}\n", row[0], row[1], row[2])).collect()
}
