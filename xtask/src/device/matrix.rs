//! The matrix of devices: a TOML file with one table a device. Errors name the line.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use toml::Spanned;

/// How a device is reached.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// This machine.
    Local,
    /// Linux by ssh.
    Ssh,
    /// Android by adb.
    Adb,
    /// The iOS simulator of a Mac, or an iPhone.
    Ios,
    /// qemu's user-mode emulation of an aarch64 processor.
    Qemu,
}

/// A part of what is run on a device.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub(super) enum Part {
    /// The kernels' conformance suite.
    Conformance,
    /// Speed of reading, generating and tuning on the fixture.
    Bench,
    /// Perplexity of the fixture, which must be this machine's.
    Accuracy,
    /// A few steps of tuning, which must lower the loss.
    Adapt,
    /// Generating for minutes, to see what heat does.
    Sustained,
}

/// One device. Fields that a transport does not use are errors.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Device {
    pub(super) name: Spanned<String>,
    pub(super) transport: Kind,
    /// Rust's target of the programs (default: by transport).
    pub(super) target: Option<String>,
    /// The command to push instead of building or taking one, relative to the repository.
    pub(super) command: Option<PathBuf>,
    /// The conformance tests to push, likewise.
    pub(super) conformance: Option<PathBuf>,
    /// ssh: `user@host`.
    pub(super) host: Option<String>,
    pub(super) port: Option<u16>,
    /// ssh: file with the private key.
    pub(super) key: Option<PathBuf>,
    /// ssh: further options of the program.
    #[serde(default)]
    pub(super) ssh_options: Vec<String>,
    /// adb: the device's serial number; ios: its identifier.
    pub(super) serial: Option<String>,
    /// qemu: the processor, as `-cpu` takes it.
    pub(super) cpu: Option<String>,
    /// Where files go on the device.
    pub(super) folder: Option<String>,
    #[serde(default = "all_parts")]
    pub(super) parts: Vec<Part>,
    /// Only the conformance tests whose name contains this.
    pub(super) conformance_only: Option<String>,
    /// Minutes of the sustained run.
    #[serde(default = "default_minutes")]
    pub(super) minutes: f64,
    /// Minutes after which the device's row ends as failed.
    #[serde(default = "default_timeout")]
    pub(super) timeout_minutes: f64,
}

fn all_parts() -> Vec<Part> {
    vec![Part::Conformance, Part::Bench, Part::Accuracy, Part::Adapt, Part::Sustained]
}

fn default_minutes() -> f64 {
    5.0
}

fn default_timeout() -> f64 {
    60.0
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Matrix {
    #[serde(default)]
    device: Vec<Device>,
}

impl Device {
    pub(super) fn name(&self) -> &str {
        self.name.get_ref()
    }

    /// Why there is nothing to connect to, where the file leaves the address out.
    pub(super) fn without_address(&self) -> Option<String> {
        let (field, value) = match self.transport {
            Kind::Ssh => ("host", &self.host),
            Kind::Adb | Kind::Ios => ("serial", &self.serial),
            Kind::Local | Kind::Qemu => return None,
        };
        value.is_none().then(|| format!("no address given ({field})"))
    }

    /// What is wrong with the fields together.
    fn problem(&self) -> Option<String> {
        let name = self.name();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || !name.chars().all(plain) {
            return Some(format!("name {name:?}: expected letters, digits, - and _"));
        }
        let set = [
            ("host", self.host.is_some(), &[Kind::Ssh][..]),
            ("port", self.port.is_some(), &[Kind::Ssh]),
            ("key", self.key.is_some(), &[Kind::Ssh]),
            ("ssh_options", !self.ssh_options.is_empty(), &[Kind::Ssh]),
            ("serial", self.serial.is_some(), &[Kind::Adb, Kind::Ios]),
            ("cpu", self.cpu.is_some(), &[Kind::Qemu]),
        ];
        let misplaced = set.iter().find(|(_, is_set, kinds)| *is_set && !kinds.contains(&self.transport));
        if let Some((field, ..)) = misplaced {
            return Some(
                format!("device {name}: {field} does not belong to transport {:?}", self.transport).to_lowercase(),
            );
        }
        let dash = [&self.host, &self.serial, &self.cpu].into_iter().flatten().find(|v| v.starts_with('-'));
        if let Some(value) = dash {
            return Some(format!("device {name}: {value:?} begins with a dash"));
        }
        let positive = |minutes: f64| minutes.is_finite() && minutes > 0.0 && minutes <= 1440.0;
        if !positive(self.minutes) || !positive(self.timeout_minutes) {
            return Some(format!("device {name}: minutes and timeout_minutes must be above 0 and at most 1440"));
        }
        if self.parts.is_empty() {
            return Some(format!("device {name}: parts is empty"));
        }
        None
    }
}

/// Reads a matrix.
///
/// # Errors
/// The file cannot be read, is no TOML, or says what cannot be meant; with the line.
pub(super) fn read(path: &Path) -> Result<Vec<Device>> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| format!("{} is no device matrix", path.display()))
}

fn parse(text: &str) -> Result<Vec<Device>> {
    let line = |at: usize| text.get(..at).map_or(1, |before| before.matches('\n').count() + 1);
    let matrix: Matrix = match toml::from_str(text) {
        Ok(matrix) => matrix,
        Err(error) => {
            let at = error.span().map_or(0, |span| span.start);
            bail!("line {}: {}", line(at), error.message().replace("u16", "a whole number up to 65535"))
        }
    };
    let mut names = BTreeSet::new();
    for device in &matrix.device {
        let at = line(device.name.span().start);
        if let Some(problem) = device.problem() {
            bail!("line {at}: {problem}");
        }
        if !names.insert(device.name()) {
            bail!("line {at}: there are two devices called {}", device.name());
        }
    }
    Ok(matrix.device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repo;

    #[test]
    fn the_matrix_of_the_repository_is_read() {
        let devices = read(&repo::root().unwrap().join("docs/devices.toml")).unwrap();
        let of = |name: &str| devices.iter().find(|d| d.name() == name).unwrap();
        assert_eq!(of("local").transport, Kind::Local);
        assert_eq!(of("qemu-a57").cpu.as_deref(), Some("cortex-a57"));
        for name in ["jetson-orin", "pixel", "iphone-simulator"] {
            assert!(of(name).without_address().unwrap().starts_with("no address given"), "{name}");
        }
    }

    #[test]
    fn errors_name_the_line() {
        let head = "[[device]]\nname = \"a\"\n";
        for (rest, wanted) in [
            ("transport = \"pigeon\"", "line 3: unknown variant `pigeon`"),
            ("transport = \"local\"\nspeed = 3", "line 4: unknown field `speed`"),
            (
                "transport = \"local\"\nport = 70000",
                "line 4: invalid value: integer `70000`, expected a whole number up to 65535",
            ),
            ("transport = \"local\"\nhost = \"x\"", "line 2: device a: host does not belong to transport local"),
            (
                "transport = \"ssh\"\nhost = \"-oProxyCommand=x\"",
                "line 2: device a: \"-oProxyCommand=x\" begins with a dash",
            ),
            ("transport = \"local\"\nminutes = -1.0", "line 2: device a: minutes"),
            ("transport = \"local\"\nparts = []", "line 2: device a: parts is empty"),
            ("transport = \"local\"\n[[device]]\nname = \"a\"\ntransport = \"local\"", "line 5: there are two devices"),
            ("transport = ", "line 3: "),
        ] {
            let error = parse(&format!("{head}{rest}\n")).unwrap_err().to_string();
            assert!(error.starts_with(wanted), "{rest}: {error}");
        }
        let error = parse("\n[[device]]\ntransport = \"local\"\n").unwrap_err().to_string();
        assert!(error.starts_with("line 2: missing field `name`"), "{error}");
        assert!(
            parse("[[device]]\nname = \"../a\"\ntransport = \"local\"").unwrap_err().to_string().contains("letters")
        );
    }
}
