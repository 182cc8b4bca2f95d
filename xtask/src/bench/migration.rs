//! Our moves, there and back over a shaped link, with both ways of rewriting memory.

use anyhow::{Context, Result};
use berth_e2e::{Cluster, UpOptions};

use super::Run;
use super::figures::Figures;
use super::work::{self, GUEST_MIB, WHOLE, WORD, items, number};

/// The link between the hosts, in Mbit/s; also for the peers.
pub const LINK_MBIT: u32 = 1000;
const VM: &str = "mover";

/// What some moves measured.
#[derive(Debug, Default)]
struct Moves {
    blackout_ms: Vec<f64>,
    gap_ms: Vec<f64>,
    total_ms: Vec<f64>,
    bytes: Vec<f64>,
    rounds: Vec<f64>,
}

/// Takes the figures of moves.
///
/// # Errors
/// When a move fails, or the guest is not as it was afterwards.
pub fn measure(run: &Run, figures: &mut Figures) -> Result<()> {
    let options =
        UpOptions { dir: run.dir.join("migration"), hosts: 2, link_mbit: Some(LINK_MBIT), keep: false };
    let cluster = Cluster::up(run.berth()?, &options)?;
    cluster.import_guest("probe", "")?;
    let memory = format!("{GUEST_MIB}MiB");
    let guest = cluster.create_guest(VM, "probe", &["--memory", &memory, "--disk", "1GiB"])?;
    for (settings, suffix, pattern) in [(WHOLE, "", "whole pages"), (WORD, "_word", "a word a page")] {
        let pace = work::begin(&guest.probe, settings)?;
        let name = |name: &str| format!("{name}{suffix}");
        let meaning = |meaning: &str| format!("{meaning}; {pattern}");
        figures.add(
            &name("migration_quiet_gap_ms"),
            &meaning("longest gap when left alone"),
            &[pace.quiet_gap_ms],
        );
        let moves = moves(run, &cluster)?;
        figures.add(
            &name("migration_blackout_ms"),
            &meaning("source's STOP to target's RESUME"),
            &moves.blackout_ms,
        );
        figures.add(
            &name("migration_udp_gap_ms"),
            &meaning("longest gap seen by a UDP client"),
            &moves.gap_ms,
        );
        figures.add(&name("migration_total_ms"), &meaning("the move in all"), &moves.total_ms);
        figures.add(&name("migration_bytes"), &meaning("bytes sent"), &moves.bytes);
        figures.add(&name("migration_rounds"), &meaning("passes over memory"), &moves.rounds);
        let seen = cluster.guest(VM)?.verify()?;
        println!("   {} pages verified after {} moves: all right", seen.pages, run.runs);
    }
    cluster.down()
}

fn moves(run: &Run, cluster: &Cluster) -> Result<Moves> {
    let mut moves = Moves::default();
    for _ in 0..run.runs {
        work::settle();
        let guest = cluster.guest(VM)?;
        let words = ["vm", "migrate", VM];
        let (_, gap_ms) = work::with_gap(guest.probe.address(), || cluster.berth.run(&words))?;
        let operations = items(&cluster.berth.run(&["operation", "list"])?)?;
        let newest = operations.into_iter().find(|operation| operation["kind"] == "vm.migrate");
        let report = newest.context("no migration is listed")?["result"]["report"].take();
        moves.blackout_ms.push(number(&report["blackout_us"])? / 1000.0);
        moves.total_ms.push(number(&report["total_ms"])?);
        moves.bytes.push(number(&report["memory_bytes"])? + number(&report["storage_bytes"])?);
        moves.rounds.push(number(&report["rounds"])?);
        moves.gap_ms.push(gap_ms);
        say_phases(&report)?;
    }
    Ok(moves)
}

fn say_phases(report: &serde_json::Value) -> Result<()> {
    let mut words = Vec::new();
    for phase in items(&report["phases"])? {
        words.push(format!(
            "{} {:.1}",
            phase["phase"].as_str().unwrap_or("?"),
            number(&phase["took_us"])? / 1000.0
        ));
    }
    println!("   a move, in ms: {}", words.join(", "));
    Ok(())
}
