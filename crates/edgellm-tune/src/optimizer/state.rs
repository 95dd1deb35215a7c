//! The state as named buffers, bit for bit, and back.

use std::collections::BTreeMap;

use edgellm_model::ModelError;

use super::blockwise::{BLOCK, Quantized};
use super::{AdamW, Moments, ParameterState};
use crate::TuneError;
use crate::checkpoint::{Buffer, NamedBuffer};

/// Suffixes of a parameter's buffers.
const UPDATES: &str = "updates";
const FIRST: &str = "first";
const SECOND: &str = "second";
const CODES: &str = "codes";
const SCALES: &str = "scales";

impl AdamW {
    /// The whole state, for a checkpoint. Of parameter `P`: `P.updates` (one `u64`), and `P.first` and `P.second` (`f32`)
    /// or, in 8 bits, `P.first.codes`, `P.first.scales`, `P.second.codes` and `P.second.scales`. In order of the names.
    pub fn state(&self) -> Vec<NamedBuffer> {
        let mut out = Vec::new();
        for (name, ParameterState { moments, updates }) in &self.parameters {
            let mut push = |suffix: String, data: Buffer| out.push(NamedBuffer::new(format!("{name}.{suffix}"), data));
            push(UPDATES.into(), Buffer::U64(vec![*updates]));
            match moments {
                Moments::F32 { first, second } => {
                    push(FIRST.into(), Buffer::F32(first.clone()));
                    push(SECOND.into(), Buffer::F32(second.clone()));
                }
                Moments::Int8 { first, second } => {
                    for (moment, quantized) in [(FIRST, first), (SECOND, second)] {
                        push(format!("{moment}.{CODES}"), Buffer::U8(quantized.codes.clone()));
                        push(format!("{moment}.{SCALES}"), Buffer::F32(quantized.scales.clone()));
                    }
                }
            }
        }
        out
    }

    /// Takes over a state that [`AdamW::state`] gave, in any order; `len_of` tells how many values a parameter has, `None`
    /// where there is no such parameter. The state before is dropped; on an error it stays.
    ///
    /// # Errors
    /// A buffer is missing, unknown, of another type or length, or holds what no update can have made; or the state is of
    /// another [`StateType`](super::StateType) than this optimizer's.
    pub fn restore(
        &mut self,
        buffers: impl IntoIterator<Item = NamedBuffer>,
        len_of: impl Fn(&str) -> Option<usize>,
    ) -> Result<(), TuneError> {
        let mut rest: BTreeMap<String, Buffer> = BTreeMap::new();
        for NamedBuffer { name, data } in buffers {
            if rest.insert(name.clone(), data).is_some() {
                return Err(bad(&name, "every buffer once".into(), "the buffer twice".into()));
            }
        }
        let suffix = format!(".{UPDATES}");
        let names: Vec<String> = rest.keys().filter_map(|key| key.strip_suffix(&suffix)).map(str::to_owned).collect();
        let mut parameters = BTreeMap::new();
        for name in names {
            let len =
                len_of(&name).ok_or_else(|| bad(&name, "a parameter that is trained".into(), "another name".into()))?;
            let updates = match rest.remove(&format!("{name}{suffix}")) {
                Some(Buffer::U64(values)) if values.len() == 1 && values[0] > 0 => values[0],
                other => return Err(bad(&name, "a number of updates above 0".into(), describe(other.as_ref()))),
            };
            let mut moments = Moments::zeros(len, self.config.state);
            match &mut moments {
                Moments::F32 { first, second } => {
                    *first = take_f32(&mut rest, format!("{name}.{FIRST}"), len)?;
                    *second = take_f32(&mut rest, format!("{name}.{SECOND}"), len)?;
                    not_negative(&name, second)?;
                }
                Moments::Int8 { first, second } => {
                    *first = take_int8(&mut rest, &format!("{name}.{FIRST}"), len)?;
                    *second = take_int8(&mut rest, &format!("{name}.{SECOND}"), len)?;
                }
            }
            parameters.insert(name, ParameterState { moments, updates });
        }
        if let Some((name, data)) = rest.first_key_value() {
            let expected = format!("a state of type {}", self.config.state.name());
            return Err(bad(name, expected, format!("{} that belong to no such state", data.describe())));
        }
        self.parameters = parameters;
        Ok(())
    }
}

fn take_f32(rest: &mut BTreeMap<String, Buffer>, name: String, len: usize) -> Result<Vec<f32>, TuneError> {
    match rest.remove(&name) {
        Some(Buffer::F32(values)) if values.len() == len => match values.iter().find(|v| v.is_nan()) {
            None => Ok(values),
            Some(_) => Err(bad(&name, "numbers".into(), "one that is none".into())),
        },
        other => Err(bad(&name, format!("{len} values of f32"), describe(other.as_ref()))),
    }
}

fn take_int8(rest: &mut BTreeMap<String, Buffer>, name: &str, len: usize) -> Result<Quantized, TuneError> {
    let codes_name = format!("{name}.{CODES}");
    let codes = match rest.remove(&codes_name) {
        Some(Buffer::U8(codes)) if codes.len() == len => codes,
        other => return Err(bad(&codes_name, format!("{len} values of u8"), describe(other.as_ref()))),
    };
    let scales = take_f32(rest, format!("{name}.{SCALES}"), len.div_ceil(BLOCK))?;
    not_negative(name, &scales)?;
    Ok(Quantized { codes, scales })
}

fn not_negative(name: &str, values: &[f32]) -> Result<(), TuneError> {
    match values.iter().find(|value| **value < 0.0) {
        Some(value) => Err(bad(name, "no number below 0".into(), value.to_string())),
        None => Ok(()),
    }
}

fn describe(found: Option<&Buffer>) -> String {
    found.map_or_else(|| "nothing".into(), Buffer::describe)
}

fn bad(name: &str, expected: String, found: String) -> TuneError {
    let what = format!("optimizer state '{}'", name.escape_debug());
    TuneError::Model(ModelError::Value { what, expected, found })
}
