//! What an evaluation found, as JSON and as text.

use edgellm::eval::Measured;
use edgellm::kernels::active_isa;
use edgellm::session::LoadedModel;
use serde_json::{Value, json};

use super::{Eval, Results, speed};
use crate::cli::output::{bytes, seconds, table};
use crate::cli::{Context, vote};

/// Every figure with its interval, and the items that it came from.
pub(super) fn measured(eval: &Eval, model: &LoadedModel, results: &Results) -> Measured {
    use edgellm::eval::Better::{Higher, Lower};
    let mut all = Measured::default();
    if let Some(found) = &results.perplexity {
        all.add_perplexity(found);
    }
    if let Some(found) = &results.strided {
        all.add_logarithm("strided_perplexity", found.items.clone());
    }
    if let Some(found) = &results.divergence {
        all.add_divergence(found);
    }
    if let Some(found) = &results.heldout {
        all.add_heldout(found, &eval.vote);
    }
    if let Some(found) = &results.choice {
        all.add_choices(found, &eval.vote);
    }
    for (name, items) in &results.answers {
        all.add(name, items.clone(), "share", Higher);
    }
    if let Some(found) = &results.reliability {
        for (name, found) in reliability_names(eval, results).iter().zip(found) {
            all.add_calibration(&format!("calibration_error_{}", name.replace(' ', "_")), found);
        }
        all.add_calibration("calibration_error", &found[found.len() - eval.vote.len()]);
    }
    all.add_exact("model_bytes", model.files.file_bytes() as f64, "bytes", Lower);
    all.add_exact("load_seconds", results.load_seconds, "s", Lower);
    if let Some(found) = &results.speed {
        found.add_to(&mut all);
    }
    if let Some(peak) = results.peak_rss_bytes {
        all.add_exact("peak_rss_bytes", peak as f64, "bytes of memory", Lower);
    }
    all
}

/// Names of what [`Results::reliability`] is of: `exit N`, then the votes.
fn reliability_names(eval: &Eval, results: &Results) -> Vec<String> {
    let exits = results.heldout.iter().flat_map(|h| &h.by_exit).map(|exit| format!("exit {}", exit.exit));
    exits.chain(eval.vote.iter().cloned()).collect()
}

/// Expected calibration errors with the bins that they come from.
fn reliability(eval: &Eval, results: &Results) -> Option<Value> {
    let found = results.reliability.as_ref()?;
    let names = reliability_names(eval, results);
    let named = names.iter().zip(found);
    Some(named.map(|(name, f)| json!({"of": name, "error": f.error(), "bins": f.bins})).collect())
}

/// Where the figures come from.
pub(crate) fn environment(ctx: &Context) -> Value {
    json!({
        "edgellm": env!("CARGO_PKG_VERSION"), "os": std::env::consts::OS, "arch": std::env::consts::ARCH,
        "cpu": edgellm::sched::device_name(), "cores": std::thread::available_parallelism().map_or(1, |n| n.get()), "isa": active_isa().name(),
        "threads": rayon::current_num_threads(), "device": ctx.device.to_string(),
        "activations": ctx.activations.to_string(),
    })
}

pub(super) fn json(eval: &Eval, ctx: &Context, model: &LoadedModel, results: &Results) -> Value {
    let text_tokens = results.perplexity.as_ref().map(|p| p.tokens);
    let data_tokens = results.heldout.as_ref().map(|h| h.tokens);
    let measured = measured(eval, model, results);
    let mut json = json!({
        "perplexity": results.perplexity.as_ref().map(|p| p.all_targets),
        "second_half_perplexity": results.perplexity.as_ref().map(|p| p.second_half),
        "windows": results.perplexity.as_ref().map(|p| p.windows),
        "strided": results.strided,
        "kl": results.divergence.as_ref().map(|d| d.kl),
        "second_half_kl": results.divergence.as_ref().map(|d| d.second_half_kl),
        "top1_agreement": results.divergence.as_ref().map(|d| d.top1_agreement),
        "heldout_loss": results.heldout.as_ref().and_then(|h| h.votes.first()),
        "by_exit": results.heldout.as_ref().map(|h| &h.by_exit),
        "vote": results.heldout.as_ref().map(|_| &eval.vote[0]),
        "votes": results.heldout.as_ref().map(|h| vote::by_name(&eval.vote, &h.votes)),
        "multiple_choice": results.choice.as_ref().map(|c| json!({
            "questions": c.questions,
            "by_exit": c.by_exit,
            "votes": vote::by_name(&eval.vote, &c.votes),
            "by_subject": results.by_subject,
        })),
        "reliability": reliability(eval, results),
        "speed": results.speed.as_ref().map(speed::Speed::json),
        "generated": results.generated,
        "examples": results.heldout.as_ref().map(|h| h.examples),
        "data": results.data,
        "tokens": text_tokens.unwrap_or(0) + data_tokens.unwrap_or(0),
        "seconds": results.seconds,
        "peak_rss_bytes": results.peak_rss_bytes,
        "model_bytes": model.files.file_bytes(),
        "figures": measured.figures,
        "environment": environment(ctx),
    });
    if eval.items {
        json["items"] = json!(measured.items);
    }
    json
}

pub(super) fn text(eval: &Eval, model: &LoadedModel, results: &Results) -> String {
    let measured = measured(eval, model, results);
    let mut rows = Vec::new();
    let mut row = |name: &str, value: String, figure: &str| {
        let interval = measured.figures.get(figure).and_then(|figure| figure.interval);
        let interval = interval.map(|(low, high)| format!("{low:.4} to {high:.4}")).unwrap_or_default();
        rows.push(vec![name.to_string(), value, interval]);
    };
    if let Some(p) = &results.perplexity {
        row("perplexity", format!("{:.4}", p.all_targets), "perplexity");
        row("perplexity, second half", format!("{:.4}", p.second_half), "second_half_perplexity");
        row("windows", format!("{} of {} tokens", p.windows, eval.context), "");
    }
    if let Some(p) = &results.strided {
        row("perplexity, overlapping windows", format!("{:.4}", p.perplexity), "strided_perplexity");
    }
    if let Some(d) = &results.divergence {
        row("KL from the base", format!("{:.5} nats", d.kl), "kl");
        row("KL, second half", format!("{:.5} nats", d.second_half_kl), "second_half_kl");
        row("same likeliest token", format!("{:.2}%", d.top1_agreement * 100.0), "top1_agreement");
    }
    for exit in results.heldout.iter().flat_map(|h| &h.by_exit) {
        let figure = format!("heldout_loss_exit_{}", exit.exit);
        row(&format!("held-out loss, exit {}", exit.exit), format!("{:.4}", exit.loss), &figure);
    }
    for (index, (name, loss)) in eval.vote.iter().zip(results.heldout.iter().flat_map(|h| &h.votes)).enumerate() {
        let figure = if index == 0 { "heldout_loss".into() } else { format!("heldout_loss_{name}") };
        row(&format!("held-out loss, vote {name}"), format!("{loss:.4}"), &figure);
    }
    if let Some(found) = &results.reliability {
        for (name, found) in reliability_names(eval, results).iter().zip(found) {
            let figure = format!("calibration_error_{}", name.replace(' ', "_"));
            row(&format!("calibration error, {name}"), format!("{:.4}", found.error()), &figure);
        }
    }
    if let Some(c) = &results.choice {
        let exits = (1..=c.by_exit.len()).map(|number| format!("exit {number} of {}", c.by_exit.len()));
        let names = exits.chain(eval.vote.iter().map(|name| format!("vote {name}")));
        for (name, found) in names.zip(c.by_exit.iter().chain(&c.votes)) {
            let value = format!("{:.4} summed, {:.4} per character", found.acc, found.acc_norm);
            row(&format!("accuracy, {name}"), value, "");
        }
        row("accuracy, summed", format!("{:.4}", c.votes[0].acc), "accuracy");
        row("questions", c.questions.to_string(), "");
    }
    for (name, items) in &results.answers {
        row(&name.replace('_', " "), format!("{:.4} of {}", edgellm::eval::ratio(items), items.len()), name);
    }
    row("model", bytes(model.files.file_bytes()), "");
    for [name, value] in results.speed.iter().flat_map(speed::Speed::rows) {
        row(&name, value, "");
    }
    row("loaded in", seconds(results.load_seconds), "");
    if let Some(peak) = results.peak_rss_bytes {
        row("peak memory", bytes(peak), "");
    }
    row("time", seconds(results.seconds), "");
    let data = results.data.as_ref().map(|report| format!("{report}\n")).unwrap_or_default();
    data + table(&["", "", "95% interval"], &rows).trim_start()
}
