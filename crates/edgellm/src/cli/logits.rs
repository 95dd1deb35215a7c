//! `edgellm run --dump-logits`: the logits of every position, for comparing with other programs.

use std::io::Write;
use std::path::Path;

use edgellm::model::ModelError;
use edgellm::model::adapter::Adapter;
use edgellm::model::decoder::Decoder;
use edgellm::model::generate::to_vec;
use edgellm::model::io::AtomicFile;
use serde_json::json;

use super::{Context, stop_if_requested};
use crate::cli::progress::Counted;

/// Positions whose logits are in memory at a time.
const CHUNK: usize = 32;

/// Writes `token_ids` [T] (i32) and `logits` [T, V] (f32) as a safetensors file, which appears when it is complete.
pub(crate) fn dump(
    ctx: &Context,
    decoder: &Decoder,
    adapter: Option<&Adapter>,
    ids: &[u32],
    path: &Path,
) -> anyhow::Result<()> {
    let (tokens, config) = (ids.len(), decoder.config());
    let hidden = decoder.embed(&[ids])?;
    let hidden = decoder.run_blocks(hidden, 0..decoder.n_blocks(), adapter, None)?;
    let hidden = hidden.reshape([tokens, config.hidden_size]);
    let normed = decoder.exit_norm(hidden, decoder.n_blocks(), adapter);
    let mut file = AtomicFile::create(path)?;
    let failed = |e| ModelError::io(path, e);
    file.write_all(&header(tokens, config.vocab_size)).map_err(failed)?;
    for &id in ids {
        // `embed` has checked that every id is below the vocabulary size, which fits.
        file.write_all(&(id as i32).to_le_bytes()).map_err(failed)?;
    }
    let mut progress = ctx.progress("logits", tokens as u64, Counted::Items("positions"));
    for start in (0..tokens).step_by(CHUNK) {
        stop_if_requested()?;
        let rows = CHUNK.min(tokens - start);
        let logits = to_vec(decoder.logits(normed.clone().narrow(0, start, rows)))?;
        let bytes: Vec<u8> = logits.iter().flat_map(|value| value.to_le_bytes()).collect();
        file.write_all(&bytes).map_err(failed)?;
        progress.set((start + rows) as u64);
    }
    file.commit()?;
    progress.finish();
    Ok(())
}

/// Length and JSON of the safetensors header, padded so that the data is aligned to 64 bytes.
fn header(tokens: usize, vocab: usize) -> Vec<u8> {
    let ids_end = 4 * tokens;
    let object = json!({
        "token_ids": {"dtype": "I32", "shape": [tokens], "data_offsets": [0, ids_end]},
        "logits": {"dtype": "F32", "shape": [tokens, vocab], "data_offsets": [ids_end, ids_end + 4 * tokens * vocab]},
    });
    let mut text = object.to_string().into_bytes();
    let whole = (text.len() + 8).next_multiple_of(64);
    text.resize(whole - 8, b' ');
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    #[test]
    fn the_header_is_safetensors() {
        let mut bytes = header(2, 3);
        assert_eq!(bytes.len() % 64, 0);
        bytes.extend([7i32, 8].iter().flat_map(|v| v.to_le_bytes()));
        bytes.extend([0.5f32; 6].iter().flat_map(|v| v.to_le_bytes()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(file.tensor("token_ids").unwrap().shape(), [2]);
        assert_eq!(file.tensor("token_ids").unwrap().data()[..4], 7i32.to_le_bytes());
        assert_eq!(file.tensor("logits").unwrap().shape(), [2, 3]);
    }
}
