//! Running the stages of a sweep: in processes of their own, several at once where memory allows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use edgellm::eval::store::Store;
use edgellm::eval::sweep::{Argument, Expanded, Stage, StageKind};
use edgellm::eval::{Record, process_memory};
use edgellm::sched::usable_bytes;
use serde_json::{Value, json};

use super::record;
use crate::cli::failure::Interrupted;
use crate::cli::progress::Counted;
use crate::cli::{Context, child, interrupt};

/// Time between two looks at what the running stages take, and at signals.
const PERIOD: Duration = Duration::from_millis(100);

/// How a sweep is run.
pub(super) struct Settings<'a> {
    /// The folder of outputs.
    pub(super) work: PathBuf,
    /// The sweep's name.
    pub(super) name: &'a str,
    /// Stages at once, at most.
    pub(super) jobs: usize,
    /// Whether what is stored is run all the same.
    pub(super) again: bool,
    /// Whether compressed models and adapters stay.
    pub(super) keep_models: bool,
}

/// What is known of a stage.
enum State {
    Waiting,
    Running,
    Done(Value),
    /// It failed, or something that it reads did.
    Failed,
}

/// A process that runs a stage.
struct Job {
    stage: usize,
    process: u32,
    start: Instant,
}

/// What a stage printed, or why it failed.
type Ended = (usize, anyhow::Result<Value>);

/// A sweep while it runs.
pub(super) struct Sweep<'a> {
    ctx: &'a Context,
    settings: Settings<'a>,
    expanded: &'a Expanded,
    store: Store,
    /// Of the stages that results need.
    states: BTreeMap<usize, State>,
    /// By case.
    records: BTreeMap<usize, Record>,
    jobs: Vec<Job>,
    /// Most memory that a finished stage of the kind took; one of which the system did not tell counts as nothing.
    peaks: BTreeMap<StageKind, u64>,
    run: usize,
    found: usize,
    failures: Vec<String>,
    ended: (Sender<Ended>, Receiver<Ended>),
}

impl<'a> Sweep<'a> {
    pub(super) fn new(ctx: &'a Context, settings: Settings<'a>, expanded: &'a Expanded, store: Store) -> Self {
        let (states, records, jobs, peaks) = (BTreeMap::new(), BTreeMap::new(), Vec::new(), BTreeMap::new());
        let (run, found, failures, ended) = (0, 0, Vec::new(), channel());
        Self { ctx, settings, expanded, store, states, records, jobs, peaks, run, found, failures, ended }
    }

    /// Stages that were run, were found in the store, and failed.
    pub(super) fn counts(&self) -> Value {
        json!({"run": self.run, "found": self.found, "failed": self.failures.len()})
    }

    /// A sentence for each stage that failed.
    pub(super) fn failures(&self) -> &[String] {
        &self.failures
    }

    /// Runs what has no result yet; the records of all cases that have one then, in order.
    pub(super) fn run(&mut self) -> anyhow::Result<Vec<Record>> {
        for case in &self.expanded.cases {
            self.need(case.stage)?;
            case.plan.map(|plan| self.need(plan)).transpose()?;
        }
        self.put_records()?;
        let waiting = self.states.values().filter(|state| matches!(state, State::Waiting)).count();
        let labels = labels(self.expanded);
        let mut progress = self.ctx.progress("sweep", waiting as u64, Counted::Items("stages"));
        loop {
            self.start_what_may()?;
            let Some(job) = self.jobs.last() else { break };
            let finished = (self.run + self.failures.len()) as u64;
            progress.set_with(finished, labels[&job.stage].clone());
            let ended = self.ended.1.recv_timeout(PERIOD);
            self.watch();
            match ended {
                Ok((stage, result)) => self.finish(stage, result)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("this end has a sender too"),
            }
            if interrupt::requested() {
                self.stop()?;
                let kept = format!("stopped by a signal; {} stages are stored", self.run + self.found);
                return Err(Interrupted(kept).into());
            }
        }
        progress.set((self.run + self.failures.len()) as u64);
        progress.finish();
        Ok(std::mem::take(&mut self.records).into_values().collect())
    }

    /// Takes a stage's result from the store, or notes that it has to be run, and all that it reads.
    fn need(&mut self, index: usize) -> anyhow::Result<()> {
        if self.states.contains_key(&index) {
            return Ok(());
        }
        let stage = &self.expanded.stages[index];
        // What writes something is done only while that is there.
        let there = self.output(stage).is_none_or(|path| path.exists());
        let stored = if there && !self.settings.again { self.store.stage(&stage.key)? } else { None };
        let state = match stored {
            Some(result) => {
                self.found += 1;
                State::Done(result)
            }
            None => {
                for input in stage.inputs() {
                    self.need(input)?;
                }
                State::Waiting
            }
        };
        self.states.insert(index, state);
        Ok(())
    }

    /// Starts the stages that wait for nothing, as far as processors and memory go.
    fn start_what_may(&mut self) -> anyhow::Result<()> {
        let waiting: Vec<usize> =
            self.states.iter().filter(|(_, state)| matches!(state, State::Waiting)).map(|(index, _)| *index).collect();
        // Inputs come before what reads them.
        for index in waiting {
            let stage = &self.expanded.stages[index];
            if stage.inputs().any(|input| matches!(self.states.get(&input), Some(State::Failed))) {
                self.states.insert(index, State::Failed);
            } else if stage.inputs().all(|input| matches!(self.states.get(&input), Some(State::Done(_))))
                && self.may_start(stage)
            {
                self.start(index)?;
            }
        }
        Ok(())
    }

    /// Whether a stage may start now. What measures speed has the machine for itself; so does the first stage of each kind,
    /// which tells what the others will take.
    fn may_start(&self, stage: &Stage) -> bool {
        if self.jobs.is_empty() {
            return true;
        }
        let mut all = self.jobs.iter().map(|job| &self.expanded.stages[job.stage]).chain([stage]);
        if self.jobs.len() >= self.settings.jobs
            || all.any(|stage| measures_speed(stage) || !self.peaks.contains_key(&stage.kind))
        {
            return false;
        }
        let Some(left) = usable_bytes() else { return true };
        let growth = self.jobs.iter().map(|job| {
            let [now, _] = process_memory(job.process).unwrap_or_default();
            self.peaks[&self.expanded.stages[job.stage].kind].saturating_sub(now)
        });
        growth.sum::<u64>() + self.peaks[&stage.kind] <= left
    }

    fn start(&mut self, index: usize) -> anyhow::Result<()> {
        let stage = &self.expanded.stages[index];
        let output = self.output(stage);
        // Written beside, and renamed when it is whole; commands that go on where they were stopped find what they left.
        let partial = output.as_deref().map(partial);
        for path in [&partial, &output].into_iter().flatten() {
            remove(path)?;
        }
        let mut arguments: Vec<String> =
            stage.arguments.iter().map(|argument| self.argument(argument, partial.as_deref())).collect();
        let checkpoints = partial.as_ref().map(|path| path.with_file_name(format!("{}.checkpoints", file_name(path))));
        if stage.kind == StageKind::Adapt && checkpoints.is_some_and(|folder| folder.is_dir()) {
            arguments.push("--resume".into());
        }
        // Together they have as many threads as there are processors.
        if self.settings.jobs > 1 && !measures_speed(stage) && !arguments.iter().any(|word| word == "--threads") {
            let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
            arguments.extend(["--threads".into(), (processors / self.settings.jobs).max(1).to_string()]);
        }
        let started = child::start([stage.kind.command().to_owned()].into_iter().chain(arguments))?;
        self.jobs.push(Job { stage: index, process: started.id(), start: Instant::now() });
        self.states.insert(index, State::Running);
        let ended = self.ended.0.clone();
        // Only the receiver's end could make this fail, and that waits for it.
        std::thread::spawn(move || drop(ended.send((index, started.wait()))));
        Ok(())
    }

    /// Keeps what the running stages took at most.
    fn watch(&mut self) {
        for job in &self.jobs {
            let kind = self.expanded.stages[job.stage].kind;
            if let (Some([_, most]), Some(peak)) = (process_memory(job.process), self.peaks.get_mut(&kind)) {
                *peak = most.max(*peak);
            }
        }
    }

    fn finish(&mut self, index: usize, result: anyhow::Result<Value>) -> anyhow::Result<()> {
        let stage = &self.expanded.stages[index];
        let Some(at) = self.jobs.iter().position(|job| job.stage == index) else { return Ok(()) };
        let took = self.jobs.remove(at).start.elapsed().as_secs_f64();
        // From now on, others of its kind may run beside others.
        self.peaks.entry(stage.kind).or_default();
        let state = match result {
            Ok(result) => {
                if let Some(output) = self.output(stage) {
                    let partial = partial(&output);
                    std::fs::rename(&partial, &output)
                        .map_err(|e| anyhow::anyhow!("{}: cannot be renamed: {e}", partial.display()))?;
                }
                self.store.put_stage(&stage.key, stage.kind.command(), &shown(stage), took, &result)?;
                self.run += 1;
                State::Done(result)
            }
            // It was asked to stop: no failure.
            Err(_) if interrupt::requested() => State::Waiting,
            Err(error) => {
                self.failures.push(format!("{} ({error})", shown(stage)));
                State::Failed
            }
        };
        self.states.insert(index, state);
        self.put_records()?;
        if !self.settings.keep_models {
            self.remove_models()?;
        }
        Ok(())
    }

    /// Stops what runs, and waits for its end.
    fn stop(&mut self) -> anyhow::Result<()> {
        for job in &self.jobs {
            child::stop(job.process);
        }
        while !self.jobs.is_empty() {
            let (stage, result) = self.ended.1.recv()?;
            self.finish(stage, result)?;
        }
        Ok(())
    }

    /// Stores the records of cases that have all they need.
    fn put_records(&mut self) -> anyhow::Result<()> {
        for (number, case) in self.expanded.cases.iter().enumerate() {
            if self.records.contains_key(&number) {
                continue;
            }
            let Some(State::Done(result)) = self.states.get(&case.stage) else { continue };
            let plan = match case.plan.map(|plan| &self.states[&plan]) {
                None | Some(State::Failed) => None,
                Some(State::Done(plan)) => Some(plan),
                Some(State::Waiting | State::Running) => continue,
            };
            let stage = &self.expanded.stages[case.stage];
            let seconds = self.store.stage_seconds(&stage.key)?.unwrap_or(0.0);
            let record = record::record(self.ctx, self.settings.name, case, stage, result, plan, seconds)?;
            self.store.put(&record)?;
            self.records.insert(number, record);
        }
        Ok(())
    }

    /// Removes models and adapters that nothing will read any more: all that is measured of them is stored.
    fn remove_models(&self) -> anyhow::Result<()> {
        let open = |index: &usize| !matches!(self.states[index], State::Done(_));
        let still_read: BTreeSet<usize> = self
            .states
            .keys()
            .filter(|index| open(index))
            .flat_map(|index| self.expanded.stages[*index].inputs().collect::<Vec<_>>())
            .collect();
        for index in self.states.keys().filter(|index| !open(index) && !still_read.contains(index)) {
            let stage = &self.expanded.stages[*index];
            let large = matches!(stage.kind, StageKind::Compress | StageKind::Adapt);
            if let Some(path) = self.output(stage).filter(|_| large) {
                remove(&path)?;
            }
        }
        Ok(())
    }

    fn output(&self, stage: &Stage) -> Option<PathBuf> {
        Some(self.settings.work.join(format!("{:.16}-{}", stage.key, stage.kind.output()?)))
    }

    fn argument(&self, argument: &Argument, own: Option<&Path>) -> String {
        let text = |path: &Path| path.to_string_lossy().into_owned();
        match argument {
            Argument::Text(value) | Argument::File(value) => value.clone(),
            Argument::Output(stage) => {
                self.output(&self.expanded.stages[*stage]).as_deref().map(text).unwrap_or_default()
            }
            Argument::Own => own.map(text).unwrap_or_default(),
        }
    }
}

/// What a stage does for the first case that needs it, for progress.
fn labels(expanded: &Expanded) -> BTreeMap<usize, String> {
    let mut labels = BTreeMap::new();
    for case in &expanded.cases {
        let names: Vec<&str> = case.names.values().map(String::as_str).collect();
        let mut open = vec![case.stage];
        while let Some(index) = open.pop() {
            let stage = &expanded.stages[index];
            labels.entry(index).or_insert_with(|| format!("{} for {}", stage.kind.command(), names.join(" ")));
            open.extend(stage.inputs());
        }
    }
    labels
}

/// Whether others beside it would falsify what a stage measures.
fn measures_speed(stage: &Stage) -> bool {
    stage.kind == StageKind::Bench || stage.arguments.contains(&Argument::Text("--speed".into()))
}

/// Where a stage writes until its output is whole.
fn partial(output: &Path) -> PathBuf {
    output.with_file_name(format!("partial-{}", file_name(output)))
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> anyhow::Result<()> {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    match removed {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(anyhow::anyhow!("{}: cannot be removed: {e}", path.display()))
        }
        _ => Ok(()),
    }
}

/// A stage as a person would type it.
pub(super) fn shown(stage: &Stage) -> String {
    let words = stage.arguments.iter().map(|argument| match argument {
        Argument::Text(value) | Argument::File(value) => value.clone(),
        Argument::Output(stage) => format!("<{stage}>"),
        Argument::Own => "<out>".into(),
    });
    std::iter::once(stage.kind.command().to_owned()).chain(words).collect::<Vec<_>>().join(" ")
}
