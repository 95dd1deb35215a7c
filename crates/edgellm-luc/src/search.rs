//! `search`: a policy that is improved by measuring the whole compressed model.
//!
//! Sensitivities are measured one unit at a time and added up, as if units did not influence each other; they do (Sieberling
//! et al., "EvoPress", arXiv 2410.14649, ICML 2025). The search starts from a policy, as a rule from
//! [`Solve`](crate::Solve), and keeps a parent. In every generation some children are made by level switches: one unit gets a
//! better format and others a worse one, or the reverse, until the bytes are within the budget again. All children are
//! compared on a part of the windows, the best few and the parent on all of them; the best becomes the next parent.
//!
//! Every unit's matrices are compressed once for each of its formats near the start, on the uncompressed model's inputs, and
//! put together for each child. A child shares the hidden states of its parent up to the first block that differs.

use std::collections::BTreeMap;
use std::sync::Arc;

use edgellm_kernels::InputGram;
use edgellm_model::ModelError;
use edgellm_model::decoder::{Block, Decoder, ResidentStore, Weight};
use edgellm_model::traits::Compressor;
use edgellm_model::values::{Budget, CompressionPolicy, LayerFormat, Measurement, Projection, Unit};

use crate::calibrate::{DAMPING, Site, States, TIED_DAMPING};
use crate::cost::{byte_limit, matrices_bytes};
use crate::error::{LucError, Result};
use crate::measure::flat_moments;
use crate::outputs::Outputs;
use crate::policy::policy;
use crate::progress::Progress;
use crate::weights::{DenseBlock, HostWeight};

/// Children of a generation.
const CHILDREN: usize = 12;
/// Children that are measured on all windows.
const FINALISTS: usize = 3;
/// Formats on either side of the start's that a unit can get.
const REACH: usize = 3;

/// How the search goes.
#[derive(Clone, Copy)]
pub struct Search<'a> {
    /// What brings a matrix into a format.
    pub compressor: &'a dyn Compressor,
    /// Windows whose inputs compressors look at.
    pub calibration: &'a [Vec<u32>],
    /// Windows on which policies are compared.
    pub compared: &'a [Vec<u32>],
    /// Policies to try.
    pub candidates: usize,
    /// Seed of the mutations.
    pub seed: u64,
}

/// What a search found.
#[derive(Clone, Debug, PartialEq)]
pub struct Searched {
    /// The best policy.
    pub policy: CompressionPolicy,
    /// Bytes of all its units.
    pub bytes: u64,
    /// Mean KL divergence of the start from the base on the compared windows.
    pub kl_before: f64,
    /// That of the result.
    pub kl: f64,
    /// Policies that were measured.
    pub candidates: usize,
}

impl Search<'_> {
    /// Improves `start` under the budget. `decoder` computes with f32 activations.
    ///
    /// # Errors
    /// The start misses a unit, has a format that was not measured, or is over the budget; the compressor refuses; weights
    /// cannot be read.
    pub fn run(
        &self,
        decoder: &Decoder,
        measurement: &Measurement,
        start: &CompressionPolicy,
        budget: &Budget,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Searched> {
        let limit = byte_limit(measurement, budget)?.unwrap_or(u64::MAX);
        let ladders = ladders(measurement, start)?;
        let first: Vec<usize> = ladders.iter().map(|ladder| ladder.start).collect();
        let bytes = |levels: &[usize]| -> u64 {
            levels.iter().zip(&ladders).map(|(&level, ladder)| ladder.steps[level].bytes).sum()
        };
        let limit = limit.max(bytes(&first));
        let library = Library::build(self, decoder, measurement, &ladders, progress)?;
        let judge = Judge::new(decoder, &library, measurement, self.compared)?;
        let mut random = Random(self.seed.wrapping_mul(2).wrapping_add(1));
        let mut parent = judge.adopt(first)?;
        let kl_before = parent.kl;
        let mut tried = 1;
        while tried < self.candidates {
            let mut seen: Vec<Vec<usize>> = vec![parent.levels.clone()];
            let mut children = Vec::new();
            for _ in 0..4 * CHILDREN {
                let child = mutate(&parent.levels, &ladders, limit, &mut random);
                if children.len() < CHILDREN.min(self.candidates - tried) && !seen.contains(&child) {
                    seen.push(child.clone());
                    children.push((judge.quick(&parent, &child)?, child));
                    tried += 1;
                    progress(Progress { done: tried, total: self.candidates, what: "policies" });
                }
            }
            if children.is_empty() {
                break;
            }
            children.sort_by(|a, b| a.0.total_cmp(&b.0));
            let mut best: Option<(f64, Vec<usize>)> = None;
            for (_, child) in children.into_iter().take(FINALISTS) {
                let kl = judge.full(&parent, &child)?;
                if kl < best.as_ref().map_or(parent.kl, |(kl, _)| *kl) {
                    best = Some((kl, child));
                }
            }
            if let Some((_, child)) = best {
                parent = judge.adopt(child)?;
            }
        }
        let formats: Vec<LayerFormat> = parent
            .levels
            .iter()
            .zip(&ladders)
            .map(|(&level, ladder)| measurement.options[ladder.steps[level].option])
            .collect();
        let mut found = policy("search", measurement, budget, &formats);
        found.seed = self.seed;
        Ok(Searched { policy: found, bytes: bytes(&parent.levels), kl_before, kl: parent.kl, candidates: tried })
    }
}

/// A format of a unit.
#[derive(Clone, Copy)]
struct Step {
    option: usize,
    bytes: u64,
}

/// The formats of a unit that are worth having, the smallest first, near the start's.
struct Ladder {
    steps: Vec<Step>,
    /// The step of the start.
    start: usize,
}

fn ladders(measurement: &Measurement, start: &CompressionPolicy) -> Result<Vec<Ladder>> {
    let of_unit = |unit: &edgellm_model::values::UnitMeasurement| -> Result<Ladder> {
        let missing =
            |expected: String, found: String| ModelError::Value { what: "start of the search".into(), expected, found };
        let format = start.format_of(unit.unit);
        let format = format.ok_or_else(|| missing(format!("a format for {}", unit.unit), "none".into()))?;
        let chosen = measurement.options.iter().position(|option| *option == format);
        let chosen =
            chosen.ok_or_else(|| missing(format!("a measured format for {}", unit.unit), format.to_string()))?;
        let mut steps = Vec::new();
        for (option, layer) in measurement.options.iter().enumerate() {
            steps.push((Step { option, bytes: matrices_bytes(&unit.matrices, layer)? }, unit.kl[option]));
        }
        steps.sort_by(|a, b| a.0.bytes.cmp(&b.0.bytes).then(a.1.total_cmp(&b.1)));
        let mut best = f64::INFINITY;
        // The start's own format stays, even where another is smaller and better.
        steps.retain(|(step, kl)| {
            let worth = *kl < best;
            best = best.min(*kl);
            worth || step.option == chosen
        });
        let at = steps.iter().position(|(step, _)| step.option == chosen).unwrap_or(0);
        let (low, high) = (at.saturating_sub(REACH), steps.len().min(at + REACH + 1));
        Ok(Ladder { steps: steps[low..high].iter().map(|(step, _)| *step).collect(), start: at - low })
    };
    measurement.units.iter().map(of_unit).collect()
}

/// A child of `levels`: a switch of one unit, or two, and what the budget then asks of or allows to others.
fn mutate(levels: &[usize], ladders: &[Ladder], limit: u64, random: &mut Random) -> Vec<usize> {
    let bytes = |levels: &[usize]| -> u64 {
        levels.iter().zip(ladders).map(|(&level, ladder)| ladder.steps[level].bytes).sum()
    };
    let mut child = levels.to_vec();
    let mut touched = vec![false; levels.len()];
    for _ in 0..1 + random.below(2) {
        let unit = random.below(levels.len());
        let up = random.below(2) == 0;
        let top = ladders[unit].steps.len() - 1;
        child[unit] = if up { (child[unit] + 1).min(top) } else { child[unit].saturating_sub(1) };
        touched[unit] = true;
    }
    // Too large: others give way. Each try takes one step of a random unit.
    let mut tries = 0;
    while bytes(&child) > limit && tries < 1000 {
        let unit = random.below(levels.len());
        tries += 1;
        if child[unit] > 0 && (!touched[unit] || tries > 500) {
            child[unit] -= 1;
            touched[unit] = true;
        }
    }
    if bytes(&child) > limit {
        return levels.to_vec();
    }
    // What is left is given out, at random.
    for _ in 0..4 * levels.len() {
        let unit = random.below(levels.len());
        if !touched[unit] && child[unit] + 1 < ladders[unit].steps.len() {
            child[unit] += 1;
            if bytes(&child) > limit {
                child[unit] -= 1;
            } else {
                touched[unit] = true;
            }
        }
    }
    child
}

/// SplitMix64 (Steele et al., "Fast splittable pseudorandom number generators", 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Every unit's matrices in every format of its ladder, as the device uses them.
struct Library {
    /// By unit, then by step; a matrix for each of the unit's, in their order.
    weights: Vec<Vec<Vec<Weight>>>,
}

impl Library {
    fn build(
        search: &Search<'_>,
        decoder: &Decoder,
        measurement: &Measurement,
        ladders: &[Ladder],
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self> {
        let compressor = search.compressor;
        let total = ladders.iter().map(|ladder| ladder.steps.len()).sum();
        let mut done = 0;
        let mut pack =
            |values: &[f32], [rows, cols]: [usize; 2], ladder: &Ladder, inputs: Option<&InputGram>, what: &str| {
                let mut steps = Vec::with_capacity(ladder.steps.len());
                for step in &ladder.steps {
                    let format = &measurement.options[step.option];
                    let packed = compressor.compress(values, rows, cols, format, inputs)?;
                    steps.push(Weight::Packed(packed.prepare().map_err(LucError::from)?.to_device(decoder.device())));
                    done += usize::from(what != "part");
                    progress(Progress { done, total, what: "compressing" });
                }
                Ok::<_, LucError>(steps)
            };
        let by_unit: BTreeMap<Unit, usize> = measurement.units.iter().enumerate().map(|(i, u)| (u.unit, i)).collect();
        let mut weights: Vec<Vec<Vec<Weight>>> =
            ladders.iter().map(|ladder| vec![Vec::new(); ladder.steps.len()]).collect();
        let mut put = |unit: usize, steps: Vec<Weight>| {
            for (of_step, weight) in weights[unit].iter_mut().zip(steps) {
                of_step.push(weight);
            }
        };
        let needs_inputs = compressor.needs_inputs();
        let mut states = if needs_inputs { Some(States::embed(decoder, search.calibration)?) } else { None };
        for index in 0..decoder.n_blocks() {
            let block = DenseBlock::new(&decoder.store().block(index)?, decoder.device())?;
            let mut grams = Vec::new();
            if let Some(before) = states.take() {
                let (after, of_block) = before.observe(decoder, &block.block, index, &Site::ALL)?;
                (states, grams) = (Some(after), of_block);
            }
            for projection in Projection::ALL {
                let unit = by_unit.get(&Unit::Linear(index, projection)).or_else(|| by_unit.get(&Unit::Block(index)));
                let unit = *unit.ok_or_else(|| LucError::NotInModel { unit: format!("block.{index}") })?;
                let inputs = grams.get(Site::of(projection) as usize);
                let shape = block.block.linear(projection).weight.shape();
                let whole = measurement.units[unit].matrices.len() == 1 || projection == Projection::Down;
                let what = if whole { "unit" } else { "part" };
                put(unit, pack(&block.values[projection as usize], shape, &ladders[unit], inputs, what)?);
            }
        }
        for (unit, weight) in
            [(Unit::Embedding, Some(decoder.embedding())), (Unit::Head, decoder.untied_head().map(|h| &h.weight))]
        {
            let (Some(&at), Some(weight)) = (by_unit.get(&unit), weight) else { continue };
            let host = HostWeight::new(weight)?;
            let inputs = match &states {
                Some(_) if unit == Unit::Embedding && !decoder.is_head_tied() => Some(flat_moments(host.shape()[1])?),
                Some(last) => {
                    Some(last.observe_head(decoder, if decoder.is_head_tied() { TIED_DAMPING } else { DAMPING })?)
                }
                None => None,
            };
            put(at, pack(&host.values()?, host.shape(), &ladders[at], inputs.as_ref(), "unit")?);
        }
        Ok(Self { weights })
    }
}

/// A policy whose hidden states are kept.
struct Parent {
    levels: Vec<usize>,
    kl: f64,
    /// The states before each block, and behind the last: of all windows, and of the first few.
    states: Vec<States>,
    few: Vec<States>,
}

/// Measures policies.
struct Judge<'a> {
    decoder: &'a Decoder,
    library: &'a Library,
    units: Vec<Unit>,
    blocks: Vec<Block>,
    compared: &'a [Vec<u32>],
    few: &'a [Vec<u32>],
    base: Outputs,
    base_few: Outputs,
}

impl<'a> Judge<'a> {
    fn new(
        decoder: &'a Decoder,
        library: &'a Library,
        measurement: &Measurement,
        compared: &'a [Vec<u32>],
    ) -> Result<Self> {
        let few = &compared[..compared.len().div_ceil(4)];
        let base = |windows: &[Vec<u32>]| Outputs::of(decoder, States::embed(decoder, windows)?.run_rest(decoder, 0)?);
        let (base_few, base) = (base(few)?, base(compared)?);
        let blocks = (0..decoder.n_blocks()).map(|i| decoder.store().block(i)).collect::<Result<_, _>>()?;
        let units = measurement.units.iter().map(|u| u.unit).collect();
        Ok(Self { decoder, library, units, blocks, compared, few, base, base_few })
    }

    /// The model with every unit at its level.
    fn model(&self, levels: &[usize]) -> Decoder {
        let mut blocks = self.blocks.clone();
        let mut model = self.decoder.clone();
        for ((unit, &level), steps) in self.units.iter().zip(levels).zip(&self.library.weights) {
            let weights = &steps[level];
            match *unit {
                Unit::Embedding => model = model.with_embedding(weights[0].clone()),
                Unit::Head => {
                    let mut head = model.untied_head().expect("a head that was measured").clone();
                    head.weight = weights[0].clone();
                    model = model.with_head(head);
                }
                Unit::Block(index) => {
                    for (linear, weight) in blocks[index].linears.iter_mut().zip(weights) {
                        linear.weight = weight.clone();
                    }
                }
                Unit::Linear(index, projection) => blocks[index].linear_mut(projection).weight = weights[0].clone(),
            }
        }
        model.with_store(Arc::new(ResidentStore::new(blocks)))
    }

    /// The first block whose input differs, or `None` if the embedding does.
    fn first_change(&self, parent: &Parent, levels: &[usize]) -> Option<usize> {
        let changed = self.units.iter().zip(parent.levels.iter().zip(levels)).filter(|(_, (a, b))| a != b);
        let place = |unit: &Unit| match *unit {
            Unit::Embedding => None,
            Unit::Block(index) | Unit::Linear(index, _) => Some(index),
            Unit::Head => Some(self.blocks.len()),
        };
        changed.map(|(unit, _)| place(unit)).min().unwrap_or(Some(self.blocks.len()))
    }

    fn quick(&self, parent: &Parent, levels: &[usize]) -> Result<f64> {
        self.judge(levels, self.first_change(parent, levels), self.few, &parent.few, &self.base_few)
    }

    fn full(&self, parent: &Parent, levels: &[usize]) -> Result<f64> {
        self.judge(levels, self.first_change(parent, levels), self.compared, &parent.states, &self.base)
    }

    fn judge(
        &self,
        levels: &[usize],
        first: Option<usize>,
        windows: &[Vec<u32>],
        states: &[States],
        base: &Outputs,
    ) -> Result<f64> {
        let model = self.model(levels);
        let (states, first) = match first {
            Some(index) => (states[index].clone(), index),
            None => (States::embed(&model, windows)?, 0),
        };
        Ok(base.divergence(&Outputs::of(&model, states.run_rest(&model, first)?)?))
    }

    /// Runs a policy and keeps its states.
    fn adopt(&self, levels: Vec<usize>) -> Result<Parent> {
        let model = self.model(&levels);
        let all = |windows: &[Vec<u32>]| -> Result<Vec<States>> {
            let mut states = vec![States::embed(&model, windows)?];
            for index in 0..self.blocks.len() {
                let last = states.last().expect("one at least").clone();
                states.push(last.run_range(&model, index..index + 1)?);
            }
            Ok(states)
        };
        let (states, few) = (all(self.compared)?, all(self.few)?);
        let last = states.last().expect("one at least").clone();
        let kl = self.base.divergence(&Outputs::of(&model, last)?);
        Ok(Parent { levels, kl, states, few })
    }
}
