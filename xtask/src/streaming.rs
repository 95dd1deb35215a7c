//! Whether a model larger than memory runs: `edgellm` in a control group with a limit, what storage gives beside it, and a
//! peer in the same group, in turn.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::Value;

use crate::compare::{median, table};
use crate::edgellm::{Edgellm, arg, number};

/// Where the memory controller of control groups, version 1, is.
const CONTROLLER: &str = "/sys/fs/cgroup/memory";
/// What `dd` reads to tell what storage gives, in parts of 16 MB.
const PROBE_PARTS: u64 = 64;

/// Decodes with limited memory, and compares with what storage gives.
#[derive(Args)]
pub(crate) struct CheckStreaming {
    /// A model folder, larger than the limit.
    #[arg(short, long, value_name = "DIR")]
    model: PathBuf,
    /// Bytes that the control group may use.
    #[arg(long, value_name = "BYTES", default_value_t = 1_500_000_000)]
    limit: u64,
    /// Tokens that are decoded in a round.
    #[arg(short, default_value_t = 8)]
    n: usize,
    /// Rounds, in each of which everything is measured once.
    #[arg(short, long, default_value_t = 3)]
    rounds: usize,
    /// Also decode without a limit.
    #[arg(long)]
    unlimited: bool,
    /// A GGUF file for llama.cpp, in the same control group with its file mapped.
    #[arg(long, value_name = "FILE", requires = "llama_bench")]
    gguf: Option<PathBuf>,
    /// llama.cpp's `llama-bench`.
    #[arg(long, value_name = "PROGRAM")]
    llama_bench: Option<PathBuf>,
}

/// One program's rounds.
#[derive(Default)]
struct Rounds {
    tokens_per_second: Vec<f64>,
    gbps: Vec<f64>,
    peak: u64,
    failed: Option<String>,
}

impl Rounds {
    fn row(&self, name: &str) -> Vec<String> {
        if let Some(failed) = &self.failed {
            return vec![name.into(), failed.clone(), "-".into(), "-".into()];
        }
        let rate = |values: &[f64], digits| match values {
            [] => "-".into(),
            values => format!("{:.digits$}", median(values)),
        };
        let peak = if self.peak > 0 { format!("{}", self.peak / 1_000_000) } else { "-".into() };
        vec![name.into(), rate(&self.tokens_per_second, 3), rate(&self.gbps, 2), peak]
    }
}

impl CheckStreaming {
    pub(crate) fn run(&self) -> Result<()> {
        let group = Group::new(self.limit)?;
        let edgellm = Edgellm::build(&[])?.quietly();
        let inside = group.command();
        let inside: Vec<&str> = inside.iter().map(String::as_str).collect();
        let limited = Edgellm::build(&[])?.quietly().under(&inside);
        let (mut storage, mut ours, mut free, mut peer) =
            (Vec::new(), Rounds::default(), Rounds::default(), Rounds::default());
        for round in 1..=self.rounds {
            eprintln!("round {round} of {}", self.rounds);
            storage.push(storage_gbps(&self.model.join("model.safetensors"))?);
            group.reset()?;
            self.decode(&limited, &mut ours)?;
            ours.peak = ours.peak.max(group.peak()?);
            if self.unlimited {
                self.decode(&edgellm, &mut free)?;
            }
            if let (Some(gguf), Some(program)) = (&self.gguf, &self.llama_bench) {
                group.reset()?;
                match self.peer(&inside, program, gguf) {
                    Ok(rate) => peer.tokens_per_second.push(rate),
                    Err(error) => peer.failed = Some(format!("{error:#}")),
                }
                peer.peak = peer.peak.max(group.peak()?);
            }
        }
        let storage = Rounds { gbps: storage, ..Rounds::default() };
        let mut rows = vec![storage.row("storage, read with dd past the cache"), ours.row("edgellm")];
        if self.unlimited {
            rows.push(free.row("edgellm without the limit"));
        }
        if self.gguf.is_some() {
            rows.push(peer.row("llama.cpp, file mapped"));
        }
        print!("{}", table(&["", "tokens/s", "GB/s read", "MB of the group at most"], &rows, 1));
        if ours.gbps.is_empty() {
            println!("nothing was streamed: the model fits");
        } else {
            println!("storage gave edgellm {:.2} times what it gave dd", median(&ours.gbps) / median(&storage.gbps));
        }
        if self.unlimited {
            let ratio = median(&free.tokens_per_second) / median(&ours.tokens_per_second);
            println!("without the limit: {ratio:.3} times as fast");
        }
        if !peer.tokens_per_second.is_empty() {
            let ratio = median(&ours.tokens_per_second) / median(&peer.tokens_per_second);
            println!("{ratio:.2} times the speed of llama.cpp");
        }
        Ok(())
    }

    fn decode(&self, edgellm: &Edgellm, rounds: &mut Rounds) -> Result<()> {
        let n = self.n.to_string();
        let test = ["bench", "-m", arg(&self.model)?, "-p", "0", "-n", &n, "--tune", "0", "-r", "1"];
        let found = edgellm.json(test)?;
        let row = &found["tests"][0];
        rounds.tokens_per_second.push(number(row, "median_ts")?);
        if row["streamed_gbps"] != Value::Null {
            rounds.gbps.push(number(row, "streamed_gbps")?);
        }
        Ok(())
    }

    /// Tokens per second of the peer; its repacking of weights, which takes memory for all of them, is off.
    fn peer(&self, inside: &[&str], program: &Path, gguf: &Path) -> Result<f64> {
        let (shell, rest) = inside.split_first().context("a shell")?;
        let n = self.n.to_string();
        let output = Command::new(shell)
            .args(rest)
            .arg(program)
            .args(["-m", arg(gguf)?, "-p", "0", "-n", &n, "-r", "1", "-lm", "mmap", "--repack", "0", "-o", "json"])
            .output()
            .with_context(|| format!("cannot run {}", program.display()))?;
        if !output.status.success() {
            bail!("ended with {}", output.status);
        }
        let found: Value = serde_json::from_slice(&output.stdout).context("llama-bench printed no JSON")?;
        number(&found[0], "avg_ts")
    }
}

/// What storage gives a program that reads past the cache, in GB/s: one reader, or four at once, whichever is more.
fn storage_gbps(path: &Path) -> Result<f64> {
    let mut best = 0.0f64;
    for readers in [1, 4] {
        let part = PROBE_PARTS / readers;
        let start = Instant::now();
        let children: Vec<_> = (0..readers)
            .map(|reader| {
                let input = format!("if={}", arg(path)?);
                let (skip, count) = (format!("skip={}", reader * part), format!("count={part}"));
                let mut dd = Command::new("dd");
                dd.args([&input, "of=/dev/null", "bs=16M", "iflag=direct", "status=none", &skip, &count]);
                dd.spawn().context("cannot run dd")
            })
            .collect::<Result<_>>()?;
        for mut child in children {
            ensure!(child.wait()?.success(), "dd could not read {} past the cache", path.display());
        }
        best = best.max((PROBE_PARTS * (16 << 20)) as f64 / start.elapsed().as_secs_f64() * 1e-9);
    }
    Ok(best)
}

/// A control group with a memory limit and without swap; removed when dropped.
struct Group {
    folder: PathBuf,
}

impl Group {
    fn new(limit: u64) -> Result<Self> {
        let folder = Path::new(CONTROLLER).join(format!("edgellm-{}", std::process::id()));
        fs::create_dir(&folder).with_context(|| {
            format!("cannot make a control group in {CONTROLLER}; this check needs version 1 of the memory controller, and root")
        })?;
        let group = Self { folder };
        group.write("memory.limit_in_bytes", &limit.to_string())?;
        group.write("memory.swappiness", "0")?;
        Ok(group)
    }

    fn write(&self, name: &str, value: &str) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, value).with_context(|| format!("cannot write {}", path.display()))
    }

    fn reset(&self) -> Result<()> {
        self.write("memory.force_empty", "0")?;
        self.write("memory.max_usage_in_bytes", "0")
    }

    fn peak(&self) -> Result<u64> {
        let path = self.folder.join("memory.max_usage_in_bytes");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        text.trim().parse().with_context(|| format!("{} holds no number", path.display()))
    }

    /// What runs a program, which follows, inside.
    fn command(&self) -> [String; 4] {
        let enter = format!("echo $$ > {}/cgroup.procs && exec \"$@\"", self.folder.display());
        ["sh".into(), "-c".into(), enter, "sh".into()]
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Only an empty group can be removed; what is left of one that is not is harmless.
        let _ = fs::remove_dir(&self.folder);
    }
}
