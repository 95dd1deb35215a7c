//! Which projections of which blocks an adapter changes, as text and as PEFT writes it.
//!
//! The text is a list: `q_proj,v_proj`, `all-linear`, or with blocks before a colon, `20-29:down_proj,0:all-linear`.
//! Blocks count from 0, both ends belong to a range, and an item without a range means every block. Items add up.
//!
//! PEFT has `target_modules`, which are names or ends of names, and `layers_to_transform`, which holds for all of them.
//! Where the targets are the same projections in some blocks, these two say it; other targets are written as one name for
//! each matrix (`layers.20.mlp.down_proj`), which is an end of its full name.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde_json::Value;

use crate::ModelError;
use crate::values::Projection;

/// All projections of a block, by PEFT's name.
const ALL_LINEAR: &str = "all-linear";
/// Blocks that a text can name lie below this.
const MOST_BLOCKS: usize = 4096;

/// The projections that an adapter changes, each in every block or in some.
///
/// ```
/// use edgellm_model::adapter::Targets;
/// use edgellm_model::values::Projection;
/// let targets: Targets = "20-29:down_proj,v_proj".parse().unwrap();
/// assert!(targets.contains(25, Projection::Down) && !targets.contains(19, Projection::Down));
/// assert!(targets.contains(0, Projection::V));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Targets {
    entries: BTreeMap<Projection, Blocks>,
}

/// Blocks in which a projection is a target.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Blocks {
    All,
    Some(BTreeSet<usize>),
}

impl Blocks {
    fn contains(&self, block: usize) -> bool {
        match self {
            Blocks::All => true,
            Blocks::Some(blocks) => blocks.contains(&block),
        }
    }

    fn add(&mut self, other: Blocks) {
        match (&mut *self, other) {
            (Blocks::Some(blocks), Blocks::Some(more)) => blocks.extend(more),
            _ => *self = Blocks::All,
        }
    }
}

impl Targets {
    /// Every projection of every block.
    pub fn all_linear() -> Self {
        Projection::ALL.to_vec().into()
    }

    /// Whether there is no target.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The projections that are a target in any block, in block order.
    pub fn iter(&self) -> impl Iterator<Item = &Projection> {
        self.entries.keys()
    }

    /// Whether a projection of a block is a target.
    pub fn contains(&self, block: usize, projection: Projection) -> bool {
        self.entries.get(&projection).is_some_and(|blocks| blocks.contains(block))
    }

    /// Adds a projection in some blocks, or in all.
    pub fn add(&mut self, projection: Projection, blocks: Option<BTreeSet<usize>>) {
        let blocks = blocks.map_or(Blocks::All, Blocks::Some);
        match self.entries.get_mut(&projection) {
            Some(found) => found.add(blocks),
            None => drop(self.entries.insert(projection, blocks)),
        }
    }

    /// Checks that there is a target, and that a model with `n_layers` blocks has all of them.
    ///
    /// # Errors
    /// No target, or a block that the model does not have.
    pub fn check(&self, n_layers: usize) -> Result<(), ModelError> {
        let what = "LoRA targets";
        if self.is_empty() {
            let (expected, found) = ("at least one projection".into(), "none".into());
            return Err(ModelError::Value { what: what.into(), expected, found });
        }
        for (projection, blocks) in &self.entries {
            let last = if let Blocks::Some(blocks) = blocks { blocks.last() } else { None };
            if let Some(last) = last.filter(|last| **last >= n_layers) {
                return Err(ModelError::Value {
                    what: format!("{what}, {}", projection.name()),
                    expected: format!("blocks from 0 to {}", n_layers.saturating_sub(1)),
                    found: format!("block {last}"),
                });
            }
        }
        Ok(())
    }

    /// PEFT's `target_modules` and `layers_to_transform` (if not all) for a model with `n_layers` blocks.
    pub(super) fn to_peft(&self, n_layers: usize) -> (Vec<String>, Option<Vec<usize>>) {
        let names = || self.iter().map(|p| p.name().to_string()).collect();
        let Some(first) = self.entries.values().next() else { return (Vec::new(), None) };
        if self.entries.values().all(|blocks| blocks == first) {
            return match first {
                Blocks::All => (names(), None),
                Blocks::Some(blocks) => (names(), Some(blocks.iter().copied().collect())),
            };
        }
        let in_block = |block| self.iter().filter(move |p| self.contains(block, **p)).map(move |p| (block, *p));
        let modules = (0..n_layers).flat_map(in_block).map(|(block, p)| format!("layers.{block}.{}", p.path()));
        (modules.collect(), None)
    }

    /// The targets that PEFT's fields name; `None` if `target_modules` is a regular expression, which only the names of
    /// the adapter's tensors resolve.
    ///
    /// # Errors
    /// What is not a projection of a decoder block, or a malformed field.
    pub(super) fn from_peft(modules: &Value, layers: Option<&Value>, n_layers: usize) -> Result<Option<Self>, String> {
        let blocks = match layers {
            None | Some(Value::Null) => None,
            Some(value) => {
                let bad = || format!("layers_to_transform: expected a block or a list of blocks, found {value:.200}");
                let index = |v: &Value| v.as_u64().and_then(|v| usize::try_from(v).ok()).ok_or_else(bad);
                let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
                Some(list.iter().map(index).collect::<Result<BTreeSet<_>, _>>()?)
            }
        };
        let names = match modules {
            Value::String(name) if name == ALL_LINEAR => {
                let mut targets = Self::default();
                Projection::ALL.into_iter().for_each(|p| targets.add(p, blocks.clone()));
                return Ok(Some(targets.normalized(n_layers)));
            }
            Value::String(_) => return Ok(None),
            Value::Array(names) => names,
            _ => return Err("target_modules: expected a list of names or a text".into()),
        };
        let mut targets = Self::default();
        for name in names {
            let found = name.as_str().and_then(module);
            let Some((block, projection)) = found else {
                return Err(format!("target_modules: expected projections of a decoder block, found {name:.200}"));
            };
            let named = block.map(|block| BTreeSet::from([block]));
            let both = match (named, &blocks) {
                (Some(named), Some(blocks)) => Some(&named & blocks),
                (named, blocks) => named.or_else(|| blocks.clone()),
            };
            targets.add(projection, both);
        }
        Ok(Some(targets.normalized(n_layers)))
    }

    /// The same targets of a model with `n_layers` blocks, where a list of all blocks is no list.
    fn normalized(mut self, n_layers: usize) -> Self {
        for blocks in self.entries.values_mut() {
            if (0..n_layers).all(|block| blocks.contains(block)) {
                *blocks = Blocks::All;
            }
        }
        self
    }
}

/// Block (if it is in the name) and projection of a module's name, or of its end.
fn module(name: &str) -> Option<(Option<usize>, Projection)> {
    if let Some(projection) = Projection::ALL.into_iter().find(|p| name == p.name() || name == p.path()) {
        return Some((None, projection));
    }
    let name = name.strip_prefix("model.").unwrap_or(name);
    let (block, path) = name.strip_prefix("layers.")?.split_once('.')?;
    let projection = Projection::ALL.into_iter().find(|p| path == p.path())?;
    Some((Some(block.parse().ok()?), projection))
}

impl From<Vec<Projection>> for Targets {
    /// These projections in every block.
    fn from(projections: Vec<Projection>) -> Self {
        let mut targets = Self::default();
        projections.into_iter().for_each(|p| targets.add(p, None));
        targets
    }
}

impl<'a> IntoIterator for &'a Targets {
    type Item = &'a Projection;
    type IntoIter = std::vec::IntoIter<&'a Projection>;

    fn into_iter(self) -> Self::IntoIter {
        self.entries.keys().collect::<Vec<_>>().into_iter()
    }
}

impl FromStr for Targets {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut targets = Self::default();
        for item in text.split(',') {
            let (blocks, name) = match item.split_once(':') {
                Some((range, name)) => (Some(block_range(range)?), name),
                None => (None, item),
            };
            if name == ALL_LINEAR {
                Projection::ALL.into_iter().for_each(|p| targets.add(p, blocks.clone()));
            } else {
                targets.add(name.parse().map_err(|e| format!("{e}, or {ALL_LINEAR}"))?, blocks);
            }
        }
        Ok(targets)
    }
}

/// The blocks of `7` or `20-29`.
fn block_range(text: &str) -> Result<BTreeSet<usize>, String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let block = |text: &str| text.parse::<usize>().ok().filter(|block| *block < MOST_BLOCKS);
    match (block(first), block(last)) {
        (Some(first), Some(last)) if first <= last => Ok((first..=last).collect()),
        _ => Err(format!("'{text}' is no range of blocks; expected a block such as 7, or first-last such as 20-29")),
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut items = Vec::new();
        for (projection, blocks) in &self.entries {
            match blocks {
                Blocks::All => items.push(projection.name().to_string()),
                Blocks::Some(blocks) => {
                    items.extend(ranges(blocks).into_iter().map(|range| format!("{range}:{}", projection.name())));
                }
            }
        }
        f.write_str(&items.join(","))
    }
}

/// A set of blocks as ranges.
fn ranges(blocks: &BTreeSet<usize>) -> Vec<String> {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for &block in blocks {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == block => *last = block,
            _ => ranges.push((block, block)),
        }
    }
    let show =
        |(first, last): (usize, usize)| if first == last { first.to_string() } else { format!("{first}-{last}") };
    ranges.into_iter().map(show).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Text to PEFT's fields (of a model with 4 blocks) and back, and text to the same text.
    fn check(text: &str, modules: Value, layers: Value) {
        let targets: Targets = text.parse().unwrap();
        let (names, blocks) = targets.to_peft(4);
        assert_eq!((json!(names), json!(blocks)), (modules.clone(), layers.clone()), "{text}");
        assert_eq!(Targets::from_peft(&modules, Some(&layers), 4).unwrap().unwrap(), targets, "{text}");
        assert_eq!(targets.to_string().parse::<Targets>().unwrap(), targets, "{text}");
    }

    #[test]
    fn targets_survive_text_and_peft() {
        check("q_proj,v_proj", json!(["q_proj", "v_proj"]), Value::Null);
        check("v_proj,q_proj,v_proj", json!(["q_proj", "v_proj"]), Value::Null);
        check("2-3:down_proj", json!(["down_proj"]), json!([2, 3]));
        check("0:q_proj,2-3:q_proj", json!(["q_proj"]), json!([0, 2, 3]));
        check("1:q_proj,3:down_proj", json!(["layers.1.self_attn.q_proj", "layers.3.mlp.down_proj"]), Value::Null);
        let all = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
        check("all-linear", json!(all), Value::Null);
        check("1-2:all-linear", json!(all), json!([1, 2]));
        // Adding every block to some is every block.
        check("1:q_proj,q_proj", json!(["q_proj"]), Value::Null);
    }

    #[test]
    fn peft_has_other_ways_to_say_it() {
        let read = |modules: Value, layers: Value| Targets::from_peft(&modules, Some(&layers), 4).unwrap();
        let text = |modules, layers| read(modules, layers).unwrap().to_string();
        assert_eq!(text(json!(["q_proj"]), json!(2)), "2:q_proj");
        assert_eq!(text(json!(["self_attn.q_proj"]), json!([0, 1, 2, 3])), "q_proj");
        assert_eq!(text(json!(["model.layers.3.mlp.up_proj"]), Value::Null), "3:up_proj");
        assert_eq!(read(json!("all-linear"), Value::Null), Some(Targets::all_linear()));
        assert_eq!(read(json!(".*\\.(q|v)_proj"), Value::Null), None);
        for (modules, layers) in [
            (json!(["q_proj", "lm_head"]), Value::Null),
            (json!([3]), Value::Null),
            (json!({}), Value::Null),
            (json!(["q_proj"]), json!(-1)),
            (json!(["q_proj"]), json!(["x"])),
            (json!(["layers.99999999999999999999.mlp.up_proj"]), Value::Null),
        ] {
            assert!(Targets::from_peft(&modules, Some(&layers), 4).is_err(), "{modules} {layers}");
        }
    }

    #[test]
    fn what_is_no_target_is_refused() {
        for bad in ["", "w_proj", "q_proj,", "5-2:q_proj", "a-b:q_proj", ":q_proj", "1-:q_proj", "0-99999:q_proj", "1:"]
        {
            assert!(bad.parse::<Targets>().is_err(), "{bad}");
        }
        assert!("w_proj".parse::<Targets>().unwrap_err().contains("is no projection"));
        let deep: Targets = "3-4:q_proj".parse().unwrap();
        assert!(deep.check(5).is_ok());
        assert!(deep.check(4).unwrap_err().to_string().contains("blocks from 0 to 3, found block 4"));
        assert!(Targets::default().check(4).is_err());
    }
}
