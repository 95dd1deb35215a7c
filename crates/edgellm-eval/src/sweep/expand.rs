//! From a template to stages.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::template::{Adapter, Device, Model, Options, Policy, Task, Template};
use crate::error::{EvalError, Result};

/// A kind of stage: the command that it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StageKind {
    /// `edgellm measure`.
    Measure,
    /// `edgellm plan`.
    Plan,
    /// `edgellm search`.
    Search,
    /// `edgellm compress`.
    Compress,
    /// `edgellm adapt`.
    Adapt,
    /// `edgellm eval`.
    Eval,
    /// `edgellm bench`.
    Bench,
}

impl StageKind {
    /// The command's name.
    pub fn command(self) -> &'static str {
        match self {
            Self::Measure => "measure",
            Self::Plan => "plan",
            Self::Search => "search",
            Self::Compress => "compress",
            Self::Adapt => "adapt",
            Self::Eval => "eval",
            Self::Bench => "bench",
        }
    }

    /// What the output is called, after the key; `None` if all that counts is printed.
    pub fn output(self) -> Option<&'static str> {
        match self {
            Self::Measure => Some("measurement.json"),
            Self::Plan | Self::Search => Some("policy.toml"),
            Self::Compress => Some("model"),
            Self::Adapt => Some("adapter"),
            Self::Eval | Self::Bench => None,
        }
    }
}

/// An argument of a stage.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Argument {
    /// As it is.
    Text(String),
    /// A file, or a model by path or stored name; its contents count, not its name.
    File(String),
    /// The output of the stage with this index.
    Output(usize),
    /// Where this stage writes.
    Own,
}

/// One command line.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// Which command.
    pub kind: StageKind,
    /// Its arguments.
    pub arguments: Vec<Argument>,
    /// 64 hexadecimal digits.
    pub key: String,
}

impl Stage {
    /// Indices of the stages whose output it reads.
    pub fn inputs(&self) -> impl Iterator<Item = usize> {
        self.arguments.iter().filter_map(|argument| match argument {
            Argument::Output(stage) => Some(*stage),
            _ => None,
        })
    }
}

/// A task on one model under one configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Case {
    /// `model`, `policy`, `budget`, `adapter`, `device`, `seed`, `task`, where there is more than nothing to say.
    pub names: BTreeMap<String, String>,
    /// The stage whose result it is.
    pub stage: usize,
    /// The stage that planned its formats, if any.
    pub plan: Option<usize>,
    /// 12 hexadecimal digits of a digest of the task's data and of its options that choose and cut items: cases in which
    /// it is the same have the same items.
    pub sample: String,
}

/// What holds for every stage, beside the template.
#[derive(Clone, Copy, Debug, Default)]
pub struct Everywhere<'a> {
    /// The command's version, which is part of every key.
    pub version: &'a str,
    /// Options of the command line that every stage gets, by their long names, with their values.
    pub options: &'a [(&'static str, String)],
}

/// What a template comes to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Expanded {
    /// Stages; each reads the outputs of earlier ones only.
    pub stages: Vec<Stage>,
    /// What is measured.
    pub cases: Vec<Case>,
    /// Combinations that mean nothing, with the reason.
    pub left_out: Vec<String>,
}

/// Options of tasks that say how answers are weighed or what else is measured, not which items there are.
const NOT_OF_SAMPLE: [&str; 3] = ["vote", "calibration", "speed"];

/// Expands a template. `digest` tells what a file or a model contains: a digest, or `None` for what is neither, such as a
/// number.
///
/// # Errors
/// An option that is neither text, number, flag nor a list of them, that both the template and `everywhere` have, or what
/// `digest` refuses.
pub fn expand(
    template: &Template,
    everywhere: Everywhere<'_>,
    digest: &mut dyn FnMut(&str) -> Result<Option<String>>,
) -> Result<Expanded> {
    let mut builder = Builder { template, everywhere, digest, out: Expanded::default(), known: BTreeMap::new() };
    let none = [Adapter { name: "none".into(), adapt: None }];
    let here = [Device { name: "here".into(), options: Options::new() }];
    let adapters = if template.adapter.is_empty() { &none[..] } else { &template.adapter };
    let devices = if template.device.is_empty() { &here[..] } else { &template.device };
    for model in &template.model {
        for policy in &template.policy {
            let budgets: Vec<Option<&String>> =
                if policy.budgets.is_empty() { vec![None] } else { policy.budgets.iter().map(Some).collect() };
            for budget in budgets {
                for &seed in &template.seeds {
                    let compressed = builder.compressed(model, policy, budget, seed)?;
                    for adapter in adapters {
                        for device in devices {
                            for task in &template.task {
                                let combination = Combination { model, policy, budget, seed, adapter, device, task };
                                builder.case(&combination, &compressed)?;
                            }
                        }
                    }
                }
            }
        }
    }
    let mut seen = BTreeSet::new();
    builder.out.left_out.retain(|reason| seen.insert(reason.clone()));
    Ok(builder.out)
}

struct Combination<'a> {
    model: &'a Model,
    policy: &'a Policy,
    budget: Option<&'a String>,
    seed: u64,
    adapter: &'a Adapter,
    device: &'a Device,
    task: &'a Task,
}

/// A model that tasks run on.
struct Compressed {
    model: Argument,
    plan: Option<usize>,
}

struct Builder<'a> {
    template: &'a Template,
    everywhere: Everywhere<'a>,
    digest: &'a mut dyn FnMut(&str) -> Result<Option<String>>,
    out: Expanded,
    /// Stages by key.
    known: BTreeMap<String, usize>,
}

impl Builder<'_> {
    fn compressed(&mut self, model: &Model, policy: &Policy, budget: Option<&String>, seed: u64) -> Result<Compressed> {
        let base = Argument::File(self.path_of(&model.path));
        let mut compress = self.template.compress.clone();
        compress.extend(policy.compress.clone());
        let (how, plan) = match (&policy.format, &policy.solver, budget) {
            (None, None, _) => return Ok(Compressed { model: base, plan: None }),
            (Some(format), ..) => (vec![text("--format"), text(format)], None),
            (None, Some(solver), Some(budget)) => {
                let plan = self.plan(&base, policy, solver, budget, seed)?;
                (vec![text("--policy"), Argument::Output(plan)], Some(plan))
            }
            (None, Some(_), None) => unreachable!("a solver has budgets"),
        };
        let mut arguments = vec![text("-m"), base];
        arguments.extend(how);
        arguments.extend([text("-o"), Argument::Own]);
        arguments.extend(self.options(&compress, seed)?);
        let stage = self.stage(StageKind::Compress, arguments)?;
        Ok(Compressed { model: Argument::Output(stage), plan })
    }

    fn plan(&mut self, base: &Argument, policy: &Policy, solver: &str, budget: &str, seed: u64) -> Result<usize> {
        let mut arguments = vec![text("-m"), base.clone(), text("-o"), Argument::Own];
        let measure = self.template.measure.clone();
        arguments.extend(self.options(&measure, seed)?);
        let measurement = self.stage(StageKind::Measure, arguments)?;
        let (option, value) = match budget {
            ms if ms.ends_with("ms") => ("--target-ms", ms.trim_end_matches("ms").trim()),
            size if size.to_ascii_uppercase().ends_with('B') => ("--target-size", size),
            bits => ("--target-bpw", bits),
        };
        let mut arguments = vec![text("--measurement"), Argument::Output(measurement), text("-o"), Argument::Own];
        arguments.extend([text(option), text(value)]);
        let kind = if solver == "search" {
            arguments.extend([text("-m"), base.clone()]);
            StageKind::Search
        } else {
            arguments.extend([text("--solver"), text(solver)]);
            StageKind::Plan
        };
        arguments.extend(self.options(&policy.plan, seed)?);
        self.stage(kind, arguments)
    }

    fn case(&mut self, at: &Combination<'_>, compressed: &Compressed) -> Result<()> {
        let Combination { model, policy, budget, seed, adapter, device, task } = *at;
        if task.needs_adapter && adapter.adapt.is_none() {
            self.out.left_out.push(format!("task {} without an adapter: there is nothing to vote", task.name));
            return Ok(());
        }
        let mut arguments = vec![text("-m"), compressed.model.clone()];
        if let Some(options) = &adapter.adapt {
            if task.bench.is_some() {
                self.out.left_out.push(format!("task {} with adapter {}: bench takes none", task.name, adapter.name));
                return Ok(());
            }
            let mut adapt = vec![text("-m"), compressed.model.clone(), text("-o"), Argument::Own];
            adapt.extend(self.options(options, seed)?);
            let stage = self.stage(StageKind::Adapt, adapt)?;
            arguments.extend([text("--adapter"), Argument::Output(stage)]);
        }
        let (kind, options) = match (&task.eval, &task.bench) {
            (Some(options), _) => (StageKind::Eval, options),
            (None, Some(options)) => (StageKind::Bench, options),
            (None, None) => unreachable!("a task is one of them"),
        };
        if kind == StageKind::Eval {
            arguments.push(text("--items"));
        }
        if task.base {
            let base = self.path_of(&model.path);
            arguments.extend([text("--base"), Argument::File(base)]);
        }
        let mut of_sample = options.clone();
        of_sample.retain(|name, _| !NOT_OF_SAMPLE.contains(&name.as_str()));
        let of_sample = self.options(&of_sample, seed)?;
        // Without the version: runs of two versions are there to be compared.
        let sample = self.digest_of("", kind, &of_sample)?[..12].to_owned();
        arguments.extend(self.options(options, seed)?);
        arguments.extend(self.options(&device.options, seed)?);
        let stage = self.stage(kind, arguments)?;
        let mut names = BTreeMap::new();
        let mut name = |key: &str, value: &str| names.insert(key.to_owned(), value.to_owned());
        name("model", &model.name);
        name("policy", &policy.name);
        name("task", &task.name);
        if let Some(budget) = budget {
            name("budget", budget);
        }
        if !self.template.adapter.is_empty() {
            name("adapter", &adapter.name);
        }
        if !self.template.device.is_empty() {
            name("device", &device.name);
        }
        if self.template.seeds.len() > 1 {
            name("seed", &seed.to_string());
        }
        self.out.cases.push(Case { names, stage, plan: compressed.plan, sample });
        Ok(())
    }

    /// Options as arguments. `{seed}` in a value is the case's seed; values that name files are files.
    fn options(&mut self, options: &Options, seed: u64) -> Result<Vec<Argument>> {
        let mut arguments = Vec::new();
        for (name, value) in options {
            let bad = || EvalError::Setting {
                what: "option of the template",
                expected: "a text, a number, true, or a list of them".into(),
                found: format!("{name} = {value}"),
            };
            let value = match value {
                toml::Value::Boolean(true) => None,
                toml::Value::Boolean(false) => continue,
                toml::Value::Array(list) => {
                    let list: Option<Vec<String>> = list.iter().map(plain).collect();
                    Some(list.ok_or_else(bad)?.join(","))
                }
                other => Some(plain(other).ok_or_else(bad)?),
            };
            arguments.push(text(&format!("--{name}")));
            if let Some(value) = value {
                let value = value.replace("{seed}", &seed.to_string());
                let path = self.path_of(&value);
                let is_file = (self.digest)(&path)?.is_some();
                arguments.push(if is_file { Argument::File(path) } else { Argument::Text(value) });
            }
        }
        Ok(arguments)
    }

    /// A path beside the template, if there is something; else the text as it is.
    fn path_of(&self, value: &str) -> String {
        let beside: PathBuf = self.template.folder.join(value);
        if !value.is_empty() && beside.exists() { beside.to_string_lossy().into_owned() } else { value.to_owned() }
    }

    fn stage(&mut self, kind: StageKind, mut arguments: Vec<Argument>) -> Result<usize> {
        for (name, value) in self.everywhere.options {
            let option = text(&format!("--{name}"));
            if arguments.contains(&option) {
                return Err(EvalError::Setting {
                    what: "option",
                    expected: format!("--{name} on the command line or in the template"),
                    found: "both".into(),
                });
            }
            arguments.extend([option, text(value)]);
        }
        let key = self.digest_of(self.everywhere.version, kind, &arguments)?;
        if let Some(&known) = self.known.get(&key) {
            return Ok(known);
        }
        let index = self.out.stages.len();
        self.known.insert(key.clone(), index);
        self.out.stages.push(Stage { kind, arguments, key });
        Ok(index)
    }

    /// A digest of a command line, in which files count by their contents.
    fn digest_of(&mut self, version: &str, kind: StageKind, arguments: &[Argument]) -> Result<String> {
        let mut hash = Sha256::new();
        let mut add = |kind: &str, value: &str| {
            hash.update(kind.as_bytes());
            hash.update((value.len() as u64).to_le_bytes());
            hash.update(value.as_bytes());
        };
        add("version", version);
        add("command", kind.command());
        for argument in arguments {
            match argument {
                Argument::Text(value) => add("text", value),
                Argument::Output(stage) => add("output", &self.out.stages[*stage].key),
                Argument::Own => add("own", ""),
                Argument::File(path) => match (self.digest)(path)? {
                    Some(digest) => add("file", &digest),
                    None => {
                        return Err(EvalError::Setting {
                            what: "file or model of the template",
                            expected: "one that exists, beside the template or as a stored name".into(),
                            found: path.clone(),
                        });
                    }
                },
            }
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

fn text(value: &str) -> Argument {
    Argument::Text(value.into())
}

fn plain(value: &toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text.clone()),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const TEXT: &str = r#"
version = 1
name = "x"
[measure]
calibrate = "a.txt"
[compress]
calibrate-windows = 4
prepare = true
quick = false
[[model]]
name = "m"
path = "model"
[[policy]]
name = "dense"
[[policy]]
name = "solved"
solver = "solve"
budgets = ["3", "45MB", "4.2ms"]
[[policy]]
name = "searched"
solver = "search"
budgets = ["3"]
[[adapter]]
name = "none"
[[adapter]]
name = "tuned"
adapt = { data = "a.txt", targets = ["q", "v"], seed = "{seed}" }
[[task]]
name = "text"
base = true
eval = { text = "a.txt", windows = 2 }
[[task]]
name = "votes"
needs_adapter = true
eval = { text = "a.txt", windows = 2, vote = "max" }
[[task]]
name = "speed"
bench = { n-gen = 8 }
"#;

    /// The template's text in a folder in which there are two files and a model.
    struct Folder(tempfile::TempDir);

    impl Folder {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            for name in ["a.txt", "b.txt", "model"] {
                std::fs::write(folder.path().join(name), name).unwrap();
            }
            Self(folder)
        }

        fn expand(&self, text: &str, everywhere: Everywhere<'_>) -> Result<Expanded> {
            let path = self.0.path().join("t.toml");
            std::fs::write(&path, text).unwrap();
            let template = Template::read(&path, &[]).unwrap();
            expand(&template, everywhere, &mut |name| Ok(std::fs::read_to_string(Path::new(name)).ok()))
        }

        fn plain(&self, text: &str) -> Expanded {
            self.expand(text, Everywhere::default()).unwrap()
        }
    }

    /// A stage's words; files by their names.
    fn words(stage: &Stage) -> String {
        let word = |argument: &Argument| match argument {
            Argument::Text(value) => value.clone(),
            Argument::File(path) => path.rsplit('/').next().unwrap_or_default().to_owned(),
            Argument::Output(stage) => format!("<{stage}>"),
            Argument::Own => "<out>".into(),
        };
        stage.arguments.iter().map(word).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn every_combination_is_there_once_and_shared_work_is_shared() {
        let found = Folder::new().plain(TEXT);
        // Dense, three budgets and a search; for each a text, with an adapter a text and votes, and a speed.
        assert_eq!(found.cases.len(), 5 * 4);
        let count = |kind| found.stages.iter().filter(|stage| stage.kind == kind).count();
        let kinds = [StageKind::Measure, StageKind::Plan, StageKind::Search, StageKind::Compress, StageKind::Adapt];
        assert_eq!(kinds.map(count), [1, 3, 1, 4, 5]);
        assert_eq!((count(StageKind::Eval), count(StageKind::Bench)), (15, 5));
        for (index, stage) in found.stages.iter().enumerate() {
            assert!(stage.inputs().all(|input| input < index), "{}", words(stage));
            assert_eq!(stage.key.len(), 64);
        }
        let unique: BTreeSet<&str> = found.stages.iter().map(|stage| stage.key.as_str()).collect();
        assert_eq!(unique.len(), found.stages.len());
        let left_out = found.left_out.join("; ");
        assert!(left_out.contains("votes without an adapter") && left_out.contains("bench takes none"), "{left_out}");
    }

    #[test]
    fn stages_are_the_commands_that_a_person_would_type() {
        let found = Folder::new().plain(TEXT);
        let of = |kind| found.stages.iter().filter(move |stage| stage.kind == kind).map(words).collect::<Vec<_>>();
        assert_eq!(of(StageKind::Measure), ["-m model -o <out> --calibrate a.txt"]);
        let plans = of(StageKind::Plan);
        for (plan, target) in plans.iter().zip(["--target-bpw 3", "--target-size 45MB", "--target-ms 4.2"]) {
            assert!(plan.ends_with(&format!("-o <out> {target} --solver solve")), "{plan}");
        }
        let search = &of(StageKind::Search)[0];
        assert!(search.contains("--target-bpw 3 -m model") && !search.contains("--solver"), "{search}");
        let compress = &of(StageKind::Compress)[0];
        assert!(compress.contains("-m model --policy <"), "{compress}");
        assert!(compress.ends_with("-o <out> --calibrate-windows 4 --prepare"), "{compress}");
        let adapt = &of(StageKind::Adapt)[0];
        assert!(adapt.ends_with("-o <out> --data a.txt --seed 0 --targets q,v"), "{adapt}");
        let text = &of(StageKind::Eval)[0];
        assert_eq!(text, "-m model --items --base model --text a.txt --windows 2");
    }

    #[test]
    fn keys_follow_contents_versions_and_options_but_not_names() {
        let folder = Folder::new();
        let keys = |found: &Expanded| found.stages.iter().map(|stage| stage.key.clone()).collect::<Vec<_>>();
        let before = keys(&folder.plain(TEXT));
        // The same contents under another name.
        std::fs::copy(folder.0.path().join("a.txt"), folder.0.path().join("c.txt")).unwrap();
        assert_eq!(keys(&folder.plain(&TEXT.replace("a.txt", "c.txt"))), before);
        let all_differ = |after: Vec<String>| before.iter().zip(&after).all(|(a, b)| a != b);
        assert!(all_differ(keys(&folder.expand(TEXT, Everywhere { version: "2", options: &[] }).unwrap())));
        let options = [("threads", "2".to_owned())];
        let everywhere = Everywhere { version: "", options: &options };
        let found = folder.expand(TEXT, everywhere).unwrap();
        assert!(found.stages.iter().all(|stage| words(stage).ends_with("--threads 2")));
        assert!(all_differ(keys(&found)));
        let device = "[[device]]\nname = \"d\"\noptions = { threads = 1 }\n";
        let both = folder.expand(&format!("{TEXT}{device}"), everywhere).unwrap_err().to_string();
        assert!(both.contains("--threads on the command line or in the template") && both.contains("both"), "{both}");
        // Another text: only what does not read it is the same.
        std::fs::write(folder.0.path().join("a.txt"), "other").unwrap();
        let after = folder.plain(TEXT);
        let same: Vec<String> = after.stages.iter().filter(|stage| before.contains(&stage.key)).map(words).collect();
        assert_eq!(same, ["-m model --n-gen 8"]);
    }

    #[test]
    fn a_sample_is_the_data_and_how_it_is_cut() {
        let folder = Folder::new();
        let samples = |text: &str| -> BTreeMap<String, BTreeSet<String>> {
            let mut samples: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
            for case in folder.plain(text).cases {
                samples.entry(case.names["task"].clone()).or_default().insert(case.sample);
            }
            samples
        };
        let found = samples(TEXT);
        assert!(found.values().all(|of_task| of_task.len() == 1), "a task has one sample: {found:?}");
        assert_eq!(found["text"], found["votes"], "how exits vote changes no item");
        assert_ne!(found["text"], found["speed"]);
        let newer = folder.expand(TEXT, Everywhere { version: "2", options: &[] }).unwrap();
        assert!(newer.cases.iter().all(|case| found[&case.names["task"]].contains(&case.sample)));
        for (from, to) in [("text = \"a.txt\"", "text = \"b.txt\""), ("windows = 2", "windows = 3")] {
            assert_ne!(samples(&TEXT.replace(from, to))["text"], found["text"]);
        }
    }

    #[test]
    fn what_is_not_there_and_what_is_no_option_is_refused() {
        let folder = Folder::new();
        let error = |text: &str| folder.expand(text, Everywhere::default()).unwrap_err().to_string();
        let missing = error(&TEXT.replace("path = \"model\"", "path = \"other\""));
        assert!(missing.contains("one that exists") && missing.contains("other"), "{missing}");
        let nested = error(&TEXT.replace("n-gen = 8", "n-gen = { a = 1 }"));
        assert!(nested.contains("n-gen") && nested.contains("a list of them"), "{nested}");
    }
}
