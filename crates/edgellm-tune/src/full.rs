//! Training all weights of a small float model from scratch: what made the project's own fixture model.
//!
//! Plain next-token prediction over windows of text, with AdamW on every matrix and norm; the embedding is tied to the head.

use std::sync::Arc;
use std::time::Instant;

use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use edgellm_model::config::ModelConfig;
use edgellm_model::decoder::{Block, Decoder, Linear, ResidentStore, Weight};
use edgellm_model::generate::to_vec;
use edgellm_model::values::Projection;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::TuneError;
use crate::optimizer::{AdamW, AdamWConfig, LrSchedule};

/// Settings of a run from scratch.
#[derive(Clone, Debug)]
pub struct PretrainConfig {
    /// Optimizer steps.
    pub steps: u64,
    /// Windows per step.
    pub batch_size: usize,
    /// Tokens per window.
    pub context: usize,
    /// Largest learning rate; it falls as half a cosine.
    pub learning_rate: f64,
    /// Steps of linear increase of the learning rate.
    pub warmup_steps: u64,
    /// Weight decay on matrices.
    pub weight_decay: f64,
    /// Share of steps (from 0 to 1) whose loss also looks at one earlier exit, so that exits work from the start.
    pub early_exit_share: f64,
    /// Seed of the start and of the order of the text.
    pub seed: u64,
}

/// What one step did.
#[derive(Clone, Copy, Debug)]
pub struct PretrainReport {
    /// The step, counted from 0.
    pub step: u64,
    /// Mean loss of the whole model.
    pub loss: f64,
    /// Wall time of the step.
    pub seconds: f64,
}

/// Weights that are trained, as plain tensors.
#[derive(Clone)]
struct Weights {
    embedding: Tensor<2>,
    final_norm: Tensor<1>,
    blocks: Vec<BlockWeights>,
}

#[derive(Clone)]
struct BlockWeights {
    attn_norm: Tensor<1>,
    mlp_norm: Tensor<1>,
    linears: Vec<Tensor<2>>,
}

impl Weights {
    /// Normal noise of deviation 0.02, smaller by `sqrt(2 L)` for the projections that write to the residual stream
    /// (Radford et al., GPT-2, 2019, section 2.3).
    fn random(config: &ModelConfig, seed: u64, device: &Device) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut matrix = |[rows, cols]: [usize; 2], deviation: f32| {
            let values: Vec<f32> = (0..rows * cols).map(|_| normal(&mut rng) * deviation).collect();
            Tensor::<2>::from_data(TensorData::new(values, [rows, cols]), device)
        };
        let residual = 0.02 / (2.0 * config.n_layers as f32).sqrt();
        let embedding = matrix([config.vocab_size, config.hidden_size], 0.02);
        let ones = || Tensor::<1>::ones([config.hidden_size], device);
        let blocks = (0..config.n_layers)
            .map(|_| BlockWeights {
                attn_norm: ones(),
                mlp_norm: ones(),
                linears: Projection::ALL
                    .map(|p| {
                        let writes = matches!(p, Projection::O | Projection::Down);
                        matrix(config.projection_shape(p), if writes { residual } else { 0.02 })
                    })
                    .to_vec(),
            })
            .collect();
        Self { embedding, final_norm: ones(), blocks }
    }

    fn tracked(&self) -> Self {
        let leaf1 = |t: &Tensor<1>| t.clone().autodiff().require_grad();
        let leaf2 = |t: &Tensor<2>| t.clone().autodiff().require_grad();
        Self {
            embedding: leaf2(&self.embedding),
            final_norm: leaf1(&self.final_norm),
            blocks: self
                .blocks
                .iter()
                .map(|b| BlockWeights {
                    attn_norm: leaf1(&b.attn_norm),
                    mlp_norm: leaf1(&b.mlp_norm),
                    linears: b.linears.iter().map(leaf2).collect(),
                })
                .collect(),
        }
    }

    fn decoder(&self, config: &ModelConfig, device: &Device) -> Result<Decoder, TuneError> {
        let blocks = self
            .blocks
            .iter()
            .map(|b| Block {
                attn_norm: b.attn_norm.clone(),
                mlp_norm: b.mlp_norm.clone(),
                q_norm: None,
                k_norm: None,
                linears: std::array::from_fn(|i| Linear::new(Weight::Dense(b.linears[i].clone()))),
            })
            .collect();
        let store = Arc::new(ResidentStore::new(blocks));
        let embedding = Weight::Dense(self.embedding.clone());
        let norm = self.final_norm.clone();
        Ok(Decoder::from_parts(config.clone(), embedding, store, norm, None, device.clone())?)
    }

    /// Updates every weight from the gradients of its tracked twin; `scale` clips.
    fn update(
        &mut self,
        tracked: &Weights,
        grads: &mut Gradients,
        optimizer: &mut Optimizers,
        lr: f64,
        scale: f32,
    ) -> Result<(), TuneError> {
        let Optimizers { matrices, vectors } = optimizer;
        let mut matrix = |name: String, value: &mut Tensor<2>, leaf: &Tensor<2>| match leaf.grad_remove(grads) {
            Some(grad) => update(matrices, &name, value, grad, scale, lr),
            None => Ok(()),
        };
        matrix("embedding".into(), &mut self.embedding, &tracked.embedding)?;
        for (index, (block, leaf)) in self.blocks.iter_mut().zip(&tracked.blocks).enumerate() {
            for (p, projection) in Projection::ALL.into_iter().enumerate() {
                matrix(format!("{index}.{}", projection.name()), &mut block.linears[p], &leaf.linears[p])?;
            }
        }
        let mut vector = |name: String, value: &mut Tensor<1>, leaf: &Tensor<1>| match leaf.grad_remove(grads) {
            Some(grad) => update(vectors, &name, value, grad, scale, lr),
            None => Ok(()),
        };
        vector("final_norm".into(), &mut self.final_norm, &tracked.final_norm)?;
        for (index, (block, leaf)) in self.blocks.iter_mut().zip(&tracked.blocks).enumerate() {
            vector(format!("{index}.attn_norm"), &mut block.attn_norm, &leaf.attn_norm)?;
            vector(format!("{index}.mlp_norm"), &mut block.mlp_norm, &leaf.mlp_norm)?;
        }
        Ok(())
    }

    fn squared_norm(tracked: &Weights, grads: &Gradients) -> Result<f64, TuneError> {
        let mut sum = 0.0;
        let mut add = |squares: Option<Tensor<1>>| -> Result<(), TuneError> {
            if let Some(squares) = squares {
                sum += f64::from(to_vec(squares)?[0]);
            }
            Ok(())
        };
        let squares2 = |t: &Tensor<2>| t.grad(grads).map(|g| g.powi_scalar(2).sum());
        add(squares2(&tracked.embedding))?;
        for linear in tracked.blocks.iter().flat_map(|b| &b.linears) {
            add(squares2(linear))?;
        }
        Ok(sum)
    }
}

struct Optimizers {
    matrices: AdamW,
    vectors: AdamW,
}

/// One update of a weight: its values leave the tensor, and a new tensor takes its place.
fn update<const D: usize>(
    optimizer: &mut AdamW,
    name: &str,
    value: &mut Tensor<D>,
    grad: Tensor<D>,
    scale: f32,
    lr: f64,
) -> Result<(), TuneError> {
    let mut values = to_vec(value.clone())?;
    optimizer.update(name, &mut values, &to_vec(grad)?, scale, lr);
    *value = Tensor::from_data(TensorData::new(values, value.dims()), &value.device());
    Ok(())
}

/// Standard normal noise (Box and Muller, 1958).
fn normal(rng: &mut ChaCha8Rng) -> f32 {
    let u: f64 = 1.0 - rng.random::<f64>();
    let v: f64 = rng.random();
    ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()) as f32
}

/// Trains a model with a tied head from scratch on one long sequence of token ids.
///
/// # Errors
/// The text is shorter than one window, the configuration is not one that this trainer builds, or the loss is not finite.
pub fn pretrain(
    model: &ModelConfig,
    ids: &[u32],
    config: &PretrainConfig,
    device: &Device,
    mut on_step: impl FnMut(&PretrainReport),
) -> Result<Decoder, TuneError> {
    if !model.tie_word_embeddings {
        let (expected, found) = ("true".into(), "false".into());
        return Err(TuneError::Setting { what: "tie_word_embeddings", expected, found });
    }
    if ids.len() <= config.context + 1 {
        let expected = format!("more than {} tokens", config.context + 1);
        return Err(TuneError::Setting { what: "training text", expected, found: format!("{} tokens", ids.len()) });
    }
    let mut weights = Weights::random(model, config.seed, device);
    let adamw = AdamWConfig { beta2: 0.99, weight_decay: config.weight_decay, ..AdamWConfig::default() };
    let mut optimizers =
        Optimizers { matrices: AdamW::new(adamw), vectors: AdamW::new(AdamWConfig { weight_decay: 0.0, ..adamw }) };
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    rng.set_stream(1);
    for step in 0..config.steps {
        let start = Instant::now();
        let offsets: Vec<usize> =
            (0..config.batch_size).map(|_| rng.random_range(0..ids.len() - config.context - 1)).collect();
        let early = (rng.random::<f64>() < config.early_exit_share && model.n_layers > 1)
            .then(|| rng.random_range(1..model.n_layers));
        let tracked = weights.tracked();
        let decoder = tracked.decoder(model, device)?;
        let (total, last) = step_loss(&decoder, ids, &offsets, config.context, early)?;
        let loss = f64::from(to_vec(last.inner())?[0]);
        if !loss.is_finite() {
            return Err(TuneError::Diverged { steps: 1, step });
        }
        drop(decoder);
        let mut grads = total.backward();
        let norm = Weights::squared_norm(&tracked, &grads)?.sqrt();
        let lr = config.learning_rate * LrSchedule::Cosine.factor(step, config.steps, config.warmup_steps);
        let clip = if norm > 1.0 { 1.0 / norm } else { 1.0 };
        weights.update(&tracked, &mut grads, &mut optimizers, lr, clip as f32)?;
        on_step(&PretrainReport { step, loss, seconds: start.elapsed().as_secs_f64() });
    }
    weights.decoder(model, device)
}

/// The loss to descend, and the whole model's share of it.
fn step_loss(
    decoder: &Decoder,
    ids: &[u32],
    offsets: &[usize],
    context: usize,
    early: Option<usize>,
) -> Result<(Tensor<1>, Tensor<1>), TuneError> {
    let rows: Vec<&[u32]> = offsets.iter().map(|&o| &ids[o..o + context]).collect();
    let targets: Vec<i32> =
        offsets.iter().flat_map(|&o| ids[o + 1..=o + context].iter().map(|&id| id as i32)).collect();
    let n = targets.len();
    let targets = Tensor::<1, Int>::from_data(targets.as_slice(), decoder.device());
    let weights = Tensor::<1>::full([n], 1.0 / n as f32, decoder.device());
    let hidden = decoder.embed(&rows)?;
    let exit_loss = |hidden: Tensor<3>, exit: usize| {
        let flat = hidden.reshape([n, decoder.config().hidden_size]);
        decoder.loss(decoder.exit_norm(flat, exit, None), targets.clone(), weights.clone())
    };
    let last = decoder.n_blocks();
    match early {
        None => {
            let loss = exit_loss(decoder.run_blocks(hidden, 0..last, None, None)?, last);
            Ok((loss.clone(), loss))
        }
        Some(exit) => {
            let middle = decoder.run_blocks(hidden, 0..exit, None, None)?;
            let early_loss = exit_loss(middle.clone(), exit);
            let loss = exit_loss(decoder.run_blocks(middle, exit..last, None, None)?, last);
            Ok((loss.clone().add(early_loss.mul_scalar(0.3)), loss))
        }
    }
}
