//! The main job, shown: what a user of Berth does all year, in a minute, each step with its measured figure.
//!
//! Everything goes through the `berth` binary, as a user's own commands would; only the guest's own word (what its
//! memory and files must be) comes from `guest-probe` inside it.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use berth_e2e::{Berth, Cluster, Guest, UpOptions};
use guest_probe::gap::GapMeter;
use guest_probe::memory::{Rewrite, Settings};
use serde_json::{Map, Value, json};

/// The VM of the demo.
const VM: &str = "books";
/// What the guest holds and rewrites while it works.
const WORK: Settings = Settings { memory_mib: 96, rate_mib_s: 10, hot_mib: 0, rewrite: Rewrite::Whole };
/// Pages of memory that it holds then.
const PAGES: u64 = 96 * 256;
/// Files that it writes.
const FILES: u32 = 50;
/// How often the client outside asks the guest.
const ASK_EVERY: Duration = Duration::from_millis(2);
/// How long a guest may be silent after a step before the demo gives up.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// How to run the demo.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Leave the cluster running at the end and say how to use it.
    #[arg(long, env = "BERTH_DEMO_KEEP", value_parser = clap::builder::FalseyValueParser::new())]
    keep: bool,
    /// Where to write the figures.
    #[arg(long, default_value = "target/demo.json")]
    json: PathBuf,
    /// Where the cluster's files go.
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// Figures by name, in the order in which they were taken, with what they mean.
#[derive(Default)]
struct Figures(Vec<(&'static str, f64, String)>);

impl Figures {
    fn add(&mut self, name: &'static str, value: f64, meaning: impl Into<String>) {
        self.0.push((name, value, meaning.into()));
    }
}

/// Runs the demo.
///
/// # Errors
/// When a step fails; the cluster is taken down then, too.
pub fn run(arguments: &Arguments) -> Result<()> {
    let berth = Berth::beside_this_program()?;
    let dir = arguments
        .dir
        .clone()
        .unwrap_or_else(|| std::env::temp_dir().join(format!("berth-demo-{}", std::process::id())));
    let mut figures = Figures::default();

    say(1, "a manager and two hosts, joined by mutual TLS");
    let begun = Instant::now();
    let cluster = Cluster::up(&berth, &UpOptions { dir, hosts: 2, link_mbit: None, keep: arguments.keep })?;
    done(format!("up after {:.1} s", begun.elapsed().as_secs_f64()));

    let guest = create(&cluster)?;
    work(&guest)?;
    snapshot(&cluster, &mut figures)?;
    migrate(&cluster, guest, &mut figures)?;
    break_and_restore(&cluster, &mut figures)?;

    table(&figures);
    write_json(&figures, &arguments.json)?;
    finish(cluster, arguments.keep)
}

fn say(step: u32, what: &str) {
    println!("\n{step}. {what}");
}

fn done(what: impl std::fmt::Display) {
    println!("   {what}");
}

fn create(cluster: &Cluster) -> Result<Guest> {
    say(2, "a VM from an image; its baseline is taken by itself when the guest is ready");
    cluster.import_guest("probe", "probe.memory_mib=32")?;
    let begun = Instant::now();
    let guest = cluster.create_guest(VM, "probe", &["--memory", "256MiB", "--disk", "1GiB"])?;
    let seconds = begun.elapsed().as_secs_f64();
    let snapshots = items(&cluster.berth.run(&["snapshot", "list", VM])?)?;
    let baseline =
        snapshots.iter().find(|snapshot| snapshot["kind"] == "baseline").context("no baseline was taken")?;
    let paused_ms = number(&baseline["facts"]["paused_us"])? / 1000.0;
    done(format!(
        "ready on {} with its baseline after {seconds:.1} s (guest paused for it: {paused_ms:.1} ms)",
        cluster.host_of(VM)?
    ));
    Ok(guest)
}

fn work(guest: &Guest) -> Result<()> {
    say(3, "the guest works: files written and fsynced, memory rewritten, a counter ticking, UDP answered");
    guest.probe.set(WORK, Duration::from_secs(60))?;
    let files = guest.probe.write(FILES)?;
    let seen = guest.verify()?;
    done(format!(
        "{files} files, {} pages of memory, all verified; {} MiB/s rewritten",
        seen.pages, WORK.rate_mib_s
    ));
    Ok(())
}

fn snapshot(cluster: &Cluster, figures: &mut Figures) -> Result<()> {
    done("a snapshot with memory, while it works:");
    cluster.berth.run(&["snapshot", "create", VM, "--name", "working"])?;
    let snapshots = items(&cluster.berth.run(&["snapshot", "list", VM])?)?;
    let working = snapshots
        .iter()
        .find(|snapshot| snapshot["name"] == "working")
        .context("the snapshot is not listed")?;
    let paused_ms = number(&working["facts"]["paused_us"])? / 1000.0;
    done(format!(
        "guest paused for {paused_ms:.1} ms, {:.0} ms in all",
        number(&working["facts"]["total_ms"])?
    ));
    figures.add("snapshot_paused_ms", paused_ms, "guest paused by a snapshot with memory");
    cluster.berth.run(&["snapshot", "pin", VM, "working"])?;
    done("it is pinned: from now on the baseline");
    Ok(())
}

fn migrate(cluster: &Cluster, guest: Guest, figures: &mut Figures) -> Result<()> {
    let from = cluster.host_of(VM)?;
    say(4, &format!("live migration from {from} to the other host, while it works"));
    let tick = guest.probe.tick()?;
    let meter = GapMeter::start(&[guest.probe.address()], ASK_EVERY)?;
    let begun = Instant::now();
    cluster.berth.run(&["vm", "migrate", VM])?;
    let moved = cluster.guest(VM)?;
    meter.retarget(&[moved.probe.address()]);
    meter.wait_for_answer_after(Instant::now(), SILENCE_MAX).context("the guest is silent after its move")?;
    let gap_ms = meter.longest_gap_since(begun).length.as_secs_f64() * 1000.0;
    let after = moved.probe.tick()?;
    ensure!(after.nonce == tick.nonce && after.tick > tick.tick, "this is not the guest that was moved");

    let report = last_migration(cluster)?;
    for phase in report["phases"].as_array().into_iter().flatten() {
        done(format!(
            "{:<14} {:>9.1} ms",
            phase["phase"].as_str().unwrap_or_default(),
            number(&phase["took_us"])? / 1000.0
        ));
    }
    let blackout_ms = number(&report["blackout_us"])? / 1000.0;
    let bytes = number(&report["memory_bytes"])? + number(&report["storage_bytes"])?;
    let total_ms = number(&report["total_ms"])?;
    done(format!(
        "now on {}: {total_ms:.0} ms, {:.1} MiB, blackout {blackout_ms:.1} ms",
        cluster.host_of(VM)?,
        bytes / 1_048_576.0
    ));
    figures.add("migration_total_ms", total_ms, "live migration in all");
    figures.add("migration_bytes", bytes, "bytes that it sent");
    figures.add("migration_blackout_ms", blackout_ms, "guest not running, by the hypervisors' events");
    if guest.forwarded {
        done(
            "the gap seen from outside can't be taken with user-mode networking: the guest's port moves with its host",
        );
    } else {
        done(format!(
            "longest gap seen by a UDP client outside: {gap_ms:.1} ms (asking every {} ms)",
            ASK_EVERY.as_millis()
        ));
        figures.add("migration_udp_gap_ms", gap_ms, "longest gap seen by a UDP client outside");
    }
    let seen = moved.verify()?;
    done(format!("{} pages and {} files verified: all right", seen.pages, seen.files));
    Ok(())
}

fn break_and_restore(cluster: &Cluster, figures: &mut Figures) -> Result<()> {
    say(5, "the guest is broken for good: data deleted, kernel panicked; then back to the baseline");
    let guest = cluster.guest(VM)?;
    guest.probe.break_data()?;
    guest.probe.break_panic()?;
    ensure!(
        guest.probe.tick_within(Duration::from_secs(1)).is_err(),
        "the guest still answers after its panic"
    );
    done("the guest is silent");

    let addresses = [guest.probe.address()];
    let meter = GapMeter::start(&addresses, ASK_EVERY)?;
    let commanded = Instant::now();
    let mut restoring = cluster.berth.start(&["snapshot", "restore", VM, "baseline"])?;
    let first = wait_for_life(cluster, &meter, commanded, guest.forwarded)?;
    ensure!(restoring.wait()?.success(), "the restore failed");
    let life_ms = first.duration_since(commanded).as_secs_f64() * 1000.0;

    let facts = last_result(cluster, "snapshot.restore")?;
    let running_ms = number(&facts["facts"]["running_us"])? / 1000.0;
    done(format!(
        "running {running_ms:.0} ms after the agent's command (the undo snapshot before it: {:.0} ms)",
        number(&facts["facts"]["undo_us"])? / 1000.0
    ));
    done(format!("first sign of life {life_ms:.0} ms after the user's command"));
    figures.add("restore_running_ms", running_ms, "restore: command to guest running");
    figures.add(
        "restore_first_sign_ms",
        life_ms,
        "restore: user's command to the first answer from the guest",
    );

    let seen = cluster.guest(VM)?.probe.verify(Duration::from_secs(120))?;
    ensure!(
        seen.files == u64::from(FILES) && seen.pages == PAGES,
        "the guest came back as it was at some other time"
    );
    done(format!(
        "{} pages and {} files verified against the baseline: {} and {} wrong",
        seen.pages, seen.files, seen.pages_wrong, seen.files_wrong
    ));
    figures.add("pages_wrong", number(&json!(seen.pages_wrong))?, "pages of memory not as they were");
    figures.add("files_wrong", number(&json!(seen.files_wrong))?, "files not as they were");
    ensure!(seen.pages_wrong == 0 && seen.files_wrong == 0, "the guest did not come back as it was");
    Ok(())
}

/// Waits for the first answer after the command; behind forwarded ports the address is new, and asked for first.
fn wait_for_life(
    cluster: &Cluster,
    meter: &GapMeter,
    commanded: Instant,
    forwarded: bool,
) -> Result<Instant> {
    let end = Instant::now() + SILENCE_MAX;
    loop {
        if let Some(heard) = meter.wait_for_answer_after(commanded, Duration::from_millis(200)) {
            return Ok(heard.at);
        }
        ensure!(Instant::now() < end, "no sign of life from the guest after its restore");
        if forwarded && let Ok(guest) = cluster.guest(VM) {
            let address: SocketAddr = guest.probe.address();
            meter.retarget(&[address]);
        }
    }
}

fn table(figures: &Figures) {
    say(6, "all figures");
    println!();
    for (name, value, meaning) in &figures.0 {
        let digits = usize::from(value.fract() != 0.0);
        println!("   {name:<24} {value:>14.digits$}   {meaning}");
    }
}

fn write_json(figures: &Figures, path: &PathBuf) -> Result<()> {
    let object: Map<String, Value> =
        figures.0.iter().map(|(name, value, _)| ((*name).to_owned(), json!(value))).collect();
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let text = format!("{:#}\n", Value::Object(object));
    fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    println!("\n   also in {}", path.display());
    Ok(())
}

fn finish(cluster: Cluster, keep: bool) -> Result<()> {
    if !keep {
        cluster.down()?;
        println!("   everything is stopped, and nothing is left");
        return Ok(());
    }
    let dir = cluster.dir().display();
    println!("\nThe cluster goes on. To use it:");
    println!("   export BERTH_CONFIG={dir}/client.toml");
    println!("   berth vm list; berth snapshot list {VM}; berth vm console {VM}");
    println!("To stop it and remove its files:\n   berth down --dir {dir} --purge");
    Ok(())
}

fn last_migration(cluster: &Cluster) -> Result<Value> {
    Ok(last_result(cluster, "vm.migrate")?["report"].clone())
}

/// The result of the newest operation of a kind.
fn last_result(cluster: &Cluster, kind: &str) -> Result<Value> {
    let operations = items(&cluster.berth.run(&["operation", "list"])?)?;
    let newest = operations.into_iter().find(|operation| operation["kind"] == kind);
    Ok(newest.with_context(|| format!("no operation {kind} is listed"))?["result"].clone())
}

fn items(list: &Value) -> Result<Vec<Value>> {
    let items = list.as_array().or_else(|| list["items"].as_array());
    items.cloned().with_context(|| format!("not a list: {list}"))
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().with_context(|| format!("not a number: {value}"))
}
