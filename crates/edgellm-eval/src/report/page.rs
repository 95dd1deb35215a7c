//! The page around the sections.

use super::{Inputs, sections};
use crate::chart::escape;

const STYLE: &str = include_str!("style.css");
/// The choice of colours, kept for this page; everything else works without it.
const SCRIPT: &str = "const r=document.documentElement,b=document.getElementById('theme');\
b.hidden=false;b.onclick=()=>{const d=getComputedStyle(r).colorScheme==='dark';r.dataset.theme=d?'light':'dark'};";
/// Fetches the page again and takes over what is in it: where the reader is, what is open and the colours stay.
const FOLLOW: &str = "const q='main details';setInterval(async()=>{try{\
const t=await(await fetch('/',{cache:'no-store'})).text(),n=new DOMParser().parseFromString(t,'text/html'),\
o=[...document.querySelectorAll(q)].map(d=>d.open);\
n.querySelectorAll(q).forEach((d,i)=>d.open=!!o[i]);\
for(const s of['main','nav'])document.querySelector(s).replaceWith(n.querySelector(s));\
document.title=n.title}catch{document.title='ended: '+document.title.replace(/^(ended: )+/,'')}},SECONDS*1000);";

/// The report as one HTML file.
pub fn page(inputs: &Inputs) -> String {
    let sections = sections::all(inputs);
    let links: String = sections.iter().map(|s| format!("<a href=\"#{}\">{}</a> ", s.id, escape(s.title))).collect();
    let body: String = sections
        .iter()
        .map(|s| format!("<section id=\"{}\">\n<h2>{}</h2>\n{}</section>\n", s.id, escape(s.title), s.body))
        .collect();
    // Only a page that is served may ask for anything, and only whoever serves it; without scripts it is loaded as a whole.
    let (connect, refresh, follow) = match inputs.refresh {
        Some(seconds) => (
            "; connect-src 'self'",
            format!("<noscript><meta http-equiv=\"refresh\" content=\"{seconds}\"></noscript>\n"),
            FOLLOW.replace("SECONDS", &seconds.to_string()),
        ),
        None => ("", String::new(), String::new()),
    };
    let title = escape(&inputs.title);
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
         script-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'{connect}\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n{refresh}\
         <link rel=\"icon\" href=\"data:,\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n\
         <header><h1>{title}</h1><button id=\"theme\" hidden>light or dark</button></header>\n<nav>{links}</nav>\n\
         <main>\n{body}</main>\n<script>{SCRIPT}{follow}</script>\n</body>\n</html>\n"
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
        assert!(!page.contains("fetch(") && !page.contains("connect-src"));
    }

    #[test]
    fn only_a_page_that_is_served_follows() {
        let page = page(&Inputs { refresh: Some(3), ..Inputs::default() });
        assert!(page.contains("connect-src 'self'") && page.contains("},3*1000)"), "{page}");
    }
}
