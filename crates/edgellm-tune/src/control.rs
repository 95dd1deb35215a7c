//! Whether a run may go on: between two steps, a [`Control`] says to continue, to pause for a while, or to stop.
//!
//! Nothing here reads a clock or sleeps by itself: the caller gives both, so that a test needs neither.

mod sensors;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

pub use sensors::{PowerAndHeat, PowerLimits};

/// The least time between two looks at files and sensors.
pub const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// What a run shall do before its next step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Go on.
    Continue,
    /// Wait, and ask again.
    Pause {
        /// Why, as a part of a sentence: `the file PAUSE exists`.
        reason: String,
    },
    /// End the run as if its steps were done.
    Stop,
}

/// Decides before each step whether a run may go on.
pub trait Control {
    /// What to do before step `step`.
    fn poll(&mut self, step: u64) -> Command;
}

impl<F: FnMut(u64) -> Command> Control for F {
    fn poll(&mut self, step: u64) -> Command {
        self(step)
    }
}

/// Pauses while a file exists, whatever is in it.
#[derive(Clone, Debug)]
pub struct PauseFile {
    path: PathBuf,
}

impl PauseFile {
    /// Pauses while there is something at `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }
}

impl Control for PauseFile {
    fn poll(&mut self, _step: u64) -> Command {
        let path = self.path.display();
        match self.path.try_exists() {
            Ok(false) => Command::Continue,
            Ok(true) => Command::Pause { reason: format!("the file {path} exists") },
            Err(error) => Command::Pause { reason: format!("whether the file {path} exists cannot be seen: {error}") },
        }
    }
}

/// Several controls as one: a stop of any of them stops; otherwise all reasons to pause are given together.
#[derive(Default)]
pub struct All(pub Vec<Box<dyn Control>>);

impl Control for All {
    fn poll(&mut self, step: u64) -> Command {
        let commands: Vec<Command> = self.0.iter_mut().map(|control| control.poll(step)).collect();
        if commands.contains(&Command::Stop) {
            return Command::Stop;
        }
        let reasons: Vec<String> = commands
            .into_iter()
            .filter_map(|command| if let Command::Pause { reason } = command { Some(reason) } else { None })
            .collect();
        if reasons.is_empty() { Command::Continue } else { Command::Pause { reason: reasons.join("; ") } }
    }
}

/// Asks a control at most once every [`POLL_INTERVAL`], and repeats its last answer in between.
pub struct Throttled<C, N> {
    control: C,
    now: N,
    last: Option<(Duration, Command)>,
}

impl<C: Control, N: FnMut() -> Duration> Throttled<C, N> {
    /// `now` tells the time since any fixed moment; it must not go back.
    pub fn new(control: C, now: N) -> Self {
        Self { control, now, last: None }
    }
}

impl<C: Control, N: FnMut() -> Duration> Control for Throttled<C, N> {
    fn poll(&mut self, step: u64) -> Command {
        let now = (self.now)();
        match &self.last {
            Some((when, command)) if now.saturating_sub(*when) < POLL_INTERVAL => command.clone(),
            _ => {
                let command = self.control.poll(step);
                self.last = Some((now, command.clone()));
                command
            }
        }
    }
}

/// What happens to a run that pauses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PauseEvent {
    /// It waits now, or waits now for another reason.
    Paused {
        /// Why.
        reason: String,
    },
    /// It goes on.
    Resumed {
        /// How long it waited.
        waited: Duration,
    },
}

/// How a pause, or the lack of one, ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next step may run.
    Run,
    /// The run ends.
    Stop,
}

/// Asks `control` before step `step` and waits as long as it says to pause: `sleep` waits for the time it is given (in
/// the trainer, [`std::thread::sleep`]), and `tell` hears when a pause begins, gets another reason, or ends.
pub fn run_paused(
    control: &mut dyn Control,
    step: u64,
    mut sleep: impl FnMut(Duration),
    mut tell: impl FnMut(&PauseEvent),
) -> Flow {
    let mut pause: Option<(String, Duration)> = None;
    loop {
        match control.poll(step) {
            Command::Stop => return Flow::Stop,
            Command::Continue => {
                if let Some((_, waited)) = pause {
                    tell(&PauseEvent::Resumed { waited });
                }
                return Flow::Run;
            }
            Command::Pause { reason } => {
                let (told, waited) = pause.take().map_or((None, Duration::ZERO), |(told, waited)| (Some(told), waited));
                if told.as_ref() != Some(&reason) {
                    tell(&PauseEvent::Paused { reason: reason.clone() });
                }
                sleep(POLL_INTERVAL);
                pause = Some((reason, waited + POLL_INTERVAL));
            }
        }
    }
}
