//! Rows of measurements and how they are printed: a Markdown table, CSV or JSON with llama-bench's field names.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::output::bytes;
use super::stats::{deviation, mean, median};

/// One test on one model: what was measured, and where.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Row {
    pub(crate) build_version: String,
    pub(crate) isa: String,
    pub(crate) device: String,
    /// In products with quantized weights on the CPU.
    pub(crate) activations: String,
    pub(crate) model_filename: String,
    /// Architecture and formats.
    pub(crate) model_type: String,
    /// Bytes of the weights.
    pub(crate) model_size: u64,
    pub(crate) model_n_params: u64,
    pub(crate) n_threads: usize,
    /// Tokens of the prompt; 0 in other tests.
    pub(crate) n_prompt: usize,
    /// Tokens that are generated one by one; 0 in other tests.
    pub(crate) n_gen: usize,
    /// Tokens of each sequence of a tuning step; 0 in other tests.
    pub(crate) n_tune: usize,
    /// Sequences of a tuning step.
    pub(crate) n_tune_batch: usize,
    /// Blocks that a tuning step trains; all of them without.
    pub(crate) n_tune_window: Option<usize>,
    /// Exits that the tuning steps took in turn.
    pub(crate) n_tune_exits: usize,
    pub(crate) avg_ns: u64,
    pub(crate) stddev_ns: u64,
    pub(crate) median_ns: u64,
    /// Tokens per second.
    pub(crate) avg_ts: f64,
    pub(crate) stddev_ts: f64,
    pub(crate) median_ts: f64,
    /// Wall time of each repetition.
    pub(crate) samples_ns: Vec<u64>,
    pub(crate) samples_ts: Vec<f64>,
    /// Processor time of each repetition, summed over threads; `null` where the system does not tell.
    pub(crate) cpu_ns: Option<Vec<u64>>,
    /// Median time from the prompt to its first sampled token; `null` in other tests.
    pub(crate) ttft_ns: Option<u64>,
    /// Peak of the resident memory in this test; `null` where the system does not tell.
    pub(crate) peak_rss_bytes: Option<u64>,
    /// Bytes of weights that this test read from storage, warm-up included; `null` where all of them are in memory.
    pub(crate) streamed_bytes: Option<u64>,
    /// At how many GB/s.
    pub(crate) streamed_gbps: Option<f64>,
}

/// The columns of CSV, in the order of JSON.
const COLUMNS: [&str; 28] = [
    "build_version",
    "isa",
    "device",
    "activations",
    "model_filename",
    "model_type",
    "model_size",
    "model_n_params",
    "n_threads",
    "n_prompt",
    "n_gen",
    "n_tune",
    "n_tune_batch",
    "n_tune_window",
    "n_tune_exits",
    "avg_ns",
    "stddev_ns",
    "median_ns",
    "avg_ts",
    "stddev_ts",
    "median_ts",
    "samples_ns",
    "samples_ts",
    "cpu_ns",
    "ttft_ns",
    "peak_rss_bytes",
    "streamed_bytes",
    "streamed_gbps",
];

impl Row {
    /// Puts in the times of the repetitions.
    pub(crate) fn set_samples(&mut self, samples_ns: Vec<u64>, cpu_ns: Option<Vec<u64>>) {
        let wall: Vec<f64> = samples_ns.iter().map(|&ns| ns.max(1) as f64).collect();
        let rates: Vec<f64> = wall.iter().map(|ns| self.tokens() as f64 / ns * 1e9).collect();
        self.avg_ns = mean(&wall).round() as u64;
        self.stddev_ns = deviation(&wall).round() as u64;
        self.median_ns = median(&wall).round() as u64;
        (self.avg_ts, self.stddev_ts, self.median_ts) = (mean(&rates), deviation(&rates), median(&rates));
        (self.samples_ns, self.samples_ts, self.cpu_ns) = (samples_ns, rates, cpu_ns);
    }

    /// Tokens of a repetition.
    fn tokens(&self) -> usize {
        self.n_prompt + self.n_gen + self.n_tune * self.n_tune_batch
    }

    /// `pp512`, `tg128`, `tune256`, or `tune256x4` for four sequences in a step.
    pub(crate) fn test(&self) -> String {
        match (self.n_prompt, self.n_gen, self.n_tune) {
            (n, 0, 0) => format!("pp{n}"),
            (0, n, 0) => format!("tg{n}"),
            (_, _, n) => {
                let mut name = format!("tune{n}");
                if self.n_tune_batch > 1 {
                    name.push_str(&format!("x{}", self.n_tune_batch));
                }
                if let Some(window) = self.n_tune_window {
                    name.push_str(&format!(" w{window}"));
                }
                if self.n_tune_exits > 1 {
                    name.push_str(&format!(" e{}", self.n_tune_exits));
                }
                name
            }
        }
    }
}

/// A table in Markdown, as llama-bench prints it.
pub(crate) fn markdown(rows: &[Row]) -> String {
    let header = ["model", "size", "params", "threads", "test", "t/s", "ttft", "peak RSS"];
    let cells = rows.iter().map(|row| {
        vec![
            row.model_type.clone(),
            bytes(row.model_size),
            count(row.model_n_params),
            row.n_threads.to_string(),
            row.test(),
            format!("{:.2} ± {:.2}", row.avg_ts, row.stddev_ts),
            row.ttft_ns.map_or_else(|| "-".into(), |ns| format!("{:.1} ms", ns as f64 / 1e6)),
            row.peak_rss_bytes.map_or_else(|| "-".into(), bytes),
        ]
    });
    markdown_table(&header, &cells.collect::<Vec<_>>(), 1)
}

/// A Markdown table whose first `left` columns are aligned to the left, the others to the right.
pub(crate) fn markdown_table(header: &[&str], rows: &[Vec<String>], left: usize) -> String {
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count().max(4)).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = String>| {
        let padded = cells.zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column < left { format!(" {cell:<width$} |") } else { format!(" {cell:>width$} |") }
        });
        format!("|{}\n", padded.collect::<String>())
    };
    let mut out = line(&mut header.iter().map(ToString::to_string));
    let rule = widths.iter().enumerate().map(|(column, &width)| {
        if column < left { format!(" {} |", "-".repeat(width)) } else { format!(" {}: |", "-".repeat(width - 1)) }
    });
    out.push_str(&format!("|{}\n", rule.collect::<String>()));
    for row in rows {
        out.push_str(&line(&mut row.iter().cloned()));
    }
    out
}

/// Lines with a header; lists are separated by semicolons.
pub(crate) fn csv(rows: &[Row]) -> anyhow::Result<String> {
    let values = rows.iter().map(serde_json::to_value).collect::<Result<Vec<_>, _>>()?;
    Ok(csv_table(&COLUMNS, &values))
}

/// The fields `columns` of JSON objects as CSV.
pub(crate) fn csv_table(columns: &[&str], rows: &[Value]) -> String {
    let mut out = columns.join(",") + "\n";
    for row in rows {
        out.push_str(&columns.iter().map(|column| field(&row[*column])).collect::<Vec<_>>().join(","));
        out.push('\n');
    }
    out
}

fn field(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Array(items) => items.iter().map(field).collect::<Vec<_>>().join(";"),
        Value::String(text) if text.contains(['"', ',', '\n', '\r', ';']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// An array of objects.
pub(crate) fn json<T: Serialize>(rows: &[T]) -> anyhow::Result<String> {
    Ok(serde_json::to_string_pretty(rows)? + "\n")
}

/// A number of parameters for people: `134.5 M`.
pub(crate) fn count(n: u64) -> String {
    match n {
        0..1_000_000 => format!("{:.1} k", n as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", n as f64 / 1e6),
        _ => format!("{:.2} B", n as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(n_prompt: usize, n_gen: usize, n_tune: usize, n_tune_batch: usize) -> Row {
        let mut row = Row {
            build_version: "0.1.0".into(),
            isa: "avx2".into(),
            device: "flex".into(),
            activations: "int8".into(),
            model_filename: "a,b".into(),
            model_type: "llama q4g32a".into(),
            model_size: 98_000_000,
            model_n_params: 134_515_008,
            n_threads: 2,
            n_prompt,
            n_gen,
            n_tune,
            n_tune_batch,
            n_tune_window: None,
            n_tune_exits: 1,
            avg_ns: 0,
            stddev_ns: 0,
            median_ns: 0,
            avg_ts: 0.0,
            stddev_ts: 0.0,
            median_ts: 0.0,
            samples_ns: Vec::new(),
            samples_ts: Vec::new(),
            cpu_ns: None,
            ttft_ns: (n_prompt > 0).then_some(1_234_567),
            peak_rss_bytes: Some(130_000_000),
            streamed_bytes: None,
            streamed_gbps: None,
        };
        row.set_samples(vec![1_000_000_000, 500_000_000], Some(vec![2, 3]));
        row
    }

    #[test]
    fn rates_follow_from_times() {
        let pp = row(512, 0, 0, 1);
        assert_eq!(pp.samples_ts, [512.0, 1024.0]);
        assert_eq!((pp.avg_ns, pp.avg_ts, pp.median_ts), (750_000_000, 768.0, 768.0));
        assert!((pp.stddev_ts - 512.0 / 2f64.sqrt()).abs() < 1e-9);
        assert_eq!(row(0, 0, 256, 4).samples_ts[0], 1024.0);
    }

    #[test]
    fn tests_have_llama_benchs_names() {
        let names = [row(512, 0, 0, 1), row(0, 128, 0, 1), row(0, 0, 256, 1), row(0, 0, 256, 4)].map(|r| r.test());
        assert_eq!(names, ["pp512", "tg128", "tune256", "tune256x4"]);
    }

    #[test]
    fn markdown_is_a_table() {
        let text = markdown(&[row(512, 0, 0, 1), row(0, 128, 0, 1)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[1].starts_with("| ---") && lines[1].ends_with("-: |"), "{text}");
        for part in ["98.0 MB", "134.5 M", "pp512", "768.00 ± 362.04", "1.2 ms", "130 MB"] {
            assert!(lines[2].contains(part), "{text}");
        }
        assert!(lines[3].contains("tg128") && lines[3].contains(" - |"), "{text}");
        assert!(lines.iter().all(|line| line.chars().count() == lines[0].chars().count()), "{text}");
    }

    #[test]
    fn csv_has_every_field_of_json() {
        let rows = [row(512, 0, 0, 1)];
        let text = csv(&rows).unwrap();
        let (header, line) = text.trim_end().split_once('\n').unwrap();
        assert_eq!(header, COLUMNS.join(","));
        assert!(
            line.contains("\"a,b\"") && line.contains(",1000000000;500000000,") && line.contains(",2;3,"),
            "{line}"
        );
        let value = serde_json::to_value(&rows[0]).unwrap();
        let mut fields: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
        let mut columns = COLUMNS.to_vec();
        fields.sort_unstable();
        columns.sort_unstable();
        assert_eq!(fields, columns);
    }

    #[test]
    fn json_reads_back() {
        let mut rows = vec![row(512, 0, 0, 1), row(0, 0, 256, 4)];
        // Numbers with few digits: others may come back with another last bit.
        rows.iter_mut().for_each(|row| row.set_samples(vec![500_000_000; 3], None));
        assert_eq!(serde_json::from_str::<Vec<Row>>(&json(&rows).unwrap()).unwrap(), rows);
    }

    #[test]
    fn counts_read_well() {
        assert_eq!([count(288_000), count(134_515_008), count(6_740_000_000)], ["288.0 k", "134.5 M", "6.74 B"]);
    }
}
