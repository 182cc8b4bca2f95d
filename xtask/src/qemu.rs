//! Finds a QEMU of release 10 or later for the tests that need one, beside the system's.
//!
//! Debian 12 has 7.2, and 10.0 among its backports. Only the program is taken out of the package: it runs with the
//! libraries and firmware of the system's own QEMU, and nothing is installed. Of that one's modules it must not know: it
//! ends when it meets one of another build. So the name of their directory is blotted out in our copy. Debian 13's own QEMU is new
//! enough. Where the distribution has none (Ubuntu 24.04), those tests are left out, and it is said.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use guest_probe::image::default_directory;

use crate::guest::{self, packages::Apt};

const SYSTEM: &str = "/usr/bin/qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";
/// Where a QEMU of Debian's looks for its modules, as it stands in the program, and what is put there.
const MODULES: [&[u8; 31]; 2] = [b"/usr/lib/x86_64-linux-gnu/qemu\0", b"/usr/lib/x86_64-linux-gnu/none\0"];
/// The machine type that only such a QEMU has.
const MACHINE: &str = "pc-q35-10.0";

/// Prints where it is; nothing, if there is none for this system.
pub fn run() -> Result<()> {
    let kept = default_directory().join("qemu-10/qemu-system-x86_64");
    for program in [Path::new(SYSTEM), &kept] {
        if is_new(program) {
            println!("{}", program.display());
            return Ok(());
        }
    }
    let directory = kept.parent().context("it is in a directory")?;
    match download(directory)? {
        Some(program) => {
            fs::rename(program, &kept)?;
            anyhow::ensure!(is_new(&kept), "{} does not run, or has no {MACHINE}", kept.display());
            println!("{}", kept.display());
        }
        None => eprintln!("this system has no QEMU 10: the tests that need one are left out"),
    }
    Ok(())
}

fn is_new(program: &Path) -> bool {
    let machines = Command::new(program).args(["-machine", "help"]).output();
    machines.is_ok_and(|machines| String::from_utf8_lossy(&machines.stdout).contains(MACHINE))
}

/// Takes the program out of the backports' package, if there are backports.
fn download(directory: &Path) -> Result<Option<PathBuf>> {
    let work = directory.join("new");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    fs::create_dir_all(&work)?;
    let Some(apt) = Apt::of_backports(&work)? else { return Ok(None) };
    eprintln!("downloading a newer {PACKAGE}");
    let root = work.join("root");
    guest::output(apt.command("apt-get").args(["download", PACKAGE]).current_dir(&work))?;
    for entry in fs::read_dir(&work)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            guest::output(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&root))?;
        }
    }
    let (found, program) = (root.join(SYSTEM.trim_start_matches('/')), directory.join("unpacked"));
    let bytes = fs::read(&found).context("the package has no such program")?;
    fs::write(&found, without_modules(bytes))?;
    fs::rename(found, &program)?;
    fs::remove_dir_all(&work)?;
    Ok(Some(program))
}

fn without_modules(mut program: Vec<u8>) -> Vec<u8> {
    let [theirs, ours] = MODULES;
    let places: Vec<usize> =
        program.windows(theirs.len()).enumerate().filter(|(_, at)| at == theirs).map(|(at, _)| at).collect();
    for place in places {
        program[place..place + ours.len()].copy_from_slice(ours);
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_modules_directory_is_blotted_out_and_nothing_else() {
        let program = b"a/usr/lib/x86_64-linux-gnu/qemu\0b/usr/lib/x86_64-linux-gnu/qemu/x".to_vec();
        let expected = b"a/usr/lib/x86_64-linux-gnu/none\0b/usr/lib/x86_64-linux-gnu/qemu/x";
        assert_eq!(without_modules(program), expected);
    }
}
