//! The page around the sections.

use super::{Inputs, sections};
use crate::chart::escape;

const STYLE: &str = include_str!("style.css");
/// The choice of colours, kept for this page; everything else works without it.
const SCRIPT: &str = "const r=document.documentElement,b=document.getElementById('theme');\
b.hidden=false;b.onclick=()=>{const d=getComputedStyle(r).colorScheme==='dark';r.dataset.theme=d?'light':'dark'};";

/// The report as one HTML file.
pub fn page(inputs: &Inputs) -> String {
    let sections = sections::all(inputs);
    let links: String = sections.iter().map(|s| format!("<a href=\"#{}\">{}</a> ", s.id, escape(s.title))).collect();
    let body: String = sections
        .iter()
        .map(|s| format!("<section id=\"{}\">\n<h2>{}</h2>\n{}</section>\n", s.id, escape(s.title), s.body))
        .collect();
    let refresh =
        inputs.refresh.map(|s| format!("<meta http-equiv=\"refresh\" content=\"{s}\">\n")).unwrap_or_default();
    let title = escape(&inputs.title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'; img-src data:\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n{refresh}\
         <link rel=\"icon\" href=\"data:,\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header><h1>{title}</h1><button id=\"theme\" hidden>light or dark</button></header>\n<nav>{links}</nav>\n\
         <main>\n{body}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::figures::Layer;
    use crate::report::Metrics;

    #[test]
    fn names_do_not_run_and_nothing_is_loaded() {
        let hostile = "<script>alert(1)</script>";
        let layers = vec![Layer { name: hostile.into(), bits: Some(3.0), sensitivity: Some(1.0), ..Layer::default() }];
        let inputs = Inputs {
            title: hostile.into(),
            models: vec![(hostile.into(), layers)],
            problems: vec![hostile.into()],
            ..Inputs::default()
        };
        let page = page(&inputs);
        assert!(!page.contains(hostile) && page.contains("&lt;script&gt;alert(1)"));
        assert!(!page.contains("src=") && !page.contains("http://") && !page.contains("https://"), "{page}");
        assert_eq!(page.matches("<script>").count(), 1);
    }

    #[test]
    fn ten_thousand_steps_stay_small() {
        let step = |i: u32| {
            let value = json!({"event": "step", "time_s": i, "step": i, "exit": 15 + 15 * (i % 2), "loss": 3.0 / (1.0 + f64::from(i)).ln_1p()});
            value.as_object().cloned().unwrap()
        };
        let metrics = Metrics { name: "run.jsonl".into(), events: (0..10_000).map(step).collect() };
        let page = page(&Inputs { title: "a run".into(), metrics: vec![metrics], ..Inputs::default() });
        assert!(page.len() < 400_000 && page.contains("exit 30"), "{}", page.len());
    }
}
