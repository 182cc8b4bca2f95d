//! The options for quotas, and quotas in words.

use std::str::FromStr;

use berth_api::manager::{Quota, Usage};
use clap::Args;

use crate::output::NOTHING;
use crate::units;

/// The most that there may be: a number, or no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bound(Option<u64>);

impl FromStr for Bound {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self(None));
        }
        let expected = || "expected a number, or none for no bound".to_owned();
        text.parse().map(|number| Self(Some(number))).map_err(|_| expected())
    }
}

fn size(text: &str) -> Result<Bound, String> {
    if text == "none" {
        return Ok(Bound(None));
    }
    let bound = units::parse_size_mib(text).map(|mib| Bound(Some(mib)));
    bound.map_err(|expected| format!("{expected}, or none for no bound"))
}

/// The most that the VMs of a segment, with those of the segments inside it, may be and take together.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct Arguments {
    /// At most so many VMs; 'none' for no bound, here and below
    #[arg(long, value_name = "N")]
    quota_vms: Option<Bound>,
    /// At most so many virtual CPUs
    #[arg(long, value_name = "N")]
    quota_vcpus: Option<Bound>,
    /// At most so much memory
    #[arg(long, value_name = "SIZE", value_parser = size)]
    quota_memory: Option<Bound>,
    /// At most so much disk, each at its full size
    #[arg(long, value_name = "SIZE", value_parser = size)]
    quota_disk: Option<Bound>,
    /// At most so many snapshots
    #[arg(long, value_name = "N")]
    quota_snapshots: Option<Bound>,
    /// At most so much taken by snapshots
    #[arg(long, value_name = "SIZE", value_parser = size)]
    quota_snapshot_size: Option<Bound>,
}

impl Arguments {
    /// Whether no bound is named.
    pub fn is_empty(&self) -> bool {
        self.all().iter().all(Option::is_none)
    }

    const fn all(&self) -> [Option<Bound>; 6] {
        [
            self.quota_vms,
            self.quota_vcpus,
            self.quota_memory,
            self.quota_disk,
            self.quota_snapshots,
            self.quota_snapshot_size,
        ]
    }

    /// A quota with what is named in the place of what was.
    pub fn onto(&self, before: Quota) -> Quota {
        let or = |bound: Option<Bound>, before: Option<u64>| bound.map_or(before, |bound| bound.0);
        Quota {
            vms: or(self.quota_vms, before.vms),
            vcpus: or(self.quota_vcpus, before.vcpus),
            memory_mib: or(self.quota_memory, before.memory_mib),
            disk_mib: or(self.quota_disk, before.disk_mib),
            snapshots: or(self.quota_snapshots, before.snapshots),
            snapshot_mib: or(self.quota_snapshot_size, before.snapshot_mib),
        }
    }
}

struct Line {
    name: &'static str,
    most: Option<u64>,
    used: u64,
    is_size: bool,
}

impl Line {
    fn text(&self, value: u64) -> String {
        if self.is_size { units::mib(value) } else { value.to_string() }
    }
}

fn all(quota: &Quota, usage: &Usage) -> [Line; 6] {
    let line = |name, most, used, is_size| Line { name, most, used, is_size };
    [
        line("VMs", quota.vms, usage.vms, false),
        line("vcpus", quota.vcpus, usage.vcpus, false),
        line("memory", quota.memory_mib, usage.memory_mib, true),
        line("disks", quota.disk_mib, usage.disk_mib, true),
        line("snapshots", quota.snapshots, usage.snapshots, false),
        line("snapshots' size", quota.snapshot_mib, usage.snapshot_mib, true),
    ]
}

/// What is used beside what may be, a line for each.
pub fn lines(quota: &Quota, usage: &Usage) -> Vec<(&'static str, String)> {
    let text = |line: &Line| match line.most {
        Some(most) => format!("{} of {}", line.text(line.used), line.text(most)),
        None => format!("{}, no bound", line.text(line.used)),
    };
    all(quota, usage).iter().map(|line| (line.name, text(line))).collect()
}

/// A quota in a cell: `10 VMs, 64 GiB memory`.
pub fn in_words(quota: &Quota) -> String {
    let lines = all(quota, &Usage::default());
    let bounds: Vec<String> = lines
        .iter()
        .filter_map(|line| line.most.map(|most| format!("{} {}", line.text(most), line.name)))
        .collect();
    if bounds.is_empty() { NOTHING.to_owned() } else { bounds.join(", ") }
}

/// A quota in a sentence.
pub fn sentence(quota: &Quota) -> String {
    if *quota == Quota::default() { "no quota".to_owned() } else { format!("a quota of {}", in_words(quota)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_read_and_nonsense_is_refused() {
        assert_eq!("10".parse(), Ok(Bound(Some(10))));
        assert_eq!("none".parse(), Ok(Bound(None)));
        assert_eq!(size("64GiB"), Ok(Bound(Some(65_536))));
        assert_eq!(size("none"), Ok(Bound(None)));
        for bad in ["", "-1", "ten", "1.5"] {
            assert!(bad.parse::<Bound>().is_err(), "{bad}");
        }
        assert!(size("64").is_err() && size("1KiB").is_err());
    }

    #[test]
    fn a_quota_is_said_in_words() {
        let quota = Quota { vms: Some(2), snapshot_mib: Some(1024), ..Quota::default() };
        assert_eq!(sentence(&quota), "a quota of 2 VMs, 1.0 GiB snapshots' size");
        assert_eq!(sentence(&Quota::default()), "no quota");
    }
}
