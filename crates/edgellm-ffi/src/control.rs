//! What other threads may ask of the call that an engine runs: to end it, to wait, to go on.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};

use crate::{EngineError, Result};

/// A mutex's value, whoever panicked while holding it: values behind these locks are whole at every moment.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, Default)]
struct Wishes {
    /// What runs, as a verb; `None` for nothing.
    running: Option<&'static str>,
    cancel: bool,
    pause: bool,
}

/// The wishes for the call that runs now. They do not outlive it.
#[derive(Debug, Default)]
pub(crate) struct Control {
    wishes: Mutex<Wishes>,
    changed: Condvar,
}

/// A running call: forgets all wishes when it ends.
pub(crate) struct Running<'a>(&'a Control);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *lock(&self.0.wishes) = Wishes::default();
    }
}

impl Control {
    /// Takes what calls work on, for a call that does `what`.
    ///
    /// # Errors
    /// Another call has it.
    pub(crate) fn begin<'a, T>(
        &'a self,
        work: &'a Mutex<T>,
        what: &'static str,
    ) -> Result<(Running<'a>, MutexGuard<'a, T>)> {
        let work = match work.try_lock() {
            Ok(work) => work,
            // What a panic left is whole: see `Work`.
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                let doing = lock(&self.wishes).running.unwrap_or("working");
                return Err(EngineError::Busy(format!(
                    "the engine is busy {doing}; expected one call at a time: wait for it or cancel it"
                )));
            }
        };
        *lock(&self.wishes) = Wishes { running: Some(what), ..Wishes::default() };
        Ok((Running(self), work))
    }

    /// Asks the running call to end; without one, nothing happens.
    pub(crate) fn cancel(&self) {
        self.wish(|wishes| wishes.cancel = true);
    }

    /// Asks the running call to wait, or to go on; without one, nothing happens.
    pub(crate) fn pause(&self, pause: bool) {
        self.wish(|wishes| wishes.pause = pause);
    }

    fn wish(&self, change: impl FnOnce(&mut Wishes)) {
        let mut wishes = lock(&self.wishes);
        if wishes.running.is_some() {
            change(&mut wishes);
            self.changed.notify_all();
        }
    }

    /// Whether the running call shall end.
    pub(crate) fn is_cancelled(&self) -> bool {
        lock(&self.wishes).cancel
    }

    /// Waits as long as the running call shall wait; returns whether it may go on.
    pub(crate) fn wait(&self) -> bool {
        let wishes = lock(&self.wishes);
        let waits = |wishes: &mut Wishes| wishes.pause && !wishes.cancel;
        let wishes = self.changed.wait_while(wishes, waits).unwrap_or_else(PoisonError::into_inner);
        !wishes.cancel
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes_reach_the_running_call_only() {
        let (control, work) = (Control::default(), Mutex::new(()));
        control.cancel();
        control.pause(true);
        let (running, held) = control.begin(&work, "counting").unwrap();
        assert!(!control.is_cancelled() && control.wait());
        let error = control.begin(&work, "reading").err().unwrap();
        assert!(error.to_string().contains("busy counting"), "{error}");
        control.cancel();
        assert!(control.is_cancelled() && !control.wait());
        drop((running, held));
        assert!(!control.is_cancelled());
    }

    #[test]
    fn a_pause_ends_by_going_on_or_by_cancelling() {
        for cancel in [false, true] {
            let (control, work) = (Control::default(), Mutex::new(()));
            let _held = control.begin(&work, "counting").unwrap();
            control.pause(true);
            std::thread::scope(|scope| {
                let waits = scope.spawn(|| control.wait());
                std::thread::sleep(std::time::Duration::from_millis(20));
                assert!(!waits.is_finished());
                if cancel {
                    control.cancel()
                } else {
                    control.pause(false)
                }
                assert_eq!(waits.join().unwrap(), !cancel);
            });
        }
    }
}
