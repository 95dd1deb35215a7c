//! The same interface in plain C: `include/edgellm.h` declares and documents what is here.
//!
//! The only file of this crate with `unsafe` code: it reads pointers that C hands over. Every function turns them into
//! values, calls the engine, and returns a status; the sentence of an error is kept for its thread.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Arc;

use serde::Serialize;

use crate::error::guard;
use crate::{
    AdaptOptions, Engine, EngineError, Example, GenerateOptions, ListenerError, LoadOptions, Message, ProgressListener,
    Result, Step, TokenListener,
};

/// `edgellm_load_options`.
#[repr(C)]
struct CLoadOptions {
    memory_budget_bytes: u64,
    policy: *const c_char,
    threads: u32,
    kernels: *const c_char,
}

/// `edgellm_generate_options`.
#[repr(C)]
struct CGenerateOptions {
    max_tokens: u32,
    temperature: f64,
    top_k: u32,
    top_p: f64,
    seed: u64,
    stop: *const *const c_char,
    n_stop: usize,
}

/// `edgellm_adapt_options`.
#[repr(C)]
struct CAdaptOptions {
    steps: u32,
    batch: u32,
    rank: u32,
    window: u32,
    learning_rate: f64,
    max_tokens: u32,
    memory_budget_bytes: u64,
    seed: u64,
}

/// `edgellm_message`.
#[repr(C)]
struct CMessage {
    role: *const c_char,
    content: *const c_char,
}

/// `edgellm_example`.
#[repr(C)]
struct CExample {
    prompt: *const c_char,
    response: *const c_char,
    messages: *const CMessage,
    n_messages: usize,
}

/// `edgellm_on_token`.
type OnToken = Option<unsafe extern "C" fn(*const c_char, *mut c_void) -> bool>;
/// `edgellm_on_step`.
type OnStep = Option<unsafe extern "C" fn(u32, u32, f64, u64, *mut c_void) -> c_int>;

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

/// A text for C; what comes after a zero byte would be lost, so zero bytes are left out.
fn c_string(mut text: String) -> CString {
    text.retain(|c| c != '\0');
    CString::new(text).unwrap_or_default()
}

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

/// The value behind a pointer, if it is not null.
///
/// # Safety
/// The pointer is null or points to a `T` that lives and does not change as long as the result.
unsafe fn value<'a, T>(pointer: *const T) -> Option<&'a T> {
    // SAFETY: the caller's promise.
    unsafe { pointer.as_ref() }
}

/// The values of a C array; null is an empty one.
///
/// # Safety
/// The pointer is null or points to so many values of `T` that live and do not change as long as the result.
unsafe fn array<'a, T>(pointer: *const T, len: usize) -> &'a [T] {
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
unsafe fn optional_text(what: &str, pointer: *const c_char) -> Result<Option<String>> {
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
unsafe fn text(what: &str, pointer: *const c_char) -> Result<String> {
    // SAFETY: the caller's promise.
    unsafe { optional_text(what, pointer) }?.ok_or_else(|| EngineError::argument(what, "a text", "a null pointer"))
}

/// The engine behind a handle.
///
/// # Safety
/// The pointer is null or came from [`edgellm_load`] and was not freed.
unsafe fn engine<'a>(handle: *const Engine) -> Result<&'a Engine> {
    // SAFETY: the caller's promise.
    unsafe { value(handle) }.ok_or_else(|| EngineError::argument("engine", "one that was loaded", "a null pointer"))
}

/// Hands a text over to C, if it is wanted.
///
/// # Safety
/// The pointer is null or points to where a pointer can be written.
unsafe fn give(place: *mut *mut c_char, text: String) {
    if !place.is_null() {
        // SAFETY: the caller's promise.
        unsafe { *place = c_string(text).into_raw() };
    }
}

/// As [`give`], a value as JSON.
///
/// # Safety
/// As for [`give`].
unsafe fn give_json(place: *mut *mut c_char, value: &impl Serialize) -> Result<()> {
    let json = serde_json::to_string(value).map_err(|error| EngineError::Internal(error.to_string()))?;
    // SAFETY: the caller's promise.
    unsafe { give(place, json) };
    Ok(())
}

/// A number where 0 means the default.
fn unless_zero<T: Default + PartialEq>(value: T) -> Option<T> {
    (value != T::default()).then_some(value)
}

/// # Safety
/// As the header says of `edgellm_generate_options`.
unsafe fn generate_options(options: *const CGenerateOptions) -> Result<GenerateOptions> {
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
unsafe fn load_options(options: *const CLoadOptions) -> Result<LoadOptions> {
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
unsafe fn adapt_options(options: *const CAdaptOptions) -> AdaptOptions {
    // SAFETY: the caller's promise.
    let Some(options) = (unsafe { value(options) }) else { return AdaptOptions::default() };
    let &CAdaptOptions { steps, batch, rank, learning_rate, max_tokens, seed, .. } = options;
    let (window, memory_budget_bytes) = (unless_zero(options.window), unless_zero(options.memory_budget_bytes));
    AdaptOptions { steps, batch, rank, window, learning_rate, max_tokens, memory_budget_bytes, seed }
}

/// # Safety
/// The pointer is null or points to so many messages, as the header says of them.
unsafe fn messages(messages: *const CMessage, len: usize) -> Result<Vec<Message>> {
    // SAFETY: the caller's promise.
    unsafe {
        let one = |m: &CMessage| Ok(Message { role: text("role", m.role)?, content: text("content", m.content)? });
        array(messages, len).iter().map(one).collect()
    }
}

/// # Safety
/// The pointer is null or points to so many examples, as the header says of them.
unsafe fn examples(examples: *const CExample, len: usize) -> Result<Vec<Example>> {
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

fn token_listener(call: OnToken, user: *mut c_void) -> Option<Arc<dyn TokenListener>> {
    call.map(|call| Arc::new(Callback { call, user }) as Arc<dyn TokenListener>)
}

fn progress_listener(call: OnStep, user: *mut c_void) -> Option<Arc<dyn ProgressListener>> {
    call.map(|call| Arc::new(Callback { call, user }) as Arc<dyn ProgressListener>)
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
