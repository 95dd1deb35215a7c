//! How far a long operation is.

/// A step that was just finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress<'a> {
    /// Steps that are done.
    pub done: usize,
    /// Steps in all.
    pub total: usize,
    /// What was worked on: a unit or a tensor.
    pub what: &'a str,
}
