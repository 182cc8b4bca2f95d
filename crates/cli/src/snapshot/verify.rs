//! `berth snapshot verify`: whether snapshots are still what they were.

use berth_api::endpoint::Nothing;
use berth_api::manager::{PageQuery, SnapshotList, SnapshotVerify, VerifySnapshot, VmList, VmListQuery};
use berth_model::operation::{Operation, OperationResult};
use berth_model::snapshot::Snapshot;
use berth_model::verification::{Means, Verdict, Verification, VerificationFacts};
use berth_model::{Problem, ProblemCode, Timestamp};
use clap::Args;

use super::{Which, change_query, resolve};
use crate::arguments::ChangeArguments;
use crate::exit::Failure;
use crate::lookup::VmRef;
use crate::output::plain;
use crate::session::Session;
use crate::{units, wait};

/// What to verify.
#[derive(Debug, Args)]
#[command(group(clap::ArgGroup::new("which").args(["snapshot", "all"]).required(true)))]
pub struct Arguments {
    /// The VM; with --all and without it, all VMs that you may see
    #[arg(required_unless_present = "all")]
    vm: Option<VmRef>,
    /// The snapshot's name or id; 'baseline' is the VM's baseline
    snapshot: Option<String>,
    /// All snapshots, one after the other
    #[arg(long)]
    all: bool,
    /// Not only read it: start a clone without a network from it and wait until its guest is ready
    #[arg(long)]
    boot: bool,
    #[command(flatten)]
    change: ChangeArguments,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached, an operation's failure, and when a snapshot is bad.
pub async fn run(session: &Session, arguments: Arguments) -> Result<(), Failure> {
    let Arguments { vm, snapshot, all: _, boot, change } = arguments;
    match (vm, snapshot) {
        (Some(vm), Some(snapshot)) => {
            let which = Which { vm, snapshot };
            let snapshot = resolve(session, &which).await?;
            match one(session, &which.vm, &snapshot, boot, change).await? {
                Some(bad) => Err(failure(&bad)),
                None => Ok(()),
            }
        }
        (vm, _) => all(session, vm, boot, change).await,
    }
}

/// What is wrong with a snapshot, if it is bad.
async fn one(
    session: &Session,
    vm: &VmRef,
    snapshot: &str,
    boot: bool,
    change: ChangeArguments,
) -> Result<Option<String>, Failure> {
    let (path, query) = (vm.snapshot_path(snapshot), change_query(change));
    let reply = session.send::<SnapshotVerify>(&path, &query, &VerifySnapshot { boot }).await?;
    let Some(over) = wait::carry_through(session, change, reply).await? else { return Ok(None) };
    let name =
        super::name_of(session, vm, &found(&over).map_or_else(|| snapshot.to_owned(), |found| found.0)).await;
    wait::done(session, &over, |over| format!("{} of {}: {}", name, over.subject, outcome(over)))?;
    let bad = found(&over).filter(|(_, found, _)| found.is_bad());
    Ok(bad.map(|(_, found, _)| format!("snapshot {name} of {} is bad: {}", over.subject, found.detail)))
}

/// Verifies all; what can't be verified is said and passed over.
async fn all(
    session: &Session,
    vm: Option<VmRef>,
    boot: bool,
    change: ChangeArguments,
) -> Result<(), Failure> {
    let vms = match vm {
        Some(vm) => vec![vm],
        None => all_vms(session).await?,
    };
    let (mut bad, mut failed): (Vec<String>, Option<Failure>) = (Vec::new(), None);
    for vm in vms {
        let query = |limit, cursor| PageQuery { limit, cursor };
        let snapshots: Vec<Snapshot> = session.pages::<SnapshotList, _>(&vm.path(), None, query).await?;
        for snapshot in snapshots {
            match one(session, &vm, snapshot.id.as_str(), boot, change).await {
                Ok(found) => bad.extend(found),
                // Deleted since it was listed.
                Err(failure) if code_of(&failure) == Some(ProblemCode::NotFound) => {}
                Err(failure @ (Failure::Problem(_) | Failure::Operation { .. })) => {
                    let why = failure.problem().map(|problem| problem.message.clone()).unwrap_or_default();
                    session.output.error(&format!(
                        "{} of {vm} is not verified: {}",
                        snapshot.name,
                        plain(&why)
                    ));
                    // What may not be verified is not asked for.
                    if code_of(&failure) != Some(ProblemCode::NotAllowed) {
                        failed.get_or_insert(failure);
                    }
                }
                Err(failure) => return Err(failure),
            }
        }
    }
    match (bad.as_slice(), failed) {
        ([], None) => Ok(()),
        ([], Some(failure)) => Err(failure),
        ([only], _) => Err(failure(only)),
        (several, _) => Err(failure(&format!("{} snapshots are bad: {}", several.len(), several.join("; ")))),
    }
}

async fn all_vms(session: &Session) -> Result<Vec<VmRef>, Failure> {
    let query = |limit, cursor| VmListQuery { segment: None, host: None, limit, cursor };
    let vms = session.pages::<VmList, _>(&Nothing {}, None, query).await?;
    Ok(vms.iter().filter_map(|vm| vm.full_name().parse().ok()).collect())
}

fn code_of(failure: &Failure) -> Option<ProblemCode> {
    failure.problem().map(|problem| problem.code)
}

fn failure(text: &str) -> Failure {
    Failure::Local(Box::new(Problem::new(ProblemCode::BadImage, text)))
}

fn found(over: &Operation) -> Option<(String, &Verification, &VerificationFacts)> {
    match &over.result {
        Some(OperationResult::Verification { snapshot, verification, facts }) => {
            Some((snapshot.to_string(), verification, facts))
        }
        _ => None,
    }
}

fn outcome(over: &Operation) -> String {
    found(over).map_or_else(String::new, |(_, found, facts)| in_words(found, facts))
}

/// What came of a verification, in words: `good, 812 MiB read in 1.2 s`.
pub fn in_words(found: &Verification, facts: &VerificationFacts) -> String {
    let read = format!("{} read in {}", units::bytes(facts.read_bytes), units::millis(facts.total_ms));
    let spared = match facts.spared_bytes {
        0 => String::new(),
        bytes => format!(", {} read a moment ago", units::bytes(bytes)),
    };
    let started = if found.by == Means::Boot { ", and its guest gets ready" } else { "" };
    let remark = if found.detail.is_empty() { String::new() } else { format!(" ({})", found.detail) };
    match found.verdict {
        Verdict::Good => format!("good, {read}{spared}{started}{remark}"),
        Verdict::Bad => format!("BAD: {}", found.detail),
    }
}

/// What is known of a snapshot, for a table: `good 2h ago`, `BAD: …`, `-`.
pub fn cell(verified: Option<&Verification>, now: Timestamp) -> String {
    match verified {
        None => "-".to_owned(),
        Some(bad) if bad.is_bad() => format!("BAD: {}", bad.detail),
        Some(good) => {
            let started = if good.by == Means::Boot { ", boots" } else { "" };
            format!("good {} ago{started}", units::age(now.millis_since(good.at)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_is_said_to_be_good_for_as_long_as_nobody_has_looked_again() {
        let at = Timestamp::from_millis(1_795_352_752_007);
        let mut found = Verification {
            at,
            by: Means::Hash,
            verdict: Verdict::Good,
            detail: "1 layer first hashed now".into(),
        };
        assert_eq!(cell(None, at), "-");
        assert_eq!(cell(Some(&found), at.plus_millis(2 * 3600 * 1000 + 5)), "good 2h ago");
        found.by = Means::Boot;
        assert_eq!(cell(Some(&found), at.plus_millis(90_000)), "good 1min ago, boots");
        let facts =
            VerificationFacts { read_bytes: 12 << 20, total_ms: 1150, ..VerificationFacts::default() };
        let expected = "good, 12 MiB read in 1.15 s, and its guest gets ready (1 layer first hashed now)";
        assert_eq!(in_words(&found, &facts), expected);
        (found.verdict, found.detail) = (Verdict::Bad, "device.bin: it is missing".into());
        assert_eq!(cell(Some(&found), at), "BAD: device.bin: it is missing");
    }
}
