//! What snapshots cost and what they make cheap: pauses, the guest's lost work, restores, and the room they take.
//!
//! Each part has a cluster of its own, so that one that fails does not harm the next, and so that `--only` takes what
//! it needs and nothing else. How each figure is taken stands in `docs/benchmarks.md`.

use std::path::Path;

use anyhow::Result;
use berth_e2e::{Cluster, UpOptions};

use super::figures::{Bar, Bound, Figures};
use super::peers;
use super::{Run, part, say_machine};

mod clones;
mod pauses;
mod restores;
mod room;
mod schedule;
mod slowdown;

/// How often a thing is done when nobody says otherwise: what the counts of the figures below are for.
pub const USUAL_RUNS: u32 = 7;

/// What must be reached; smaller is better in all of it.
pub const BARS: [Bar; 14] = [
    Bar {
        name: "paused_ms_p50",
        bound: Bound::Most(15.0),
        meaning: "guest paused by a snapshot with memory, 2 GiB, 50 of them",
    },
    Bar { name: "paused_ms_max", bound: Bound::Most(40.0), meaning: "the longest of them" },
    Bar {
        name: "paused_growth_ratio",
        bound: Bound::Most(1.5),
        meaning: "the same for 0.5, 2, 8 GiB, all touched: largest median / smallest",
    },
    Bar {
        name: "guest_slowdown_percent",
        bound: Bound::Most(15.0),
        meaning: "guest's own work lost while a snapshot streams, 50 MiB/s",
    },
    Bar {
        name: "restore_running_ms_2gib",
        bound: Bound::Most(100.0),
        meaning: "restore: agent told -> guest running, page cache warm",
    },
    Bar { name: "restore_running_ms_8gib", bound: Bound::Most(120.0), meaning: "the same, 8 GiB" },
    Bar {
        name: "restore_running_warm_process_ms",
        bound: Bound::Most(25.0),
        meaning: "the same, 2 GiB, with a process made ready before",
    },
    Bar {
        name: "restore_running_cold_ms",
        bound: Bound::Most(400.0),
        meaning: "the same, 2 GiB, nothing of it in the page cache",
    },
    Bar {
        name: "restore_udp_vs_libvirt_ratio",
        bound: Bound::Most(0.1),
        meaning: "command -> UDP answer, divided by libvirt's revert",
    },
    Bar {
        name: "clones10_seconds",
        bound: Bound::Most(5.0),
        meaning: "ten clones of a 2 GiB VM: command until all answer",
    },
    Bar {
        name: "clone_extra_memory_percent",
        bound: Bound::Most(15.0),
        meaning: "private memory of each clone's QEMU then, of the VM's memory",
    },
    Bar {
        name: "second_snapshot_bytes_percent",
        bound: Bound::Most(8.0),
        meaning: "bytes of a snapshot after 5 % of memory changed, of the first's",
    },
    Bar {
        name: "schedule_100_errors",
        bound: Bound::Most(0.0),
        meaning: "failures in 100 runs of a schedule and in what it keeps",
    },
    Bar {
        name: "schedule_chain_max",
        bound: Bound::Most(16.0),
        meaning: "most layers of the VM's disk meanwhile",
    },
];

/// Takes the figures that are wanted.
pub fn measure(run: &Run, no_peers: bool, figures: &mut Figures) {
    say_machine();
    let wants = |names: &[&str]| names.iter().any(|name| run.wants(name));
    if wants(&["paused_ms_p50", "paused_ms_max"]) {
        part(figures, "pauses", |figures| pauses::many(run, figures));
    }
    if wants(&["guest_slowdown_percent"]) {
        part(figures, "the guest's own work meanwhile", |figures| slowdown::measure(run, figures));
    }
    if wants(&["paused_growth_ratio"]) {
        part(figures, "pauses of small and large guests", |figures| pauses::growth(run, figures));
    }
    if wants(&restores::SMALL) {
        part(figures, "restores", |figures| restores::small(run, figures));
    }
    if wants(&["restore_running_ms_8gib"]) {
        part(figures, "restores of a large guest", |figures| restores::large(run, figures));
    }
    if wants(&["second_snapshot_bytes_percent"]) {
        part(figures, "the room of a second snapshot", |figures| room::measure(run, figures));
    }
    if wants(&["clones10_seconds", "clone_extra_memory_percent"])
        && knows(run, "clones", &["snapshot", "restore", "--clone", "copy"])
    {
        part(figures, "clones", |figures| clones::measure(run, figures));
    }
    if wants(&["schedule_100_errors", "schedule_chain_max"]) && knows(run, "schedules", &["schedule"]) {
        part(figures, "a schedule", |figures| schedule::measure(run, figures));
    }
    if no_peers {
        println!("\npeers are left out: --no-peers");
    } else {
        peers::measure_snapshots(run, figures);
        restores::compare(figures);
    }
}

/// Whether the binary that is measured knows these words; says so if it does not, as an older one may not.
fn knows(run: &Run, feature: &str, words: &[&str]) -> bool {
    let help = run.berth().and_then(|berth| Ok(berth.command(&[words, &["--help"]].concat()).output()?));
    let known = help.is_ok_and(|help| help.status.success());
    if !known {
        println!("\n{feature} are left out: this berth has no `berth {}`", words.join(" "));
    }
    known
}

/// A cluster of one host with the test guest as image `probe`, in a folder of this name.
fn cluster(run: &Run, name: &str) -> Result<Cluster> {
    let dir: &Path = &run.dir;
    let options = UpOptions { dir: dir.join(name), hosts: 1, link_mbit: None, keep: false };
    let cluster = Cluster::up(run.berth()?, &options)?;
    cluster.import_guest("probe", "")?;
    Ok(cluster)
}

/// So many for the usual number of runs, and accordingly for another; once at least.
fn scaled(run: &Run, usual: u32) -> u32 {
    (usual * run.runs / USUAL_RUNS).max(1)
}
