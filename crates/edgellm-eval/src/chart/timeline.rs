//! What happens when.

use plotters::prelude::*;

use super::{COLOURS, GRID, GROUND, INK, draw, failed, number};
use crate::error::Result;

/// Something that takes time.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// From when to when, in milliseconds.
    pub time: (f64, f64),
    /// Inside it, where there is room.
    pub label: String,
    /// Drawn strongly, not pale.
    pub strong: bool,
}

/// Spans that do not overlap.
#[derive(Clone, Debug, PartialEq)]
pub struct Lane<'a> {
    /// Left of it.
    pub label: &'a str,
    /// In order.
    pub spans: Vec<Span>,
}

/// Lanes of spans over time in milliseconds as SVG, and a quantity over the same time below them.
///
/// # Errors
/// There is no span.
pub fn timeline(title: &str, lanes: &[Lane<'_>], below: &str, line: &[(f64, f64)]) -> Result<String> {
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
