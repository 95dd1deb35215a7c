//! Rotary position embedding: the table of cosines and sines (Su et al., "RoFormer", 2021, section 3.4.2).
//!
//! Angle of position `p` and pair `i`: `p * inv_freq[i]`, rounded to f32 as the reference implementations do.

use std::sync::{Arc, Mutex};

use burn::tensor::{Device, Tensor, TensorData};

/// Cosines and sines of consecutive positions, each `[positions, rotary_dim / 2]`.
#[derive(Clone, Debug)]
pub(crate) struct RopeSlice {
    pub(crate) cos: Tensor<2>,
    pub(crate) sin: Tensor<2>,
}

/// The table of a model, which grows as longer texts are seen.
#[derive(Clone, Debug)]
pub(crate) struct RopeTable {
    inv_freq: Vec<f64>,
    /// Factor on cosines and sines (YaRN's attention factor; 1 otherwise).
    magnitude: f64,
    table: Arc<Mutex<Option<RopeSlice>>>,
    device: Device,
}

impl RopeTable {
    pub(crate) fn new(inv_freq: Vec<f64>, magnitude: f64, device: Device) -> Self {
        Self { inv_freq, magnitude, table: Arc::default(), device }
    }

    /// The rotation of positions `start..start + len`.
    pub(crate) fn slice(&self, start: usize, len: usize) -> RopeSlice {
        let mut table = self.table.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let known = table.as_ref().map_or(0, |t| t.cos.dims()[0]);
        if start + len > known {
            *table = Some(self.compute((start + len).next_power_of_two().max(256)));
        }
        let full = table.as_ref().expect("the table was just filled");
        RopeSlice { cos: full.cos.clone().narrow(0, start, len), sin: full.sin.clone().narrow(0, start, len) }
    }

    fn compute(&self, positions: usize) -> RopeSlice {
        let pairs = self.inv_freq.len();
        let mut cos = Vec::with_capacity(positions * pairs);
        let mut sin = Vec::with_capacity(positions * pairs);
        for position in 0..positions {
            for freq in &self.inv_freq {
                // The reference implementations round the frequency and the angle to f32 first.
                let angle = f64::from(position as f32 * *freq as f32);
                cos.push((angle.cos() * self.magnitude) as f32);
                sin.push((angle.sin() * self.magnitude) as f32);
            }
        }
        let tensor = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, [positions, pairs]), &self.device);
        RopeSlice { cos: tensor(cos), sin: tensor(sin) }
    }
}
