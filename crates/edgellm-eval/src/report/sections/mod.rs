//! The sections of a report; each is there only if there is something to show.

mod layers;
mod quality;
mod results;
mod time;
mod training;
mod votes;

pub(crate) use self::time::{STAGES, passes, stage_seconds};
use super::Inputs;
use crate::chart::{Bar, escape, themed};

pub(super) struct Section {
    pub(super) id: &'static str,
    pub(super) title: &'static str,
    pub(super) body: String,
}

/// What makes a section's body.
type Make = fn(&Inputs) -> String;

pub(super) fn all(inputs: &Inputs) -> Vec<Section> {
    let parts: [(&'static str, &'static str, Make); 11] = [
        ("summary", "What was run", results::summary),
        ("recommendations", "Recommendations", results::advice),
        ("pareto", "Size and quality", quality::pareto),
        ("layers", "Bits and sensitivity by layer", layers::layers),
        ("loss", "Loss", training::loss),
        ("votes", "Exits and votes", votes::votes),
        ("time", "Time by layer and operator", time::time),
        ("memory", "Memory and energy", training::memory),
        ("gradients", "Gradients and activations", training::magnitudes),
        ("devices", "Devices", results::devices),
        ("figures", "All figures", results::figures),
    ];
    let section = |(id, title, make): (&'static str, &'static str, Make)| {
        let body = make(inputs);
        (!body.is_empty()).then_some(Section { id, title, body })
    };
    parts.into_iter().filter_map(section).collect()
}

/// A chart in the page; one that has nothing to show is left out.
fn shown(svg: crate::Result<String>, description: &str) -> String {
    svg.map_or(String::new(), |svg| format!("<div class=\"charts\">{}</div>\n", themed(&svg, description)))
}

/// What a chart shows, for those who want or need the numbers.
fn in_numbers(header: &[&str], rows: &[Vec<String>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    format!("<details><summary>in numbers</summary>\n{}</details>\n", table(header, rows))
}

/// A table of bars.
fn bars_in_numbers(of: &str, bars: &[Bar]) -> String {
    in_numbers(&["layer", of], &bars.iter().map(|bar| vec![bar.label.clone(), bar.words.clone()]).collect::<Vec<_>>())
}

fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let head: String = header.iter().map(|cell| format!("<th scope=\"col\">{}</th>", escape(cell))).collect();
    let head = if header.iter().all(|cell| cell.is_empty()) {
        String::new()
    } else {
        format!("<thead><tr>{head}</tr></thead>")
    };
    let row = |row: &Vec<String>| {
        let cells: String = row.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
        format!("<tr>{cells}</tr>\n")
    };
    let rows: String = rows.iter().map(row).collect();
    format!("<div class=\"wide\" tabindex=\"0\"><table>{head}<tbody>\n{rows}</tbody></table></div>\n")
}
