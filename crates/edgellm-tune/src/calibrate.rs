//! A start for the norms of early exits: a diagonal lens from an early hidden state to the last one.
//!
//! The head reads the last hidden state. Through the final norm, an early state gives confident nonsense: its dimensions
//! have other scales, and some mean something else. With `u_e(t) = h_e(t) / rms(h_e(t))` and `u_L(t)` likewise, the
//! least-squares factor of dimension `i` is `c_i = sum_t u_e u_L / sum_t u_e^2`, and the exit's norm starts as `c_i` times
//! the final norm: the diagonal case of the tuned lens (Belrose et al., 2023, section 3), in closed form from one forward
//! pass. Dimensions that say nothing of the last state get a factor near zero.

use burn::tensor::{Int, Tensor};
use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;

use crate::TuneError;
use crate::batch::Batch;

/// Sums over tokens of one exit: `u_e u_L` and `u_e^2`, both `[d]`.
struct Sums {
    cross: Tensor<1>,
    square: Tensor<1>,
}

/// Sets the norm of every exit but the last from how its hidden states relate to the last ones on these examples.
///
/// # Errors
/// No example has a response token, or weights cannot be read.
pub fn calibrate_exit_norms(
    decoder: &Decoder,
    adapter: &mut Adapter,
    exits: &[usize],
    examples: &[Example],
    batch_size: usize,
) -> Result<(), TuneError> {
    let last = decoder.n_blocks();
    let early: Vec<usize> = exits.iter().copied().filter(|exit| *exit < last).collect();
    let mut sums: Vec<Option<Sums>> = early.iter().map(|_| None).collect();
    for chunk in examples.chunks(batch_size.max(1)) {
        let batch = Batch::new(chunk, 0);
        if batch.targets.is_empty() {
            continue;
        }
        let (states, end) = unit_states(decoder, adapter, &batch, &early)?;
        for (state, sum) in states.into_iter().zip(&mut sums) {
            let cross = total(state.clone().mul(end.clone()));
            let square = total(state.powi_scalar(2));
            *sum = Some(match sum.take() {
                Some(old) => Sums { cross: old.cross.add(cross), square: old.square.add(square) },
                None => Sums { cross, square },
            });
        }
    }
    for (exit, sum) in early.iter().zip(sums) {
        let Some(Sums { cross, square }) = sum else { return Err(TuneError::EmptyBatch { step: 0 }) };
        let factor = cross.div(square.add_scalar(1e-6));
        adapter.set_exit_norm(*exit, decoder.final_norm().clone().mul(factor));
    }
    Ok(())
}

/// The hidden states of the batch's response positions at each early exit and at the end, each divided by its rms.
fn unit_states(
    decoder: &Decoder,
    adapter: &Adapter,
    batch: &Batch,
    early: &[usize],
) -> Result<(Vec<Tensor<2>>, Tensor<2>), TuneError> {
    let rows: Vec<&[u32]> = batch.rows.iter().map(Vec::as_slice).collect();
    let positions = Tensor::<1, Int>::from_data(batch.positions.as_slice(), decoder.device());
    let mut hidden = decoder.embed(&rows)?;
    let [batch_size, tokens, d] = hidden.dims();
    let unit = |hidden: &Tensor<3>| {
        let picked = hidden.clone().reshape([batch_size * tokens, d]).select(0, positions.clone());
        let rms = picked.clone().powi_scalar(2).mean_dim(1).add_scalar(decoder.config().rms_norm_eps).sqrt();
        picked.div(rms)
    };
    let mut states = Vec::with_capacity(early.len());
    let mut start = 0;
    for &exit in early {
        hidden = decoder.run_blocks(hidden, start..exit, Some(adapter), None)?;
        states.push(unit(&hidden));
        start = exit;
    }
    let end = decoder.run_blocks(hidden, start..decoder.n_blocks(), Some(adapter), None)?;
    Ok((states, unit(&end)))
}

/// Sums over tokens: `[tokens, d]` to `[d]`.
fn total(values: Tensor<2>) -> Tensor<1> {
    let d = values.dims()[1];
    values.sum_dim(0).reshape([d])
}
