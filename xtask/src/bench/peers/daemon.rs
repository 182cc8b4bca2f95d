//! A libvirt daemon that lives beside the machine and leaves nothing in it.
//!
//! It has its own mount, UTS and network namespace: in there `/run`, `/etc/libvirt` and the folders under `/var` are of
//! this run, and so are the user database (Debian's build asks for a user that its packages may not have made) and
//! `/dev/kvm`, which is empty: where KVM opens but runs nothing, libvirt would probe QEMU anew at each start and take
//! seconds longer, which would be this machine's fault and not libvirt's.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{event_us, net};

/// Folders that libvirt has compiled in, each with its stand-in.
const FOLDERS: [(&str, &str); 4] = [
    ("/etc/libvirt", "etc"),
    ("/var/lib/libvirt", "lib"),
    ("/var/cache/libvirt", "cache"),
    ("/var/log/libvirt", "log"),
];
const USER: &str = "libvirt-qemu";
/// How long the daemon may take to answer: at its first start it asks QEMU for all that it can do.
const START_MAX: Duration = Duration::from_secs(120);
/// What one command may take, in seconds, as `timeout` takes it.
const COMMAND_MAX_S: &str = "300";

/// The daemon; stopped when dropped.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    dir: PathBuf,
    /// Folders made in the machine as places to mount on; taken away again.
    made: Vec<&'static str>,
}

impl Daemon {
    /// Starts a daemon in a network namespace, and waits until it answers.
    ///
    /// # Errors
    /// When it does not, with the end of its log.
    pub fn start(dir: &Path, namespace: &str) -> Result<Self> {
        for folder in ["sock", "disks"].into_iter().chain(FOLDERS.iter().map(|(_, own)| *own)) {
            let path = dir.join(folder);
            fs::create_dir_all(&path).with_context(|| format!("making {}", path.display()))?;
        }
        configure(dir)?;
        let mut made = Vec::new();
        for (folder, _) in FOLDERS {
            if !Path::new(folder).exists() {
                fs::create_dir_all(folder).with_context(|| format!("making {folder}"))?;
                made.push(folder);
            }
        }
        let log = fs::File::create(dir.join("out"))?;
        let child = Command::new("nsenter")
            .arg(format!("--net={}", net::file(namespace).display()))
            .args(["unshare", "--mount", "--uts", "--propagation", "private", "sh", "-euc", &script(dir)])
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting libvirtd")?;
        let mut daemon = Self { child, dir: dir.to_owned(), made };
        daemon.wait_until_up()?;
        Ok(daemon)
    }

    /// The daemon's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A folder for disks and memory files.
    pub fn disks(&self) -> PathBuf {
        self.dir.join("disks")
    }

    /// Carries out a command of `virsh`.
    ///
    /// # Errors
    /// When it fails.
    pub fn virsh(&self, words: &[&str]) -> Result<String> {
        let uri = format!("qemu:///system?socket={}", self.dir.join("sock/libvirt-sock").display());
        let all = [&[COMMAND_MAX_S, "virsh", "-q", "-c", &uri][..], words].concat();
        super::run_program("timeout", &all)
    }

    /// How far its log goes; [`Daemon::stamps`] looks from there.
    ///
    /// # Errors
    /// When there is none.
    pub fn mark(&self) -> Result<u64> {
        Ok(fs::metadata(self.log())?.len())
    }

    /// The stamps of all events of this name that QEMU sent since the mark, in microseconds.
    ///
    /// # Errors
    /// When the log can't be read.
    pub fn stamps(&self, mark: u64, event: &str) -> Result<Vec<u64>> {
        let text = fs::read(self.log())?;
        let since = text.get(usize::try_from(mark)?..).unwrap_or_default();
        let mut stamps = Vec::new();
        for line in String::from_utf8_lossy(since).lines() {
            if !line.contains("QEMU_MONITOR_RECV_EVENT") {
                continue;
            }
            let Some((_, json)) = line.split_once("event={") else { continue };
            let value: Value =
                serde_json::from_str(&format!("{{{json}")).context("an event in libvirt's log")?;
            if value["event"] == event {
                stamps.push(event_us(&value)?);
            }
        }
        Ok(stamps)
    }

    fn log(&self) -> PathBuf {
        self.dir.join("libvirtd.log")
    }

    fn wait_until_up(&mut self) -> Result<()> {
        let end = Instant::now() + START_MAX;
        loop {
            if let Some(status) = self.child.try_wait()? {
                let said = fs::read_to_string(self.dir.join("out")).unwrap_or_default();
                bail!("libvirtd ended with {status}: {}", said.trim());
            }
            if self.virsh(&["version"]).is_ok() {
                return Ok(());
            }
            let said = fs::read_to_string(self.log()).unwrap_or_default();
            ensure!(
                Instant::now() < end,
                "libvirtd does not answer: {}",
                said.lines().last().unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-s", "TERM", &self.child.id().to_string()]).status();
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end && matches!(self.child.try_wait(), Ok(None)) {
            std::thread::sleep(Duration::from_millis(100));
        }
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for folder in &self.made {
            // Only empty ones go: whatever else is in there is not ours.
            let _ = fs::remove_dir(folder);
        }
    }
}

fn configure(dir: &Path) -> Result<()> {
    let write = |name: &str, text: String| {
        let path = dir.join(name);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let socket = dir.join("sock");
    let log = dir.join("libvirtd.log");
    write(
        "etc/libvirtd.conf",
        format!(
            "unix_sock_dir = \"{}\"\nunix_sock_group = \"root\"\nauth_unix_rw = \"none\"\nauth_unix_ro = \"none\"\n\
             host_uuid = \"{}\"\nlog_filters = \"2:qemu.qemu_monitor 3:*\"\nlog_outputs = \"1:file:{}\"\n",
            socket.display(),
            uuid.trim(),
            log.display()
        ),
    )?;
    write(
        "etc/qemu.conf",
        "user = \"root\"\ngroup = \"root\"\ndynamic_ownership = 0\nremember_owner = 0\nsecurity_driver = \"none\"\n\
         stdio_handler = \"file\"\ncgroup_controllers = [ ]\nnamespaces = [ ]\n"
            .to_owned(),
    )?;
    let (users, groups) = (fs::read_to_string("/etc/passwd")?, fs::read_to_string("/etc/group")?);
    let has = |text: &str| text.lines().any(|line| line.starts_with(&format!("{USER}:")));
    let user =
        if has(&users) { String::new() } else { format!("{USER}:x:64055:64055::/:/usr/sbin/nologin\n") };
    let group = if has(&groups) { String::new() } else { format!("{USER}:x:64055:\n") };
    write("passwd", users + &user)?;
    write("group", groups + &group)
}

/// What is done inside before the daemon takes the shell's place, and so its process id.
fn script(dir: &Path) -> String {
    let dir = dir.display();
    let mut script = "hostname bench-libvirt\n".to_owned();
    for (folder, own) in FOLDERS {
        script.push_str(&format!("mount --bind '{dir}/{own}' {folder}\n"));
    }
    for file in ["passwd", "group"] {
        script.push_str(&format!("mount --bind '{dir}/{file}' /etc/{file}\n"));
    }
    script.push_str("mount -t tmpfs -o mode=755 none /run\n");
    script.push_str("if [ -e /dev/kvm ]; then mount --bind /dev/null /dev/kvm; fi\n");
    script.push_str(&format!("exec /usr/sbin/libvirtd --config '{dir}/etc/libvirtd.conf'\n"));
    script
}
