//! Bars by layer: one column of them, or several side by side; and bars of parts.

use plotters::prelude::*;

use super::{Area, COLOURS, INK, draw, failed};
use crate::error::Result;

/// The note of a chart of bits.
pub const BITS: &str = "bits per weight as stored; what is pale is pruned";
/// Pixels: the whole width, of labels, of a row, above the rows, and of the words behind a bar.
const WIDTH: i32 = 900;
const LEFT: i32 = 190;
const ROW: i32 = 20;
const TOP: i32 = 64;
const WORDS: i32 = 150;
/// Characters of a label; what is longer loses its middle.
const MOST_CHARACTERS: usize = 26;

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

/// Bars below a note; their labels are the rows they belong to.
#[derive(Clone, Debug, PartialEq)]
pub struct Column<'a> {
    /// What the bars mean.
    pub note: &'a str,
    /// The bars, each in the row of its label.
    pub bars: Vec<Bar>,
}

/// Horizontal bars as SVG, one below the other, under a title and a note.
///
/// # Errors
/// There is no bar, or none with a length.
pub fn bars(title: &str, note: &str, bars: &[Bar]) -> Result<String> {
    columns(title, &[Column { note, bars: bars.to_vec() }])
}

/// Columns of bars side by side as SVG: what several columns say of a row is on one line. Rows are in the order in which
/// labels come first.
///
/// # Errors
/// There is no bar, or a column has none with a length.
pub fn columns(title: &str, columns: &[Column<'_>]) -> Result<String> {
    let mut labels: Vec<&str> = Vec::new();
    for bar in columns.iter().flat_map(|column| &column.bars) {
        if !labels.contains(&bar.label.as_str()) {
            labels.push(&bar.label);
        }
    }
    let most: Vec<f64> =
        columns.iter().map(|c| c.bars.iter().map(|b| b.value).filter(|v| v.is_finite()).fold(0.0, f64::max)).collect();
    if labels.is_empty() || most.iter().any(|most| *most <= 0.0) {
        return Err(failed("there is no layer to show"));
    }
    let each = (WIDTH - LEFT - 16) / columns.len() as i32;
    draw(size(labels.len()), |area| {
        frame(area, title, &labels)?;
        for (at, (column, most)) in columns.iter().zip(&most).enumerate() {
            let left = LEFT + each * at as i32;
            say(area, column.note, (left, 40))?;
            for bar in &column.bars {
                let row = labels.iter().position(|label| *label == bar.label).unwrap_or(0);
                let end = left + (f64::from(each - WORDS) * finite(bar.value) / most) as i32;
                let kept = left + (f64::from(end - left) * (1.0 - bar.pale.clamp(0.0, 1.0))) as i32;
                let colour = COLOURS[at % COLOURS.len()];
                fill(area, row, (left, end), colour.mix(0.35).filled())?;
                fill(area, row, (left, kept), colour.filled())?;
                say(area, &bar.words, (end + 8, TOP + ROW * row as i32 + 3))?;
            }
        }
        Ok(())
    })
}

/// A row of parts.
#[derive(Clone, Debug, PartialEq)]
pub struct Parts {
    /// Left of it.
    pub label: String,
    /// The length of each part.
    pub values: Vec<f64>,
    /// Right of it.
    pub words: String,
}

/// Bars whose parts have a colour each, as SVG, with the parts' names above them.
///
/// # Errors
/// There is no row, or none with a length.
pub fn stacked(title: &str, names: &[&str], rows: &[Parts]) -> Result<String> {
    let most = rows.iter().map(|row| row.values.iter().copied().map(finite).sum::<f64>()).fold(0.0, f64::max);
    if !most.is_finite() || most <= 0.0 {
        return Err(failed("there is no layer to show"));
    }
    let labels: Vec<&str> = rows.iter().map(|row| row.label.as_str()).collect();
    draw(size(rows.len()), |area| {
        frame(area, title, &labels)?;
        let mut at = 16;
        for (index, name) in names.iter().enumerate() {
            let mark = Rectangle::new([(at, 42), (at + 10, 52)], COLOURS[index % COLOURS.len()].filled());
            area.draw(&mark).map_err(failed)?;
            say(area, name, (at + 15, 40))?;
            at += 30 + 7 * name.chars().count() as i32;
        }
        let scale = f64::from(WIDTH - LEFT - 16 - WORDS) / most;
        for (row, parts) in rows.iter().enumerate() {
            let mut sum = 0.0;
            let place = |sum: f64| LEFT + (scale * sum).round() as i32;
            for (index, value) in parts.values.iter().enumerate() {
                let from = place(sum);
                sum += finite(*value);
                fill(area, row, (from, place(sum)), COLOURS[index % COLOURS.len()].filled())?;
            }
            say(area, &parts.words, (place(sum) + 8, TOP + ROW * row as i32 + 3))?;
        }
        Ok(())
    })
}

fn finite(value: f64) -> f64 {
    if value.is_finite() { value.max(0.0) } else { 0.0 }
}

fn size(rows: usize) -> (u32, u32) {
    (WIDTH as u32, (TOP + ROW * rows as i32 + 16) as u32)
}

fn say(area: &Area<'_>, words: &str, at: (i32, i32)) -> Result<()> {
    let font = ("sans-serif", 13).into_font().color(&INK);
    area.draw(&Text::new(words.to_owned(), at, font)).map_err(failed)
}

fn fill(area: &Area<'_>, row: usize, (from, to): (i32, i32), style: ShapeStyle) -> Result<()> {
    let y = TOP + ROW * row as i32;
    area.draw(&Rectangle::new([(from, y + 2), (to, y + ROW - 3)], style)).map_err(failed)
}

/// The title, and the labels of rows.
fn frame(area: &Area<'_>, title: &str, labels: &[&str]) -> Result<()> {
    let heading = ("sans-serif", 20).into_font().color(&INK);
    area.draw(&Text::new(title.to_owned(), (16, 14), heading)).map_err(failed)?;
    for (row, label) in labels.iter().enumerate() {
        say(area, &shortened(label), (16, TOP + ROW * row as i32 + 3))?;
    }
    Ok(())
}

fn shortened(label: &str) -> String {
    let count = label.chars().count();
    if count <= MOST_CHARACTERS {
        return label.to_owned();
    }
    let half = MOST_CHARACTERS / 2;
    let start: String = label.chars().take(half - 1).collect();
    let end: String = label.chars().skip(count - half).collect();
    format!("{start}…{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_show_what_is_pruned() {
        let bar = |bits, sparsity| Bar::bits("block.0".into(), bits, sparsity);
        let svg = bars("model", BITS, &[bar(4.5, 0.0), bar(3.0, 0.5)]).unwrap();
        assert!(svg.contains("50% pruned") && svg.contains("4.50"), "{svg}");
        assert!(bars("model", BITS, &[]).is_err());
    }

    #[test]
    fn columns_share_the_rows_of_their_labels() {
        let bar = |label: &str, value| Bar { label: label.into(), value, pale: 0.0, words: format!("is {value}") };
        let first = Column { note: "bits", bars: vec![bar("a", 1.0), bar("b", 2.0)] };
        let second = Column { note: "cost", bars: vec![bar("b", 3.0)] };
        let svg = columns("both", &[first, second]).unwrap();
        let height = |words: &str| {
            let before = svg[..svg.find(words).unwrap()].rsplit("<text").next().unwrap();
            before.split(" y=\"").nth(1).unwrap().split('"').next().unwrap().to_owned()
        };
        assert_eq!(height("is 2"), height("is 3"));
        assert_ne!(height("is 1"), height("is 2"));
        assert!(columns("none", &[Column { note: "", bars: Vec::new() }]).is_err());
    }

    #[test]
    fn parts_lie_one_after_the_other() {
        let row = Parts { label: "a".into(), values: vec![1.0, f64::NAN, 3.0], words: "4 ms".into() };
        let svg = stacked("time", &["one", "two", "three"], &[row]).unwrap();
        assert!(svg.contains("4 ms") && svg.contains("three"), "{svg}");
        assert!(stacked("time", &[], &[]).is_err());
    }

    #[test]
    fn long_labels_lose_their_middle() {
        assert_eq!(shortened("block.3"), "block.3");
        assert_eq!(shortened("model.layers.12.self_attn.q_proj").chars().count(), MOST_CHARACTERS);
    }
}
