//! Bars by layer.

use plotters::prelude::*;

use super::{COLOURS, INK, draw, failed};
use crate::error::Result;

/// The note of a chart of bits.
pub const BITS: &str = "bits per weight as stored; what is pale is pruned";

/// One bar.
#[derive(Clone, Debug, PartialEq)]
pub struct Bar {
    /// Left of it.
    pub label: String,
    /// Its length.
    pub value: f64,
    /// The share of it that is drawn pale, at its end.
    pub pale: f64,
    /// Right of it.
    pub words: String,
}

impl Bar {
    /// Bits per weight as stored, and the share of weights that are pruned.
    pub fn bits(label: String, bits: f64, sparsity: f64) -> Self {
        let pruned = if sparsity > 0.0 { format!(", {:.0}% pruned", 100.0 * sparsity) } else { String::new() };
        Self { label, value: bits, pale: sparsity, words: format!("{bits:.2}{pruned}") }
    }
}

/// Horizontal bars as SVG, one below the other, under a title and a note.
///
/// # Errors
/// There is no bar, or none with a length.
pub fn bars(title: &str, note: &str, bars: &[Bar]) -> Result<String> {
    let most = bars.iter().map(|b| b.value).fold(0.0, f64::max);
    if bars.is_empty() || most <= 0.0 {
        return Err(failed("there is no layer to show"));
    }
    let (row, left, top, width) = (20, 190, 60, 560);
    let size = (900, (top + row * bars.len() as i32 + 40) as u32);
    draw(size, |area| {
        let text = ("sans-serif", 13).into_font().color(&INK);
        let say = |words: String, at: (i32, i32)| area.draw(&Text::new(words, at, text.clone())).map_err(failed);
        let heading = ("sans-serif", 20).into_font().color(&INK);
        area.draw(&Text::new(title.to_string(), (16, 14), heading)).map_err(failed)?;
        say(note.to_owned(), (left, 40))?;
        for (index, bar) in bars.iter().enumerate() {
            let y = top + row * index as i32;
            let end = left + (f64::from(width) * bar.value.max(0.0) / most) as i32;
            let kept = left + (f64::from(end - left) * (1.0 - bar.pale)) as i32;
            say(bar.label.clone(), (16, y + 3))?;
            let colour = COLOURS[0];
            let rectangle = |from, to, style: ShapeStyle| Rectangle::new([(from, y + 2), (to, y + row - 3)], style);
            area.draw(&rectangle(left, end, colour.mix(0.35).filled())).map_err(failed)?;
            area.draw(&rectangle(left, kept, colour.filled())).map_err(failed)?;
            say(bar.words.clone(), (end + 8, y + 3))?;
        }
        Ok(())
    })
}
