//! What C hands over, as values: structures, texts and arrays behind pointers.

use std::ffi::{CStr, CString, c_char};

use serde::Serialize;

use crate::{AdaptOptions, Engine, EngineError, Example, GenerateOptions, LoadOptions, Message, Result};

/// `edgellm_load_options`.
#[repr(C)]
pub(super) struct CLoadOptions {
    pub(super) memory_budget_bytes: u64,
    pub(super) policy: *const c_char,
    pub(super) threads: u32,
    pub(super) kernels: *const c_char,
}

/// `edgellm_generate_options`.
#[repr(C)]
pub(super) struct CGenerateOptions {
    pub(super) max_tokens: u32,
    pub(super) temperature: f64,
    pub(super) top_k: u32,
    pub(super) top_p: f64,
    pub(super) seed: u64,
    pub(super) stop: *const *const c_char,
    pub(super) n_stop: usize,
}

/// `edgellm_adapt_options`.
#[repr(C)]
pub(super) struct CAdaptOptions {
    pub(super) steps: u32,
    pub(super) batch: u32,
    pub(super) rank: u32,
    pub(super) window: u32,
    pub(super) learning_rate: f64,
    pub(super) max_tokens: u32,
    pub(super) memory_budget_bytes: u64,
    pub(super) seed: u64,
}

/// `edgellm_message`.
#[repr(C)]
pub(super) struct CMessage {
    pub(super) role: *const c_char,
    pub(super) content: *const c_char,
}

/// `edgellm_example`.
#[repr(C)]
pub(super) struct CExample {
    pub(super) prompt: *const c_char,
    pub(super) response: *const c_char,
    pub(super) messages: *const CMessage,
    pub(super) n_messages: usize,
}

/// A text for C; what comes after a zero byte would be lost, so zero bytes are left out.
pub(super) fn c_string(mut text: String) -> CString {
    text.retain(|c| c != '\0');
    CString::new(text).unwrap_or_default()
}

/// The value behind a pointer, if it is not null.
///
/// # Safety
/// The pointer is null or points to a `T` that lives and does not change as long as the result.
pub(super) unsafe fn value<'a, T>(pointer: *const T) -> Option<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }
}

/// The values of a C array; null is an empty one.
///
/// # Safety
/// The pointer is null or points to so many values of `T` that live and do not change as long as the result.
pub(super) unsafe fn array<'a, T>(pointer: *const T, len: usize) -> &'a [T] {
    if pointer.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(pointer, len) }
}

/// A text of C; `None` for null.
///
/// # Safety
/// The pointer is null or points to a text that ends with a zero byte.
pub(super) unsafe fn optional_text(what: &str, pointer: *const c_char) -> Result<Option<String>> {
    if pointer.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller's promise.
    let text = unsafe { CStr::from_ptr(pointer) }.to_str();
    text.map(|text| Some(text.to_owned())).map_err(|error| EngineError::argument(what, "UTF-8", error))
}

/// A text of C that must be there.
///
/// # Safety
/// As for [`optional_text`].
pub(super) unsafe fn text(what: &str, pointer: *const c_char) -> Result<String> {
    // SAFETY: the caller's promise.
    unsafe { optional_text(what, pointer) }?.ok_or_else(|| EngineError::argument(what, "a text", "a null pointer"))
}

/// The engine behind a handle.
///
/// # Safety
/// The pointer is null or came from [`edgellm_load`] and was not freed.
pub(super) unsafe fn engine<'a>(handle: *const Engine) -> Result<&'a Engine> {
    // SAFETY: the caller's promise.
    unsafe { value(handle) }.ok_or_else(|| EngineError::argument("engine", "one that was loaded", "a null pointer"))
}

/// Hands a text over to C, if it is wanted.
///
/// # Safety
/// The pointer is null or points to where a pointer can be written.
pub(super) unsafe fn give(place: *mut *mut c_char, text: String) {
    if !place.is_null() {
        // SAFETY: the caller's promise.
        unsafe { *place = c_string(text).into_raw() };
    }
}

/// As [`give`], a value as JSON.
///
/// # Safety
/// As for [`give`].
pub(super) unsafe fn give_json(place: *mut *mut c_char, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string(value).map_err(|error| EngineError::Internal(error.to_string()))?;
    // SAFETY: the caller's promise.
    unsafe { give(place, json) };
    Ok(())
}

/// A number where 0 means the default.
pub(super) fn unless_zero<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

/// # Safety
/// As the header says of `edgellm_generate_options`.
pub(super) unsafe fn generate_options(options: *const CGenerateOptions) -> Result<GenerateOptions> {
    // SAFETY: the caller's promise.
    unsafe {
        let Some(options) = value(options) else { return Ok(GenerateOptions::default()) };
        let &CGenerateOptions { max_tokens, temperature, top_k, top_p, seed, .. } = options;
        let stop = array(options.stop, options.n_stop).iter().map(|&stop| text("stop", stop)).collect::<Result<_>>()?;
        Ok(GenerateOptions { max_tokens, temperature, top_k, top_p, seed, stop })
    }
}

/// # Safety
/// As the header says of `edgellm_load_options`, or null.
pub(super) unsafe fn load_options(options: *const CLoadOptions) -> Result<LoadOptions> {
    // SAFETY: the caller's promise.
    unsafe {
        let Some(options) = value(options) else { return Ok(LoadOptions::default()) };
        Ok(LoadOptions {
            memory_budget_bytes: unless_zero(options.memory_budget_bytes),
            policy: optional_text("policy", options.policy)?,
            threads: unless_zero(options.threads),
            kernels: optional_text("kernels", options.kernels)?,
        })
    }
}

/// # Safety
/// The pointer is null, or what the header says of `edgellm_adapt_options`.
pub(super) unsafe fn adapt_options(options: *const CAdaptOptions) -> AdaptOptions {
    // SAFETY: the caller's promise.
    let Some(options) = (unsafe { value(options) }) else { return AdaptOptions::default() };
    let &CAdaptOptions { steps, batch, rank, learning_rate, max_tokens, seed, .. } = options;
    let (window, memory_budget_bytes) = (unless_zero(options.window), unless_zero(options.memory_budget_bytes));
    AdaptOptions { steps, batch, rank, window, learning_rate, max_tokens, memory_budget_bytes, seed }
}

/// # Safety
/// The pointer is null or points to so many messages, as the header says of them.
pub(super) unsafe fn messages(messages: *const CMessage, len: usize) -> Result<Vec<Message>> {
    // SAFETY: the caller's promise.
    unsafe {
        let one = |m: &CMessage| Ok(Message { role: text("role", m.role)?, content: text("content", m.content)? });
        array(messages, len).iter().map(one).collect()
    }
}

/// # Safety
/// The pointer is null or points to so many examples, as the header says of them.
pub(super) unsafe fn examples(examples: *const CExample, len: usize) -> Result<Vec<Example>> {
    // SAFETY: the caller's promise.
    unsafe {
        let one = |example: &CExample| {
            if example.n_messages > 0 {
                return Ok(Example::Chat { messages: messages(example.messages, example.n_messages)? });
            }
            let response = text("response", example.response)?;
            Ok(match optional_text("prompt", example.prompt)? {
                Some(prompt) => Example::Pair { prompt, response },
                None => Example::Text { text: response },
            })
        };
        array(examples, len).iter().map(one).collect()
    }
}
