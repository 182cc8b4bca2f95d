//! What taking memory costs the guest while it runs: the time that its processors got, against what they got just before.
//!
//! The threads that run them are asked of the kernel. One that is kept waiting for a processor, for QEMU's big lock or by
//! QEMU's slowing it down gets less; so does a guest that happens to have less to do, which is why a guest that hardly
//! works is not judged.

use std::time::{Duration, Instant};

use berth_qmp::Qmp;
use berth_qmp::commands::QueryCpusFast;

/// How long is looked at before, at least. Shorter: a guest that works in bursts is misjudged; longer: each snapshot
/// takes as much longer.
pub const LOOK_BEFORE: Duration = Duration::from_millis(100);
/// The share of one processor, in percent, below which a guest hardly works.
const HARDLY_PERCENT: f64 = 10.0;

/// What a guest's processors have got up to an instant.
#[derive(Debug, Clone)]
pub struct CpuTime {
    threads: Vec<i32>,
    ran: Duration,
    at: Instant,
}

impl CpuTime {
    /// Asks for it. None when QEMU or the kernel does not say.
    pub async fn now(qmp: &Qmp) -> Option<Self> {
        let cpus = qmp.call(QueryCpusFast {}).await.ok()?;
        Self::of(cpus.into_iter().map(|cpu| cpu.thread_id).collect())
    }

    /// The same threads' later.
    pub fn later(&self) -> Option<Self> {
        Self::of(self.threads.clone())
    }

    fn of(threads: Vec<i32>) -> Option<Self> {
        let ran = threads.iter().map(|thread| ran(*thread)).sum::<Option<Duration>>()?;
        Some(Self { threads, ran, at: Instant::now() })
    }

    /// The share of one processor that they got since, in percent.
    fn percent_since(&self, earlier: &Self) -> f64 {
        let wall = self.at.saturating_duration_since(earlier.at).as_secs_f64();
        if wall > 0.0 { self.ran.saturating_sub(earlier.ran).as_secs_f64() / wall * 100.0 } else { 0.0 }
    }
}

/// What they lost of their time between `begun` and `ended`, in percent of what they got between `before` and `begun`.
/// None for a guest that hardly worked.
pub fn percent(before: &CpuTime, begun: &CpuTime, ended: &CpuTime) -> Option<u32> {
    let had = begun.percent_since(before);
    let got = ended.percent_since(begun);
    (had >= HARDLY_PERCENT).then(|| ((1.0 - got / had).max(0.0) * 100.0).round() as u32)
}

/// What a thread has run, by the kernel's scheduler. Any thread can be asked for by its number, as if it were a process.
fn ran(thread: i32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{thread}/schedstat")).ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(start: Instant, ran_ms: u64, at_ms: u64) -> CpuTime {
        let ms = Duration::from_millis;
        CpuTime { threads: Vec::new(), ran: ms(ran_ms), at: start + ms(at_ms) }
    }

    #[test]
    fn what_was_lost_is_said_in_percent_of_what_was_had() {
        let start = Instant::now();
        let (before, begun) = (at(start, 0, 0), at(start, 80, 100));
        assert_eq!(percent(&before, &begun, &at(start, 80 + 600, 1100)), Some(25));
        assert_eq!(percent(&before, &begun, &at(start, 80 + 900, 1100)), Some(0), "it lost nothing");
        assert_eq!(percent(&before, &at(start, 5, 100), &at(start, 5, 1100)), None, "it hardly worked");
    }

    #[test]
    fn a_thread_that_works_is_seen_to_and_one_that_is_gone_is_not() {
        let own = i32::try_from(std::process::id()).expect("a pid");
        let before = CpuTime::of(vec![own]).expect("told");
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_millis(50) {
            std::hint::black_box(begun.elapsed());
        }
        // The main thread of a test only waits: what counts is that its time is told and never goes back.
        assert!(before.later().expect("told").ran >= before.ran);
        assert!(CpuTime::of(vec![i32::MAX]).is_none());
    }
}
