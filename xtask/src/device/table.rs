//! A run as a table, in Markdown and in HTML.

use super::results::{Change, Outcome, Row, Run};

const HEAD: [&str; 4] = ["device", "result", "what was run", "since the last run"];

/// The cells of a row, each a list of lines.
fn cells(row: &Row) -> [Vec<String>; 4] {
    let processor = row.processor.as_deref().unwrap_or("no answer");
    let name = match row.outcome {
        Outcome::NotRun => vec![row.name.clone(), row.transport.clone()],
        _ => vec![row.name.clone(), format!("{}, {processor}", row.transport)],
    };
    let reason = row.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
    let parts = row.parts.iter().map(|p| match p.outcome {
        Outcome::Passed => format!("{}: {}", p.part, p.detail),
        other => format!("{} {}: {}", p.part, other.word(), p.detail),
    });
    let mut parts: Vec<_> = parts.collect();
    parts.extend(heat(row));
    [name, vec![format!("{}{reason}", row.outcome.word())], parts, row.changes.iter().map(change).collect()]
}

/// The hottest reading, and what the battery lost.
fn heat(row: &Row) -> Option<String> {
    let hottest = row.readings.iter().filter_map(|r| r.hottest.as_ref()).max_by(|a, b| a.1.total_cmp(&b.1));
    let mut levels = row.readings.iter().filter_map(|r| r.battery.as_ref().map(|b| b.0));
    let battery =
        levels.next().zip(levels.next_back()).map(|(first, last)| format!("battery {first:.0}% to {last:.0}%"));
    let heat = hottest.map(|(sensor, celsius)| format!("hottest {celsius:.0} C ({sensor})"));
    let both: Vec<_> = heat.into_iter().chain(battery).collect();
    (!both.is_empty()).then(|| both.join(", "))
}

fn change(c: &Change) -> String {
    let percent = 100.0 * (c.after / c.before - 1.0);
    let noise = 100.0 * c.noise;
    let word = match (c.clear, c.is_slower()) {
        (false, _) => format!("as before (noise {noise:.0}%)"),
        (true, true) => "SLOWER".to_owned(),
        (true, false) => "faster".to_owned(),
    };
    format!("{}: {:.0} to {:.0}, {percent:+.0}%, {word}", c.figure, c.before, c.after)
}

pub(super) fn markdown(run: &Run) -> String {
    let mut text = format!("# Devices, {} UTC, commit {}\n\n| {} |\n", run.time, run.commit, HEAD.join(" | "));
    text += &format!("|{}\n", "---|".repeat(HEAD.len()));
    for row in &run.rows {
        let cells = cells(row).map(|lines| lines.join("<br>").replace('|', "\\|").replace('\n', " "));
        text += &format!("| {} |\n", cells.join(" | "));
    }
    text
}

pub(super) fn html(run: &Run) -> String {
    let title = escape(&format!("Devices, {} UTC, commit {}", run.time, run.commit));
    let head: String = HEAD.iter().map(|cell| format!("<th>{cell}</th>")).collect();
    let mut body = String::new();
    for row in &run.rows {
        let class = match row.outcome {
            Outcome::Passed => "passed",
            Outcome::Failed => "failed",
            Outcome::NotRun => "not-run",
        };
        let cells = cells(row).map(|lines| {
            let lines: Vec<_> = lines.iter().map(|line| escape(line)).collect();
            format!("<td>{}</td>", lines.join("<br>"))
        });
        body += &format!("<tr class=\"{class}\">{}</tr>\n", cells.concat());
    }
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<meta charset=\"utf-8\">\n<title>{title}</title>\n<style>\n\
         body {{ font: 15px sans-serif; margin: 2em }}\n\
         td, th {{ border: 1px solid #bbb; padding: .4em .7em; text-align: left; vertical-align: top }}\n\
         table {{ border-collapse: collapse }}\n\
         .failed td:nth-child(2) {{ background: #fbb }} .passed td:nth-child(2) {{ background: #cfc }}\n\
         .not-run {{ color: #666 }}\n</style>\n<h1>{title}</h1>\n<table>\n<tr>{head}</tr>\n{body}</table>\n</html>\n"
    )
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
