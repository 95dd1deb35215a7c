//! An example: tokens, and which of them the loss looks at.

/// Tokens of an example, and which of them the loss looks at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    targets: Vec<bool>,
}

impl Example {
    /// A prompt and the response that is to be learned.
    pub fn new(prompt: &[u32], response: &[u32]) -> Self {
        let mut example = Self { ids: Vec::new(), targets: Vec::new() };
        example.push(prompt, false);
        example.push(response, true);
        example
    }

    pub(super) fn push(&mut self, ids: &[u32], target: bool) {
        self.ids.extend_from_slice(ids);
        self.targets.resize(self.ids.len(), target);
    }

    /// Leaves the first `max_len` tokens; says whether there were more.
    pub(super) fn cut(&mut self, max_len: usize) -> bool {
        let longer = self.ids.len() > max_len;
        self.ids.truncate(max_len);
        self.targets.truncate(max_len);
        longer
    }

    /// Whether the last token is one of these, and to be learned.
    pub(super) fn ends_with(&self, tokens: &[u32]) -> bool {
        self.targets.last() == Some(&true) && self.ids.last().is_some_and(|id| tokens.contains(id))
    }

    /// Whether the loss looks at the prediction of the token at `position`. The first token is never predicted.
    pub fn is_target(&self, position: usize) -> bool {
        position > 0 && self.targets.get(position).copied().unwrap_or(false)
    }

    /// Number of tokens that the loss looks at.
    pub fn n_targets(&self) -> usize {
        (0..self.ids.len()).filter(|&position| self.is_target(position)).count()
    }
}
