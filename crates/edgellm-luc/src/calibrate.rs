//! Running calibration text through a model, block by block, and what the inputs of its matrices look like.
//!
//! All tokens count, the first of a window too. Its activations are outliers of their own (Sun et al., "Massive Activations
//! in Large Language Models", arXiv 2402.17762) that all later tokens attend to: left out of the moments, error feedback
//! would move errors into their directions, and break the model.

use std::cell::RefCell;

use burn::tensor::Tensor;
use edgellm_kernels::InputGram;
use edgellm_model::decoder::{Block, Decoder};
use edgellm_model::generate::to_vec;
use edgellm_model::values::Projection;

use crate::error::{LucError, Result};

/// Windows that run together.
const BATCH: usize = 8;
/// Added to the diagonal of the moments, as a share of its mean.
pub(crate) const DAMPING: f64 = 0.01;
/// The same of the head's inputs where the head is also the embedding: looking a row up sees errors in all columns alike.
pub(crate) const TIED_DAMPING: f64 = 0.1;

/// Where in a block an input arises that one or several projections share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Site {
    /// Queries, keys and values.
    Attention,
    /// The output projection.
    Output,
    /// Gate and up.
    FeedForward,
    /// Down.
    Down,
}

impl Site {
    /// In the order in which a block comes to them.
    pub(crate) const ALL: [Site; 4] = [Site::Attention, Site::Output, Site::FeedForward, Site::Down];

    pub(crate) fn of(projection: Projection) -> Self {
        match projection {
            Projection::Q | Projection::K | Projection::V => Site::Attention,
            Projection::O => Site::Output,
            Projection::Gate | Projection::Up => Site::FeedForward,
            Projection::Down => Site::Down,
        }
    }

    pub(crate) fn projections(self) -> impl Iterator<Item = Projection> {
        Projection::ALL.into_iter().filter(move |p| Site::of(*p) == self)
    }

    /// The projection whose input stands for all of the site.
    fn first(self) -> Projection {
        self.projections().next().expect("every site has a projection")
    }
}

/// Hidden states of calibration windows of equal length, some windows a tensor: `[windows, tokens, d]`.
#[derive(Clone)]
pub(crate) struct States {
    batches: Vec<Tensor<3>>,
}

impl States {
    /// The embeddings of windows. Windows of unequal length do not share a tensor.
    pub(crate) fn embed(decoder: &Decoder, windows: &[Vec<u32>]) -> Result<Self> {
        let windows: Vec<&[u32]> = windows.iter().map(Vec::as_slice).filter(|w| !w.is_empty()).collect();
        if windows.is_empty() {
            return Err(LucError::Nothing { expected: "at least one calibration token" });
        }
        let alike = windows.chunk_by(|a, b| a.len() == b.len()).flat_map(|alike| alike.chunks(BATCH));
        let batches = alike.map(|batch| decoder.embed(batch)).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { batches })
    }

    /// Runs a block in the place of block `index`.
    pub(crate) fn run(&self, decoder: &Decoder, block: &Block, index: usize) -> Self {
        let run = |x: &Tensor<3>| decoder.run_block(block, index, x.clone(), None);
        Self { batches: self.batches.iter().map(run).collect() }
    }

    /// Tokens in all.
    pub(crate) fn tokens(&self) -> usize {
        self.batches.iter().map(|x| x.dims()[0] * x.dims()[1]).sum()
    }

    /// One row a token.
    pub(crate) fn flat(&self) -> Tensor<2> {
        let flat = self.batches.iter().map(|x| {
            let [windows, tokens, d] = x.dims();
            x.clone().reshape([windows * tokens, d])
        });
        Tensor::cat(flat.collect(), 0)
    }

    /// The second halves of all windows, one row a token.
    pub(crate) fn second_halves(self) -> impl Iterator<Item = Tensor<2>> {
        self.batches.into_iter().map(|x| {
            let [windows, tokens, d] = x.dims();
            let first = tokens / 2;
            x.narrow(1, first, tokens - first).reshape([windows * (tokens - first), d])
        })
    }

    /// Runs the blocks from `first` on.
    pub(crate) fn run_rest(self, decoder: &Decoder, first: usize) -> Result<Self> {
        self.run_range(decoder, first..decoder.n_blocks())
    }

    /// Runs some blocks.
    pub(crate) fn run_range(self, decoder: &Decoder, range: std::ops::Range<usize>) -> Result<Self> {
        let run = |x| decoder.run_blocks(x, range.clone(), None, None);
        Ok(Self { batches: self.batches.into_iter().map(run).collect::<Result<Vec<_>, _>>()? })
    }

    /// Runs the blocks from `first` on, on several states of the same shapes at once.
    pub(crate) fn run_rest_together(all: Vec<Self>, decoder: &Decoder, first: usize) -> Result<Vec<Self>> {
        let mut results = vec![Self { batches: Vec::new() }; all.len()];
        let batches = all.first().map_or(0, |states| states.batches.len());
        for at in 0..batches {
            let same: Vec<Tensor<3>> = all.iter().map(|states| states.batches[at].clone()).collect();
            let windows = same[0].dims()[0];
            let x = decoder.run_blocks(Tensor::cat(same, 0), first..decoder.n_blocks(), None, None)?;
            for (i, result) in results.iter_mut().enumerate() {
                result.batches.push(x.clone().narrow(0, i * windows, windows));
            }
        }
        Ok(results)
    }

    /// Runs a block, and gives the moments of the inputs of one site, or of all.
    pub(crate) fn observe(
        &self,
        decoder: &Decoder,
        block: &Block,
        index: usize,
        sites: &[Site],
    ) -> Result<(Self, Vec<InputGram>)> {
        let _span = tracing::debug_span!("calibrate", index).entered();
        let sums: RefCell<Vec<Option<Tensor<2>>>> = RefCell::new(vec![None; sites.len()]);
        let mut batches = Vec::with_capacity(self.batches.len());
        for x in &self.batches {
            let observer = |projection: Projection, input: &Tensor<2>| {
                let Some(at) = sites.iter().position(|site| site.first() == projection) else { return };
                add(&mut sums.borrow_mut()[at], input.clone());
            };
            batches.push(decoder.run_block(block, index, x.clone(), Some(&observer)));
        }
        let sums = sums.into_inner().into_iter();
        let grams = sums.map(|sum| gram(sum.expect("a block comes to all its sites"), DAMPING));
        Ok((Self { batches }, grams.collect::<Result<Vec<_>>>()?))
    }

    /// The moments of the states behind the final norm, which the head sees.
    pub(crate) fn observe_head(&self, decoder: &Decoder, damping: f64) -> Result<InputGram> {
        let mut sum = None;
        for x in &self.batches {
            let [windows, tokens, width] = x.dims();
            let normed = decoder.exit_norm(x.clone().reshape([windows * tokens, width]), decoder.n_blocks(), None);
            add(&mut sum, normed);
        }
        gram(sum.expect("states are never empty"), damping)
    }
}

fn add(sum: &mut Option<Tensor<2>>, x: Tensor<2>) {
    let product = x.clone().transpose().matmul(x);
    *sum = Some(match sum.take() {
        Some(sum) => sum.add(product),
        None => product,
    });
}

fn gram(sum: Tensor<2>, damping: f64) -> Result<InputGram> {
    let [cols, _] = sum.dims();
    Ok(InputGram::new(cols, to_vec(sum)?, damping).map_err(edgellm_model::ModelError::from)?)
}
