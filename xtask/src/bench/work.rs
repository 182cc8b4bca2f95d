//! What the guest does while it is measured, and what is seen of it from outside: the same for us and for the peers.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use guest_probe::client::ProbeClient;
use guest_probe::gap::GapMeter;
use guest_probe::memory::{Rewrite, Settings};
use serde_json::Value;

/// The guest's memory in MiB.
pub const GUEST_MIB: u32 = 2048;
/// The larger guest's.
pub const LARGE_GUEST_MIB: u32 = 8192;
/// What is rewritten, in MiB, all of it in turn.
const USED_MIB: u32 = 600;

/// While snapshots are taken and restored: one word of each page in turn, as fast as 200 MiB of pages a second. That is
/// all of the 600 MiB every three seconds.
pub const BUSY: Settings =
    Settings { memory_mib: USED_MIB, rate_mib_s: 200, hot_mib: 0, rewrite: Rewrite::Word };
/// While the guest's own work is measured: 50 MiB of pages a second, and as fast as it can. The second is a rate that
/// no guest reaches here; what has not been done within a second is forgiven.
pub const STEADY: Settings = Settings { rate_mib_s: 50, ..BUSY };
/// The same without a limit.
pub const FLAT_OUT: Settings = Settings { rate_mib_s: 4000, ..BUSY };
/// While it moves: 20 MiB a second, whole pages of random data, which no delta makes smaller.
pub const WHOLE: Settings =
    Settings { memory_mib: USED_MIB, rate_mib_s: 20, hot_mib: 0, rewrite: Rewrite::Whole };
/// While it moves: 20 MiB of pages a second, one word of each.
pub const WORD: Settings =
    Settings { memory_mib: USED_MIB, rate_mib_s: 20, hot_mib: 0, rewrite: Rewrite::Word };

/// How often the client outside asks.
const ASK_EVERY: Duration = Duration::from_millis(2);
/// How long a guest may be silent before it is given up.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long filling its memory may take a guest.
const FILL_MAX: Duration = Duration::from_secs(180);
/// For how long the rate is measured.
const RATE_OVER: Duration = Duration::from_secs(3);
/// How far the tick of a guest that was put back must be behind: less may be two answers that overtook each other.
const BEHIND_MS: u64 = 300;

/// What a guest's work came to.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Pages rewritten, in MiB a second.
    pub reached_mib_s: f64,
    /// The longest gap seen meanwhile with nothing done to the guest, in milliseconds: the floor of all other gaps.
    pub quiet_gap_ms: f64,
}

/// A probe's client for this address, when the guest has booted.
///
/// # Errors
/// When it does not answer within a minute.
pub fn booted(address: SocketAddr) -> Result<ProbeClient> {
    let probe = ProbeClient::new(address)?;
    probe.tick_within(SILENCE_MAX)?;
    Ok(probe)
}

/// Has the guest work, waits until it does, and says what came of it.
///
/// # Errors
/// When it does not get there, or reaches less than half of the rate: then the figures would be of another guest.
pub fn begin(probe: &ProbeClient, settings: Settings) -> Result<Pace> {
    probe.set(settings, FILL_MAX)?;
    let meter = GapMeter::start(&[probe.address()], ASK_EVERY)?;
    meter.wait_for_answer_after(Instant::now(), SILENCE_MAX).context("the guest does not answer")?;
    let begun = Instant::now();
    let reached_mib_s = rate(probe, RATE_OVER)?;
    let quiet_gap_ms = ms(meter.longest_gap_since(begun).length);
    println!(
        "   the guest holds {} MiB and rewrites {reached_mib_s:.0} MiB/s of it ({} asked for, pattern {}); \
         longest gap when left alone {quiet_gap_ms:.1} ms",
        settings.memory_mib,
        settings.rate_mib_s,
        settings.rewrite.as_str(),
    );
    ensure!(reached_mib_s * 2.0 >= f64::from(settings.rate_mib_s), "the guest does not reach its rate");
    Ok(Pace { reached_mib_s, quiet_gap_ms })
}

/// What a guest rewrites, in MiB of pages a second, over this time.
///
/// # Errors
/// When it is silent.
pub fn rate(probe: &ProbeClient, over: Duration) -> Result<f64> {
    let begun = Mark::now(probe)?;
    std::thread::sleep(over);
    Ok(Mark::now(probe)?.rate_since(&begun))
}

/// How much a guest had rewritten at a moment.
#[derive(Debug, Clone, Copy)]
pub struct Mark {
    at: Instant,
    pages: u64,
}

impl Mark {
    /// Now, as the guest says.
    ///
    /// # Errors
    /// When it is silent.
    pub fn now(probe: &ProbeClient) -> Result<Self> {
        let pages = probe.status()?.dirtied_pages;
        Ok(Self { at: Instant::now(), pages })
    }

    /// What was rewritten between the two, in MiB of pages a second.
    pub fn rate_since(&self, earlier: &Self) -> f64 {
        let pages = count(self.pages.saturating_sub(earlier.pages));
        pages * 4096.0 / 1_048_576.0 / self.at.duration_since(earlier.at).as_secs_f64()
    }
}

/// Does something to a guest, and measures the longest gap from its start until the guest has answered after its end,
/// in milliseconds. After a move the address may be another: `moved` says which.
///
/// # Errors
/// When it fails, or the guest is silent afterwards.
pub fn with_gap<T>(address: SocketAddr, work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let meter = GapMeter::start(&[address], ASK_EVERY)?;
    meter.wait_for_answer_after(Instant::now(), SILENCE_MAX).context("the guest does not answer")?;
    let begun = Instant::now();
    let outcome = work()?;
    meter.wait_for_answer_after(Instant::now(), SILENCE_MAX).context("the guest is silent afterwards")?;
    Ok((outcome, ms(meter.longest_gap_since(begun).length)))
}

/// When a guest was put back.
#[derive(Debug, Clone, Copy)]
pub struct Life {
    /// From the command to the first answer of the guest as it was then, in milliseconds.
    pub first_sign_ms: f64,
    /// Until the command came back, in milliseconds.
    pub command_ms: f64,
}

/// Puts a guest back to an earlier moment, and measures from the command to its first answer: the first one whose tick
/// is behind what was heard before. The guest must have run for a second since that moment.
///
/// # Errors
/// When it fails, or no such answer comes.
pub fn put_back<T>(address: SocketAddr, work: impl FnOnce() -> Result<T>) -> Result<(T, Life)> {
    let meter = GapMeter::start(&[address], ASK_EVERY)?;
    meter.wait_for_answer_after(Instant::now(), SILENCE_MAX).context("the guest does not answer")?;
    let commanded = Instant::now();
    let outcome = work()?;
    let command_ms = ms(commanded.elapsed());
    let end = Instant::now() + SILENCE_MAX;
    loop {
        if let Some(at) = first_from_earlier(&meter, commanded) {
            return Ok((outcome, Life { first_sign_ms: ms(at.duration_since(commanded)), command_ms }));
        }
        ensure!(Instant::now() < end, "no answer from the guest as it was came within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Has a guest that is not there come up, and measures from the command to its first answer, in milliseconds.
///
/// # Errors
/// When it fails, or the guest is silent.
pub fn until_first_answer<T>(address: SocketAddr, work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let meter = GapMeter::start(&[address], ASK_EVERY)?;
    let commanded = Instant::now();
    let outcome = work()?;
    let heard = meter.wait_for_answer_after(commanded, SILENCE_MAX).context("the guest is silent")?;
    Ok((outcome, ms(heard.at.duration_since(commanded))))
}

fn first_from_earlier(meter: &GapMeter, commanded: Instant) -> Option<Instant> {
    let mut highest = 0;
    for heard in meter.heard() {
        if heard.at > commanded && heard.tick + BEHIND_MS < highest {
            return Some(heard.at);
        }
        highest = highest.max(heard.tick);
    }
    None
}

/// Lets the guest run on for a moment, so that one measurement does not reach into the next.
pub fn settle() {
    std::thread::sleep(Duration::from_millis(1500));
}

/// A duration in milliseconds.
pub fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// A count as a figure; exact up to 2^53.
pub fn count(number: u64) -> f64 {
    number as f64
}

/// A number out of an answer.
///
/// # Errors
/// When it is none.
pub fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("not a number: {value}"))
}

/// The items of a list, as the command line prints lists.
///
/// # Errors
/// When it is none.
pub fn items(list: &Value) -> Result<Vec<Value>> {
    let items = list.as_array().or_else(|| list["items"].as_array());
    items.cloned().with_context(|| format!("not a list: {list}"))
}
