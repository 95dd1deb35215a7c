//! The same interface in plain C: `include/edgellm.h` declares and documents what is here.
//!
//! The only module of this crate with `unsafe` code: it reads pointers that C hands over. Every function turns them into
//! values, calls the engine, and returns a status; the sentence of an error is kept for its thread.
#![allow(unsafe_code)]

mod callbacks;
mod values;

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Arc;

use self::callbacks::{OnStep, OnToken, progress_listener, token_listener};
use self::values::{
    CAdaptOptions, CExample, CGenerateOptions, CLoadOptions, CMessage, adapt_options, c_string, engine, examples,
    generate_options, give, give_json, load_options, messages, text,
};
use crate::error::guard;
use crate::{AdaptOptions, Engine, EngineError, GenerateOptions, Result};

/// Runs a call and gives its `edgellm_status`.
fn status(call: impl FnOnce() -> Result<()>) -> c_int {
    match guard(call) {
        Ok(()) => 0,
        Err(EngineError::BadArgument(_)) => 1,
        Err(EngineError::Model(_)) => 2,
        Err(EngineError::Memory(_)) => 3,
        Err(EngineError::Busy(_)) => 4,
        Err(EngineError::Listener(_)) => 5,
        Err(EngineError::Internal(_)) => 6,
    }
}

/// See the header.
#[unsafe(no_mangle)]
extern "C" fn edgellm_version() -> *const c_char {
    const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
        Ok(version) => version,
        Err(_) => c"",
    };
    VERSION.as_ptr()
}

/// See the header.
#[unsafe(no_mangle)]
extern "C" fn edgellm_last_error() -> *const c_char {
    thread_local! {
        static SHOWN: RefCell<CString> = RefCell::default();
    }
    let Some(text) = crate::error::last() else { return std::ptr::null() };
    SHOWN.with(|shown| {
        shown.replace(c_string(text));
        shown.borrow().as_ptr()
    })
}

/// See the header.
///
/// # Safety
/// The text came from this library and was not freed.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_string_free(text: *mut c_char) {
    if !text.is_null() {
        // SAFETY: the caller's promise.
        drop(unsafe { CString::from_raw(text) });
    }
}

/// See the header.
#[unsafe(no_mangle)]
extern "C" fn edgellm_load_options_default() -> CLoadOptions {
    let none = std::ptr::null();
    CLoadOptions { memory_budget_bytes: 0, policy: none, threads: 0, kernels: none }
}

/// See the header.
#[unsafe(no_mangle)]
extern "C" fn edgellm_generate_options_default() -> CGenerateOptions {
    let GenerateOptions { max_tokens, temperature, top_k, top_p, seed, stop: _ } = GenerateOptions::default();
    CGenerateOptions { max_tokens, temperature, top_k, top_p, seed, stop: std::ptr::null(), n_stop: 0 }
}

/// See the header.
#[unsafe(no_mangle)]
extern "C" fn edgellm_adapt_options_default() -> CAdaptOptions {
    let AdaptOptions { steps, batch, rank, learning_rate, max_tokens, seed, .. } = AdaptOptions::default();
    CAdaptOptions { steps, batch, rank, window: 0, learning_rate, max_tokens, memory_budget_bytes: 0, seed }
}

/// See the header.
///
/// # Safety
/// The pointers are what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_load(
    path: *const c_char,
    options: *const CLoadOptions,
    handle: *mut *const Engine,
) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe {
        if handle.is_null() {
            return Err(EngineError::argument("engine", "where to write the handle", "a null pointer"));
        }
        let engine = Engine::load(text("path", path)?, load_options(options)?)?;
        *handle = Arc::into_raw(engine);
        Ok(())
    })
}

/// See the header.
///
/// # Safety
/// The handle is null or came from [`edgellm_load`], was not freed, and no call uses it.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_free(handle: *const Engine) {
    if !handle.is_null() {
        // SAFETY: the caller's promise.
        let engine = unsafe { Arc::from_raw(handle) };
        // A panic while dropping must not leave, either.
        status(|| {
            drop(engine);
            Ok(())
        });
    }
}

/// See the header.
///
/// # Safety
/// The pointers are what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_info(handle: *const Engine, json: *mut *mut c_char) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe { give_json(json, &engine(handle)?.info()) })
}

/// See the header.
///
/// # Safety
/// The pointers are what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_generate(
    handle: *const Engine,
    prompt: *const c_char,
    options: *const CGenerateOptions,
    on_token: OnToken,
    user: *mut c_void,
    json: *mut *mut c_char,
) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe {
        let (prompt, options) = (text("prompt", prompt)?, generate_options(options)?);
        give_json(json, &engine(handle)?.generate(prompt, options, token_listener(on_token, user))?)
    })
}

/// See the header.
///
/// # Safety
/// The pointers are what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_chat(
    handle: *const Engine,
    list: *const CMessage,
    n_messages: usize,
    options: *const CGenerateOptions,
    on_token: OnToken,
    user: *mut c_void,
    json: *mut *mut c_char,
) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe {
        let (list, options) = (messages(list, n_messages)?, generate_options(options)?);
        give_json(json, &engine(handle)?.chat(list, options, token_listener(on_token, user))?)
    })
}

/// See the header.
///
/// # Safety
/// The pointers are what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_adapt(
    handle: *const Engine,
    list: *const CExample,
    n_examples: usize,
    options: *const CAdaptOptions,
    on_step: OnStep,
    user: *mut c_void,
    json: *mut *mut c_char,
) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe {
        let (list, options) = (examples(list, n_examples)?, adapt_options(options));
        give_json(json, &engine(handle)?.adapt(list, options, progress_listener(on_step, user))?)
    })
}

/// See the header.
///
/// # Safety
/// The pointers are what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_save_adapter(handle: *const Engine, path: *const c_char) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe { engine(handle)?.save_adapter(text("path", path)?) })
}

/// See the header.
///
/// # Safety
/// The pointers are what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_load_adapter(handle: *const Engine, path: *const c_char) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe { engine(handle)?.load_adapter(text("path", path)?) })
}

/// See the header.
///
/// # Safety
/// The handle is what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_remove_adapter(handle: *const Engine) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe { engine(handle)?.remove_adapter() })
}

/// See the header.
///
/// # Safety
/// The handle is what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_cancel(handle: *const Engine) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe { engine(handle).map(Engine::cancel) })
}

/// See the header.
///
/// # Safety
/// The handle is what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_pause(handle: *const Engine) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe { engine(handle).map(Engine::pause) })
}

/// See the header.
///
/// # Safety
/// The handle is what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_resume(handle: *const Engine) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe { engine(handle).map(Engine::resume) })
}

/// See the header.
///
/// # Safety
/// The pointer is what the header says.
#[unsafe(no_mangle)]
unsafe extern "C" fn edgellm_profile(json: *mut *mut c_char) -> c_int {
    // SAFETY: the caller's promise.
    status(|| unsafe {
        give(json, crate::profile()?);
        Ok(())
    })
}
