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

/// Expands a template for a version of the command. `digest` tells what a file or a model contains: a digest, or `None` for
/// what is neither, such as a number.
///
/// # Errors
/// An option that is neither text, number, flag nor a list of them, or what `digest` refuses.
pub fn expand(
    template: &Template,
    version: &str,
    digest: &mut dyn FnMut(&str) -> Result<Option<String>>,
) -> Result<Expanded> {
    let mut builder = Builder { template, version, digest, out: Expanded::default(), known: BTreeMap::new() };
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
    version: &'a str,
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
        self.out.cases.push(Case { names, stage, plan: compressed.plan });
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

    fn stage(&mut self, kind: StageKind, arguments: Vec<Argument>) -> Result<usize> {
        let mut hash = Sha256::new();
        let mut add = |kind: &str, value: &str| {
            hash.update(kind.as_bytes());
            hash.update((value.len() as u64).to_le_bytes());
            hash.update(value.as_bytes());
        };
        add("version", self.version);
        add("command", kind.command());
        for argument in &arguments {
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
        let key: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        if let Some(&known) = self.known.get(&key) {
            return Ok(known);
        }
        let index = self.out.stages.len();
        self.known.insert(key.clone(), index);
        self.out.stages.push(Stage { kind, arguments, key });
        Ok(index)
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
