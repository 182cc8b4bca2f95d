//! Figures, beside the bars that they must reach and beside what others reach on the same machine in the same run.
//!
//! `cargo xtask bench first-light` brings up real clusters through the `berth` binary, lets guests work in a way that
//! is stated, measures, and prints one table. Medians decide, because one run in seven may meet a machine that is busy
//! with something else; the worst stands beside each median, because users meet that one too. Peers (libvirt, plain
//! QEMU) run the same guest with the same work; where a figure can be taken in the same way on both sides, it is: the
//! hypervisors' own STOP and RESUME events, and the gap that a UDP client outside sees.
//!
//! What fails is said and left out, and the rest goes on: a bench of ten minutes must not be lost to its last step.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use berth_e2e::Berth;

mod figures;
mod fleet;
mod migration;
mod peers;
mod permissions;
mod snapshot;
mod snapshots;
mod subject;
mod work;

use figures::{Bar, Bound, Figures};

/// What `first-light` must reach; smaller is better in all of it.
const FIRST_LIGHT: [Bar; 6] = [
    Bar {
        name: "snapshot_paused_ms",
        bound: Bound::Most(40.0),
        meaning: "guest paused by a snapshot with memory, 2 GiB guest",
    },
    Bar {
        name: "restore_running_ms",
        bound: Bound::Most(400.0),
        meaning: "restore: agent's command to guest running",
    },
    Bar {
        name: "restore_growth_ratio",
        bound: Bound::Most(1.3),
        meaning: "the same for an 8 GiB guest, divided by that",
    },
    Bar {
        name: "migration_blackout_ms",
        bound: Bound::Most(60.0),
        meaning: "source's STOP to target's RESUME, whole pages",
    },
    Bar {
        name: "agent_resident_mb",
        bound: Bound::Most(30.0),
        meaning: "an agent's resident memory with 10 VMs, in 10^6 bytes",
    },
    Bar {
        name: "vm_list_2000_p99_ms",
        bound: Bound::Most(50.0),
        meaning: "`vm list` with 2,000 VMs over HTTPS",
    },
];

/// What `permissions` must reach.
const PERMISSIONS: [Bar; 5] = [
    Bar {
        name: "decision_p99_us",
        bound: Bound::Most(50.0),
        meaning: "one decision, 10,000 VMs, 200 grants, 1,000 users",
    },
    Bar {
        name: "filtered_list_ms",
        bound: Bound::Most(5.0),
        meaning: "`vm list` out of 10,000 VMs for a user who may see 50, at the door",
    },
    Bar {
        name: "audit_appends_per_second",
        bound: Bound::Least(5000.0),
        meaning: "durable audit records a second, sustained",
    },
    Bar {
        name: "audit_added_latency_p99_ms",
        bound: Bound::Most(5.0),
        meaning: "what the audit adds to a request",
    },
    Bar {
        name: "audit_verify_million_seconds",
        bound: Bound::Most(5.0),
        meaning: "verifying an export of 1,000,000 records",
    },
];

/// Which bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Name {
    /// A two-host cluster: snapshot, restore, move, and what the daemons cost.
    FirstLight,
    /// Decisions, filtered lists, and the audit.
    Permissions,
    /// What snapshots cost, what they make cheap, and how that compares to others.
    Snapshots,
}

impl Name {
    const fn bars(self) -> &'static [Bar] {
        match self {
            Self::FirstLight => &FIRST_LIGHT,
            Self::Permissions => &PERMISSIONS,
            Self::Snapshots => &snapshots::BARS,
        }
    }
}

/// How to run a bench.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Which
    #[arg(value_enum)]
    bench: Name,
    /// Write the figures there too, as flat JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Take only these figures
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    only: Vec<String>,
    /// Leave out libvirt and plain QEMU
    #[arg(long)]
    no_peers: bool,
    /// How often each thing is done; what `snapshots` does fifty or a hundred times is scaled accordingly
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
}

/// What all parts of a run share.
#[derive(Debug)]
struct Run {
    berth: Option<Berth>,
    /// A folder of this run, removed at its end.
    dir: PathBuf,
    runs: u32,
    only: Vec<String>,
}

impl Run {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }

    fn berth(&self) -> Result<&Berth> {
        self.berth.as_ref().context("there is no berth binary: build berth-cli, or set BERTH_BIN")
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // What it held is worth nothing; a cluster that could not be taken down has said so itself.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Runs a bench.
///
/// # Errors
/// When a figure that was asked for could not be taken. A bar that is missed is no error: it is a figure.
pub fn run(arguments: &Arguments) -> Result<()> {
    let bars = arguments.bench.bars();
    for name in &arguments.only {
        if !bars.iter().any(|bar| bar.name == name) {
            let names: Vec<&str> = bars.iter().map(|bar| bar.name).collect();
            bail!("--only {name}: expected one or more of {}", names.join(", "));
        }
    }
    let dir = std::env::temp_dir().join(format!("berth-bench-{}", std::process::id()));
    fs::create_dir_all(&dir).with_context(|| format!("making {}", dir.display()))?;
    let run = Run {
        berth: Berth::beside_this_program().ok(),
        dir,
        runs: arguments.runs,
        only: arguments.only.clone(),
    };
    let mut figures = Figures::default();
    match arguments.bench {
        Name::FirstLight => first_light(&run, arguments.no_peers, &mut figures),
        Name::Permissions => permissions(&run, &mut figures),
        Name::Snapshots => snapshots::measure(&run, arguments.no_peers, &mut figures),
    }
    drop(run);
    figures.print(bars);
    if let Some(path) = &arguments.json {
        write(path, &figures)?;
    }
    let failures = figures.failures();
    if failures > 0 {
        bail!("{failures} part(s) of the bench failed: see above");
    }
    Ok(())
}

fn first_light(run: &Run, no_peers: bool, figures: &mut Figures) {
    say_machine();
    let wants = |names: &[&str]| names.iter().any(|name| run.wants(name));
    if wants(&["snapshot_paused_ms", "restore_running_ms", "restore_growth_ratio"]) {
        part(figures, "snapshot and restore", |figures| snapshot::measure(run, figures));
    }
    if wants(&["migration_blackout_ms"]) {
        part(figures, "migration", |figures| migration::measure(run, figures));
    }
    if wants(&["agent_resident_mb"]) {
        part(figures, "an agent's memory", |figures| fleet::agent_memory(run, figures));
    }
    if wants(&["vm_list_2000_p99_ms"]) {
        part(figures, "a list of 2,000 VMs", fleet::list);
    }
    if no_peers {
        println!("\npeers are left out: --no-peers");
    } else {
        peers::measure(run, figures);
    }
}

fn permissions(run: &Run, figures: &mut Figures) {
    say_machine();
    let wants = |names: &[&str]| names.iter().any(|name| run.wants(name));
    if wants(&["decision_p99_us", "filtered_list_ms"]) {
        part(figures, "decisions and lists", |figures| permissions::decisions(run, figures));
    }
    if wants(&["audit_appends_per_second", "audit_added_latency_p99_ms"]) {
        part(figures, "writing the audit", |figures| permissions::audit(run, figures));
    }
    if wants(&["audit_verify_million_seconds"]) {
        part(figures, "verifying the audit", |figures| permissions::verify(run, figures));
    }
}

/// Does one part; says and counts its failure.
fn part(figures: &mut Figures, what: &str, work: impl FnOnce(&mut Figures) -> Result<()>) {
    println!("\n== {what}");
    if let Err(error) = work(figures) {
        println!("   FAILED: {error:#}");
        figures.failed();
    }
}

/// Figures mean little without the machine, and less when it was busy.
fn say_machine() {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = read("/proc/cpuinfo");
    let models: Vec<&str> = cpus
        .lines()
        .filter_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim()))
        .collect();
    let memory_kib: f64 = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
        .unwrap_or_default();
    println!(
        "machine: {} x {}, {:.0} GiB, Linux {}",
        models.len(),
        models.first().unwrap_or(&"unknown processor"),
        memory_kib / 1_048_576.0,
        read("/proc/sys/kernel/osrelease").trim(),
    );
    println!("load before the start: {}", read("/proc/loadavg").trim());
}

fn write(path: &Path, figures: &Figures) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let text = format!("{:#}\n", figures.json());
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    println!("\nalso in {}", path.display());
    Ok(())
}
