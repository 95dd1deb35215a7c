//! The Lagrangian dual of the knapsack, and selections that it leads to.
//!
//! With a multiplier `m` for each resource, `L(m) = sum over classes of min(damage + m cost) - m budget` is a lower bound of
//! the least damage, concave in `m` (Kellerer, Pferschy and Pisinger, "Knapsack Problems", 2004, sections 2.6 and
//! 11.2). One multiplier is found by bisection: the spending falls as it grows. Several are found one after the other
//! in turns, and by Polyak's subgradient steps, since turns alone may stall at a kink. Any `m` gives a valid bound, so
//! that how well this works only decides how long the exact search takes.

use super::knapsack::{Front, Selection, add, selection};

/// Turns of single multipliers, where there are several.
const TURNS: usize = 4;
/// Subgradient steps.
const STEPS: usize = 300;
/// Steps without a better bound after which they become shorter.
const PATIENCE: usize = 12;

/// Multipliers, and the best selection within the budgets that was met on the way.
pub(super) struct Dual<const N: usize> {
    pub(super) multipliers: [f64; N],
    pub(super) picks: Option<Vec<usize>>,
}

struct Ascent<'a, const N: usize> {
    fronts: &'a [Front<N>],
    budgets: [u64; N],
    multipliers: [f64; N],
    /// The best bound and where it was found.
    best: (f64, [f64; N]),
    /// The least damage within the budgets, and how.
    known: Option<(f64, Vec<usize>)>,
}

/// Multipliers near the dual's optimum.
pub(super) fn dual<const N: usize>(fronts: &[Front<N>], budgets: [u64; N]) -> Dual<N> {
    let zero = [0.0; N];
    let mut ascent = Ascent { fronts, budgets, multipliers: zero, best: (f64::NEG_INFINITY, zero), known: None };
    let costs = ascent.at(zero);
    if (0..N).all(|r| costs[r] <= budgets[r]) {
        // Nothing binds: the least damage of every class.
        return Dual { multipliers: zero, picks: ascent.known.map(|(_, picks)| picks) };
    }
    for turn in 0..if N == 1 { 1 } else { TURNS } {
        for resource in 0..N {
            ascent.bisect(resource);
        }
        if N > 1 && turn + 1 < TURNS {
            ascent.multipliers = ascent.best.1;
            ascent.climb();
            ascent.multipliers = ascent.best.1;
        }
    }
    Dual { multipliers: ascent.best.1, picks: ascent.known.map(|(_, picks)| picks) }
}

impl<const N: usize> Ascent<'_, N> {
    /// What the best items for these multipliers cost; of equals, the first. Takes note of bound and selection.
    fn at(&mut self, multipliers: [f64; N]) -> [u64; N] {
        let (mut costs, mut damage, mut value) = ([0u64; N], 0.0, 0.0);
        let mut picks = Vec::with_capacity(self.fronts.len());
        for front in self.fronts {
            let mut best = (f64::INFINITY, 0);
            for (i, (_, item)) in front.iter().enumerate() {
                let value = item.damage + (0..N).map(|r| multipliers[r] * item.costs[r] as f64).sum::<f64>();
                if value < best.0 {
                    best = (value, i);
                }
            }
            let item = front[best.1].1;
            (costs, damage, value) = (add(costs, item.costs), damage + item.damage, value + best.0);
            picks.push(best.1);
        }
        let budget: f64 = (0..N).map(|r| multipliers[r] * self.budgets[r] as f64).sum();
        if value - budget > self.best.0 {
            self.best = (value - budget, multipliers);
        }
        let fits = (0..N).all(|r| costs[r] <= self.budgets[r]);
        if fits && self.known.as_ref().is_none_or(|(known, _)| damage < *known) {
            self.known = Some((damage, picks));
        }
        costs
    }

    /// The least multiplier of `resource`, up to rounding, that keeps its budget while the others stay.
    fn bisect(&mut self, resource: usize) {
        let with = |multipliers: [f64; N], value: f64| {
            let mut changed = multipliers;
            changed[resource] = value;
            changed
        };
        let base = self.multipliers;
        if self.at(with(base, 0.0))[resource] <= self.budgets[resource] {
            self.multipliers[resource] = 0.0;
            return;
        }
        let (mut low, mut high) = (0.0, self.most(resource));
        for _ in 0..if N == 1 { 200 } else { 80 } {
            let middle = 0.5 * (low + high);
            if self.at(with(base, middle))[resource] <= self.budgets[resource] {
                high = middle;
            } else {
                low = middle;
            }
        }
        self.multipliers[resource] = high;
    }

    /// A multiplier above which every class takes the item that costs least of `resource`.
    fn most(&self, resource: usize) -> f64 {
        let range = |front: &Front<N>| {
            let value = |item: &super::knapsack::Item<N>| {
                let others = (0..N).filter(|&r| r != resource).map(|r| self.multipliers[r] * item.costs[r] as f64);
                item.damage + others.sum::<f64>()
            };
            let values = || front.iter().map(|(_, item)| value(item));
            values().fold(f64::NEG_INFINITY, f64::max) - values().fold(f64::INFINITY, f64::min)
        };
        self.fronts.iter().map(range).fold(0.0, f64::max) + 1.0
    }

    /// Polyak's subgradient steps, on resources in shares of their budgets.
    fn climb(&mut self) {
        let shares: [f64; N] = std::array::from_fn(|r| self.budgets[r].max(1) as f64);
        let worst: f64 =
            self.fronts.iter().map(|f| f.iter().map(|(_, item)| item.damage).fold(f64::NEG_INFINITY, f64::max)).sum();
        let (mut length, mut waited) = (1.0, 0);
        for _ in 0..STEPS {
            let before = self.best.0;
            let costs = self.at(self.multipliers);
            let slope: [f64; N] = std::array::from_fn(|r| (costs[r] as f64 - self.budgets[r] as f64) / shares[r]);
            let norm: f64 = slope.iter().map(|s| s * s).sum();
            let target = self.known.as_ref().map_or(worst, |(damage, _)| *damage);
            if norm == 0.0 || target <= self.best.0 {
                return;
            }
            waited = if self.best.0 > before { 0 } else { waited + 1 };
            if waited > PATIENCE {
                (length, waited) = (0.5 * length, 0);
                self.multipliers = self.best.1;
                continue;
            }
            let step = length * (target - self.best.0) / norm;
            for r in 0..N {
                self.multipliers[r] = (self.multipliers[r] + step * slope[r] / shares[r]).max(0.0);
            }
        }
    }
}

/// Exchanges single items for the better as long as the budgets allow: a good upper bound.
pub(super) fn improve<const N: usize>(fronts: &[Front<N>], mut picks: Vec<usize>, budgets: [u64; N]) -> Selection<N> {
    loop {
        let costs = selection(fronts, &picks).costs;
        let mut best: Option<(f64, usize, usize)> = None;
        for (class, front) in fronts.iter().enumerate() {
            let now = front[picks[class]].1;
            for (i, (_, item)) in front.iter().enumerate() {
                let gain = now.damage - item.damage;
                let fits = || (0..N).all(|r| (costs[r] - now.costs[r]).saturating_add(item.costs[r]) <= budgets[r]);
                if gain > best.map_or(0.0, |(g, ..)| g) && fits() {
                    best = Some((gain, class, i));
                }
            }
        }
        match best {
            Some((_, class, i)) => picks[class] = i,
            None => return selection(fronts, &picks),
        }
    }
}
