//! How scripts and files get to a device. Every transport is a shell at the other end: `sh` here, by ssh or by adb, with an
//! emulator or a simulator before the program's name where there is one.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::matrix::{Device, Kind};
use super::process::{self, Failure};
use crate::repo::has_program;
use crate::{cross, repo};

/// A way to one device.
pub(super) struct Transport {
    /// Program and arguments; a script follows as one argument.
    shell: Vec<String>,
    /// adb has its own way for files; elsewhere the shell reads them from its standard input.
    adb: Option<Vec<String>>,
    /// What goes before a program's name.
    prefix: String,
    /// A script that fails where there is no device.
    probe: String,
    /// Where files go on the device, an absolute path, or one from its home.
    folder: String,
    /// What it measures of heat and battery is the device's own.
    pub(super) own_sensors: bool,
}

/// Seconds until a device must have answered for the first time.
const FIRST_ANSWER: Duration = Duration::from_secs(30);

impl Transport {
    /// # Errors
    /// What it needs on this machine is missing, or the matrix gives no address.
    pub(super) fn new(device: &Device) -> Result<Self, Failure> {
        if let Some(reason) = device.without_address() {
            return Err(Failure::NotRun(reason));
        }
        let given = |folder: &str| device.folder.clone().unwrap_or_else(|| folder.to_owned());
        let here = || -> Result<String, Failure> {
            let folder = repo::scratch(&format!("device-{}", device.name()));
            let folder = folder.map_err(|e| Failure::Failed(format!("{e:#}")))?;
            Ok(device.folder.clone().unwrap_or_else(|| folder.display().to_string()))
        };
        let words = |list: &[&str]| list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
        let local = |prefix: String, folder: String, own_sensors: bool| Self {
            shell: words(&["sh", "-c"]),
            adb: None,
            prefix,
            probe: "true".to_owned(),
            folder,
            own_sensors,
        };
        match device.transport {
            Kind::Local => Ok(local(String::new(), here()?, true)),
            Kind::Qemu => {
                needs(cross::EMULATOR, "apt-get install qemu-user-static")?;
                let cpu = device.cpu.as_deref().unwrap_or("max");
                Ok(local(format!("{} -cpu {} ", cross::EMULATOR, quote(cpu)), here()?, false))
            }
            Kind::Ios => {
                needs("xcrun", "it needs a Mac with Xcode")?;
                let serial = device.serial.as_deref().unwrap_or_default();
                let booted = format!("xcrun simctl list devices booted | grep -F {}", quote(serial));
                let probe =
                    format!("({booted} || {{ echo no booted simulator {} >&2; exit 1; }}) >/dev/null", quote(serial));
                Ok(Self { probe, ..local(format!("xcrun simctl spawn {} ", quote(serial)), here()?, false) })
            }
            Kind::Ssh => {
                needs("ssh", "apt-get install openssh-client")?;
                Ok(Self {
                    shell: ssh(device),
                    adb: None,
                    prefix: String::new(),
                    probe: "true".to_owned(),
                    folder: given("edgellm-bench"),
                    own_sensors: true,
                })
            }
            Kind::Adb => {
                needs("adb", "apt-get install adb")?;
                let serial = device.serial.as_deref().unwrap_or_default();
                Ok(Self::adb("adb", serial, given("/data/local/tmp/edgellm-bench")))
            }
        }
    }

    /// By a program that is adb.
    pub(super) fn adb(program: &str, serial: &str, folder: String) -> Self {
        let adb = [program, "-s", serial].map(str::to_owned).to_vec();
        let shell = [adb.clone(), vec!["shell".to_owned()]].concat();
        Self { shell, adb: Some(adb), prefix: String::new(), probe: "true".to_owned(), folder, own_sensors: true }
    }

    /// The first contact: makes the folder and returns the processor.
    ///
    /// # Errors
    /// [`Failure::NotRun`] where nothing answers.
    pub(super) fn reach(&self) -> Result<String, Failure> {
        let script = format!("{} && mkdir -p {} && uname -m", self.probe, quote(&self.folder));
        let answer = process::run(self.command(&script), None, FIRST_ANSWER);
        answer.map(|text| text.trim().to_owned()).map_err(|error| Failure::NotRun(error.to_string()))
    }

    /// Runs a script in the device's folder and returns what it prints.
    pub(super) fn script(&self, script: &str, limit: Duration) -> Result<String, Failure> {
        let script = format!("cd {} && {script}", quote(&self.folder));
        process::run(self.command(&script), None, limit)
    }

    /// Runs a program of the folder with arguments and returns what it prints.
    pub(super) fn program(&self, name: &str, args: &[&str], limit: Duration) -> Result<String, Failure> {
        let args: Vec<_> = args.iter().map(|a| quote(a)).collect();
        // The shell becomes the program, so that ending one ends the other.
        // Ending ssh or adb does not end a program at the other end, so that it gets the limit too.
        let seconds = limit.as_secs() + 1;
        let timeout = format!("$(command -v timeout >/dev/null 2>&1 && echo timeout {seconds}) ");
        let timeout = if self.shell[0] == "sh" { "" } else { &timeout };
        self.script(&format!("exec {timeout}{}./{name} {}", self.prefix, args.join(" ")), limit)
    }

    /// Puts a file into the folder; a file that arrives in part does not get its name.
    pub(super) fn push(&self, from: &Path, to: &str, executable: bool, limit: Duration) -> Result<(), Failure> {
        let part = format!("{to}.part");
        let settle = format!(
            "chmod {} {part} && mv {part} {to}",
            if executable { 755 } else { 644 },
            part = quote(&part),
            to = quote(to)
        );
        let parent = Path::new(to).parent().map(|p| p.to_string_lossy().into_owned()).unwrap_or_default();
        let parent = if parent.is_empty() { ".".to_owned() } else { parent };
        let open = format!("mkdir -p {}", quote(&parent));
        let Some(adb) = &self.adb else {
            let script = format!("cd {} && {open} && cat > {} && {settle}", quote(&self.folder), quote(&part));
            return process::run(self.command(&script), Some(from), limit).map(drop);
        };
        self.script(&open, limit)?;
        let mut command = Command::new(&adb[0]);
        command.args(&adb[1..]).arg("push").arg(from).arg(format!("{}/{part}", self.folder));
        process::run(command, None, limit)?;
        self.script(&settle, limit).map(drop)
    }

    /// Removes the folder.
    pub(super) fn remove(&self) -> Result<(), Failure> {
        let script = format!("rm -rf {}", quote(&self.folder));
        process::run(self.command(&script), None, FIRST_ANSWER).map(drop)
    }

    fn command(&self, script: &str) -> Command {
        let mut command = Command::new(&self.shell[0]);
        command.args(&self.shell[1..]).arg(script);
        command
    }
}

fn needs(program: &str, remedy: &str) -> Result<(), Failure> {
    if has_program(program) { Ok(()) } else { Err(Failure::NotRun(format!("no {program} here ({remedy})"))) }
}

/// ssh without questions, which notices within a minute that the other end is gone.
fn ssh(device: &Device) -> Vec<String> {
    let mut words = vec!["ssh".to_owned()];
    for option in [
        "BatchMode=yes",
        "ConnectTimeout=10",
        "ServerAliveInterval=15",
        "ServerAliveCountMax=4",
        "StrictHostKeyChecking=accept-new",
    ] {
        words.extend(["-o".to_owned(), option.to_owned()]);
    }
    if let Some(port) = device.port {
        words.extend(["-p".to_owned(), port.to_string()]);
    }
    if let Some(key) = &device.key {
        words.extend(["-i".to_owned(), key.display().to_string()]);
    }
    words.extend(device.ssh_options.iter().cloned());
    words.push(device.host.clone().unwrap_or_default());
    words
}

/// A word that a POSIX shell takes literally.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_survive_the_shell() {
        for word in ["plain", "", "two words", "it's", "$HOME", "a;b", "*"] {
            let mut command = Command::new("sh");
            command.args(["-c", &format!("printf %s {}", quote(word))]);
            assert_eq!(process::run(command, None, Duration::from_secs(20)).unwrap(), word);
        }
    }
}
