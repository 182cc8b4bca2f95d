//! Picks the kernel modules that the guest loads, with what they depend on, in an order in which they load.
//!
//! Which drivers are modules and which are built in differs between kernels: a name that is not there as a module
//! is taken to be built in, except that a guest without the essential ones is caught by its boot test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::elf::Elf;
use super::output;

/// What the guest loads before it is ready, when it has a seed, and when it is ready.
pub const GROUPS: [(&str, &[&str]); 3] = [
    ("early", &["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "crc32c_generic", "ext4"]),
    ("seed", &["nls_cp437", "nls_ascii", "nls_iso8859_1", "nls_utf8", "vfat", "isofs"]),
    ("late", &["button", "evdev", "virtio_rng", "virtio_balloon", "pvpanic", "pvpanic_pci", "efivarfs"]),
];

/// One module in the image.
#[derive(Debug)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// Its bytes, uncompressed.
    pub bytes: Vec<u8>,
}

/// The modules of one kernel by name.
#[derive(Debug)]
pub struct Tree {
    files: BTreeMap<String, PathBuf>,
    busybox: PathBuf,
}

impl Tree {
    /// Finds all modules below a directory. Busybox unpacks what is compressed with xz.
    pub fn new(directory: &Path, busybox: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        collect(directory, &mut files)
            .with_context(|| format!("modules in {} can't be listed", directory.display()))?;
        ensure!(!files.is_empty(), "there are no modules in {}", directory.display());
        Ok(Self { files, busybox: busybox.to_owned() })
    }

    /// The modules of each group in loading order; one that an earlier group has is not in a later one.
    pub fn groups(&self) -> Result<Vec<(&'static str, Vec<Module>)>> {
        let mut seen = BTreeSet::new();
        let mut groups = Vec::new();
        for (group, names) in GROUPS {
            let mut modules = Vec::new();
            for name in names {
                self.add(name, &mut seen, &mut modules)?;
            }
            groups.push((group, modules));
        }
        Ok(groups)
    }

    fn add(&self, name: &str, seen: &mut BTreeSet<String>, modules: &mut Vec<Module>) -> Result<()> {
        let name = name.replace('-', "_");
        let Some(file) = self.files.get(&name) else { return Ok(()) };
        if !seen.insert(name.clone()) {
            return Ok(());
        }
        let bytes = self.read(file)?;
        let elf = Elf::new(&bytes).with_context(|| format!("{} is no module", file.display()))?;
        for list in elf.module_info("depends") {
            for dependency in list.split(',').filter(|dependency| !dependency.is_empty()) {
                self.add(dependency, seen, modules)?;
            }
        }
        modules.push(Module { name, bytes });
        Ok(())
    }

    fn read(&self, file: &Path) -> Result<Vec<u8>> {
        let ending = file.extension().unwrap_or_default().to_string_lossy();
        match &*ending {
            "xz" => output(Command::new(&self.busybox).args(["unxz", "-c"]).arg(file)),
            "gz" => output(Command::new(&self.busybox).args(["gunzip", "-c"]).arg(file)),
            "zst" => output(Command::new("zstd").args(["-q", "-d", "-c"]).arg(file))
                .context("this distribution's modules need the package zstd"),
            _ => fs::read(file).with_context(|| format!("{} can't be read", file.display())),
        }
    }
}

fn collect(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), files)?;
        } else if let Some((name, ending)) = entry.file_name().to_string_lossy().split_once(".ko")
            && matches!(ending, "" | ".xz" | ".zst" | ".gz")
        {
            files.insert(name.replace('-', "_"), entry.path());
        }
    }
    Ok(())
}
