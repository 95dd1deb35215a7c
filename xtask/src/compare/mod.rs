//! Comparisons with peers, side by side in one run, so that a noisy machine is noisy for both.

pub(crate) mod llama;
pub(crate) mod peft;
pub(crate) mod policies;

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::edgellm::{Edgellm, number};

/// The middle value, or the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// A table in Markdown: the first `left` columns to the left, the others to the right.
pub(crate) fn table(header: &[&str], rows: &[Vec<String>], left: usize) -> String {
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count().max(3)).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String]| {
        let padded = cells.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column < left { format!(" {cell:<width$} |") } else { format!(" {cell:>width$} |") }
        });
        format!("|{}\n", padded.collect::<String>())
    };
    let rule = widths.iter().enumerate().map(|(column, &width)| {
        if column < left { format!(" {} |", "-".repeat(width)) } else { format!(" {}: |", "-".repeat(width - 1)) }
    });
    let header: Vec<String> = header.iter().map(ToString::to_string).collect();
    let mut out = line(&header) + &format!("|{}\n", rule.collect::<String>());
    rows.iter().for_each(|row| out.push_str(&line(row)));
    out
}

/// The rows of `edgellm bench` with these arguments.
fn bench(edgellm: &Edgellm, arguments: &[String]) -> Result<Vec<Value>> {
    let found = edgellm.json(["bench".to_owned()].iter().chain(arguments))?;
    let rows = found["tests"].as_array().with_context(|| format!("no list \"tests\" in {found}"))?;
    Ok(rows.clone())
}

/// A list of numbers of a row.
fn numbers(row: &Value, key: &str) -> Result<Vec<f64>> {
    let list = row[key].as_array().with_context(|| format!("no list {key:?} in {row}"))?;
    list.iter().map(|v| v.as_f64().with_context(|| format!("{v} in {key:?} is no number"))).collect()
}

/// A count of a row.
fn count(row: &Value, key: &str) -> Result<u64> {
    Ok(number(row, key)? as u64)
}

/// Writes the results beside their place and renames them there.
fn write_json(path: &Path, value: &Value) -> Result<()> {
    let name = path.file_name().with_context(|| format!("{} is no file name", path.display()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(hidden);
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&temporary)?;
        std::io::Write::write_all(&mut file, format!("{value:#}\n").as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write()
        .inspect_err(|_| {
            let _ = std::fs::remove_file(&temporary);
        })
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Refuses an output that cannot be written, before minutes of work.
fn check_output(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    ensure!(folder.is_dir(), "{}: the folder {} does not exist", path.display(), folder.display());
    ensure!(!path.is_dir(), "{}: expected a file name, found a folder", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_tables() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        let text = table(&["test", "t/s"], &[vec!["pp512".into(), "1.5".into()]], 1);
        assert_eq!(text, "| test  | t/s |\n| ----- | --: |\n| pp512 | 1.5 |\n");
    }

    #[test]
    fn results_replace_a_file_whole() {
        let folder = crate::repo::scratch("compare-test").unwrap();
        let path = folder.join("out.json");
        for value in [1, 2] {
            write_json(&path, &serde_json::json!({ "a": value })).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\n  \"a\": 2\n}\n");
        assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
        assert!(check_output(&folder).is_err() && check_output(&folder.join("none/x.json")).is_err());
        std::fs::remove_dir_all(folder).unwrap();
    }
}
