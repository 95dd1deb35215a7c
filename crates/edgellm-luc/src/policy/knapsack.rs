//! The multiple-choice knapsack: one item from every class, least damage in all, every resource within its budget.
//!
//! Dynamic programming over classes on the Pareto front of costs and damage (Nemhauser and Ullmann 1969; Kellerer,
//! Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11): after each class only states are kept that no other
//! state beats in everything. Costs stay exact integers of any size; no table is indexed by them.
//!
//! States that cannot lead to the best end are dropped by a bound. For any multipliers `m >= 0`, weak Lagrangian duality
//! says that a state with costs `c` and damage `d` ends with at least
//! `d + m (c - budget) + sum over the classes left of min(damage + m cost)`; a state for which this is above the
//! damage of a selection that is already known cannot improve on it. With `m` near the [dual](super::dual)'s optimum a
//! few hundred states are left where there were millions. The result is still exact.
//!
//! Should more than `max_states` be left all the same, those of the lowest bounds are kept. The lowest bound that was
//! dropped then says how far the result may be from the best: [`Selection::gap`].

use std::collections::BTreeMap;

use super::dual::{dual, improve};

/// One way to take a class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item<const N: usize> {
    /// What it spends of each resource.
    pub costs: [u64; N],
    /// What it does; finite.
    pub damage: f64,
}

/// One item of every class.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection<const N: usize> {
    /// Index of the item taken from each class.
    pub items: Vec<usize>,
    /// Sums of costs.
    pub costs: [u64; N],
    /// Sum of damage, in class order.
    pub damage: f64,
    /// The best selection does at least `damage - gap`; 0 where the result is exact.
    pub gap: f64,
    /// Damage that one more unit of each resource would save, by the dual: its shadow price.
    pub prices: [f64; N],
}

/// The items of a class that no other item beats, by ascending first cost; with their indices in the class.
pub(super) type Front<const N: usize> = Vec<(usize, Item<N>)>;

#[derive(Clone, Copy)]
struct State<const N: usize> {
    costs: [u64; N],
    damage: f64,
    bound: f64,
    parent: u32,
    item: u32,
}

/// The selection of least damage within `budgets`; of equal ones, the one of lower costs.
///
/// # Errors
/// No selection keeps all budgets. Where a resource cannot even on its own: the least of each on its own. Else the least
/// of each while the budgets before it are kept; the first that is above its budget is the one to raise.
///
/// # Panics
/// If a class has no item, or `N` is 0.
///
/// ```
/// use edgellm_luc::{Item, select};
/// let class = [Item { costs: [2], damage: 4.0 }, Item { costs: [4], damage: 1.0 }];
/// let best = select(&[class.to_vec(), class.to_vec()], [7], 1 << 20).unwrap();
/// assert_eq!((best.costs, best.damage, best.gap), ([6], 5.0, 0.0));
/// assert_eq!(select(&[class.to_vec()], [1], 1 << 20), Err([2]));
/// ```
pub fn select<const N: usize>(
    classes: &[Vec<Item<N>>],
    budgets: [u64; N],
    max_states: usize,
) -> Result<Selection<N>, [u64; N]> {
    let fronts: Vec<Front<N>> = classes.iter().map(|class| undominated(class)).collect();
    let smallest = least_costs(&fronts)[0];
    if (0..N).any(|r| smallest[r] > budgets[r]) {
        return Err(smallest);
    }
    let dual = dual(&fronts, budgets);
    let start = match dual.picks.clone() {
        Some(picks) => picks,
        None => feasible(classes, &fronts, budgets, max_states, smallest)?,
    };
    let known = improve(&fronts, start, budgets);
    Ok(search(&fronts, budgets, dual.multipliers, &known, max_states.max(2)))
}

/// A selection that keeps all budgets, where the dual met none: the least of each resource in turn within the budgets of
/// those before it.
fn feasible<const N: usize>(
    classes: &[Vec<Item<N>>],
    fronts: &[Front<N>],
    budgets: [u64; N],
    max_states: usize,
    mut least: [u64; N],
) -> Result<Vec<usize>, [u64; N]> {
    let mut picks = cheapest(fronts, 0);
    for resource in 1..N {
        let spend = |item: &Item<N>| Item { damage: item.costs[resource] as f64, ..*item };
        let spending: Vec<Front<N>> =
            classes.iter().map(|class| undominated(&class.iter().map(spend).collect::<Vec<_>>())).collect();
        let limits = std::array::from_fn(|r| if r < resource { budgets[r] } else { u64::MAX });
        let dual = dual(&spending, limits);
        let start = dual.picks.clone().unwrap_or_else(|| positions(&spending, fronts, &picks));
        let known = improve(&spending, start, limits);
        let found = search(&spending, limits, dual.multipliers, &known, max_states.max(2));
        least[resource] = found.costs[resource];
        if found.costs[resource] > budgets[resource] {
            return Err(least);
        }
        picks = by_item(fronts, classes, &found.items);
    }
    Ok(picks)
}

/// Positions in `to` of items that are at `picks` in `from`, or of one that beats it.
fn positions<const N: usize>(to: &[Front<N>], from: &[Front<N>], picks: &[usize]) -> Vec<usize> {
    let costs = from.iter().zip(picks).map(|(front, &i)| front[i].1.costs);
    to.iter().zip(costs).map(|(front, costs)| no_dearer(front, costs)).collect()
}

/// Positions in the fronts of `items`, or of those that beat them.
fn by_item<const N: usize>(fronts: &[Front<N>], classes: &[Vec<Item<N>>], items: &[usize]) -> Vec<usize> {
    let costs = classes.iter().zip(items).map(|(class, &i)| class[i].costs);
    fronts.iter().zip(costs).map(|(front, costs)| no_dearer(front, costs)).collect()
}

/// An item of a front that costs no more than `costs`: there is one, since fronts hold all that nothing beats.
fn no_dearer<const N: usize>(front: &Front<N>, costs: [u64; N]) -> usize {
    front.iter().position(|(_, item)| (0..N).all(|r| item.costs[r] <= costs[r])).unwrap_or(0)
}

fn cheapest<const N: usize>(fronts: &[Front<N>], resource: usize) -> Vec<usize> {
    let least = |front: &Front<N>| (0..front.len()).min_by_key(|&i| front[i].1.costs[resource]).unwrap_or(0);
    fronts.iter().map(least).collect()
}

fn undominated<const N: usize>(class: &[Item<N>]) -> Front<N> {
    let mut order: Front<N> = class.iter().copied().enumerate().collect();
    order.sort_by(|(i, a), (j, b)| a.costs.cmp(&b.costs).then(a.damage.total_cmp(&b.damage)).then(i.cmp(j)));
    let mut front: Front<N> = Vec::new();
    for (index, item) in order {
        let beats = |other: &Item<N>| other.damage <= item.damage && (0..N).all(|r| other.costs[r] <= item.costs[r]);
        if !front.iter().any(|(_, other)| beats(other)) {
            front.push((index, item));
        }
    }
    assert!(!front.is_empty() && N > 0, "a class of the knapsack has no item");
    front
}

/// The least of each resource that the classes from `i` on need.
fn least_costs<const N: usize>(fronts: &[Front<N>]) -> Vec<[u64; N]> {
    let mut out = vec![[0u64; N]; fronts.len() + 1];
    for (i, front) in fronts.iter().enumerate().rev() {
        let least = |r: usize| front.iter().map(|(_, item)| item.costs[r]).min().unwrap_or(0);
        out[i] = std::array::from_fn(|r| out[i + 1][r].saturating_add(least(r)));
    }
    out
}

pub(super) fn selection<const N: usize>(fronts: &[Front<N>], picks: &[usize]) -> Selection<N> {
    let chosen = || fronts.iter().zip(picks).map(|(front, &i)| front[i]);
    Selection {
        items: chosen().map(|(index, _)| index).collect(),
        costs: chosen().fold([0; N], |sum, (_, item)| add(sum, item.costs)),
        damage: chosen().map(|(_, item)| item.damage).sum(),
        gap: 0.0,
        prices: [0.0; N],
    }
}

pub(super) fn add<const N: usize>(a: [u64; N], b: [u64; N]) -> [u64; N] {
    std::array::from_fn(|r| a[r].saturating_add(b[r]))
}

struct Bound<const N: usize> {
    multipliers: [f64; N],
    /// For each number of classes taken: the least relaxed value of those left.
    rest: Vec<f64>,
    /// The least costs of those left.
    least: Vec<[u64; N]>,
    budgets: [u64; N],
    /// Damage of a selection that is known.
    known: f64,
}

impl<const N: usize> Bound<N> {
    /// A lower bound of what a state ends with, if it may end within the budgets and no worse than what is known.
    fn of(&self, taken: usize, costs: [u64; N], damage: f64) -> Option<f64> {
        if (0..N).any(|r| costs[r].saturating_add(self.least[taken][r]) > self.budgets[r]) {
            return None;
        }
        let (mut price, mut size) = (0.0, 0.0);
        for ((m, &cost), &budget) in self.multipliers.iter().zip(&costs).zip(&self.budgets) {
            price += m * (cost as f64 - budget as f64);
            size += m * cost.max(budget) as f64;
        }
        let bound = damage + price + self.rest[taken];
        // The sums are rounded: give them the benefit of the doubt.
        let scale = self.known.abs() + damage.abs() + size + self.rest[taken].abs();
        let bound = bound - 1e-12 * scale;
        (bound <= self.known).then_some(bound)
    }
}

fn search<const N: usize>(
    fronts: &[Front<N>],
    budgets: [u64; N],
    multipliers: [f64; N],
    known: &Selection<N>,
    max_states: usize,
) -> Selection<N> {
    let value = |item: &Item<N>| item.damage + (0..N).map(|r| multipliers[r] * item.costs[r] as f64).sum::<f64>();
    let mut rest = vec![0.0; fronts.len() + 1];
    for (i, front) in fronts.iter().enumerate().rev() {
        rest[i] = rest[i + 1] + front.iter().map(|(_, item)| value(item)).fold(f64::INFINITY, f64::min);
    }
    let bound = Bound { multipliers, rest, least: least_costs(fronts), budgets, known: known.damage };
    let mut layers = vec![vec![State { costs: [0; N], damage: 0.0, bound: 0.0, parent: 0, item: 0 }]];
    let mut dropped = f64::INFINITY;
    for (class, front) in fronts.iter().enumerate() {
        let mut next = Vec::new();
        for (parent, state) in layers[class].iter().enumerate() {
            for (item, (_, taken)) in front.iter().enumerate() {
                let (costs, damage) = (add(state.costs, taken.costs), state.damage + taken.damage);
                if let Some(bound) = bound.of(class + 1, costs, damage) {
                    next.push(State { costs, damage, bound, parent: parent as u32, item: item as u32 });
                }
            }
        }
        keep_undominated(&mut next);
        if next.len() > max_states {
            next.sort_by(|a, b| a.bound.total_cmp(&b.bound).then(a.costs.cmp(&b.costs)));
            dropped = dropped.min(next[max_states].bound);
            next.truncate(max_states);
        }
        layers.push(next);
    }
    let mut best = known.clone();
    let order = |a: &State<N>, b: &State<N>| a.damage.total_cmp(&b.damage).then(a.costs.cmp(&b.costs));
    let last = &layers[fronts.len()];
    if let Some(end) = (0..last.len()).min_by(|&a, &b| order(&last[a], &last[b])) {
        let found = selection(fronts, &picks_of(&layers, end));
        if found.damage <= known.damage {
            best = found;
        }
    }
    Selection { gap: (best.damage - dropped).max(0.0), prices: multipliers, ..best }
}

/// The items that lead to state `at` of the last layer.
fn picks_of<const N: usize>(layers: &[Vec<State<N>>], mut at: usize) -> Vec<usize> {
    let mut picks = vec![0; layers.len() - 1];
    for class in (0..picks.len()).rev() {
        let state = layers[class + 1][at];
        (picks[class], at) = (state.item as usize, state.parent as usize);
    }
    picks
}

/// Drops states that another one beats. States come by ascending first cost; of those so far, the map holds the least
/// damage for each second cost. A third cost is compared with that state alone: some beaten states stay then, which
/// costs time only.
fn keep_undominated<const N: usize>(states: &mut Vec<State<N>>) {
    states.sort_by(|a, b| {
        let order = a.costs.cmp(&b.costs).then(a.damage.total_cmp(&b.damage));
        order.then(a.parent.cmp(&b.parent)).then(a.item.cmp(&b.item))
    });
    let cost = |state: &State<N>, r: usize| state.costs.get(r).copied().unwrap_or(0);
    let others = |state: &State<N>| {
        state.costs.get(2..).map_or([0; N], |rest| {
            let mut costs = [0; N];
            costs[..rest.len()].copy_from_slice(rest);
            costs
        })
    };
    let mut stairs: BTreeMap<u64, (f64, [u64; N])> = BTreeMap::new();
    states.retain(|state| {
        let key = cost(state, 1);
        if let Some((_, (damage, costs))) = stairs.range(..=key).next_back() {
            let cheaper = costs.iter().zip(others(state)).all(|(theirs, ours)| *theirs <= ours);
            if *damage <= state.damage {
                if cheaper {
                    return false;
                }
                return true;
            }
        }
        let above: Vec<u64> = stairs.range(key..).take_while(|(_, s)| s.0 >= state.damage).map(|(&k, _)| k).collect();
        for key in above {
            stairs.remove(&key);
        }
        stairs.insert(key, (state.damage, others(state)));
        true
    });
}
