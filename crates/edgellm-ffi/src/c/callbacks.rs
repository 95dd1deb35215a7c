//! Functions of C as listeners.

use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

use super::values::c_string;
use crate::{ListenerError, ProgressListener, Result, Step, TokenListener};

/// `edgellm_on_token`.
pub(super) type OnToken = Option<unsafe extern "C" fn(*const c_char, *mut c_void) -> bool>;
/// `edgellm_on_step`.
pub(super) type OnStep = Option<unsafe extern "C" fn(u32, u32, f64, u64, *mut c_void) -> c_int>;

/// A function of C with what it wants to be given back.
struct Callback<F> {
    call: F,
    user: *mut c_void,
}

// SAFETY: the engine calls a listener only on the thread that handed it over, before that call returns.
unsafe impl<F> Send for Callback<F> {}
// SAFETY: as above.
unsafe impl<F> Sync for Callback<F> {}

impl TokenListener for Callback<unsafe extern "C" fn(*const c_char, *mut c_void) -> bool> {
    fn on_token(&self, text: String) -> Result<bool, ListenerError> {
        let text = c_string(text);
        // SAFETY: the header asks for a function that can be called with a text and this pointer.
        Ok(unsafe { (self.call)(text.as_ptr(), self.user) })
    }
}

impl ProgressListener for Callback<unsafe extern "C" fn(u32, u32, f64, u64, *mut c_void) -> c_int> {
    fn on_step(&self, step: u32, total: u32, loss: f64, bytes: u64) -> Result<Step, ListenerError> {
        // SAFETY: the header asks for a function that can be called with these values and this pointer.
        match unsafe { (self.call)(step, total, loss, bytes, self.user) } {
            0 => Ok(Step::Continue),
            1 => Ok(Step::Pause),
            2 => Ok(Step::Stop),
            other => Err(ListenerError::Failed { reason: format!("expected 0, 1 or 2, found {other}") }),
        }
    }
}

pub(super) fn token_listener(call: OnToken, user: *mut c_void) -> Option<Arc<dyn TokenListener>> {
    call.map(|call| Arc::new(Callback { call, user }) as Arc<dyn TokenListener>)
}

pub(super) fn progress_listener(call: OnStep, user: *mut c_void) -> Option<Arc<dyn ProgressListener>> {
    call.map(|call| Arc::new(Callback { call, user }) as Arc<dyn ProgressListener>)
}
