//! Charts as SVG: series of points over two axes, or bars by layer; readable on light and on dark ground.
//!
//! The library draws for a light ground; a style sheet in the file changes text, axes and ground where the viewer
//! prefers a dark one. Series keep their colours, which are readable on both.

use std::path::Path;

use edgellm_model::io::atomic_write;
use plotters::coord::Shift;
use plotters::prelude::*;

use crate::error::{EvalError, Result};

mod bars;
mod points;
mod ticks;
mod timeline;

pub use bars::{BITS, Bar, Column, Parts, bars, columns, stacked};
pub use points::{Chart, Series};
pub use timeline::{Lane, Span, timeline};

/// Colours that people with the usual kinds of colour blindness tell apart (Okabe and Ito 2008), and that have enough
/// contrast on white and on black.
const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 145, 105),
    RGBColor(190, 100, 150),
    RGBColor(120, 110, 210),
    RGBColor(160, 120, 0),
    RGBColor(70, 140, 190),
];
const INK: RGBColor = RGBColor(31, 35, 40);
const GRID: RGBColor = RGBColor(208, 215, 222);
const GROUND: RGBColor = RGBColor(255, 255, 255);
/// CSS overrides the attributes that the library writes.
const STYLE: &str = "<style>text{font-family:system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}\
@media(prefers-color-scheme:dark){text,[fill=\"#1F2328\"]{fill:#e6edf3}[stroke=\"#1F2328\"]{stroke:#e6edf3}\
[fill=\"#FFFFFF\"]{fill:#0d1117}[stroke=\"#D0D7DE\"]{stroke:#30363d}}</style>\n";

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn failed(error: impl std::fmt::Display) -> EvalError {
    EvalError::Chart(error.to_string())
}

/// Draws into a string; a style sheet follows the root element.
fn draw(size: (u32, u32), paint: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&GROUND).map_err(failed)?;
        paint(&area)?;
        area.present().map_err(failed)?;
    }
    let root = svg.find("<svg").and_then(|at| svg[at..].find('>').map(|end| at + end + 1));
    let at = root.ok_or_else(|| failed("no root element"))?;
    svg.insert_str(at, &format!("\n{STYLE}"));
    Ok(svg)
}

/// The least and the largest, with a margin around them.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return None;
    }
    let margin = if high > low { 0.04 * (high - low) } else { 0.05 * high.abs().max(1.0) };
    Some((low - margin, high + margin))
}

/// A number in as few digits as an axis needs.
fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".into(),
        0.001..0.1 => format!("{value:.4}").trim_end_matches('0').into(),
        0.1..100.0 => {
            let text = format!("{value:.2}");
            if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').into() } else { text }
        }
        100.0..1e6 => format!("{value:.0}"),
        _ => format!("{value:.1e}"),
    }
}

/// A chart as a part of a page: as wide as there is room, its colours the page's CSS variables `--ground`, `--ink`, `--grid`
/// and `--c1` to `--c7`, with a description for those who do not see it.
pub fn themed(svg: &str, description: &str) -> String {
    let svg = svg.replace(STYLE, "").replace(" xmlns=\"http://www.w3.org/2000/svg\"", "");
    let mut out =
        svg.replace("#1F2328", "var(--ink)").replace("#FFFFFF", "var(--ground)").replace("#D0D7DE", "var(--grid)");
    for (index, RGBColor(r, g, b)) in COLOURS.into_iter().enumerate() {
        out = out.replace(&format!("#{r:02X}{g:02X}{b:02X}"), &format!("var(--c{})", index + 1));
    }
    if let (Some(start), Some(view)) = (out.find("<svg"), out.find("viewBox=")) {
        out.replace_range(start..view, "<svg role=\"img\" class=\"chart\" ");
        if let Some(end) = out[start..].find('>') {
            let description = escape(description);
            out.insert_str(start + end + 1, &format!("<title>{description}</title>"));
        }
        // What stands before the root element is for files of their own.
        out.replace_range(..start, "");
    }
    out
}

/// Text as HTML and XML show it.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Writes a chart by atomic replacement.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: &Path, svg: &str) -> Result<()> {
    Ok(atomic_write(path, svg.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(label: &str, points: &[(f64, f64)]) -> Series {
        Series::line(label, points.to_vec())
    }

    #[test]
    fn charts_hold_their_series_and_a_dark_style() {
        let chart = Chart { title: "Damage", x: "MB", y: "KL", log_y: true, ..Chart::default() };
        let two = [series("one", &[(1.0, 0.1), (2.0, 0.01)]), series("two", &[(1.0, 0.2), (2.0, 0.0)])];
        let svg = chart.points(&two).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for part in ["Damage", "MB", "KL", "one", "two", "prefers-color-scheme:dark", "polyline", "circle"] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        // A point at 0 has no place on a logarithmic axis; a legend entry has a mark too.
        assert_eq!(svg.matches("<circle").count(), 2 + 1);
        assert_eq!(chart.points(&two).unwrap(), svg);
        assert!(chart.points(&[series("none", &[(1.0, 0.0)])]).is_err());
        assert!(chart.points(&[]).is_err());
    }

    #[test]
    fn names_do_not_leave_their_text() {
        let chart = Chart { title: "a < b & c", x: "x", y: "y", ..Chart::default() };
        let svg = chart.points(&[series("<script>", &[(1.0, 1.0)])]).unwrap();
        assert!(!svg.contains("<script>") && svg.contains("&lt;script"), "{svg}");
    }

    #[test]
    fn a_chart_in_a_page_has_the_colours_of_the_page() {
        let chart = Chart { title: "a", x: "x", y: "y", ..Chart::default() };
        let svg = themed(&chart.points(&[series("s", &[(1.0, 1.0), (2.0, 2.0)])]).unwrap(), "what <it> shows");
        assert!(svg.starts_with("<svg role=\"img\"") && svg.contains("<title>what &lt;it&gt; shows</title>"), "{svg}");
        assert!(
            svg.contains("var(--ink)")
                && svg.contains("\"var(--c1)\"")
                && !svg.contains("#0072B2")
                && !svg.contains("#1F2328")
                && !svg.contains("<style>"),
            "{svg}"
        );
        assert!(!svg[..svg.find('>').unwrap()].contains("height"), "{svg}");
    }

    #[test]
    fn long_lines_have_no_markers() {
        let chart = Chart { title: "a", x: "x", y: "y", ..Chart::default() };
        let many: Vec<(f64, f64)> = (0..500).map(|i| (f64::from(i), f64::from(i % 7))).collect();
        assert!(!chart.points(&[series("s", &many)]).unwrap().contains("<circle"));
    }

    #[test]
    fn a_timeline_shows_spans_and_memory() {
        let span = |from, to, strong| Span { time: (from, to), label: "7".into(), strong };
        let lanes = [
            Lane { label: "computes", spans: vec![span(0.0, 4.0, false), span(5.0, 9.0, true)] },
            Lane { label: "reads", spans: vec![span(-2.0, 5.0, true)] },
        ];
        let svg = timeline("a token", &lanes, "memory, MB", &[(-2.0, 10.0), (9.0, 30.0)]).unwrap();
        for part in ["a token", "computes", "reads", "memory, MB", "-2 ms", "9 ms", "polyline"] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert!(timeline("nothing", &[], "memory", &[]).is_err());
    }
}
