//! Names of the parts of a model that a policy can treat on their own.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One of the seven linear projections of a decoder block, by its Hugging Face name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Projection {
    /// Query projection of the attention.
    Q,
    /// Key projection of the attention.
    K,
    /// Value projection of the attention.
    V,
    /// Output projection of the attention.
    O,
    /// Gate projection of the feed-forward part.
    Gate,
    /// Up projection of the feed-forward part.
    Up,
    /// Down projection of the feed-forward part.
    Down,
}

impl Projection {
    /// All projections in the order in which a block runs them.
    pub const ALL: [Projection; 7] = [
        Projection::Q,
        Projection::K,
        Projection::V,
        Projection::O,
        Projection::Gate,
        Projection::Up,
        Projection::Down,
    ];

    /// The Hugging Face module name, such as `q_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Projection::Q => "q_proj",
            Projection::K => "k_proj",
            Projection::V => "v_proj",
            Projection::O => "o_proj",
            Projection::Gate => "gate_proj",
            Projection::Up => "up_proj",
            Projection::Down => "down_proj",
        }
    }

    /// The path below a block, such as `self_attn.q_proj`.
    pub fn path(self) -> &'static str {
        match self {
            Projection::Q => "self_attn.q_proj",
            Projection::K => "self_attn.k_proj",
            Projection::V => "self_attn.v_proj",
            Projection::O => "self_attn.o_proj",
            Projection::Gate => "mlp.gate_proj",
            Projection::Up => "mlp.up_proj",
            Projection::Down => "mlp.down_proj",
        }
    }

    /// The tensor name of this projection's weight in block `block`.
    pub fn weight_name(self, block: usize) -> String {
        format!("model.layers.{block}.{}.weight", self.path())
    }
}

impl FromStr for Projection {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Projection::ALL.into_iter().find(|p| p.name() == s).ok_or_else(|| {
            format!(
                "'{s}' is no projection; expected one of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"
            )
        })
    }
}

/// What a policy decides on: whole blocks, or single projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// One unit per decoder block (the paper's choice).
    Block,
    /// One unit per linear projection.
    Linear,
}

impl FromStr for Granularity {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "block" => Ok(Granularity::Block),
            "linear" => Ok(Granularity::Linear),
            other => Err(format!("'{other}' is no granularity; expected block or linear")),
        }
    }
}

/// A part of the model that gets one format: `embedding`, `head`, `block.3` or `block.3.q_proj`.
///
/// The embedding of a model whose head is tied to it is also its head, and counts once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unit {
    /// The token embedding (and the head, where they are tied).
    Embedding,
    /// All projections of one block.
    Block(usize),
    /// One projection of one block.
    Linear(usize, Projection),
    /// The untied language-model head.
    Head,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unit::Embedding => f.write_str("embedding"),
            Unit::Head => f.write_str("head"),
            Unit::Block(block) => write!(f, "block.{block}"),
            Unit::Linear(block, projection) => write!(f, "block.{block}.{}", projection.name()),
        }
    }
}

impl FromStr for Unit {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let bad = || format!("'{s}' is no unit; expected embedding, head, block.N or block.N.q_proj");
        match s {
            "embedding" => return Ok(Unit::Embedding),
            "head" => return Ok(Unit::Head),
            _ => {}
        }
        let rest = s.strip_prefix("block.").ok_or_else(bad)?;
        match rest.split_once('.') {
            None => rest.parse().map(Unit::Block).map_err(|_| bad()),
            Some((block, projection)) => {
                let block = block.parse().map_err(|_| bad())?;
                Ok(Unit::Linear(block, projection.parse().map_err(|_| bad())?))
            }
        }
    }
}

impl Serialize for Unit {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Unit {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The name and size of one weight matrix, `[rows, cols]` = `[output features, input features]`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MatrixShape {
    /// The tensor's Hugging Face name.
    pub name: String,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

impl MatrixShape {
    /// Number of weights.
    pub fn weights(&self) -> u64 {
        self.rows as u64 * self.cols as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_survive_text() {
        let units = [Unit::Embedding, Unit::Head, Unit::Block(12), Unit::Linear(3, Projection::Down)];
        for unit in units {
            assert_eq!(unit.to_string().parse::<Unit>().unwrap(), unit);
        }
        for bad in ["", "block", "block.", "block.x", "block.1.w_proj", "block.-1", "layers.0"] {
            assert!(bad.parse::<Unit>().is_err(), "{bad}");
        }
    }
}
