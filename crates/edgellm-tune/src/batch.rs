//! Batches: examples padded on the right to a common length, and which positions the loss looks at.
//!
//! Attention is causal, so that padding on the right changes nothing to its left, and padded positions have no loss.

use edgellm_model::data::Example;

/// A batch ready for the decoder.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Batch {
    /// Token ids, rows of equal length.
    pub(crate) rows: Vec<Vec<u32>>,
    /// Positions in the flattened `[batch * tokens]` hidden states whose next token is a response token.
    pub(crate) positions: Vec<i32>,
    /// The next token at each of these positions.
    pub(crate) targets: Vec<i32>,
}

impl Batch {
    /// Pads the examples; the last token of an example is only a target, so that it is not fed in.
    pub(crate) fn new(examples: &[Example], pad: u32) -> Self {
        let tokens = examples.iter().map(|e| e.ids.len().saturating_sub(1)).max().unwrap_or(0).max(1);
        let mut batch = Self { rows: Vec::with_capacity(examples.len()), positions: Vec::new(), targets: Vec::new() };
        for (row, example) in examples.iter().enumerate() {
            let fed = example.ids.len().saturating_sub(1);
            let mut ids = example.ids[..fed].to_vec();
            ids.resize(tokens, pad);
            batch.rows.push(ids);
            for position in 0..fed {
                if example.is_target(position + 1) {
                    batch.positions.push((row * tokens + position) as i32);
                    batch.targets.push(example.ids[position + 1] as i32);
                }
            }
        }
        batch
    }
}
