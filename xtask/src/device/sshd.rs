//! CI's check of the ssh transport: a real ssh server on this machine's loopback, with keys and a port of its own, started
//! for the check and stopped after it.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xshell::cmd;

use crate::repo;

const SERVER: &str = "/usr/sbin/sshd";

/// What is missing for the check, if anything.
pub(crate) fn missing() -> Option<String> {
    if !Path::new(SERVER).is_file() {
        return Some(format!("no {SERVER} (Debian: openssh-server)"));
    }
    let absent = ["ssh", "ssh-keygen"].into_iter().find(|program| !repo::has_program(program));
    absent.map(|program| format!("no {program} (Debian: openssh-client)"))
}

/// Runs the suite on this machine by ssh.
pub(crate) fn check() -> Result<String> {
    let server = Server::start()?;
    let matrix = server.folder.join("devices.toml");
    let shell = repo::shell()?;
    let user = cmd!(shell, "id -un").quiet().read()?;
    let known = server.folder.join("known_hosts");
    fs::write(
        &matrix,
        format!(
            "[[device]]\nname = \"loopback\"\ntransport = \"ssh\"\ntarget = \"host\"\nhost = \"{user}@127.0.0.1\"\n\
             port = {}\nkey = \"{}\"\nssh_options = [\"-o\", \"UserKnownHostsFile={}\"]\nfolder = \"{}\"\n",
            server.port,
            server.folder.join("key").display(),
            known.display(),
            server.folder.join("device").display()
        ),
    )?;
    super::check(&matrix, "loopback")
}

/// A running server, which ends with the value.
struct Server {
    child: Child,
    port: u16,
    folder: PathBuf,
}

impl Server {
    fn start() -> Result<Self> {
        let folder = repo::scratch("sshd")?;
        fs::remove_dir_all(&folder)?;
        fs::create_dir_all(&folder)?;
        let (shell, host_key, key) = (repo::shell()?, folder.join("host_key"), folder.join("key"));
        for file in [&host_key, &key] {
            cmd!(shell, "ssh-keygen -q -t ed25519 -N '' -f {file}").quiet().run()?;
        }
        let (allowed, config) = (folder.join("authorized_keys"), folder.join("config"));
        fs::copy(folder.join("key.pub"), &allowed)?;
        // The folder that the server insists on when root starts it.
        if cmd!(shell, "id -u").quiet().read()? == "0" {
            fs::create_dir_all("/run/sshd").context("cannot create /run/sshd")?;
        }
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let lines = [
            format!("Port {port}"),
            "ListenAddress 127.0.0.1".to_owned(),
            format!("HostKey {}", host_key.display()),
            format!("AuthorizedKeysFile {}", allowed.display()),
            format!("PidFile {}", folder.join("pid").display()),
            "PasswordAuthentication no".to_owned(),
            "PermitRootLogin prohibit-password".to_owned(),
            "StrictModes no".to_owned(),
            "UsePAM no".to_owned(),
        ];
        fs::write(&config, lines.join("\n") + "\n")?;
        let log = fs::File::create(folder.join("log"))?;
        let child =
            Command::new(SERVER).arg("-D").arg("-e").arg("-f").arg(&config).stderr(log).stdin(Stdio::null()).spawn();
        let mut server = Self { child: child.with_context(|| format!("cannot start {SERVER}"))?, port, folder };
        server.wait()?;
        Ok(server)
    }

    /// Until it listens.
    fn wait(&mut self) -> Result<()> {
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let log = || fs::read_to_string(self.folder.join("log")).unwrap_or_default();
            if let Some(status) = self.child.try_wait()? {
                bail!("{SERVER} ended with {status}: {}", log().trim());
            }
            ensure!(start.elapsed() < Duration::from_secs(20), "{SERVER} does not listen: {}", log().trim());
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
