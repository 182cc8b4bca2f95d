//! What a guest loses of its own work while a snapshot is taken of it, by its own count of rewritten pages.
//!
//! Its pace before is set against its pace from the first word of memory being streamed to the first word of anything
//! else: what comes after is written from what was streamed, and asks nothing of the guest. A guest that rewrites 50 MiB
//! a second has time to spare and catches up; one that works as fast as it can has none, and shows all that is taken
//! from it.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_probe::memory::Settings;
use serde_json::Value;

use super::{cluster, scaled};
use crate::bench::Run;
use crate::bench::figures::Figures;
use crate::bench::subject::Subject;
use crate::bench::work::{self, FLAT_OUT, GUEST_MIB, Mark, STEADY};

/// How many snapshots at each pace.
const EACH: u32 = 4;
/// For how long the pace before is measured.
const BEFORE: Duration = Duration::from_secs(3);
/// The phase in which memory is streamed.
const STREAMING: &str = "warm-up";
/// How long the guest may take to fill its memory.
const FILL_MAX: Duration = Duration::from_secs(60);

/// Takes the figures.
///
/// # Errors
/// When a snapshot fails, or the guest is silent.
pub fn measure(run: &Run, figures: &mut Figures) -> Result<()> {
    let cluster = cluster(run, "slowdown")?;
    let subject = Subject::make(&cluster, "worker", GUEST_MIB)?;
    for (settings, suffix, how) in
        [(STEADY, "", "50 MiB/s asked"), (FLAT_OUT, "_flat_out", "as fast as it can")]
    {
        let lost = lost(run, &subject, settings)?;
        let named = |name: &str| format!("{name}{suffix}");
        figures.add(&named("guest_rate_before_mib_s"), &format!("its pace before, {how}"), &lost.before);
        figures.add(
            &named("guest_rate_streaming_mib_s"),
            &format!("its pace meanwhile, {how}"),
            &lost.during,
        );
        figures.add(
            &named("guest_slowdown_percent"),
            &format!("guest's own work lost while a snapshot streams, {how}"),
            &lost.percent,
        );
    }
    subject.verify()?;
    cluster.down()
}

#[derive(Debug, Default)]
struct Lost {
    before: Vec<f64>,
    during: Vec<f64>,
    percent: Vec<f64>,
}

fn lost(run: &Run, subject: &Subject<'_>, settings: Settings) -> Result<Lost> {
    subject.probe.set(settings, FILL_MAX)?;
    let mut lost = Lost::default();
    for index in 0..scaled(run, EACH) {
        work::settle();
        let before = work::rate(&subject.probe, BEFORE)?;
        let name = format!("run-{index}");
        let (begun, ended) = streamed(subject, &name)?;
        let during = ended.rate_since(&begun);
        lost.before.push(before);
        lost.during.push(during);
        lost.percent.push(100.0 * (1.0 - during / before));
        subject.forget(&name)?;
    }
    Ok(lost)
}

/// Takes a snapshot; gives what the guest had done when streaming began and when it was over.
fn streamed(subject: &Subject<'_>, snapshot: &str) -> Result<(Mark, Mark)> {
    let words = ["snapshot", "create", subject.name, "--name", snapshot];
    let mut child = subject.cluster.berth.start(&words)?;
    let output = child.stdout.take().context("the command's output")?;
    let (mut begun, mut ended) = (None, None);
    for line in BufReader::new(output).lines() {
        let event: Value = serde_json::from_str(&line?).context("an event of the command")?;
        let streaming = event["operation"]["progress"]["phase"] == STREAMING && event["event"] == "progress";
        if streaming && begun.is_none() {
            begun = Some(Mark::now(&subject.probe)?);
        } else if !streaming && begun.is_some() && ended.is_none() {
            ended = Some(Mark::now(&subject.probe)?);
        }
    }
    ensure!(child.wait()?.success(), "berth {} failed", words.join(" "));
    let begun = begun.with_context(|| format!("no phase of the snapshot was called {STREAMING}"))?;
    Ok((begun, ended.context("the snapshot did not end")?))
}
