//! A cheap head for an early exit: scores of the frequent tokens only, behind the exit's norm or a lens.
//!
//! The head of the whole vocabulary is a good part of a small model's bytes (21% of SmolLM2-135M in 4 bits). A draft may be
//! any token, so its head has only the rows of a shortlist, gathered once from the packed rows (as in FR-Spec, Zhao et
//! al., ACL 2025); what is drafted is verified with the whole head.
//!
//! A *lens* maps what is known before a token has been through all blocks to the normalized last hidden state:
//! `z(t) = W [h_e(t) / rms(h_e(t)); z(t - 1)]`, with the state `h_e` after `e` blocks (after 0: the embedding) and the
//! normalized last state `z` of the token before, which is there already. It is the tuned lens (Belrose et al., 2023,
//! section 3) with the last state beside it, as in EAGLE (Li et al., ICML 2024); for drafts after drafts the lens's own
//! `z` takes the place of the last state.

use burn::tensor::Tensor;
use edgellm_kernels::{Arrangement, rms_norm};

use crate::ModelError;
use crate::adapter::Adapter;
use crate::decoder::{Decoder, Linear, Weight};
use crate::generate::to_vec;

/// Some rows of the language-model head.
#[derive(Clone, Debug)]
pub struct Shortlist {
    ids: Vec<u32>,
    linear: Linear,
}

impl Shortlist {
    /// The rows `ids` of the decoder's head.
    ///
    /// # Errors
    /// No id, an id outside the vocabulary, or weights that cannot be read.
    pub fn new(decoder: &Decoder, ids: &[u32]) -> Result<Self, ModelError> {
        let vocab = decoder.config().vocab_size;
        if ids.is_empty() || ids.iter().any(|&id| id as usize >= vocab) {
            return Err(ModelError::Value {
                what: "shortlist of a draft's head".into(),
                expected: format!("token ids below {vocab}"),
                found: ids.iter().max().map_or("none".into(), u32::to_string),
            });
        }
        let index: Vec<i32> = ids.iter().map(|&id| id as i32).collect();
        let index = Tensor::from_data(index.as_slice(), decoder.device());
        let weight = match decoder.head() {
            Weight::Packed(matrix) => {
                let rows: Vec<usize> = ids.iter().map(|&id| id as usize).collect();
                let mut host = matrix.to_host()?.gather_rows(&rows)?;
                if matrix.layout().arrangement == Arrangement::Panels {
                    host = host.prepare()?;
                }
                Weight::Packed(host.to_device(decoder.device()))
            }
            Weight::Dense(tensor) => Weight::Dense(tensor.clone().select(0, index.clone())),
        };
        let bias = decoder.untied_head().and_then(|head| head.bias.as_ref());
        let bias = bias.map(|bias| bias.clone().select(0, index));
        Ok(Self { ids: ids.to_vec(), linear: Linear { weight, bias } })
    }

    /// The token of a row.
    pub fn id(&self, row: usize) -> u32 {
        self.ids[row]
    }
}

/// What turns an exit's hidden state into something the head can read.
#[derive(Clone, Debug)]
enum Reader {
    /// A norm of the exit's own.
    Norm(Tensor<1>),
    /// A lens, `[d, 2 d]`, behind a norm of ones.
    Lens(Box<Linear>, Tensor<1>),
}

/// An early exit with its cheap head.
#[derive(Clone, Debug)]
pub struct DraftHead {
    exit: usize,
    reader: Reader,
    shortlist: Shortlist,
    eps: f64,
    /// Divides the scores before their softmax, so that confidences are frequencies.
    temperature: f32,
}

impl DraftHead {
    /// The exit after `exit` blocks behind the adapter's norm for it.
    ///
    /// # Errors
    /// The exit is not an early one of the model's.
    pub fn with_norm(
        decoder: &Decoder,
        adapter: Option<&Adapter>,
        exit: usize,
        shortlist: Shortlist,
    ) -> Result<Self, ModelError> {
        if exit == 0 || exit >= decoder.n_blocks() {
            return Err(bad_exit(exit, 1, decoder));
        }
        let norm = adapter.and_then(|a| a.exit_norm(exit)).unwrap_or(decoder.final_norm()).clone();
        let eps = decoder.config().rms_norm_eps;
        Ok(Self { exit, reader: Reader::Norm(norm), shortlist, eps, temperature: 1.0 })
    }

    /// The exit after `exit` blocks, which may be none, behind a lens `[d, 2 d]`.
    ///
    /// # Errors
    /// The exit is not before the model's last, or the lens has another shape.
    pub fn with_lens(
        decoder: &Decoder,
        exit: usize,
        lens: Linear,
        temperature: f32,
        shortlist: Shortlist,
    ) -> Result<Self, ModelError> {
        if exit >= decoder.n_blocks() {
            return Err(bad_exit(exit, 0, decoder));
        }
        let d = decoder.config().hidden_size;
        if lens.weight.shape() != [d, 2 * d] || !temperature.is_finite() || temperature <= 0.0 {
            return Err(ModelError::Value {
                what: "lens of a draft's head".into(),
                expected: format!("shape [{d}, {}] and a temperature above 0", 2 * d),
                found: format!("{:?} and {temperature}", lens.weight.shape()),
            });
        }
        let ones = Tensor::ones([d], decoder.device());
        let eps = decoder.config().rms_norm_eps;
        Ok(Self { exit, reader: Reader::Lens(Box::new(lens), ones), shortlist, eps, temperature })
    }

    /// Blocks below the exit.
    pub fn exit(&self) -> usize {
        self.exit
    }

    /// The tokens that it can name.
    pub fn shortlist(&self) -> &Shortlist {
        &self.shortlist
    }

    /// Whether it reads the last state of the token before.
    pub fn reads_last_state(&self) -> bool {
        matches!(self.reader, Reader::Lens(..))
    }

    /// An estimate of the normalized last state.
    ///
    /// # Shapes
    /// `hidden`, `before` and the result: `[tokens, d]`.
    pub fn read(&self, hidden: Tensor<2>, before: Tensor<2>) -> Tensor<2> {
        match &self.reader {
            Reader::Norm(norm) => rms_norm(hidden, norm.clone(), self.eps),
            Reader::Lens(lens, ones) => {
                let unit = rms_norm(hidden, ones.clone(), self.eps);
                lens.forward(Tensor::cat(vec![unit, before], 1), None)
            }
        }
    }

    /// Scores of the shortlist divided by the temperature, for one token.
    ///
    /// # Errors
    /// The device fails to hand them over.
    pub fn scores(&self, state: Tensor<2>) -> Result<Vec<f32>, ModelError> {
        let mut scores = to_vec(self.shortlist.linear.forward(state, None))?;
        if self.temperature != 1.0 {
            scores.iter_mut().for_each(|score| *score /= self.temperature);
        }
        Ok(scores)
    }
}

fn bad_exit(exit: usize, least: usize, decoder: &Decoder) -> ModelError {
    ModelError::Value {
        what: "exit to draft at".into(),
        expected: format!("from {least} to {} blocks", decoder.n_blocks() - 1),
        found: exit.to_string(),
    }
}
