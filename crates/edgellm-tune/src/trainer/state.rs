//! The trainer's state for checkpoints: parameters, moments, counters, and what the exit schedule learned. Everything else
//! that a step depends on is a function of the settings and the step's number.

use std::collections::BTreeMap;

use burn::tensor::{Tensor, TensorData};
use edgellm_model::generate::to_vec;
use edgellm_model::values::Projection;
use serde_json::{Map, json};

use super::Trainer;
use crate::TuneError;
use crate::checkpoint::{Buffer, NamedBuffer, TrainState};

/// Before the names of the optimizer's buffers.
const MOMENT: &str = "moment.";
/// Before the names of the adapter's.
const VALUE: &str = "value.";

impl Trainer<'_> {
    /// Everything that a run needs to go on bit for bit.
    ///
    /// # Errors
    /// A tensor cannot be read from its device.
    pub fn state(&self) -> Result<TrainState, TuneError> {
        let mut tensors = BTreeMap::new();
        for (name, values) in self.values()? {
            tensors.insert(format!("{VALUE}{name}"), Buffer::F32(values));
        }
        for NamedBuffer { name, data } in self.optimizer.state() {
            tensors.insert(format!("{MOMENT}{name}"), data);
        }
        let mut scalars = Map::new();
        scalars.insert("skipped_in_a_row".into(), json!(self.skipped_in_a_row));
        scalars.insert("schedule".into(), self.schedule.state());
        Ok(TrainState { step: self.step, tensors, scalars })
    }

    /// Takes over a state of a run with the same settings, data and model.
    ///
    /// # Errors
    /// A buffer is missing or has another length; the trainer may then be in a mixture of states and must not go on.
    pub fn restore(&mut self, state: &TrainState) -> Result<(), TuneError> {
        let lengths: BTreeMap<String, usize> =
            self.values()?.into_iter().map(|(name, values)| (name, values.len())).collect();
        let take = |name: &str| match state.tensors.get(&format!("{VALUE}{name}")) {
            Some(Buffer::F32(values)) if lengths.get(name) == Some(&values.len()) => Ok(values.clone()),
            found => Err(TuneError::Setting {
                what: "checkpoint",
                expected: format!("{} values of {name}", lengths.get(name).copied().unwrap_or_default()),
                found: found.map_or("none".into(), |buffer| buffer.len().to_string()),
            }),
        };
        for index in 0..self.adapter.n_blocks() {
            for projection in Projection::ALL {
                let block = self.adapter.block_mut(index).expect("an adapter has its blocks");
                let Some(lora) = block.get_mut(projection) else { continue };
                for (part, tensor) in [("a", &mut lora.a), ("b", &mut lora.b)] {
                    let values = take(&format!("{index}.{}.{part}", projection.name()))?;
                    *tensor = Tensor::from_data(TensorData::new(values, tensor.dims()), &tensor.device());
                }
            }
        }
        for exit in self.adapter.exits() {
            let values = take(&format!("exit.{exit}"))?;
            let len = values.len();
            let norm = Tensor::from_data(TensorData::new(values, [len]), self.decoder.device());
            self.adapter.set_exit_norm(exit, norm);
        }
        let moments: Vec<NamedBuffer> = state
            .tensors
            .iter()
            .filter_map(|(name, data)| Some(NamedBuffer::new(name.strip_prefix(MOMENT)?, data.clone())))
            .collect();
        self.optimizer.restore(moments, |name| lengths.get(name).copied())?;
        self.schedule.restore(state.scalars.get("schedule").unwrap_or(&json!(null)))?;
        let skipped = state.scalars.get("skipped_in_a_row").and_then(serde_json::Value::as_u64);
        self.skipped_in_a_row = skipped.and_then(|n| u32::try_from(n).ok()).unwrap_or(0);
        self.step = state.step;
        Ok(())
    }

    /// The adapter's values by name: `BLOCK.PROJECTION.a`, `.b`, and `exit.BLOCKS`, as the optimizer calls them.
    fn values(&self) -> Result<Vec<(String, Vec<f32>)>, TuneError> {
        let mut out = Vec::new();
        for index in 0..self.adapter.n_blocks() {
            for projection in Projection::ALL {
                let Some(lora) = self.adapter.block(index).and_then(|block| block.get(projection)) else { continue };
                let name = format!("{index}.{}", projection.name());
                out.push((format!("{name}.a"), to_vec(lora.a.clone())?));
                out.push((format!("{name}.b"), to_vec(lora.b.clone())?));
            }
        }
        for exit in self.adapter.exits() {
            if let Some(norm) = self.adapter.exit_norm(exit) {
                out.push((format!("exit.{exit}"), to_vec(norm.clone())?));
            }
        }
        Ok(out)
    }
}
