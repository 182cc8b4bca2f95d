//! The checker: it sees every fake guest go on and stand still, at that instant, and holds it against what must be.
//!
//! - A VM's guest runs in at most one process at a time, on whatever host.
//! - A guest that goes on after a pause or a move is the one that stood still last: nothing it did is lost, and nobody
//!   else was it meanwhile. Only a cold start makes a new guest, and only a snapshot's memory an old one.
//! - What a guest finds on its disk is what was written there last, and what its memory says of it.
//! - Nobody writes to what is frozen.
//!
//! What it finds wrong is kept with the VM's last doings, so that the first look tells the story.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use berth_model::{LayerId, VmId};

use crate::qemu::guest::Memory;

/// How many of a VM's doings are kept.
const DOINGS_MAX: usize = 60;

/// A process of a fake QEMU.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessName {
    /// Its number, unique in the world.
    pub number: u64,
    /// The host that it is on.
    pub host: String,
}

impl std::fmt::Display for ProcessName {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}#{}", self.host, self.number)
    }
}

/// Where a guest's memory comes from when it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Nowhere: it boots.
    Boot,
    /// A snapshot's image.
    Image,
    /// It was there before, here or where it was moved from.
    Before,
}

/// What a guest finds on its disk when it looks, or none where nothing was ever written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The uppermost layer that something was written to.
    pub layer: Option<LayerId>,
    /// What is there.
    pub written: Option<Memory>,
}

#[derive(Debug, Default)]
struct Vm {
    running: BTreeMap<ProcessName, ()>,
    /// The memory of the guest that stood still last.
    latest: Option<Memory>,
    /// Who has run the guest since, and may have written to its disk: that memory is then of the past.
    ran_since: Option<ProcessName>,
    layers: BTreeMap<LayerId, Memory>,
    doings: VecDeque<String>,
}

#[derive(Debug, Default)]
struct Seen {
    vms: BTreeMap<VmId, Vm>,
    wrongs: Vec<String>,
}

/// The checker.
#[derive(Debug, Default)]
pub struct Oracle {
    seen: Mutex<Seen>,
}

impl Oracle {
    /// Takes note of something, for the story.
    pub fn note(&self, vm: &VmId, doing: impl Into<String>) {
        self.with(vm, |vm, _| vm.remember(doing.into()));
    }

    /// A guest goes on, with this memory and what it finds on its disk.
    pub(crate) fn resumes(
        &self,
        vm: &VmId,
        process: &ProcessName,
        memory: Memory,
        origin: Origin,
        found: &Found,
    ) {
        self.with(vm, |vm, wrongs| {
            vm.remember(format!("{process} runs its guest ({origin:?}) at {memory}"));
            for other in vm.running.keys().filter(|other| *other != process) {
                wrongs.push(format!("{process} runs the guest that runs in {other}"));
            }
            match origin {
                Origin::Boot => {}
                Origin::Image => vm.check_image_disk(process, memory, found, wrongs),
                Origin::Before => {
                    if let Some(latest) = vm.latest
                        && latest != memory
                    {
                        wrongs.push(format!("{process} goes on at {memory}, but the guest was at {latest}"));
                    }
                    if let Some(other) = &vm.ran_since {
                        wrongs.push(format!("{process} goes on at {memory}, but {other} has run since"));
                    }
                }
            }
            vm.check_disk(process, origin, found, wrongs);
            vm.running.insert(process.clone(), ());
            vm.ran_since = Some(process.clone());
        });
    }

    /// A guest stands still, with this memory.
    pub(crate) fn stands(&self, vm: &VmId, process: &ProcessName, memory: Memory) {
        self.with(vm, |vm, _| {
            vm.remember(format!("{process} holds its guest at {memory}"));
            vm.running.remove(process);
            vm.latest = Some(memory);
            vm.ran_since = None;
        });
    }

    /// A guest has written down on its disk where it is.
    pub(crate) fn wrote(&self, vm: &VmId, layer: &LayerId, memory: Memory) {
        self.with(vm, |vm, _| {
            vm.layers.insert(layer.clone(), memory);
        });
    }

    /// A process has ended, however.
    pub(crate) fn ended(&self, vm: &VmId, process: &ProcessName, how: &str) {
        self.with(vm, |vm, _| {
            vm.remember(format!("{process} ended: {how}"));
            vm.running.remove(process);
        });
    }

    /// Something is wrong that a fake QEMU saw by itself.
    pub(crate) fn wrong(&self, vm: &VmId, what: String) {
        self.with(vm, |_, wrongs| wrongs.push(what));
    }

    /// The hosts on which a VM's guest runs now.
    pub fn running_on(&self, vm: &VmId) -> Vec<String> {
        let seen = self.lock();
        seen.vms
            .get(vm)
            .map(|vm| vm.running.keys().map(|name| name.host.clone()).collect())
            .unwrap_or_default()
    }

    /// How many guests run now.
    pub fn running(&self) -> usize {
        self.lock().vms.values().map(|vm| vm.running.len()).sum()
    }

    /// What a VM did last, a line each.
    pub fn story(&self, vm: &VmId) -> String {
        let seen = self.lock();
        let doings = seen.vms.get(vm).map(|vm| vm.doings.iter());
        doings.into_iter().flatten().fold(String::new(), |text, doing| text + "  " + doing + "\n")
    }

    /// Says what has been wrong so far.
    ///
    /// # Errors
    /// Everything that was, with what the VM did before.
    pub fn verdict(&self) -> Result<(), String> {
        let seen = self.lock();
        if seen.wrongs.is_empty() { Ok(()) } else { Err(seen.wrongs.join("\n")) }
    }

    fn with(&self, vm: &VmId, look: impl FnOnce(&mut Vm, &mut Vec<String>)) {
        let mut seen = self.lock();
        let seen = &mut *seen;
        let history = seen.vms.entry(vm.clone()).or_default();
        let mut wrongs = Vec::new();
        look(history, &mut wrongs);
        for wrong in wrongs {
            let mut text = format!("{vm}: {wrong}\n");
            for doing in &history.doings {
                let _ = writeln!(text, "    {doing}");
            }
            history.remember(format!("WRONG: {wrong}"));
            seen.wrongs.push(text);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vm {
    fn remember(&mut self, doing: String) {
        if self.doings.len() == DOINGS_MAX {
            self.doings.pop_front();
        }
        let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let ms = time.as_millis() % 1_000_000;
        self.doings.push_back(format!("{:>4}.{:03} {doing}", ms / 1000, ms % 1000));
    }

    /// A snapshot's memory and disk are of one instant.
    fn check_image_disk(
        &self,
        process: &ProcessName,
        memory: Memory,
        found: &Found,
        wrongs: &mut Vec<String>,
    ) {
        if let Some(written) = found.written
            && written != memory
        {
            wrongs.push(format!("{process} has memory of {memory} and a disk of {written}"));
        }
    }

    fn check_disk(&self, process: &ProcessName, origin: Origin, found: &Found, wrongs: &mut Vec<String>) {
        match (&found.layer, found.written) {
            (Some(layer), Some(written)) => {
                let expected = self.layers.get(layer);
                if expected != Some(&written) {
                    let expected = expected.map_or_else(|| "nothing".to_owned(), Memory::to_string);
                    wrongs.push(format!(
                        "{process} finds {written} in {layer}, where {expected} was written last"
                    ));
                }
            }
            _ => {
                if origin == Origin::Before
                    && let Some(latest) = self.latest
                {
                    wrongs
                        .push(format!("{process} finds nothing on its disk, but the guest was at {latest}"));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(ticks: u64) -> Memory {
        Memory { token: 1, ticks, ready: true }
    }

    fn named(number: u64) -> ProcessName {
        ProcessName { number, host: format!("host-{number}") }
    }

    fn found(layer: &LayerId, ticks: u64) -> Found {
        Found { layer: Some(layer.clone()), written: Some(memory(ticks)) }
    }

    const NOTHING: Found = Found { layer: None, written: None };

    #[test]
    fn two_at_once_are_found_and_one_after_the_other_are_not() {
        let vm = VmId::from_entropy([1; 10]);
        let layer = LayerId::from_entropy([2; 10]);
        let oracle = Oracle::default();
        oracle.resumes(&vm, &named(1), memory(0), Origin::Boot, &NOTHING);
        oracle.wrote(&vm, &layer, memory(5));
        oracle.stands(&vm, &named(1), memory(5));
        oracle.resumes(&vm, &named(2), memory(5), Origin::Before, &found(&layer, 5));
        oracle.verdict().expect("one after the other");
        assert_eq!(oracle.running_on(&vm), ["host-2"]);
        oracle.resumes(&vm, &named(1), memory(5), Origin::Before, &found(&layer, 5));
        let wrong = oracle.verdict().expect_err("two at once");
        assert!(wrong.contains("host-1#1 runs the guest that runs in host-2#2"), "{wrong}");
    }

    #[test]
    fn a_guest_that_goes_on_with_old_memory_or_an_old_disk_is_found() {
        let vm = VmId::from_entropy([1; 10]);
        let layer = LayerId::from_entropy([2; 10]);
        for (at, disk) in [(4, 5), (5, 4)] {
            let oracle = Oracle::default();
            oracle.wrote(&vm, &layer, memory(5));
            oracle.stands(&vm, &named(1), memory(5));
            oracle.resumes(&vm, &named(2), memory(at), Origin::Before, &found(&layer, disk));
            assert!(oracle.verdict().is_err(), "memory {at}, disk {disk}");
        }
        let oracle = Oracle::default();
        oracle.wrote(&vm, &layer, memory(5));
        oracle.stands(&vm, &named(1), memory(5));
        oracle.resumes(&vm, &named(2), memory(5), Origin::Before, &found(&layer, 5));
        oracle.ended(&vm, &named(2), "killed");
        oracle.resumes(&vm, &named(1), memory(5), Origin::Before, &found(&layer, 5));
        let wrong = oracle.verdict().expect_err("what it did meanwhile is forgotten");
        assert!(wrong.contains("host-2#2 has run since"), "{wrong}");
        let oracle = Oracle::default();
        oracle.wrote(&vm, &layer, memory(5));
        oracle.resumes(&vm, &named(2), memory(4), Origin::Image, &found(&layer, 5));
        assert!(oracle.verdict().is_err(), "a torn snapshot");
    }
}
