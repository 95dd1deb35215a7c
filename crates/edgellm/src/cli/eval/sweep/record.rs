//! What a sweep keeps of a case.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use edgellm::eval::sweep::{Case, Stage, StageKind};
use edgellm::eval::{Figures, Item, Layer, RECORD_VERSION, Record};
use serde_json::Value;

use crate::cli::Context;
use crate::cli::eval::report::environment;
use crate::cli::eval::speed;

/// The record of a case, whose stage printed `result` after `seconds`, on a model that `plan` planned.
pub(super) fn record(
    ctx: &Context,
    sweep: &str,
    case: &Case,
    stage: &Stage,
    result: &Value,
    plan: Option<&Value>,
    seconds: f64,
) -> anyhow::Result<Record> {
    let (figures, items) = match stage.kind {
        StageKind::Bench => {
            let found = speed::figures(result);
            (found.figures, found.items)
        }
        _ => (
            serde_json::from_value::<Figures>(result["figures"].clone())?,
            serde_json::from_value::<BTreeMap<String, Vec<Item>>>(result["items"].clone())?,
        ),
    };
    let environment = match &result["environment"] {
        Value::Object(fields) => fields.clone(),
        _ => environment(ctx).as_object().cloned().unwrap_or_default(),
    };
    let plain = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let layers = plan.and_then(|plan| plan["units"].as_array()).map(|units| units.iter().map(layer).collect());
    Ok(Record {
        version: RECORD_VERSION,
        id: stage.key[..12].to_owned(),
        sweep: Some(sweep.to_owned()),
        sample: Some(case.sample.clone()),
        case: case.names.clone(),
        figures,
        items,
        layers: layers.unwrap_or_default(),
        environment: environment.iter().map(|(name, value)| (name.clone(), plain(value))).collect(),
        seconds,
        ended: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
    })
}

/// A unit of `plan --json`.
fn layer(unit: &Value) -> Layer {
    let name = unit["unit"].as_str().map_or_else(|| unit["unit"].to_string(), str::to_owned);
    Layer {
        name,
        bits: unit["bits_per_weight"].as_f64(),
        sparsity: unit["sparsity"].as_f64(),
        sensitivity: unit["sensitivity"].as_f64(),
        bytes: unit["bytes"].as_u64(),
        milliseconds: None,
    }
}
