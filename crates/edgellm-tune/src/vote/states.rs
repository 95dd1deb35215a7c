//! The exits' normed states at the response tokens of examples, kept in memory while a vote is fitted.

use burn::tensor::{Int, Tensor, TensorData};
use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;

use crate::TuneError;

/// `tokens x d` values of each exit, and the tokens that followed.
pub(super) struct States {
    exits: Vec<Vec<f32>>,
    pub(super) targets: Vec<u32>,
    d: usize,
}

impl States {
    /// Runs examples in their order until `max_tokens` response tokens are there.
    ///
    /// Memory: `tokens * exits * d` values of 4 bytes.
    pub(super) fn collect(
        decoder: &Decoder,
        adapter: Option<&Adapter>,
        exits: &[usize],
        examples: &[Example],
        max_tokens: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Self, TuneError> {
        let d = decoder.config().hidden_size;
        let mut states = Self { exits: vec![Vec::new(); exits.len()], targets: Vec::new(), d };
        for example in examples {
            let room = max_tokens - states.targets.len();
            if room == 0 {
                break;
            }
            let targets = (1..example.ids.len()).filter(|&position| example.is_target(position));
            let positions: Vec<usize> = targets.take(room).collect();
            let Some(&last) = positions.last() else { continue };
            let rows: Vec<i32> = positions.iter().map(|&position| position as i32 - 1).collect();
            let rows = Tensor::<1, Int>::from_data(rows.as_slice(), decoder.device());
            let mut hidden = decoder.embed(&[&example.ids[..last]])?;
            let mut start = 0;
            for (&exit, values) in exits.iter().zip(&mut states.exits) {
                hidden = decoder.run_blocks(hidden, start..exit, adapter, None)?;
                start = exit;
                let flat: Tensor<2> = hidden.clone().reshape([last, d]).select(0, rows.clone());
                values.extend(to_vec(decoder.exit_norm(flat, exit, adapter))?);
            }
            states.targets.extend(positions.iter().map(|&position| example.ids[position]));
            progress(states.targets.len());
        }
        Ok(states)
    }

    pub(super) fn len(&self) -> usize {
        self.targets.len()
    }

    /// The logits of exit `index` for tokens `from..to`, `(to - from) x vocab`.
    pub(super) fn logits(
        &self,
        decoder: &Decoder,
        index: usize,
        from: usize,
        to: usize,
    ) -> Result<Vec<f32>, TuneError> {
        let values = self.exits[index][from * self.d..to * self.d].to_vec();
        let states = Tensor::from_data(TensorData::new(values, [to - from, self.d]), decoder.device());
        Ok(to_vec(decoder.logits(states))?)
    }
}
