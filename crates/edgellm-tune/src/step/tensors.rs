//! The step on tensors: Burn's autodiff, on any device.

use std::time::Instant;

use burn::tensor::{Int, Tensor};
use edgellm_model::adapter::Adapter;
use edgellm_model::data::Example;
use edgellm_model::decoder::Decoder;
use edgellm_model::generate::to_vec;
use edgellm_model::values::Projection;

use super::{Engine, Gradients, Place, StageSeconds};
use crate::TuneError;
use crate::batch::Batch;

/// The step of devices other than the CPU, and of weights that are not packed.
#[derive(Debug, Default)]
pub(crate) struct Tensors {
    seconds: StageSeconds,
}

impl Engine for Tensors {
    fn accumulate(
        &mut self,
        decoder: &Decoder,
        adapter: &Adapter,
        examples: &[Example],
        place: &Place,
        weight: f32,
        gradients: &mut Gradients,
    ) -> Result<f64, TuneError> {
        let start = Instant::now();
        let span = tracing::debug_span!("forward").entered();
        let batch = Batch::new(examples, 0);
        let tracked = tracked(adapter, place);
        let loss = loss(decoder, &batch, adapter, &tracked, place, weight)?;
        let value = f64::from(to_vec(loss.clone().inner())?[0]);
        let forward = Instant::now();
        self.seconds.window += (forward - start).as_secs_f64();
        if !value.is_finite() {
            return Ok(value);
        }
        drop(span);
        let _span = tracing::debug_span!("backward").entered();
        let mut all = loss.backward();
        let add = |sum: &mut Vec<f32>, gradient: Option<Tensor<1>>| -> Result<(), TuneError> {
            if let Some(gradient) = gradient {
                sum.iter_mut().zip(to_vec(gradient)?).for_each(|(sum, value)| *sum += value);
            }
            Ok(())
        };
        for (index, sums) in place.window.clone().zip(&mut gradients.blocks) {
            for (slot, projection) in sums.linears.iter_mut().zip(Projection::ALL) {
                let lora = tracked.block(index).and_then(|block| block.get(projection));
                let (Some(slot), Some(lora)) = (slot, lora) else { continue };
                add(&mut slot.a, lora.a.grad_remove(&mut all).map(flat))?;
                add(&mut slot.b, lora.b.grad_remove(&mut all).map(flat))?;
            }
        }
        if let Some(norm) = tracked.exit_norm(place.exit).filter(|_| place.norm) {
            add(&mut gradients.norm, norm.grad_remove(&mut all))?;
        }
        self.seconds.backward += forward.elapsed().as_secs_f64();
        Ok(value)
    }

    fn take_seconds(&mut self) -> StageSeconds {
        std::mem::take(&mut self.seconds)
    }

    fn bytes(&self) -> usize {
        0
    }
}

fn flat(tensor: Tensor<2>) -> Tensor<1> {
    let len = tensor.shape().num_elements();
    tensor.reshape([len])
}

/// The adapter with the window's tensors and the exit's norm as leaves that keep gradients.
fn tracked(adapter: &Adapter, place: &Place) -> Adapter {
    let mut tracked = adapter.clone();
    for index in place.window.clone() {
        let Some(block) = tracked.block_mut(index) else { continue };
        for projection in Projection::ALL {
            if let Some(lora) = block.get_mut(projection) {
                lora.a = lora.a.clone().autodiff().require_grad();
                lora.b = lora.b.clone().autodiff().require_grad();
            }
        }
    }
    if let Some(norm) = adapter.exit_norm(place.exit).filter(|_| place.norm) {
        tracked.set_exit_norm(place.exit, norm.clone().autodiff().require_grad());
    }
    tracked
}

/// `weight` times the sum of the losses of the batch's response tokens.
fn loss(
    decoder: &Decoder,
    batch: &Batch,
    adapter: &Adapter,
    tracked: &Adapter,
    place: &Place,
    weight: f32,
) -> Result<Tensor<1>, TuneError> {
    let rows: Vec<&[u32]> = batch.rows.iter().map(Vec::as_slice).collect();
    let hidden = decoder.embed(&rows)?;
    let hidden = decoder.run_blocks(hidden, 0..place.window.start, Some(adapter), None)?;
    let hidden = decoder.run_blocks(hidden, place.window.clone(), Some(tracked), None)?;
    let [batch_size, tokens, d] = hidden.dims();
    let device = decoder.device();
    let positions = Tensor::<1, Int>::from_data(batch.positions.as_slice(), device);
    let targets = Tensor::<1, Int>::from_data(batch.targets.as_slice(), device);
    let weights = Tensor::<1>::full([batch.targets.len()], weight, device);
    let picked = hidden.reshape([batch_size * tokens, d]).select(0, positions);
    let normed = decoder.exit_norm(picked, place.exit, Some(tracked));
    Ok(decoder.loss(normed, targets, weights))
}
