//! Ten clones of one snapshot: how long until all of them answer, and what each of them costs in memory then.
//!
//! The guest has 600 MiB of its memory filled and leaves them alone: a clone is measured, and not ten guests that fight for
//! the processors. A clone's extra memory is what its QEMU has for itself (private pages, clean and dirty, as the kernel
//! counts them) when all ten answer, divided by the VM's memory: QEMU's own needs and the translator's are in it.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use guest_probe::UDP_PORT;
use guest_probe::client::ProbeClient;
use guest_probe::memory::Settings;

use super::cluster;
use crate::bench::Run;
use crate::bench::figures::Figures;
use crate::bench::subject::Subject;
use crate::bench::work::{BUSY, GUEST_MIB, items};

/// How many.
const CLONES: usize = 10;
/// How often they are made at most: each time ten more guests run, and ten are deleted.
const FEW: u32 = 2;
/// The snapshot that they are made of.
const ORIGIN: &str = "origin";
/// What the guest does: it holds its memory.
const STILL: Settings = Settings { rate_mib_s: 0, ..BUSY };
/// How long filling may take, and how long a clone may be silent.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes the figures.
///
/// # Errors
/// When a clone is not made, does not answer, or is not what it was made of.
pub fn measure(run: &Run, figures: &mut Figures) -> Result<()> {
    let cluster = cluster(run, "clones")?;
    let subject = Subject::make(&cluster, "original", GUEST_MIB)?;
    subject.probe.set(STILL, PATIENCE)?;
    subject.take(ORIGIN)?;
    let (mut seconds, mut command, mut extra) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..run.runs.min(FEW) {
        let made = make(&subject)?;
        seconds.push(made.answering_s);
        command.push(made.command_s);
        for name in names() {
            let private_mib = private_mib(&subject, &name)?;
            extra.push(100.0 * private_mib / f64::from(GUEST_MIB));
        }
        // One that was not looked at may be made of anything.
        for probe in &made.probes {
            let seen = probe.verify(PATIENCE * 5)?;
            ensure!(
                seen.pages_wrong == 0,
                "{} of {} pages of a clone are wrong",
                seen.pages_wrong,
                seen.pages
            );
        }
        for name in names() {
            cluster.berth.run(&["vm", "delete", &name, "--force"])?;
        }
    }
    figures.add("clones10_seconds", "ten clones of 2 GiB: command until all answer", &seconds);
    figures.add("clones10_command_seconds", "until the command comes back", &command);
    figures.add("clone_extra_memory_percent", "each one's private memory then, of the VM's", &extra);
    subject.verify()?;
    cluster.down()
}

fn names() -> impl Iterator<Item = String> {
    (1..=CLONES).map(|number| format!("copy-{number}"))
}

struct Made {
    answering_s: f64,
    command_s: f64,
    probes: Vec<ProbeClient>,
}

fn make(subject: &Subject<'_>) -> Result<Made> {
    let count = CLONES.to_string();
    let begun = Instant::now();
    let words = ["snapshot", "restore", subject.name, ORIGIN, "--clone", "copy", "--count", &count];
    subject.cluster.berth.run(&words)?;
    let command_s = begun.elapsed().as_secs_f64();
    let probes = probes(subject)?;
    std::thread::scope(|scope| {
        let asked: Vec<_> = probes.iter().map(|probe| scope.spawn(|| probe.tick_within(PATIENCE))).collect();
        for answer in asked {
            answer.join().map_err(|_| anyhow!("asking a clone failed"))?.context("a clone")?;
        }
        anyhow::Ok(())
    })?;
    Ok(Made { answering_s: begun.elapsed().as_secs_f64(), command_s, probes })
}

/// Whom to ask for each clone. One question for all: ten would be measured with them.
fn probes(subject: &Subject<'_>) -> Result<Vec<ProbeClient>> {
    let vms = items(&subject.cluster.berth.run(&["vm", "list"])?)?;
    let probe = |name: String| {
        let vm = vms.iter().find(|vm| vm["name"] == name.as_str());
        let address = vm.and_then(|vm| vm["spec"]["nics"][0]["address"].as_str());
        let address = address.with_context(|| format!("{name} has no address"))?;
        let address: IpAddr = address.split('/').next().unwrap_or_default().parse().context("an address")?;
        Ok(ProbeClient::new(SocketAddr::new(address, UDP_PORT))?)
    };
    names().map(probe).collect()
}

/// What a clone's process shares with nobody, in MiB.
fn private_mib(subject: &Subject<'_>, name: &str) -> Result<f64> {
    let processes = subject.cluster.qemus_of(name)?;
    let process = processes.first().with_context(|| format!("{name} has no process"))?;
    let path = format!("/proc/{}/smaps_rollup", process.pid);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    private_kib(&text).map(|kib| kib / 1024.0).with_context(|| format!("{path} does not say what is private"))
}

/// The private pages of a `smaps_rollup`, in KiB; clean and dirty.
fn private_kib(text: &str) -> Option<f64> {
    let field = |name: &str| {
        let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
        rest.split_whitespace().next()?.parse::<f64>().ok()
    };
    Some(field("Private_Clean:")? + field("Private_Dirty:")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_pages_are_those_that_nobody_shares() {
        let text = "Rss: 900 kB\nShared_Clean:   500 kB\nPrivate_Clean:    30 kB\nPrivate_Dirty:   12 kB\n";
        assert_eq!(private_kib(text), Some(42.0));
        assert_eq!(private_kib("Rss: 900 kB\n"), None);
    }
}
