//! Processes killed with -9 at every step: afterwards the VM runs exactly once, and all that it holds is right.

use std::process::Child;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use berth_e2e::process::{Process, wait_until};
use berth_e2e::testing::{Pool, guest_in, up};
use berth_e2e::{Cluster, Guest};
use guest_probe::memory::{Rewrite, Settings};
use serde_json::Value;

const WORK: Settings = Settings { memory_mib: 64, rate_mib_s: 5, hot_mib: 0, rewrite: Rewrite::Whole };
/// Slow enough that a migration of the test guest takes seconds, so that each phase can be hit.
const SLOW: &str = "120mbit";
const LIMIT: Duration = Duration::from_secs(120);

/// Whom to kill.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Manager,
    SourceAgent,
    TargetAgent,
    TargetQemu,
}

/// When.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// As soon as the operation exists.
    AtOnce,
    /// When its progress names this phase.
    InPhase(&'static str),
    /// When so many milliseconds of the warm-up are over.
    WarmUpFor(u64),
}

fn busy_guest(cluster: &Cluster, pool: Pool) -> Result<Guest> {
    let guest = guest_in(cluster, "books", pool)?;
    guest.probe.set(WORK, Duration::from_secs(60))?;
    guest.probe.write(10)?;
    Ok(guest)
}

/// The newest operation that is not over, of this kind.
fn active(cluster: &Cluster, kind: &str) -> Result<Option<Value>> {
    let list = match cluster.berth.attempt(&["operation", "list"])? {
        Ok(list) => list,
        // A manager that is starting can't be asked.
        Err(_) => return Ok(None),
    };
    let items = list.as_array().or_else(|| list["items"].as_array()).cloned().unwrap_or_default();
    let over =
        |operation: &Value| matches!(operation["state"].as_str(), Some("succeeded" | "failed" | "cancelled"));
    Ok(items.into_iter().find(|operation| operation["kind"] == kind && !over(operation)))
}

/// Waits until the migration that this command asked for is so far; an answer before that is an error.
fn wait_for(cluster: &Cluster, asking: &mut Child, when: When) -> Result<()> {
    wait_until(LIMIT, &format!("the migration to be at {when:?}"), || {
        let Some(operation) = active(cluster, "vm.migrate")? else {
            ensure!(asking.try_wait()?.is_none(), "the migration ended before it was at {when:?}");
            return Ok(false);
        };
        Ok(match when {
            When::AtOnce => true,
            When::InPhase(phase) => operation["progress"]["phase"] == phase,
            When::WarmUpFor(_) => operation["progress"]["phase"] == "warm-up",
        })
    })?;
    if let When::WarmUpFor(ms) = when {
        std::thread::sleep(Duration::from_millis(ms));
    }
    Ok(())
}

fn others_qemu(cluster: &Cluster, before: &[Process]) -> Result<Process> {
    let mut found = None;
    wait_until(LIMIT, "the target's QEMU", || {
        found = cluster.qemus_of("books")?.into_iter().find(|process| !before.contains(process));
        Ok(found.is_some())
    })?;
    found.context("no QEMU on the target")
}

/// Kills during a migration, waits until everything has settled, and looks.
fn kill_in_migration(cluster: &Cluster, victim: Victim, when: When) -> Result<()> {
    let what = format!("{victim:?} killed {when:?}");
    let source = cluster.host_of("books")?;
    let target = if source == "h1" { "h2" } else { "h1" };
    let nonce = cluster.guest("books")?.probe.tick()?.nonce;
    let before = cluster.qemus_of("books")?;
    let mut migrating = cluster.berth.start(&["vm", "migrate", "books", "--bandwidth", SLOW])?;
    if let Err(error) = wait_for(cluster, &mut migrating, when) {
        migrating.kill()?;
        let said = migrating.wait_with_output()?;
        return Err(error).with_context(|| format!("{what}: {}", String::from_utf8_lossy(&said.stderr)));
    }
    match victim {
        Victim::Manager => cluster.daemon("manager")?.kill()?,
        Victim::SourceAgent => cluster.daemon(&source)?.kill()?,
        Victim::TargetAgent => cluster.daemon(target)?.kill()?,
        Victim::TargetQemu => others_qemu(cluster, &before)?.kill()?,
    }
    cluster.restart_dead()?;
    // Its own exit code says little once the manager was killed; what counts is how things stand.
    let _ = migrating.wait_with_output()?;
    settle(cluster).context(what.clone())?;
    let guest = cluster.guest("books")?;
    let seen = guest.verify().context(what.clone())?;
    ensure!(seen.tick.nonce == nonce, "{what}: the guest was started anew");
    ensure!(seen.files >= 10, "{what}: files were lost");
    Ok(())
}

/// Waits until all hosts are online, no operation is under way and the VM runs, exactly once.
fn settle(cluster: &Cluster) -> Result<()> {
    wait_until(LIMIT, "everything to settle", || {
        let Ok(hosts) = cluster.berth.attempt(&["host", "list"])? else { return Ok(false) };
        if hosts.as_array().into_iter().flatten().any(|host| host["state"] != "online") {
            return Ok(false);
        }
        let Ok(list) = cluster.berth.attempt(&["vm", "show", "books"])? else { return Ok(false) };
        let quiet = list["status"]["operation"].is_null() && list["status"]["state"] == "running";
        Ok(quiet && cluster.qemus_of("books")?.len() == 1)
    })
}

fn kills(victim: Victim, whens: &[When]) -> Result<()> {
    for pool in [Pool::Shared, Pool::Local] {
        let folder = tempfile::tempdir()?;
        let cluster = up(folder.path(), 2)?;
        busy_guest(&cluster, pool)?;
        for &when in whens {
            kill_in_migration(&cluster, victim, when).with_context(|| format!("{pool:?}"))?;
        }
        // Nothing of all that stands in the way of an ordinary migration.
        cluster.berth.run(&["vm", "migrate", "books"])?;
        cluster.guest("books")?.verify()?;
        cluster.down()?;
    }
    Ok(())
}

const PHASES: [When; 4] =
    [When::AtOnce, When::InPhase("warm-up"), When::WarmUpFor(700), When::WarmUpFor(3000)];

#[test]
fn a_killed_manager_loses_no_migration() -> Result<()> {
    kills(Victim::Manager, &PHASES)
}

#[test]
fn a_killed_source_agent_leaves_one_owner() -> Result<()> {
    kills(Victim::SourceAgent, &PHASES)
}

#[test]
fn a_killed_target_agent_leaves_one_owner() -> Result<()> {
    kills(Victim::TargetAgent, &PHASES)
}

#[test]
fn a_killed_target_qemu_leaves_the_source_running() -> Result<()> {
    kills(Victim::TargetQemu, &PHASES[1..])
}

#[test]
fn an_agent_that_is_killed_finds_its_vms_again() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    let guest = busy_guest(&cluster, Pool::Shared)?;
    let before = cluster.qemus_of("books")?;
    let tick = guest.probe.tick()?;
    cluster.daemon("h1")?.kill()?;
    ensure!(guest.probe.tick()?.nonce == tick.nonce, "the guest must not notice");
    cluster.restart_dead()?;
    settle(&cluster)?;
    ensure!(cluster.qemus_of("books")? == before, "it must be the same process");
    // It is not only seen but held: it can be snapshotted, paused and restored.
    cluster.berth.run(&["snapshot", "create", "books", "--name", "after"])?;
    cluster.berth.run(&["vm", "pause", "books"])?;
    cluster.berth.run(&["vm", "resume", "books"])?;
    cluster.berth.run(&["snapshot", "restore", "books", "after"])?;
    cluster.guest("books")?.verify()?;
    cluster.down()
}

#[test]
fn a_manager_killed_in_a_create_a_snapshot_and_a_restore_goes_on() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let cluster = up(folder.path(), 1)?;
    let options =
        ["vm", "create", "books", "--image", "probe", "--memory", "192MiB", "--disk", "256MiB", "--no-wait"];
    cluster.berth.run(&options)?;
    cluster.daemon("manager")?.kill()?;
    cluster.restart_dead()?;
    wait_until(LIMIT, "the baseline", || Ok(!cluster.vm("books")?["status"]["baseline"].is_null()))?;
    let guest = cluster.guest("books")?;
    guest.probe.set(WORK, Duration::from_secs(60))?;
    let nonce = guest.probe.tick()?.nonce;
    for words in [
        ["snapshot", "create", "books", "--name", "kept", "--no-wait"].as_slice(),
        ["snapshot", "restore", "books", "kept", "--no-wait"].as_slice(),
        ["snapshot", "restore", "books", "baseline", "--no-wait"].as_slice(),
    ] {
        settle(&cluster)?;
        cluster.berth.run(words)?;
        cluster.daemon("manager")?.kill()?;
        cluster.restart_dead()?;
        settle(&cluster).with_context(|| words.join(" "))?;
        let seen = cluster.guest("books")?.verify().with_context(|| words.join(" "))?;
        ensure!(seen.tick.nonce == nonce, "the guest was started anew");
    }
    cluster.down()
}
