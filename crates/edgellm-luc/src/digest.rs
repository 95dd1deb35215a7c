//! SHA-256 digests that tie measurements to their text and policies to their measurement.

use std::fmt::Write;

use edgellm_model::ModelError;
use edgellm_model::files::ModelFiles;
use edgellm_model::values::Measurement;
use sha2::{Digest, Sha256};

/// Digest of calibration windows: each window's length as a little-endian `u64`, then its ids as little-endian `u32`.
pub fn calibration_digest(windows: &[Vec<u32>]) -> String {
    let mut hash = Sha256::new();
    for window in windows {
        hash.update((window.len() as u64).to_le_bytes());
        for id in window {
            hash.update(id.to_le_bytes());
        }
    }
    hex(&hash.finalize())
}

/// Digest of a model's weights: of every matrix its name, layout and packed bytes, of every vector its name and values, in
/// the order of their names.
///
/// # Errors
/// A tensor cannot be read.
pub fn model_digest(files: &ModelFiles) -> Result<String, ModelError> {
    let mut names: Vec<&str> = files.names().collect();
    names.sort_unstable();
    let mut hash = Sha256::new();
    for name in names {
        hash.update((name.len() as u64).to_le_bytes());
        hash.update(name);
        if files.shape(name)?.len() == 1 {
            files.vector(name)?.iter().for_each(|v| hash.update(v.to_le_bytes()));
        } else {
            let matrix = files.matrix(name)?;
            hash.update(matrix.layout.to_string());
            hash.update(&matrix.words[..]);
            hash.update(&matrix.scales[..]);
            files.release(name);
        }
    }
    Ok(hex(&hash.finalize()))
}

/// Digest of a measurement's compact JSON.
pub fn measurement_digest(measurement: &Measurement) -> String {
    // A measurement is plain numbers, strings and lists; there is nothing in it that JSON cannot hold.
    let json = serde_json::to_vec(measurement).expect("a measurement is JSON");
    hex(&Sha256::digest(json))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_digest_is_sha256_and_windows_matter() {
        // `printf '' | sha256sum`.
        assert_eq!(calibration_digest(&[]), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        assert_ne!(calibration_digest(&[vec![1, 2]]), calibration_digest(&[vec![1], vec![2]]));
        assert_ne!(calibration_digest(&[vec![1, 2]]), calibration_digest(&[vec![2, 1]]));
    }
}
