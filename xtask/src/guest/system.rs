//! Assembles the guest's system: busybox, the probe, the guest agent with its libraries, modules and scripts.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::elf::Elf;
use super::modules::Tree;
use super::output;
use super::packages::Unpacked;

/// The guest's first process.
pub const INIT: &str = include_str!("../../guest/init.sh");
/// Stops the guest in good order.
pub const SHUTDOWN: &str = include_str!("../../guest/shutdown.sh");
/// Takes what a DHCP server said.
pub const UDHCPC: &str = include_str!("../../guest/udhcpc.sh");

/// Where the dynamic loader of both distributions looks.
const LIBRARIES: &str = "lib/x86_64-linux-gnu";

/// Commands that the scripts use before all of busybox's are installed, which would take too long at first.
const COMMANDS: [&str; 33] = [
    "acpid", "cat", "cttyhack", "dd", "grep", "head", "hostname", "insmod", "ip", "killall", "ln", "mkdir",
    "mke2fs", "mount", "sed", "setsid", "sh", "sleep", "sync", "tr", "udhcpc", "umount", "wc", "ls", "rm",
    "echo", "dmesg", "ps", "kill", "ping", "free", "test", "df",
];

const DIRECTORIES: [&str; 17] = [
    "bin",
    "sbin",
    "dev",
    "proc",
    "sys",
    "run",
    "tmp",
    "data",
    "root",
    "etc",
    "etc/acpi",
    "etc/acpi/PWRF",
    "lib",
    "lib/modules",
    LIBRARIES,
    "lib64",
    "var",
];

/// The finished initial ramdisk.
pub fn assemble(unpacked: &Unpacked, probe: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    DIRECTORIES.iter().for_each(|path| archive.directory(path));
    archive.character_device("dev/console", 5, 1);
    let busybox = unpacked.find("/bin/busybox").context("busybox-static has no busybox")?;
    add_busybox(&mut archive, &busybox)?;
    archive.program("bin/guest-probe", &read(probe)?);
    add_agent(&mut archive, unpacked)?;
    add_modules(&mut archive, unpacked, &busybox)?;
    add_scripts(&mut archive);
    Ok(archive.finish())
}

fn add_busybox(archive: &mut Archive, busybox: &Path) -> Result<()> {
    archive.program("bin/busybox", &read(busybox)?);
    let known = output(Command::new(busybox).arg("--list"))?;
    let known = String::from_utf8_lossy(&known);
    for command in COMMANDS {
        // A command that this busybox lacks is reported by the script that misses it.
        if known.lines().any(|name| name == command) {
            archive.symlink(&format!("bin/{command}"), "busybox");
        }
    }
    Ok(())
}

fn add_agent(archive: &mut Archive, unpacked: &Unpacked) -> Result<()> {
    let agent = unpacked.find("/usr/sbin/qemu-ga").or_else(|| unpacked.find("/usr/bin/qemu-ga"));
    let agent = read(&agent.context("qemu-guest-agent has no qemu-ga")?)?;
    for (name, file) in libraries(unpacked, &agent)? {
        archive.program(&format!("{LIBRARIES}/{name}"), &read(&file)?);
    }
    let elf = Elf::new(&agent).context("qemu-ga is no program")?;
    if let Some(name) = elf.interpreter().and_then(|path| path.rsplit('/').next()) {
        archive.symlink(&format!("lib64/{name}"), &format!("/{LIBRARIES}/{name}"));
    }
    archive.program("bin/qemu-ga", &agent);
    Ok(())
}

/// All libraries that a program needs, directly or not, and its loader.
fn libraries(unpacked: &Unpacked, program: &[u8]) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let elf = Elf::new(program).context("not a program")?;
    let mut wanted: Vec<String> = elf.needed().into_iter().map(str::to_owned).collect();
    wanted.extend(elf.interpreter().and_then(|path| path.rsplit('/').next()).map(str::to_owned));
    while let Some(name) = wanted.pop() {
        if found.contains_key(&name) {
            continue;
        }
        let file = unpacked.find(&format!("{LIBRARIES}/{name}"));
        let file = file.with_context(|| format!("no package has the library {name}"))?;
        let bytes = read(&file)?;
        if let Some(elf) = Elf::new(&bytes) {
            wanted.extend(elf.needed().into_iter().map(str::to_owned));
        }
        found.insert(name, file);
    }
    Ok(found)
}

fn add_modules(archive: &mut Archive, unpacked: &Unpacked, busybox: &Path) -> Result<()> {
    let (release, _) = unpacked.kernel()?;
    let directory = unpacked.find(&format!("/lib/modules/{release}")).context("the kernel has no modules")?;
    for (group, modules) in Tree::new(&directory, busybox)?.groups()? {
        let mut list = String::new();
        for module in modules {
            archive.file(&format!("lib/modules/{}.ko", module.name), &module.bytes);
            list.push_str(&module.name);
            list.push('\n');
        }
        archive.file(&format!("lib/modules/{group}"), list.as_bytes());
    }
    Ok(())
}

fn add_scripts(archive: &mut Archive) {
    archive.program("init", INIT.as_bytes());
    archive.program("sbin/shutdown", SHUTDOWN.as_bytes());
    // The guest agent sets no clock where this is not found.
    archive.symlink("sbin/hwclock", "/bin/busybox");
    for name in ["sbin/poweroff", "sbin/halt", "sbin/reboot"] {
        archive.symlink(name, "shutdown");
    }
    archive.symlink("etc/acpi/PWRF/00000080", "/sbin/shutdown");
    archive.program("etc/udhcpc.sh", UDHCPC.as_bytes());
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n");
    archive.file("etc/group", b"root:x:0:\n");
    archive.file(
        "etc/os-release",
        b"ID=berth-guest\nNAME=\"Berth test guest\"\nPRETTY_NAME=\"Berth test guest\"\n",
    );
    archive.symlink("etc/mtab", "/proc/mounts");
    archive.symlink("var/run", "/run");
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("{} can't be read", path.display()))
}
