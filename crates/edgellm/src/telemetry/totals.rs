//! Sums of time and bytes, by kind of pass, layer and operator.

use std::collections::BTreeMap;

/// Layers beyond this are not counted: an index comes from a span's field, which nobody checks.
const MAX_LAYERS: usize = 4096;

/// What a model runs for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Many tokens at once: prompts, windows of evaluations and of calibration.
    Prefill,
    /// Token by token.
    Decode,
    /// Steps of tuning, forward and backward.
    Tune,
}

impl Pass {
    /// All of them.
    pub const ALL: [Pass; 3] = [Pass::Prefill, Pass::Decode, Pass::Tune];

    /// Its name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Pass::Prefill => "prefill",
            Pass::Decode => "decode",
            Pass::Tune => "tune",
        }
    }

    /// The pass that a span with this name is.
    pub(super) fn of(span: &str) -> Option<Self> {
        match span {
            "prefill" | "evaluate" => Some(Pass::Prefill),
            "decode" => Some(Pass::Decode),
            "tune_step" => Some(Pass::Tune),
            _ => None,
        }
    }
}

/// Nanoseconds by name: a handful of names, so that a list is quicker than a map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Named(Vec<(&'static str, u64)>);

impl Named {
    /// Adds to a name's time.
    pub fn add(&mut self, name: &'static str, ns: u64) {
        match self.0.iter_mut().find(|(known, _)| std::ptr::eq(*known, name) || *known == name) {
            Some((_, sum)) => *sum += ns,
            None => self.0.push((name, ns)),
        }
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: &Named) {
        other.iter().for_each(|(name, ns)| self.add(name, ns));
    }

    /// Names with their nanoseconds.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        self.0.iter().copied()
    }

    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

/// Of one layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerTotals {
    /// Wall time in its blocks.
    pub ns: u64,
    /// Bytes of packed weights that were read.
    pub bytes: u64,
    /// The part of `ns` in which operators were timed.
    sampled_ns: u64,
    operators: Named,
}

impl LayerTotals {
    /// Nanoseconds by operator: what was timed, scaled to the whole time of the layer.
    pub fn operators(&self) -> BTreeMap<&'static str, f64> {
        scaled(&self.operators, self.ns, self.sampled_ns)
    }
}

/// Of one kind of pass.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PassTotals {
    /// Passes.
    pub passes: u64,
    /// Tokens that were run, or generated.
    pub tokens: u64,
    /// Wall time of the passes.
    pub ns: u64,
    /// By index of the block.
    pub layers: Vec<LayerTotals>,
    sampled_ns: u64,
    inside: Named,
    outside: Named,
}

impl PassTotals {
    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.passes == 0 && self.layers.is_empty()
    }

    /// Nanoseconds of the operators outside of blocks: the head, sampling.
    pub fn operators(&self) -> BTreeMap<&'static str, f64> {
        let mut sums = scaled(&self.inside, self.ns, self.sampled_ns);
        for (name, ns) in self.outside.iter() {
            *sums.entry(name).or_default() += ns as f64;
        }
        sums
    }
}

/// Sums over some time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    passes: [PassTotals; 3],
    /// Wall time of other stages, by name.
    pub stages: Named,
}

impl Totals {
    /// Of one kind of pass.
    pub fn pass(&self, pass: Pass) -> &PassTotals {
        &self.passes[pass as usize]
    }

    /// Counts a pass; `sampled` says whether its operators were timed.
    pub fn add_pass(&mut self, pass: Pass, tokens: u64, ns: u64, sampled: bool) {
        let sums = &mut self.passes[pass as usize];
        sums.passes += 1;
        sums.tokens += tokens;
        sums.ns += ns;
        sums.sampled_ns += if sampled { ns } else { 0 };
    }

    /// Counts a block; `operators` are those that were timed in it, if `sampled`.
    pub fn add_block(&mut self, pass: Pass, index: usize, ns: u64, bytes: u64, sampled: bool, operators: &Named) {
        if index >= MAX_LAYERS {
            return;
        }
        let layers = &mut self.passes[pass as usize].layers;
        if layers.len() <= index {
            layers.resize_with(index + 1, LayerTotals::default);
        }
        let layer = &mut layers[index];
        layer.ns += ns;
        layer.bytes += bytes;
        if sampled {
            layer.sampled_ns += ns;
            layer.operators.merge(operators);
        }
    }

    /// Counts an operator outside of blocks, within a pass or after it.
    pub fn add_operator(&mut self, pass: Pass, name: &'static str, ns: u64, within: bool) {
        let sums = &mut self.passes[pass as usize];
        (if within { &mut sums.inside } else { &mut sums.outside }).add(name, ns);
    }

    /// Adds all of another.
    pub fn merge(&mut self, other: &Totals) {
        for (sums, new) in self.passes.iter_mut().zip(&other.passes) {
            sums.passes += new.passes;
            sums.tokens += new.tokens;
            sums.ns += new.ns;
            sums.sampled_ns += new.sampled_ns;
            sums.inside.merge(&new.inside);
            sums.outside.merge(&new.outside);
            sums.layers.resize_with(sums.layers.len().max(new.layers.len()), LayerTotals::default);
            for (layer, new) in sums.layers.iter_mut().zip(&new.layers) {
                layer.ns += new.ns;
                layer.bytes += new.bytes;
                layer.sampled_ns += new.sampled_ns;
                layer.operators.merge(&new.operators);
            }
        }
        self.stages.merge(&other.stages);
    }
}

fn scaled(operators: &Named, ns: u64, sampled_ns: u64) -> BTreeMap<&'static str, f64> {
    let factor = if sampled_ns == 0 { 1.0 } else { ns as f64 / sampled_ns as f64 };
    operators.iter().map(|(name, ns)| (name, ns as f64 * factor)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampled_operators_are_scaled_to_the_time_of_all_blocks() {
        let (mut totals, mut operators) = (Totals::default(), Named::default());
        operators.add("qkv", 30);
        operators.add("down", 50);
        totals.add_block(Pass::Decode, 1, 100, 7, true, &operators);
        totals.add_block(Pass::Decode, 1, 300, 7, false, &Named::default());
        totals.add_operator(Pass::Decode, "head", 10, true);
        totals.add_operator(Pass::Decode, "sample", 3, false);
        totals.add_pass(Pass::Decode, 1, 200, true);
        totals.add_pass(Pass::Decode, 1, 400, false);
        let pass = totals.pass(Pass::Decode);
        assert_eq!((pass.tokens, pass.passes, pass.ns, pass.layers.len()), (2, 2, 600, 2));
        assert_eq!((pass.layers[1].ns, pass.layers[1].bytes), (400, 14));
        assert_eq!(pass.layers[1].operators(), [("qkv", 120.0), ("down", 200.0)].into());
        assert_eq!(pass.operators(), [("head", 30.0), ("sample", 3.0)].into());
        assert!(totals.pass(Pass::Tune).is_empty() && pass.layers[0].ns == 0);

        let mut twice = totals.clone();
        twice.merge(&totals);
        assert_eq!(twice.pass(Pass::Decode).layers[1].operators()["qkv"], 240.0);
        assert_eq!(twice.pass(Pass::Decode).tokens, 4);
    }

    #[test]
    fn an_index_that_no_model_has_takes_no_memory() {
        let mut totals = Totals::default();
        totals.add_block(Pass::Decode, usize::MAX, 1, 1, true, &Named::default());
        assert!(totals.pass(Pass::Decode).is_empty());
    }
}
