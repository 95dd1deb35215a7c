//! The multiple-choice knapsack: one item from every class, least damage in all, bytes within a budget.
//!
//! Dynamic programming over classes on the Pareto front of `(bytes, damage)` (Nemhauser and Ullmann 1969; Kellerer,
//! Pferschy and Pisinger, "Knapsack Problems", 2004, chapter 11): after each class only states are kept that no other
//! state beats in both. Bytes stay exact integers of any size; no table is indexed by them.
//!
//! States that cannot lead to the best end are dropped by a bound. For any multiplier `m >= 0`, weak Lagrangian duality
//! says that a state with `b` bytes and damage `d` ends with at least
//! `d + m (b - budget) + sum over the classes left of min(damage + m bytes)`; a state for which this is above the
//! damage of a selection that is already known cannot improve on it. With `m` at the dual's optimum a few hundred
//! states are left where there were millions. The result is still exact.
//!
//! Should a front outgrow `max_states` all the same, states within `delta` of a cheaper one are merged into it; the sum of
//! these `delta` bounds the loss and is returned as [`Selection::gap`].

/// One way to take a class.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item {
    /// What it spends.
    pub bytes: u64,
    /// What it does; finite.
    pub damage: f64,
}

/// One item of every class.
#[derive(Clone, Debug, PartialEq)]
pub struct Selection {
    /// Index of the item taken from each class.
    pub items: Vec<usize>,
    /// Sum of bytes.
    pub bytes: u64,
    /// Sum of damage, in class order.
    pub damage: f64,
    /// The best selection does at least `damage - gap`; 0 where the result is exact.
    pub gap: f64,
}

/// The items of a class that no other item beats, by ascending bytes; with their indices in the class.
type Front = Vec<(usize, Item)>;

#[derive(Clone, Copy)]
struct State {
    bytes: u64,
    damage: f64,
    parent: u32,
    item: u32,
}

/// The selection of least damage within `budget` bytes; of equal ones, the one with fewer bytes.
///
/// # Errors
/// If even the smallest items exceed the budget: the bytes that they need.
///
/// # Panics
/// If a class has no item.
///
/// ```
/// use edgellm_luc::{Item, select};
/// let class = [Item { bytes: 2, damage: 4.0 }, Item { bytes: 4, damage: 1.0 }];
/// let best = select(&[class.to_vec(), class.to_vec()], 7, 1 << 20).unwrap();
/// assert_eq!((best.bytes, best.damage, best.gap), (6, 5.0, 0.0));
/// assert_eq!(select(&[class.to_vec()], 1, 1 << 20), Err(2));
/// ```
pub fn select(classes: &[Vec<Item>], budget: u64, max_states: usize) -> Result<Selection, u64> {
    let fronts: Vec<Front> = classes.iter().map(|class| undominated(class)).collect();
    let least = suffix_sums(&fronts, 0u64, |sum, front| sum.saturating_add(front[0].1.bytes));
    if least[0] > budget {
        return Err(least[0]);
    }
    let (multiplier, picks) = dual(&fronts, budget);
    let known = improve(&fronts, picks, budget);
    let rest = suffix_sums(&fronts, 0.0, |sum, front| {
        sum + front.iter().map(|(_, item)| item.damage + multiplier * item.bytes as f64).fold(f64::INFINITY, f64::min)
    });
    let bound = Bound { multiplier, rest, least, budget, known: known.damage };
    Ok(search(&fronts, &bound, max_states.max(2), known))
}

fn undominated(class: &[Item]) -> Front {
    let mut order: Front = class.iter().copied().enumerate().collect();
    order.sort_by(|(i, a), (j, b)| a.bytes.cmp(&b.bytes).then(a.damage.total_cmp(&b.damage)).then(i.cmp(j)));
    let mut front: Front = Vec::new();
    for (index, item) in order {
        if front.last().is_none_or(|(_, last)| item.damage < last.damage) {
            front.push((index, item));
        }
    }
    assert!(!front.is_empty(), "a class of the knapsack has no item");
    front
}

/// `out[i]` folds `fronts[i..]` from the end.
fn suffix_sums<T: Copy>(fronts: &[Front], zero: T, add: impl Fn(T, &Front) -> T) -> Vec<T> {
    let mut out = vec![zero; fronts.len() + 1];
    for (i, front) in fronts.iter().enumerate().rev() {
        out[i] = add(out[i + 1], front);
    }
    out
}

/// The best items for one multiplier; of equals, the smaller.
fn relaxed(fronts: &[Front], multiplier: f64) -> (Vec<usize>, u64) {
    let mut bytes = 0u64;
    let picks = fronts.iter().map(|front| {
        let value = |i: &usize| front[*i].1.damage + multiplier * front[*i].1.bytes as f64;
        let best = (0..front.len()).min_by(|a, b| value(a).total_cmp(&value(b)).then(a.cmp(b))).unwrap_or(0);
        bytes = bytes.saturating_add(front[best].1.bytes);
        best
    });
    (picks.collect(), bytes)
}

/// The least multiplier, up to rounding, whose relaxed selection keeps the budget, with that selection.
fn dual(fronts: &[Front], budget: u64) -> (f64, Vec<usize>) {
    let (free, bytes) = relaxed(fronts, 0.0);
    if bytes <= budget {
        return (0.0, free);
    }
    // Above the largest damage range per byte, every class takes its smallest item.
    let range = |front: &Front| front[0].1.damage - front[front.len() - 1].1.damage;
    let (mut low, mut high) = (0.0, fronts.iter().map(range).fold(0.0, f64::max) + 1.0);
    let mut best = vec![0; fronts.len()];
    for _ in 0..200 {
        let middle = 0.5 * (low + high);
        let (picks, bytes) = relaxed(fronts, middle);
        if bytes <= budget {
            (high, best) = (middle, picks);
        } else {
            low = middle;
        }
    }
    (high, best)
}

/// Exchanges single items for the better as long as the budget allows: a good upper bound.
fn improve(fronts: &[Front], mut picks: Vec<usize>, budget: u64) -> Selection {
    loop {
        let bytes: u64 = fronts.iter().zip(&picks).map(|(f, &i)| f[i].1.bytes).sum();
        let mut best: Option<(f64, usize, usize)> = None;
        for (class, front) in fronts.iter().enumerate() {
            let now = front[picks[class]].1;
            for (i, (_, item)) in front.iter().enumerate() {
                let gain = now.damage - item.damage;
                if bytes - now.bytes + item.bytes <= budget && gain > best.map_or(0.0, |(g, ..)| g) {
                    best = Some((gain, class, i));
                }
            }
        }
        match best {
            Some((_, class, i)) => picks[class] = i,
            None => return selection(fronts, &picks, 0.0),
        }
    }
}

fn selection(fronts: &[Front], picks: &[usize], gap: f64) -> Selection {
    let chosen = || fronts.iter().zip(picks).map(|(front, &i)| front[i]);
    Selection {
        items: chosen().map(|(index, _)| index).collect(),
        bytes: chosen().map(|(_, item)| item.bytes).sum(),
        damage: chosen().map(|(_, item)| item.damage).sum(),
        gap,
    }
}

struct Bound {
    multiplier: f64,
    /// For each number of classes taken: the least relaxed value of those left.
    rest: Vec<f64>,
    /// The least bytes of those left.
    least: Vec<u64>,
    budget: u64,
    /// Damage of a selection that is known.
    known: f64,
}

impl Bound {
    /// Whether a state after `taken` classes may end within the budget and no worse than what is known.
    fn admits(&self, taken: usize, bytes: u64, damage: f64) -> bool {
        if bytes.saturating_add(self.least[taken]) > self.budget {
            return false;
        }
        let price = self.multiplier * (bytes as f64 - self.budget as f64);
        let bound = damage + price + self.rest[taken];
        // The sums are rounded: give them the benefit of the doubt.
        let scale = self.known.abs() + damage.abs() + price.abs() + self.rest[taken].abs();
        bound <= self.known + 1e-12 * scale
    }
}

fn search(fronts: &[Front], bound: &Bound, max_states: usize, known: Selection) -> Selection {
    let mut layers: Vec<Vec<State>> = vec![vec![State { bytes: 0, damage: 0.0, parent: 0, item: 0 }]];
    let mut gap = 0.0;
    for (class, front) in fronts.iter().enumerate() {
        let mut next = Vec::new();
        for (parent, state) in layers[class].iter().enumerate() {
            for (item, (_, taken)) in front.iter().enumerate() {
                let (bytes, damage) = (state.bytes.saturating_add(taken.bytes), state.damage + taken.damage);
                if bound.admits(class + 1, bytes, damage) {
                    next.push(State { bytes, damage, parent: parent as u32, item: item as u32 });
                }
            }
        }
        next.sort_by(|a, b| {
            let order = a.bytes.cmp(&b.bytes).then(a.damage.total_cmp(&b.damage));
            order.then(a.parent.cmp(&b.parent)).then(a.item.cmp(&b.item))
        });
        let mut best = f64::INFINITY;
        next.retain(|state| {
            state.damage < best && {
                best = state.damage;
                true
            }
        });
        if next.len() > max_states {
            gap += thin(&mut next, max_states);
        }
        layers.push(next);
    }
    let Some(end) = layers[fronts.len()].len().checked_sub(1) else {
        return Selection { gap, ..known };
    };
    let mut picks = vec![0; fronts.len()];
    let mut at = end;
    for class in (0..fronts.len()).rev() {
        let state = layers[class + 1][at];
        (picks[class], at) = (state.item as usize, state.parent as usize);
    }
    let found = selection(fronts, &picks, gap);
    if found.damage <= known.damage { found } else { Selection { gap, ..known } }
}

/// Merges states of a front (bytes up, damage down) into cheaper ones of at most `delta` more damage; returns `delta`.
fn thin(front: &mut Vec<State>, max_states: usize) -> f64 {
    let range = front[0].damage - front[front.len() - 1].damage;
    let delta = range / (max_states - 1) as f64;
    let mut kept = f64::INFINITY;
    front.retain(|state| {
        state.damage < kept - delta && {
            kept = state.damage;
            true
        }
    });
    delta
}
