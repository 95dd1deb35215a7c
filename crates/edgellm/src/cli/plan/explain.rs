//! `edgellm plan --explain`: each unit's format beside the next better and the next worse.

use edgellm::luc::{Choice, Explained, Neighbour, Resource};
use serde_json::{Value, json};

use crate::cli::output::{bytes, table};

pub(super) fn json(explained: &Explained) -> Value {
    let neighbour = |n: &Neighbour| {
        json!({
            "format": n.format.to_string(), "bytes": n.cost.bytes, "delta_bytes": n.bytes,
            "delta_milliseconds": n.milliseconds, "delta_kl": n.sensitivity,
        })
    };
    let unit = |c: &Choice| {
        json!({
            "unit": c.unit, "format": c.format.to_string(), "bytes": c.cost.bytes,
            "milliseconds": (c.cost.milliseconds > 0.0).then_some(c.cost.milliseconds), "sensitivity": c.sensitivity,
            "better": c.better.as_ref().map(neighbour), "worse": c.worse.as_ref().map(neighbour),
        })
    };
    let scarce = match explained.scarce {
        Resource::Bytes => "bytes",
        Resource::Time => "milliseconds",
        Resource::Memory => "peak_bytes",
    };
    json!({ "scarce": scarce, "units": explained.choices.iter().map(unit).collect::<Vec<_>>() })
}

/// A table; with times where a device is known.
pub(super) fn text(explained: &Explained, with_times: bool) -> String {
    let signed = |n: i64| format!("{}{}", if n < 0 { '-' } else { '+' }, bytes(n.unsigned_abs()));
    let neighbour = |n: &Option<Neighbour>| match n {
        None => "-".to_string(),
        Some(n) => {
            let spent = match explained.scarce {
                Resource::Time => format!("{:+.4} ms", n.milliseconds),
                Resource::Bytes | Resource::Memory => signed(n.bytes),
            };
            let damage = n.sensitivity.map_or("unknown".into(), |s| format!("{s:+.1e}"));
            format!("{} {spent} {damage}", n.format)
        }
    };
    let mut header = vec!["unit", "format", "size", "sensitivity", "next better", "next worse"];
    if with_times {
        header.insert(3, "ms");
    }
    let row = |c: &Choice| {
        let mut cells = vec![
            c.unit.to_string(),
            c.format.to_string(),
            bytes(c.cost.bytes),
            c.sensitivity.map_or("-".into(), |s| format!("{s:.2e}")),
            neighbour(&c.better),
            neighbour(&c.worse),
        ];
        if with_times {
            cells.insert(3, format!("{:.4}", c.cost.milliseconds));
        }
        cells
    };
    table(&header, &explained.choices.iter().map(row).collect::<Vec<_>>())
}
