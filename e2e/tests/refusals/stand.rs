//! How things stand: what must be the same after a refusal as before it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth_e2e::Cluster;
use serde_json::Value;

/// How long what was given up may take to be cleared away.
const CLEARED_WITHIN: Duration = Duration::from_secs(20);

/// All VMs, snapshots and images, and every file of them.
#[derive(Debug, PartialEq, Eq)]
pub struct Stand {
    vms: Vec<Value>,
    snapshots: Vec<Value>,
    images: Vec<Value>,
    files: BTreeSet<PathBuf>,
}

impl Stand {
    /// Looks.
    pub fn of(cluster: &Cluster) -> Result<Self> {
        let list = |words: &[&str]| -> Result<Vec<Value>> {
            let list = cluster.berth.run(words)?;
            list.as_array().cloned().with_context(|| format!("{words:?} is no list: {list}"))
        };
        let mut vms = list(&["vm", "list"])?;
        let mut snapshots = Vec::new();
        for vm in &mut vms {
            let id = vm["id"].as_str().context("a VM without an id")?.to_owned();
            snapshots.extend(list(&["snapshot", "list", &id])?);
            // What was tried counts, and is told: that is no change to the VM.
            for field in ["generation", "trouble"] {
                vm["status"].as_object_mut().context("a VM without a status")?.remove(field);
            }
        }
        let mut files = BTreeSet::new();
        for folder in ["pools", "hosts", "run", "../small"] {
            walk(&cluster.dir().join(folder), &mut files);
        }
        Ok(Self { vms, snapshots, images: list(&["image", "list"])?, files })
    }

    /// Without the images' files: a copy of an image that came to another pool stays there for the next time.
    #[must_use]
    pub fn but_image_files(mut self) -> Self {
        self.files.retain(|path| !path.components().any(|part| part.as_os_str() == "images"));
        self
    }

    /// Fails unless it is so again, at once or as soon as what was given up is cleared away.
    pub fn unchanged(&self, look: impl Fn() -> Result<Self>) -> Result<()> {
        let end = Instant::now() + CLEARED_WITHIN;
        loop {
            let now = look()?;
            if now == *self {
                return Ok(());
            }
            if Instant::now() > end {
                let new: Vec<_> = now.files.difference(&self.files).collect();
                let gone: Vec<_> = self.files.difference(&now.files).collect();
                ensure!(
                    new.is_empty() && gone.is_empty(),
                    "files that are new: {new:?}; that are gone: {gone:?}"
                );
                ensure!(now.vms == self.vms, "the VMs were {:?} and are {:?}", self.vms, now.vms);
                ensure!(now.snapshots == self.snapshots, "the snapshots are {:?}", now.snapshots);
                ensure!(now.images == self.images, "the images are {:?}", now.images);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn walk(folder: &Path, into: &mut BTreeSet<PathBuf>) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        // Hashes of layers are made in the background, after what they are of.
        if path.file_name().is_some_and(|name| name == "hashes") {
            continue;
        }
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(&path, into);
        }
        into.insert(path);
    }
}
