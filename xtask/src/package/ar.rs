//! The archive format of Unix `ar`, in the plain form that Debian packages have.

use anyhow::{Result, ensure};

/// Members with their names, in order.
///
/// # Errors
/// A name of more than 16 bytes.
pub(super) fn ar(members: &[(&str, Vec<u8>)]) -> Result<Vec<u8>> {
    let mut bytes = b"!<arch>\n".to_vec();
    for (name, data) in members {
        ensure!(name.len() <= 16, "{name} is longer than 16 bytes");
        let (time, owner, mode, size) = (0, 0, "100644", data.len());
        bytes.extend(format!("{name:<16}{time:<12}{owner:<6}{owner:<6}{mode:<8}{size:<10}`\n").bytes());
        bytes.extend(data);
        if data.len() % 2 == 1 {
            bytes.push(b'\n');
        }
    }
    Ok(bytes)
}
