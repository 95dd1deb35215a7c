//! What the items of an evaluation depend on, for `--resume`.

use std::path::Path;

use edgellm::kernels::active_isa;
use edgellm::model::ModelError;
use serde_json::{Map, Value, json};

use super::Eval;
use crate::cli::Context;
use crate::cli::digest::contents;

/// Digests of the model and of all files, and all options that change an item; also what rounds differently: the version,
/// device, instruction set, threads.
pub(super) fn settings(eval: &Eval, ctx: &Context) -> anyhow::Result<Map<String, Value>> {
    let of_file = |path: Option<&Path>| -> anyhow::Result<Value> {
        let digest = path.map(contents).transpose().map_err(|(path, error)| ModelError::io(&path, error))?;
        Ok(json!(digest))
    };
    let of_model = |name: &str| -> anyhow::Result<Value> { of_file(Some(&ctx.store.resolve(name)?)) };
    let settings = json!({
        "edgellm": env!("CARGO_PKG_VERSION"),
        "model": of_model(&eval.model)?,
        "adapter": of_file(eval.adapter.as_deref())?,
        "base": eval.base.as_deref().map(of_model).transpose()?,
        "text": of_file(eval.text.as_deref())?,
        "context": eval.context,
        "windows": eval.windows,
        "stride": eval.stride,
        "data": of_file(eval.data.as_deref())?,
        "format": format!("{:?}", eval.format),
        "calibration": eval.calibration,
        "multiple_choice": of_file(eval.multiple_choice.as_deref())?,
        "scoring": format!("{:?}", eval.scoring),
        "shots": eval.shots,
        "shots_file": of_file(eval.shots_file.as_deref())?,
        "answers": of_file(eval.answers.as_deref())?,
        "max_tokens": eval.max_tokens,
        "sampling": format!("{:?}", eval.sampling),
        "limit": eval.limit,
        "vote": eval.vote,
        "device": ctx.device.to_string(),
        "activations": ctx.activations.to_string(),
        "isa": active_isa().name(),
        "threads": rayon::current_num_threads(),
    });
    Ok(settings.as_object().cloned().unwrap_or_default())
}
