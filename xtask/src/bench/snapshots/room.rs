//! What a second snapshot takes on the disk, when little has changed since the first.

use std::time::Duration;

use anyhow::{Context, Result};
use guest_probe::memory::{Rewrite, Settings};
use serde_json::Value;

use super::pauses::fillable_mib;
use super::{cluster, scaled};
use crate::bench::Run;
use crate::bench::figures::Figures;
use crate::bench::subject::Subject;
use crate::bench::work::{self, GUEST_MIB, number};

/// How long filling may take.
const FILL_MAX: Duration = Duration::from_secs(180);
/// How many second snapshots.
const EACH: u32 = 3;
/// How much of its memory the guest changes between the two, in percent.
const CHANGED_PERCENT: u32 = 5;
/// The first snapshot's name.
const FIRST: &str = "first";

/// Takes the figures: the guest's memory is full of what can't be made smaller, then five percent of the guest's memory
/// are rewritten, whole pages of random data, some twice.
///
/// # Errors
/// When a snapshot fails, or the guest is silent.
pub fn measure(run: &Run, figures: &mut Figures) -> Result<()> {
    let cluster = cluster(run, "room")?;
    let subject = Subject::make(&cluster, "roomy", GUEST_MIB)?;
    let still =
        Settings { memory_mib: fillable_mib(GUEST_MIB), rate_mib_s: 0, hot_mib: 0, rewrite: Rewrite::Whole };
    subject.probe.set(still, FILL_MAX)?;
    let first = bytes(&subject.take(FIRST)?)?;
    figures.add("first_snapshot_bytes", "bytes of a snapshot of a full guest of 2 GiB", &[first]);
    let (mut seconds, mut percent, mut took) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..scaled(run, EACH) {
        change(&subject, still)?;
        let name = format!("second-{index}");
        let facts = subject.take(&name)?;
        seconds.push(bytes(&facts)?);
        percent.push(100.0 * bytes(&facts)? / first);
        took.push(number(&facts["total_ms"])?);
        // Back to the first one, so that the next is the first one's child again and differs from it as little.
        subject.put_back(FIRST, &["--no-undo"])?;
        subject.forget(&name)?;
    }
    figures.add("second_snapshot_bytes", "bytes of one after 5 % of memory changed", &seconds);
    figures.add("second_snapshot_bytes_percent", "the same, of the first's", &percent);
    figures.add("second_snapshot_total_ms", "how long it took in all", &took);
    subject.verify()?;
    cluster.down()
}

/// Has the guest rewrite five percent of its memory, and waits until it has.
fn change(subject: &Subject<'_>, still: Settings) -> Result<()> {
    let hot_mib = GUEST_MIB * CHANGED_PERCENT / 100;
    let enough = u64::from(hot_mib) * 256;
    let before = subject.probe.status()?.dirtied_pages;
    subject.probe.set(Settings { rate_mib_s: hot_mib, hot_mib, ..still }, FILL_MAX)?;
    let mut patience = 600;
    while subject.probe.status()?.dirtied_pages < before + enough {
        patience = u32::checked_sub(patience, 1).context("the guest does not rewrite what it was told to")?;
        std::thread::sleep(Duration::from_millis(50));
    }
    subject.probe.set(still, FILL_MAX).map(drop)?;
    work::settle();
    Ok(())
}

/// What a snapshot occupies: its memory image and the layer that it froze.
fn bytes(facts: &Value) -> Result<f64> {
    Ok(number(&facts["memory_stored_bytes"])? + number(&facts["disk_stored_bytes"])?)
}
