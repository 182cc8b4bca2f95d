//! How long guests stand still: fifty snapshots of one, and a few of a small, a middling and a large one.

use anyhow::{Result, ensure};
use guest_probe::memory::Settings;

use super::{cluster, scaled};
use crate::bench::Run;
use crate::bench::figures::{Figures, median};
use crate::bench::subject::Subject;
use crate::bench::work::{self, BUSY, GUEST_MIB, LARGE_GUEST_MIB, number};

/// How many snapshots the first figures are of.
const MANY: u32 = 50;
/// How many of each size.
const EACH: u32 = 3;
/// The small guest's memory in MiB.
const SMALL_GUEST_MIB: u32 = 512;
/// What is rewritten of guests of any size, in MiB: so much fits into the small one.
const HOT_MIB: u32 = 256;

/// What some snapshots measured.
#[derive(Debug, Default)]
struct Pauses {
    paused_ms: Vec<f64>,
    total_ms: Vec<f64>,
    gap_ms: Vec<f64>,
    rounds: Vec<f64>,
    failures: u32,
}

impl Pauses {
    /// Takes so many, each deleted again. One that fails is told at once and counted: those that went well are still worth
    /// their figures.
    fn of(subject: &Subject<'_>, snapshots: u32) -> Result<Self> {
        let mut pauses = Self::default();
        for index in 0..snapshots {
            let name = format!("run-{index}");
            match work::with_gap(subject.probe.address(), || subject.take(&name)) {
                Ok((facts, gap_ms)) => {
                    pauses.paused_ms.push(number(&facts["paused_us"])? / 1000.0);
                    pauses.total_ms.push(number(&facts["total_ms"])?);
                    pauses.rounds.push(number(&facts["rounds"])?);
                    pauses.gap_ms.push(gap_ms);
                    subject.forget(&name)?;
                }
                Err(error) => {
                    println!("   snapshot {index} of {snapshots} failed: {error:#}");
                    pauses.failures += 1;
                }
            }
        }
        Ok(pauses)
    }

    /// That all of them went well.
    fn all_went_well(&self) -> Result<()> {
        ensure!(self.failures == 0, "{} snapshots failed: see above", self.failures);
        Ok(())
    }
}

/// Fifty snapshots of a guest that rewrites 600 MiB.
///
/// # Errors
/// When one fails.
pub fn many(run: &Run, figures: &mut Figures) -> Result<()> {
    let cluster = cluster(run, "pauses")?;
    let subject = Subject::make(&cluster, "paused", GUEST_MIB)?;
    let pace = work::begin(&subject.probe, BUSY)?;
    figures.add("paused_guest_rate_mib_s", "rewritten by the guest meanwhile", &[pace.reached_mib_s]);
    figures.add("paused_quiet_gap_ms", "longest UDP gap of that guest when left alone", &[pace.quiet_gap_ms]);
    let pauses = Pauses::of(&subject, scaled(run, MANY))?;
    ensure!(!pauses.paused_ms.is_empty(), "no snapshot went well: see above");
    let longest = pauses.paused_ms.iter().copied().fold(f64::NAN, f64::max);
    figures.add("paused_ms_p50", "guest paused by a snapshot with memory, 2 GiB", &pauses.paused_ms);
    figures.add("paused_ms_max", "the longest of them", &[longest]);
    figures.add("snapshot_total_ms", "the snapshot in all", &pauses.total_ms);
    figures.add("snapshot_udp_gap_ms", "longest gap seen by a UDP client meanwhile", &pauses.gap_ms);
    figures.add("snapshot_rounds", "passes over memory", &pauses.rounds);
    subject.verify()?;
    cluster.down()?;
    pauses.all_went_well()
}

/// A few snapshots each of guests of 0.5, 2 and 8 GiB, all of whose memory is filled, with the same work.
///
/// # Errors
/// When one fails.
pub fn growth(run: &Run, figures: &mut Figures) -> Result<()> {
    let cluster = cluster(run, "growth")?;
    let mut medians = Vec::new();
    for (memory_mib, suffix) in [(SMALL_GUEST_MIB, "0_5gib"), (GUEST_MIB, "2gib"), (LARGE_GUEST_MIB, "8gib")]
    {
        let subject = Subject::make(&cluster, "growing", memory_mib)?;
        let settings = Settings { memory_mib: fillable_mib(memory_mib), hot_mib: HOT_MIB, ..BUSY };
        work::begin(&subject.probe, settings)?;
        let pauses = Pauses::of(&subject, scaled(run, EACH))?;
        let how = format!("{memory_mib} MiB, all touched");
        figures.add(&format!("paused_ms_{suffix}"), &format!("guest paused, {how}"), &pauses.paused_ms);
        figures.add(&format!("snapshot_total_ms_{suffix}"), &format!("in all, {how}"), &pauses.total_ms);
        figures.add(&format!("snapshot_udp_gap_ms_{suffix}"), &format!("UDP gap, {how}"), &pauses.gap_ms);
        pauses.all_went_well()?;
        medians.push(median(&pauses.paused_ms));
        subject.delete()?;
    }
    let largest = medians.iter().copied().fold(f64::NAN, f64::max);
    let smallest = medians.iter().copied().fold(f64::NAN, f64::min);
    figures.add(
        "paused_growth_ratio",
        "largest median of the three divided by the smallest",
        &[largest / smallest],
    );
    cluster.down()
}

/// How much of a guest's memory the probe fills: all but what the guest needs for itself.
pub const fn fillable_mib(memory_mib: u32) -> u32 {
    memory_mib - 128 - memory_mib / 16
}
