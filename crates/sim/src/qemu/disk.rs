//! The disk: block nodes as QEMU has them, and a place in the uppermost layer's file where the guest writes down its
//! memory each time that its disk is flushed. So a layer that was copied too early, or lost, is found out.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use berth_model::LayerId;
use serde_json::{Value, json};

use super::Refusal;
use super::guest::Memory;
use crate::oracle::Found;

/// Where in a layer's file the guest writes: behind everything that the format's head has.
const PLACE: u64 = 60 * 1024;
/// Nobody may write to a file that nobody may write to.
const WRITE_BITS: u32 = 0o222;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Node {
    driver: String,
    path: PathBuf,
    backing: Option<String>,
    read_only: bool,
}

/// The nodes, and which of them the guest's disk is.
#[derive(Debug, Default)]
pub(crate) struct Disk {
    nodes: BTreeMap<String, Node>,
    top: String,
    jobs: BTreeMap<String, Job>,
}

/// A commit that has caught up or is over.
#[derive(Debug)]
struct Job {
    base: String,
    overlay: String,
    status: &'static str,
}

impl Disk {
    /// From the options of a command line.
    pub(crate) fn open(words: &[String]) -> Result<Self, String> {
        let mut disk = Self::default();
        for pair in words.windows(2) {
            match pair[0].as_str() {
                "-blockdev" => {
                    let options: Value =
                        serde_json::from_str(&pair[1]).map_err(|error| format!("-blockdev: {error}"))?;
                    disk.add(&options).map_err(|refusal| refusal.desc)?;
                }
                "-device" => {
                    let mut options = pair[1].split(',');
                    if options.next() == Some("virtio-blk-pci") && pair[1].contains("id=disk0,") {
                        disk.top =
                            options.find_map(|one| one.strip_prefix("drive=")).unwrap_or_default().to_owned();
                    }
                }
                _ => {}
            }
        }
        if disk.nodes.contains_key(&disk.top) {
            Ok(disk)
        } else {
            Err(format!("no node '{}' for disk0", disk.top))
        }
    }

    /// `blockdev-add`.
    pub(crate) fn add(&mut self, options: &Value) -> Result<Value, Refusal> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let name = text(&options["node-name"]);
        if name.is_empty() || name.len() > 31 || self.nodes.contains_key(&name) {
            return Err(Refusal::new(format!("Duplicate or bad node name '{name}'")));
        }
        let path = PathBuf::from(text(&options["file"]["filename"]));
        if !path.exists() {
            let message = format!("Could not open '{}': No such file or directory", path.display());
            return Err(Refusal::new(message));
        }
        let backing = options["backing"].as_str().map(str::to_owned);
        if let Some(below) = &backing
            && !self.nodes.contains_key(below)
        {
            return Err(Refusal::new(format!("Cannot find device='{below}' nor node-name='{below}'")));
        }
        let read_only = options["read-only"].as_bool().unwrap_or(false);
        self.nodes.insert(name, Node { driver: text(&options["driver"]), path, backing, read_only });
        Ok(json!({}))
    }

    /// `blockdev-del`.
    pub(crate) fn remove(&mut self, name: &str) -> Result<Value, Refusal> {
        if !self.nodes.contains_key(name) {
            return Err(Refusal::new(format!("Failed to find node with node-name='{name}'")));
        }
        let used = self.top == name || self.nodes.values().any(|node| node.backing.as_deref() == Some(name));
        if used {
            return Err(Refusal::new(format!(
                "Node '{name}' is busy: node is used as backing hd or by a device"
            )));
        }
        self.nodes.remove(name);
        Ok(json!({}))
    }

    /// `blockdev-reopen`, of nodes and of the files right below them, which have the node's name behind an `f`.
    pub(crate) fn reopen(&mut self, arguments: &Value) -> Result<Value, Refusal> {
        for options in arguments["options"].as_array().into_iter().flatten() {
            let name = options["node-name"].as_str().unwrap_or_default();
            let read_only = options["read-only"].as_bool().unwrap_or(false);
            if let Some(node) = self.nodes.get_mut(name) {
                if node.backing.as_deref() != options["backing"].as_str() {
                    return Err(Refusal::new(format!("Node '{name}' has another backing node")));
                }
                node.read_only = read_only;
                continue;
            }
            match name.strip_prefix('f').and_then(|above| self.nodes.get(above)) {
                Some(above) if read_only && !above.read_only => {
                    let message = format!("Block node '{name}' is read-only, but its parent wants to write");
                    return Err(Refusal::new(message));
                }
                Some(_) => {}
                None => return Err(Refusal::new(format!("Failed to find node with node-name='{name}'"))),
            }
        }
        Ok(json!({}))
    }

    /// `transaction`: all of it or nothing.
    pub(crate) fn transaction(&mut self, actions: &Value) -> Result<Value, Refusal> {
        let (nodes, top) = (self.nodes.clone(), self.top.clone());
        for action in actions.as_array().into_iter().flatten() {
            let done = match action["type"].as_str() {
                Some("blockdev-snapshot") => self.put_on_top(
                    action["data"]["node"].as_str().unwrap_or_default(),
                    action["data"]["overlay"].as_str().unwrap_or_default(),
                ),
                other => Err(Refusal::new(format!("a transaction with {other:?}"))),
            };
            if let Err(refusal) = done {
                (self.nodes, self.top) = (nodes, top);
                return Err(refusal);
            }
        }
        Ok(json!({}))
    }

    fn put_on_top(&mut self, node: &str, overlay: &str) -> Result<(), Refusal> {
        if self.top != node {
            return Err(Refusal::new(format!(
                "node '{node}' is not the disk's top, which is '{}'",
                self.top
            )));
        }
        match self.nodes.get_mut(overlay) {
            Some(above) if above.backing.is_none() => above.backing = Some(node.to_owned()),
            Some(_) => return Err(Refusal::new("The overlay already has a backing image".to_owned())),
            None => {
                return Err(Refusal::new(format!(
                    "Cannot find device='{overlay}' nor node-name='{overlay}'"
                )));
            }
        }
        overlay.clone_into(&mut self.top);
        Ok(())
    }

    /// `block-commit` of the top into the node below it. Gives the job's id; it has caught up at once.
    pub(crate) fn commit(&mut self, arguments: &Value) -> Result<String, Refusal> {
        let text = |key: &str| arguments[key].as_str().unwrap_or_default().to_owned();
        let (job, overlay, base) = (text("job-id"), text("device"), text("base-node"));
        let is_next =
            self.nodes.get(&overlay).and_then(|node| node.backing.as_deref()) == Some(base.as_str());
        if self.top != overlay || !is_next {
            return Err(Refusal::new(format!("'{base}' is not right below the top '{overlay}'")));
        }
        self.jobs.insert(job.clone(), Job { base, overlay, status: "ready" });
        Ok(job)
    }

    /// `job-complete`: the guest writes to the base again. Gives what is now in which layer.
    pub(crate) fn complete(&mut self, id: &str) -> Result<Option<(LayerId, Memory)>, Refusal> {
        let Some(job) = self.jobs.get_mut(id).filter(|job| job.status == "ready") else {
            return Err(Refusal::new(format!("Job '{id}' not found, or not ready")));
        };
        job.status = "concluded";
        let written = self.nodes.get(&job.overlay).and_then(|node| read(&node.path).ok().flatten());
        self.top.clone_from(&job.base);
        // What is merged away is still open, and lies on nothing any more.
        if let Some(overlay) = self.nodes.get_mut(&job.overlay) {
            overlay.backing = None;
        }
        let Some(base) = self.nodes.get_mut(&job.base) else { return Ok(None) };
        // QEMU opens it for writing by itself.
        base.read_only = false;
        if let (Some(memory), Some(layer)) = (written, layer_of(&base.path)) {
            write(&base.path, memory).map_err(|error| Refusal::new(error.to_string()))?;
            return Ok(Some((layer, memory)));
        }
        Ok(None)
    }

    /// `job-dismiss`.
    pub(crate) fn dismiss(&mut self, id: &str) -> Result<Value, Refusal> {
        match self.jobs.remove(id) {
            Some(_) => Ok(json!({})),
            None => Err(Refusal::new(format!("Job '{id}' not found"))),
        }
    }

    /// `query-jobs`.
    pub(crate) fn jobs(&self) -> Value {
        let job = |(id, job): (&String, &Job)| json!({"id": id, "type": "commit", "status": job.status});
        self.jobs.iter().map(job).collect()
    }

    /// `query-block`.
    pub(crate) fn drives(&self) -> Value {
        let inserted = self.nodes.get(&self.top).map(|node| self.described(&self.top, node));
        json!([{"device": "", "qdev": "/machine/peripheral/disk0/virtio-backend", "inserted": inserted}])
    }

    /// `query-named-block-nodes`.
    pub(crate) fn described_nodes(&self) -> Value {
        self.nodes.iter().map(|(name, node)| self.described(name, node)).collect()
    }

    fn described(&self, name: &str, node: &Node) -> Value {
        let path_of = |name: &String| self.nodes.get(name).map(|node| node.path.display().to_string());
        json!({
            "node-name": name,
            "file": node.path.display().to_string(),
            "drv": node.driver,
            "ro": node.read_only,
            "backing_file": node.backing.as_ref().and_then(path_of),
        })
    }

    /// The guest's disk is flushed: it writes down where it is. Gives the layer that it wrote to.
    pub(crate) fn flush(&self, memory: Memory) -> Result<Option<LayerId>, String> {
        let Some(node) = self.nodes.get(&self.top) else { return Err("the disk has no top".into()) };
        if node.read_only {
            return Err(format!("it writes to '{}', which was opened to be read", self.top));
        }
        write(&node.path, memory).map_err(|error| format!("{}: {error}", node.path.display()))?;
        Ok(layer_of(&node.path))
    }

    /// What the guest finds on its disk.
    pub(crate) fn look(&self) -> Found {
        let mut next = self.nodes.get(&self.top);
        while let Some(node) = next {
            if let Ok(Some(written)) = read(&node.path) {
                return Found { layer: layer_of(&node.path), written: Some(written) };
            }
            next = node.backing.as_ref().and_then(|below| self.nodes.get(below));
        }
        Found { layer: None, written: None }
    }
}

fn layer_of(path: &Path) -> Option<LayerId> {
    path.file_stem()?.to_str()?.parse().ok()
}

fn read(path: &Path) -> io::Result<Option<Memory>> {
    let mut bytes = [0; Memory::BYTES];
    match File::open(path)?.read_exact_at(&mut bytes, PLACE) {
        Ok(()) => Ok(Memory::from_bytes(&bytes)),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(error) => Err(error),
    }
}

fn write(path: &Path, memory: Memory) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    // To root everything is open; the mode says what it would be to the VM's own user.
    if file.metadata()?.mode() & WRITE_BITS == 0 {
        return Err(io::Error::other("it is frozen, and written to"));
    }
    file.write_all_at(&memory.to_bytes(), PLACE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(directory: &Path, layers: &[&LayerId]) -> Disk {
        let mut words = Vec::new();
        let mut backing = Value::Null;
        for (index, layer) in layers.iter().enumerate() {
            let path = directory.join(format!("{layer}.qcow2"));
            if !path.exists() {
                File::create(&path).expect("file");
            }
            let node = format!("l{index}");
            words.push("-blockdev".to_owned());
            let options = json!({"driver": "qcow2", "node-name": node, "read-only": index + 1 < layers.len(),
                "backing": backing, "file": {"driver": "file", "filename": path}});
            words.push(options.to_string());
            backing = node.into();
        }
        words
            .extend(["-device".into(), format!("virtio-blk-pci,id=disk0,drive=l{},bus=x", layers.len() - 1)]);
        Disk::open(&words).expect("disk")
    }

    const fn memory(ticks: u64) -> Memory {
        Memory { token: 9, ticks, ready: false }
    }

    #[test]
    fn what_the_guest_wrote_is_found_through_the_layers_and_survives_a_switch_taken_back() {
        let directory = tempfile::tempdir().expect("directory");
        let (low, high) = (LayerId::from_entropy([1; 10]), LayerId::from_entropy([2; 10]));
        let mut one = disk(directory.path(), &[&low]);
        one.flush(memory(1)).expect("flushed");
        let path = directory.path().join(format!("{high}.qcow2"));
        File::create(&path).expect("file");
        one.add(&json!({"driver": "qcow2", "node-name": "new", "file": {"filename": path}})).expect("added");
        assert!(one.remove("l0").is_err(), "in use");
        let switch = json!([{"type": "blockdev-snapshot", "data": {"node": "l0", "overlay": "new"}}]);
        one.transaction(&switch).expect("switched");
        assert_eq!(one.look().written, Some(memory(1)), "through an empty layer");
        one.flush(memory(2)).expect("flushed");
        assert_eq!(one.look(), Found { layer: Some(high), written: Some(memory(2)) });
        let job = one.commit(&json!({"job-id": "j", "device": "new", "base-node": "l0"})).expect("job");
        one.complete(&job).expect("completed");
        one.dismiss(&job).expect("dismissed");
        one.remove("new").expect("not in use any more");
        assert_eq!(one.look(), Found { layer: Some(low), written: Some(memory(2)) });
    }

    #[test]
    fn a_frozen_layer_that_is_written_to_is_found() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().expect("directory");
        let layer = LayerId::from_entropy([1; 10]);
        let one = disk(directory.path(), &[&layer]);
        let path = directory.path().join(format!("{layer}.qcow2"));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o444)).expect("frozen");
        assert!(one.flush(memory(1)).is_err());
    }
}
