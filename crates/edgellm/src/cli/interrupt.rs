//! Ctrl-C: the first sets a flag that long work looks at between steps, the second ends the program at once.

use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};

use super::failure::Interrupted;

static REQUESTED: AtomicBool = AtomicBool::new(false);
static WAITING: AtomicBool = AtomicBool::new(false);

/// Exit code of a program that was stopped by SIGINT (128 + 2).
pub(crate) const STOPPED: u8 = 130;

/// Installs the handler for SIGINT, SIGTERM and SIGHUP.
pub(crate) fn install() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if REQUESTED.swap(true, Ordering::SeqCst) || WAITING.load(Ordering::SeqCst) {
            std::process::exit(i32::from(STOPPED));
        }
        // Standard error may be gone; there is nobody to tell then.
        let _ = writeln!(std::io::stderr(), "stopping at the next step; once more to stop at once");
    })?;
    Ok(())
}

/// Whether a signal asked to stop.
pub(crate) fn requested() -> bool {
    REQUESTED.load(Ordering::SeqCst)
}

/// Forgets the request: what it was about has stopped. Returns whether there was one.
pub(crate) fn take() -> bool {
    REQUESTED.swap(false, Ordering::SeqCst)
}

/// Runs `wait`, which only waits for a person: a signal ends the program at once meanwhile.
pub(crate) fn while_waiting<T>(wait: impl FnOnce() -> T) -> T {
    WAITING.store(true, Ordering::SeqCst);
    let result = wait();
    WAITING.store(false, Ordering::SeqCst);
    result
}

/// What unwinds out of work that cannot be stopped otherwise.
struct Stop;

/// Ends the surrounding [`stoppable`] work if a signal asked to stop. For progress callbacks of libraries that offer no
/// other way: unwinding from between two steps runs all destructors, so that temporary files go.
pub(crate) fn checkpoint() {
    if requested() {
        // Not `panic!`: no message, no hook.
        std::panic::resume_unwind(Box::new(Stop));
    }
}

/// Runs work whose progress callback calls [`checkpoint`].
pub(crate) fn stoppable<T>(work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
    // What the work leaves behind when it is cut off is dropped with it.
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)) {
        Ok(result) => result,
        Err(payload) if payload.is::<Stop>() => Err(Interrupted::nothing_written()),
        Err(payload) => std::panic::resume_unwind(payload),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stoppable_work_ends_at_a_checkpoint_and_other_panics_pass() {
        assert_eq!(
            stoppable(|| {
                checkpoint();
                Ok(1)
            })
            .unwrap(),
            1
        );
        let stopped = stoppable(|| -> anyhow::Result<()> { std::panic::resume_unwind(Box::new(Stop)) });
        assert!(stopped.unwrap_err().is::<Interrupted>());
        let other = || stoppable(|| -> anyhow::Result<()> { std::panic::resume_unwind(Box::new("x")) });
        assert!(std::panic::catch_unwind(other).is_err());
    }
}
