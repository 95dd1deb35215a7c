//! Charts as SVG: series of points over two axes, or bars by layer; readable on light and on dark ground.
//!
//! The library draws for a light ground; a style sheet in the file changes text, axes and ground where the viewer
//! prefers a dark one. Series keep their colours, which are readable on both.

use std::path::Path;

use edgellm::model::io::atomic_write;
use plotters::coord::Shift;
use plotters::prelude::*;

/// Width and height in pixels.
const SIZE: (u32, u32) = (900, 560);
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

/// Points of one kind, joined by a line or not.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Series {
    /// What it is called in the legend.
    pub(crate) label: String,
    /// `(x, y)`.
    pub(crate) points: Vec<(f64, f64)>,
    /// Whether the points are joined.
    pub(crate) line: bool,
}

/// What a chart says around its points.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Chart<'a> {
    pub(crate) title: &'a str,
    pub(crate) x: &'a str,
    pub(crate) y: &'a str,
    /// Whether the vertical axis is logarithmic; points at or below 0 are left out then.
    pub(crate) log_y: bool,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn failed(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow::anyhow!("the chart could not be drawn: {error}")
}

/// Draws into a string; a style sheet follows the root element.
fn draw(size: (u32, u32), paint: impl FnOnce(&Area<'_>) -> anyhow::Result<()>) -> anyhow::Result<String> {
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

impl Chart<'_> {
    /// The chart of some series as SVG.
    ///
    /// # Errors
    /// There is no point to show.
    pub(crate) fn points(&self, series: &[Series]) -> anyhow::Result<String> {
        let shown = |&(x, y): &(f64, f64)| x.is_finite() && y.is_finite() && (!self.log_y || y > 0.0);
        let place = |y: f64| if self.log_y { y.log10() } else { y };
        let series: Vec<Series> = series
            .iter()
            .map(|s| Series { points: s.points.iter().copied().filter(shown).collect(), ..s.clone() })
            .filter(|s| !s.points.is_empty())
            .collect();
        let all = || series.iter().flat_map(|s| s.points.iter().copied());
        let (Some(x), Some(y)) = (range(all().map(|p| p.0)), range(all().map(|p| place(p.1)))) else {
            return Err(failed("there is no point to show"));
        };
        draw(SIZE, |area| {
            let mut chart = ChartBuilder::on(area)
                .caption(self.title, ("sans-serif", 20).into_font().color(&INK))
                .margin(16)
                .x_label_area_size(46)
                .y_label_area_size(72)
                .build_cartesian_2d(x.0..x.1, y.0..y.1)
                .map_err(failed)?;
            let text = ("sans-serif", 14).into_font().color(&INK);
            chart
                .configure_mesh()
                .light_line_style(TRANSPARENT)
                .bold_line_style(GRID)
                .axis_style(INK)
                .label_style(text.clone())
                .axis_desc_style(text.clone())
                .x_desc(self.x)
                .y_desc(self.y)
                .x_labels(10)
                .y_labels(8)
                .x_label_formatter(&|x| number(*x))
                .y_label_formatter(&|y| number(if self.log_y { 10f64.powf(*y) } else { *y }))
                .draw()
                .map_err(failed)?;
            for (index, series) in series.iter().enumerate() {
                let colour = COLOURS[index % COLOURS.len()];
                let points: Vec<(f64, f64)> = series.points.iter().map(|p| (p.0, place(p.1))).collect();
                if series.line {
                    let line = LineSeries::new(points.iter().copied(), colour.stroke_width(2));
                    chart.draw_series(line).map_err(failed)?;
                }
                // A circle, a triangle or a cross, so that colour is not all that tells series apart.
                let (points, fill, stroke) = (points.iter().copied(), colour.filled(), colour.stroke_width(2));
                let at = |(x, y)| (x + 8, y);
                match index % 3 {
                    0 => chart
                        .draw_series(points.map(|p| Circle::new(p, 4, fill)))
                        .map_err(failed)?
                        .label(&series.label)
                        .legend(move |p| Circle::new(at(p), 4, fill)),
                    1 => chart
                        .draw_series(points.map(|p| TriangleMarker::new(p, 5, fill)))
                        .map_err(failed)?
                        .label(&series.label)
                        .legend(move |p| TriangleMarker::new(at(p), 5, fill)),
                    _ => chart
                        .draw_series(points.map(|p| Cross::new(p, 4, stroke)))
                        .map_err(failed)?
                        .label(&series.label)
                        .legend(move |p| Cross::new(at(p), 4, stroke)),
                };
            }
            chart
                .configure_series_labels()
                .position(SeriesLabelPosition::UpperRight)
                .background_style(GROUND)
                .border_style(GRID)
                .label_font(text)
                .margin(10)
                .draw()
                .map_err(failed)
        })
    }
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

/// One bar of a chart by layer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Bar {
    pub(crate) label: String,
    /// Bits per weight as stored.
    pub(crate) bits: f64,
    /// Share of weights that are pruned; drawn as the pale part of the bar.
    pub(crate) sparsity: f64,
}

/// Bits per weight by layer as SVG: one horizontal bar each, of which the pale part is the pruned share.
///
/// # Errors
/// There is no bar.
pub(crate) fn bars(title: &str, bars: &[Bar]) -> anyhow::Result<String> {
    let most = bars.iter().map(|b| b.bits).fold(0.0, f64::max);
    if bars.is_empty() || most <= 0.0 {
        return Err(failed("there is no layer to show"));
    }
    let (row, left, top, width) = (20, 190, 60, 560);
    let size = (900, (top + row * bars.len() as i32 + 40) as u32);
    let pruned = bars.iter().any(|b| b.sparsity > 0.0);
    draw(size, |area| {
        let text = ("sans-serif", 13).into_font().color(&INK);
        let say = |words: String, at: (i32, i32)| area.draw(&Text::new(words, at, text.clone())).map_err(failed);
        let heading = ("sans-serif", 20).into_font().color(&INK);
        area.draw(&Text::new(title.to_string(), (16, 14), heading)).map_err(failed)?;
        let note =
            if pruned { "bits per weight as stored; the pale part is pruned" } else { "bits per weight as stored" };
        say(note.into(), (left, 40))?;
        for (index, bar) in bars.iter().enumerate() {
            let y = top + row * index as i32;
            let end = left + (f64::from(width) * bar.bits / most) as i32;
            let kept = left + (f64::from(end - left) * (1.0 - bar.sparsity)) as i32;
            say(bar.label.clone(), (16, y + 3))?;
            let colour = COLOURS[0];
            let rectangle = |from, to, style: ShapeStyle| Rectangle::new([(from, y + 2), (to, y + row - 3)], style);
            area.draw(&rectangle(left, end, colour.mix(0.35).filled())).map_err(failed)?;
            area.draw(&rectangle(left, kept, colour.filled())).map_err(failed)?;
            let mut words = format!("{:.2}", bar.bits);
            if bar.sparsity > 0.0 {
                words.push_str(&format!(", {:.0}% pruned", 100.0 * bar.sparsity));
            }
            say(words, (end + 8, y + 3))?;
        }
        Ok(())
    })
}

/// Something that takes time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Span {
    /// From when to when, in milliseconds.
    pub(crate) time: (f64, f64),
    pub(crate) label: String,
    /// Drawn strongly, not pale.
    pub(crate) strong: bool,
}

/// Spans that do not overlap.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Lane<'a> {
    pub(crate) label: &'a str,
    pub(crate) spans: Vec<Span>,
}

/// Lanes of spans over time in milliseconds as SVG, and a quantity over the same time below them.
///
/// # Errors
/// There is no span.
pub(crate) fn timeline(title: &str, lanes: &[Lane<'_>], below: &str, line: &[(f64, f64)]) -> anyhow::Result<String> {
    let times = lanes.iter().flat_map(|lane| &lane.spans).flat_map(|span| [span.time.0, span.time.1]);
    let times = times.chain(line.iter().map(|point| point.0));
    let (start, end) = times.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), t| (low.min(t), high.max(t)));
    let most = line.iter().map(|point| point.1).fold(0.0, f64::max);
    if start >= end || most <= 0.0 {
        return Err(failed("there is nothing that takes time"));
    }
    let (left, width, top, row, gap) = (110, 760, 56, 44, 14);
    let base = top + (row + gap) * lanes.len() as i32;
    let (foot, height) = (base + 150, base + 200);
    draw((900, height as u32), |area| {
        let at = |t: f64| left + (f64::from(width) * (t - start) / (end - start)).round() as i32;
        let font = |size: i32| ("sans-serif", size).into_font().color(&INK);
        let say =
            |words: String, size: i32, at: (i32, i32)| area.draw(&Text::new(words, at, font(size))).map_err(failed);
        say(title.to_owned(), 20, (16, 14))?;
        for (index, lane) in lanes.iter().enumerate() {
            let y = top + (row + gap) * index as i32;
            say(lane.label.to_owned(), 14, (16, y + row / 2 - 7))?;
            for span in &lane.spans {
                let (from, to) = (at(span.time.0), at(span.time.1));
                let colour = COLOURS[index % COLOURS.len()];
                let fill = if span.strong { colour.filled() } else { colour.mix(0.45).filled() };
                // At least a pixel wide, and one apart where there is room.
                area.draw(&Rectangle::new([(from, y), ((to - 1).max(from + 1), y + row)], fill)).map_err(failed)?;
                if to - from >= 8 * span.label.len() as i32 + 4 {
                    let text = ("sans-serif", 12).into_font().color(&GROUND);
                    let place = ((from + to) / 2 - 4 * span.label.len() as i32, y + row / 2 - 6);
                    area.draw(&Text::new(span.label.clone(), place, text)).map_err(failed)?;
                }
            }
        }
        say(below.to_owned(), 14, (16, base + 4))?;
        let level = |value: f64| foot - (110.0 * value / most) as i32;
        let points: Vec<(i32, i32)> = line.iter().map(|point| (at(point.0), level(point.1))).collect();
        area.draw(&PathElement::new(points, COLOURS[2].stroke_width(2))).map_err(failed)?;
        for value in [0.0, most] {
            say(number(value), 12, (left - 52, level(value) - 6))?;
            area.draw(&PathElement::new(vec![(left, level(value)), (left + width, level(value))], GRID))
                .map_err(failed)?;
        }
        for tick in 0..=5 {
            let time = start + (end - start) * f64::from(tick) / 5.0;
            let mark = at(time);
            area.draw(&PathElement::new(vec![(mark, foot), (mark, foot + 5)], INK)).map_err(failed)?;
            say(format!("{time:.0} ms"), 12, ((mark - 16).min(left + width - 44), foot + 10))?;
        }
        Ok(())
    })
}

/// Writes a chart by atomic replacement.
pub(crate) fn write(path: &Path, svg: &str) -> anyhow::Result<()> {
    Ok(atomic_write(path, svg.as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(label: &str, points: &[(f64, f64)]) -> Series {
        Series { label: label.into(), points: points.to_vec(), line: true }
    }

    #[test]
    fn charts_hold_their_series_and_a_dark_style() {
        let chart = Chart { title: "Damage", x: "MB", y: "KL", log_y: true };
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
        let chart = Chart { title: "a < b & c", x: "x", y: "y", log_y: false };
        let svg = chart.points(&[series("<script>", &[(1.0, 1.0)])]).unwrap();
        assert!(!svg.contains("<script>") && svg.contains("&lt;script"), "{svg}");
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

    #[test]
    fn bars_show_what_is_pruned() {
        let bar = |bits, sparsity| Bar { label: "block.0".into(), bits, sparsity };
        let svg = bars("model", &[bar(4.5, 0.0), bar(3.0, 0.5)]).unwrap();
        assert!(svg.contains("50% pruned") && svg.contains("4.50"), "{svg}");
        assert!(bars("model", &[]).is_err());
    }
}
