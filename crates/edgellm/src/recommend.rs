//! What to do with a model on a device: from a measurement and a profile to a policy, a number of threads and a schedule.
//!
//! Quality is the share of the base model's probability that is kept, `exp(-KL(base || compressed))`: the geometric mean,
//! under the base's own distribution, of what the compressed model gives to a token over what the base gives to it. Like
//! [`Solve`], it adds up what the units cost alone. Wanted is the fastest model that keeps the quality within the memory; it
//! is found by bisecting milliseconds, since a longer time never costs quality. Where all weights do not fit at that quality,
//! the smallest model that keeps it is streamed. Without a wish for quality, the best within memory and time is wanted.

use edgellm_luc::{Costs, DecodeDevice, Solution, Solve, decoder_shape};
use edgellm_model::ModelError;
use edgellm_model::traits::{CostModel, DecoderShape};
use edgellm_model::values::{Budget, DeviceProfile, LayerFormat, Measurement, Unit};
use edgellm_sched::Roofline;

use crate::EdgeError;
use crate::schedule::{Parts, Schedule, ScheduledBlock};
use crate::session::{Memory, Needs};

/// Bisection ends when its bounds are this near to each other, as a share.
const PRECISION: f64 = 2e-3;
/// More threads than another number must be faster by this factor: otherwise they only take energy.
const WORTH: f64 = 1.02;

/// What is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Wish {
    /// The least share of the base's probability, above 0 and below 1.
    pub min_quality: Option<f64>,
    /// The most milliseconds for a decoded token.
    pub max_milliseconds: Option<f64>,
}

/// What to do, and what to expect.
#[derive(Clone, Debug)]
pub struct Recommendation {
    /// Formats, and what they cost.
    pub solution: Solution,
    /// Threads that decode.
    pub threads: usize,
    /// What stays in memory, and how long a token takes.
    pub schedule: Schedule,
}

impl Recommendation {
    /// The predicted share of the base's probability.
    pub fn quality(&self) -> f64 {
        (-self.solution.sensitivity).exp()
    }
}

/// Recommends for each number of threads that the profile has measured; the first is the one to take. `process` are the
/// bytes that a process has before it loads the model.
///
/// # Errors
/// A wish out of range or none that limits anything, a profile without measured rates of decoding, or wishes that cannot all
/// be kept: the message says what could be.
pub fn recommend(
    measurement: &Measurement,
    profile: &DeviceProfile,
    memory: Memory,
    process: u64,
    wish: Wish,
) -> Result<Vec<Recommendation>, EdgeError> {
    wish.check()?;
    let mut found: Vec<Recommendation> = Vec::new();
    let mut refusal = None;
    let mut threads: Vec<usize> = profile.decode.iter().map(|rates| rates.threads).collect();
    threads.sort_unstable();
    if threads.is_empty() {
        return Err(value(
            &format!("device profile '{}'", profile.name),
            "measured rates of decoding, as `edgellm profile` writes them".into(),
            "none".into(),
        ));
    }
    for threads in threads {
        let cost = Roofline::new(profile.clone())?.with_threads(threads)?;
        match (Choice { measurement, cost: &cost, memory, process, wish, threads }.best()) {
            Ok(best) => found.push(best),
            Err(error) => refusal = Some(error),
        }
    }
    // Fewer threads come first, and stay there unless more are worth it.
    found.sort_by(|a, b| {
        let seconds = |r: &Recommendation| r.schedule.seconds() * WORTH.powi(r.threads as i32);
        seconds(a).total_cmp(&seconds(b))
    });
    match refusal {
        Some(error) if found.is_empty() => Err(error),
        _ => Ok(found),
    }
}

/// The schedule of a solution that is not written yet.
///
/// # Errors
/// As [`schedule`](crate::schedule::schedule).
pub fn schedule_of(
    measurement: &Measurement,
    solution: &Solution,
    memory: Memory,
    process: u64,
    cost: &Roofline,
) -> Result<Schedule, EdgeError> {
    let shape = decoder_shape(measurement, memory.cache_tokens)?;
    let device = DecodeDevice { model: cost, context: memory.cache_tokens };
    let costs = Costs::new(measurement, &Budget::default(), Some(device))?;
    let outside = cost.fixed(&DecoderShape { n_blocks: 0, ..shape })?.milliseconds;
    let own = (costs.fixed().milliseconds - outside) / shape.n_blocks as f64;
    let mut blocks = vec![ScheduledBlock { bytes: 0, bits: 0.0, seconds: own * 1e-3 }; shape.n_blocks];
    let mut weights = vec![0u64; shape.n_blocks];
    let buffers = memory.buffers(&shape);
    let reserve = Memory::reserve(buffers);
    let mut fixed = process + buffers + reserve;
    let mut head_seconds = outside * 1e-3;
    for (index, (unit, option)) in measurement.units.iter().zip(&solution.options).enumerate() {
        let cost = costs.unit(index, &measurement.options[*option])?;
        match unit.unit {
            Unit::Block(block) | Unit::Linear(block, _) => {
                blocks[block].bytes += cost.resident_bytes;
                blocks[block].seconds += cost.milliseconds * 1e-3;
                weights[block] += unit.matrices.iter().map(|matrix| matrix.weights()).sum::<u64>();
            }
            Unit::Embedding | Unit::Head => {
                fixed += cost.resident_bytes;
                head_seconds += cost.milliseconds * 1e-3;
            }
        }
    }
    for (block, weights) in blocks.iter_mut().zip(weights) {
        block.bits = 8.0 * block.bytes as f64 / weights.max(1) as f64;
    }
    let all = blocks.iter().map(|block| block.bytes).sum();
    Parts { blocks, head_seconds, needs: Needs { fixed, reserve, blocks: all, limit: memory.limit } }.arrange(cost)
}

impl Wish {
    fn check(&self) -> Result<(), EdgeError> {
        if let Some(quality) = self.min_quality.filter(|q| !(*q > 0.0 && *q < 1.0)) {
            return Err(value("the least quality", "a share above 0 and below 1".into(), quality.to_string()));
        }
        match self.max_milliseconds {
            Some(ms) if !ms.is_finite() || ms <= 0.0 => {
                Err(value("milliseconds of a token", "a number above 0".into(), ms.to_string()))
            }
            _ => Ok(()),
        }
    }
}

/// A search on one number of threads.
struct Choice<'a> {
    measurement: &'a Measurement,
    cost: &'a Roofline,
    memory: Memory,
    process: u64,
    wish: Wish,
    threads: usize,
}

impl Choice<'_> {
    fn best(&self) -> Result<Recommendation, EdgeError> {
        let resident = self.resident_budget()?;
        let whole = resident.and_then(|peak| {
            let budget = Budget { peak_bytes: Some(peak), ..self.time() };
            let best = self.solve(&budget).ok()?;
            self.keeps(&best).then_some((peak, best))
        });
        let solution = match whole {
            Some((peak, best)) if self.wish.min_quality.is_some() => self.fastest(peak, best)?,
            Some((_, best)) => best,
            None => self.smallest()?,
        };
        let schedule = schedule_of(self.measurement, &solution, self.memory, self.process, self.cost)?;
        if let Some(most) = self.wish.max_milliseconds.filter(|most| 1e3 * schedule.seconds() > *most) {
            let expected = format!("{most} ms a token");
            return Err(value("the wishes", expected, format!("at best {:.3} ms", 1e3 * schedule.seconds())));
        }
        Ok(Recommendation { solution, threads: self.threads, schedule })
    }

    /// What a solver may spend so that the process stays within its memory; `None` if not even buffers fit.
    fn resident_budget(&self) -> Result<Option<u64>, EdgeError> {
        let shape = decoder_shape(self.measurement, self.memory.cache_tokens)?;
        let counted = self.cost.fixed(&shape)?.resident_bytes;
        let buffers = self.memory.buffers(&shape);
        let beside = self.process + buffers + Memory::reserve(buffers);
        Ok(self.memory.limit.checked_sub(beside.saturating_sub(counted)).filter(|left| *left > 0))
    }

    fn time(&self) -> Budget {
        Budget { milliseconds: self.wish.max_milliseconds, ..Budget::default() }
    }

    fn solve(&self, budget: &Budget) -> Result<Solution, EdgeError> {
        let device = Some(DecodeDevice { model: self.cost, context: self.memory.cache_tokens });
        Ok(Solve { device, ..Solve::default() }.solution(self.measurement, budget)?)
    }

    fn keeps(&self, solution: &Solution) -> bool {
        self.wish.min_quality.is_none_or(|quality| solution.sensitivity <= -quality.ln())
    }

    /// Predicted milliseconds of a solution whose weights are all in memory.
    fn milliseconds(&self, solution: &Solution) -> Result<f64, EdgeError> {
        let device = Some(DecodeDevice { model: self.cost, context: self.memory.cache_tokens });
        let formats: Vec<LayerFormat> = solution.options.iter().map(|o| self.measurement.options[*o]).collect();
        Ok(Costs::new(self.measurement, &Budget::default(), device)?.total(&formats)?[1] as f64 * 1e-6)
    }

    /// The fastest that keeps the quality within `peak` bytes, given one that does.
    fn fastest(&self, peak: u64, best: Solution) -> Result<Solution, EdgeError> {
        let mut high = self.milliseconds(&best)?;
        let (mut low, mut found) = (0.0, best);
        while high - low > PRECISION * high {
            let middle = 0.5 * (low + high);
            let budget = Budget { milliseconds: Some(middle), peak_bytes: Some(peak), ..Budget::default() };
            match self.solve(&budget) {
                Ok(solution) if self.keeps(&solution) => {
                    high = self.milliseconds(&solution)?.min(middle);
                    found = solution;
                }
                _ => low = middle,
            }
        }
        Ok(found)
    }

    /// The smallest that keeps the quality.
    fn smallest(&self) -> Result<Solution, EdgeError> {
        let Some(quality) = self.wish.min_quality else {
            // Nothing but memory and time was asked for, and they cannot be kept: the solver says what the least is.
            let peak = self.resident_budget()?.unwrap_or(1);
            return self.solve(&Budget { peak_bytes: Some(peak), ..self.time() });
        };
        let best = self.solve(&Budget { bytes: Some(u64::MAX), ..Budget::default() })?;
        if !self.keeps(&best) {
            let found = format!("{:.4} at best with the measured formats", (-best.sensitivity).exp());
            return Err(value("the quality", format!("at least {quality}"), found));
        }
        let (mut low, mut high, mut found) = (0, best.bytes, best);
        while (high - low) as f64 > PRECISION * high as f64 {
            let middle = low + (high - low) / 2;
            match self.solve(&Budget { bytes: Some(middle), ..Budget::default() }) {
                Ok(solution) if self.keeps(&solution) => {
                    high = solution.bytes.min(middle);
                    found = solution;
                }
                _ => low = middle,
            }
        }
        Ok(found)
    }
}

fn value(what: &str, expected: String, found: String) -> EdgeError {
    ModelError::Value { what: what.into(), expected, found }.into()
}
