//! Cutting a long text into windows, and running one.
//!
//! Windows have `context` tokens and do not overlap; nothing is put before them. A window has `context - 1` targets:
//! target `i`, counted from 0, is token `i + 1`, predicted at position `i`. The second half are the targets from
//! `context / 2` on (256..510 of 512), which are all predicted from at least half a window.

use burn::tensor::Tensor;
use edgellm_model::adapter::Adapter;
use edgellm_model::decoder::Decoder;

use crate::error::{EvalError, Result};

/// How far an evaluation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Windows or batches that are done.
    pub done: usize,
    /// Windows or batches in all.
    pub total: usize,
}

/// The windows of a text: at most `limit`, as many as fit if there is no limit.
pub(crate) fn windows(ids: &[u32], context: usize, limit: Option<usize>) -> Result<Vec<&[u32]>> {
    // Two tokens have one target, and it is in the first half.
    if context < 3 {
        let (expected, found) = ("at least 3 tokens".into(), context.to_string());
        return Err(EvalError::Setting { what: "context", expected, found });
    }
    if limit == Some(0) {
        let (expected, found) = ("at least 1".into(), "0".into());
        return Err(EvalError::Setting { what: "windows", expected, found });
    }
    let windows: Vec<&[u32]> = ids.chunks_exact(context).take(limit.unwrap_or(usize::MAX)).collect();
    if windows.is_empty() {
        return Err(EvalError::TooLittle { what: "tokens of the text", needed: context, found: ids.len() });
    }
    Ok(windows)
}

/// The normalized final hidden states of a window, `[tokens, d]`.
pub(crate) fn hidden(decoder: &Decoder, adapter: Option<&Adapter>, ids: &[u32]) -> Result<Tensor<2>> {
    let _span = tracing::debug_span!("evaluate", tokens = ids.len()).entered();
    let x = decoder.embed(&[ids])?;
    let x = decoder.run_blocks(x, 0..decoder.n_blocks(), adapter, None)?;
    let flat = x.reshape([ids.len(), decoder.config().hidden_size]);
    Ok(decoder.exit_norm(flat, decoder.n_blocks(), adapter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_do_not_overlap_and_the_rest_is_left() {
        let ids: Vec<u32> = (0..11).collect();
        assert_eq!(windows(&ids, 4, None).unwrap(), [&ids[0..4], &ids[4..8]]);
        assert_eq!(windows(&ids, 4, Some(1)).unwrap().len(), 1);
        assert_eq!(windows(&ids, 4, Some(9)).unwrap().len(), 2);
        assert!(windows(&ids, 12, None).unwrap_err().to_string().contains("at least 12, found 11"));
        assert!(windows(&ids, 2, None).is_err());
        assert!(windows(&ids, 4, Some(0)).is_err());
    }
}
