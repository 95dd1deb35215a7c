//! A look at a `tokenizer.json` before the tokenizers library reads it.
//!
//! The library joins the two parts of a merge in a buffer as long as the longest token, and panics where they are
//! longer. Such a merge makes no token, so the file is wrong anyway; it is found here in one pass that keeps nothing.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    model: Option<Model>,
}

#[derive(Deserialize)]
struct Model {
    #[serde(default)]
    vocab: LongestKey,
    #[serde(default)]
    merges: Merges,
    #[serde(default)]
    continuing_subword_prefix: Option<String>,
}

/// The longest key of an object, in bytes.
#[derive(Default)]
struct LongestKey(usize);

/// Lengths of the parts of merges, in bytes.
#[derive(Default)]
struct Merges {
    longest: usize,
    shortest_right: Option<usize>,
}

/// Says what is wrong with the merges of a tokenizer, if the text is one at all.
pub(super) fn merges(text: &str) -> Result<(), String> {
    // What is no tokenizer is for the library to say.
    let Ok(Document { model: Some(model) }) = serde_json::from_str(text) else { return Ok(()) };
    let prefix = model.continuing_subword_prefix.map_or(0, |p| p.len());
    let right = model.merges.shortest_right.unwrap_or(prefix);
    if right < prefix {
        return Err(format!("a merge whose right part has {right} bytes, less than the prefix of {prefix}"));
    }
    let longest = model.merges.longest.saturating_sub(prefix);
    if longest > model.vocab.0 {
        return Err(format!("a merge of {longest} bytes, longer than every token"));
    }
    Ok(())
}

impl<'de> Deserialize<'de> for LongestKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = LongestKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a vocabulary")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LongestKey, A::Error> {
                let mut longest = 0;
                while let Some((key, IgnoredAny)) = map.next_entry::<std::borrow::Cow<'de, str>, IgnoredAny>()? {
                    longest = longest.max(key.len());
                }
                Ok(LongestKey(longest))
            }
        }
        deserializer.deserialize_map(Keys)
    }
}

impl<'de> Deserialize<'de> for Merges {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Merges;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("merges")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Merges, A::Error> {
                let mut merges = Merges::default();
                while let Some(merge) = seq.next_element::<Merge>()? {
                    let (left, right) = match &merge {
                        Merge::Pair(left, right) => (left.len(), right.len()),
                        Merge::Joined(text) => {
                            text.split_once(' ').map_or((text.len(), 0), |(l, r)| (l.len(), r.len()))
                        }
                    };
                    merges.longest = merges.longest.max(left.saturating_add(right));
                    merges.shortest_right = Some(merges.shortest_right.map_or(right, |least| least.min(right)));
                }
                Ok(merges)
            }
        }
        deserializer.deserialize_seq(Pairs)
    }
}

/// A merge in either spelling: two texts, or one with a space between.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

#[cfg(test)]
mod tests {
    #[test]
    fn merges_longer_than_every_token_are_found() {
        let check = |model: &str, right: bool| {
            assert_eq!(super::merges(&format!("{{\"model\": {model}}}")).is_ok(), right, "{model}");
        };
        check(r#"{"vocab": {"ab": 0}, "merges": ["a b"]}"#, true);
        check(r#"{"vocab": {"ab": 0}, "merges": [["a", "b"]]}"#, true);
        check(r#"{"vocab": {"a": 0}, "merges": [["a", "b"]]}"#, false);
        check(r#"{"vocab": {"a": 0}, "merges": ["a b"]}"#, false);
        check(r###"{"vocab": {"ab": 0}, "merges": [["a", "##b"]], "continuing_subword_prefix": "##"}"###, true);
        check(r###"{"vocab": {"abcd": 0}, "merges": [["a", "b"]], "continuing_subword_prefix": "##"}"###, false);
        check(r#"{"vocab": [["a", 0.0]]}"#, true);
        check("null", true);
    }
}
