//! `berth operation`: changes that take time, whoever began them.

use berth_api::endpoint::Nothing;
use berth_api::manager::{OperationCancel, OperationList, OperationListQuery, OperationPath, OperationShow};
use berth_model::operation::{Operation, OperationKind, OperationResult, OperationState};
use berth_model::{OperationId, Problem, ProblemCode};
use clap::Subcommand;

use crate::arguments::DryRunArguments;
use crate::exit::Failure;
use crate::lookup::{HostNames, VmRef};
use crate::output::{Facts, Table, instant};
use crate::session::Session;
use crate::{migration, snapshot, units, wait};

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List operations, newest first
    List {
        /// Only those about this VM
        #[arg(long)]
        vm: Option<VmRef>,
        /// Only those of this kind, like vm.migrate
        #[arg(long, value_parser = parse_kind)]
        kind: Option<OperationKind>,
        /// Only those that are not over
        #[arg(long)]
        active: bool,
        /// At most so many
        #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Show an operation
    Show {
        /// Its id
        operation: OperationId,
    },
    /// Wait until an operation is over, showing how far it is; exit code 1 if it fails
    Wait {
        /// Its id
        operation: OperationId,
        /// Give up waiting after this long
        #[arg(long, value_name = "DURATION", value_parser = units::parse_duration_s)]
        timeout: Option<u64>,
    },
    /// Ask an operation to stop and to undo what it did
    Cancel {
        /// Its id
        operation: OperationId,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

fn parse_kind(text: &str) -> Result<OperationKind, String> {
    OperationKind::ALL.into_iter().find(|kind| kind.as_str() == text).ok_or_else(|| {
        let known: Vec<&str> = OperationKind::ALL.iter().map(|kind| kind.as_str()).collect();
        format!("expected one of {}", known.join(", "))
    })
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { vm, kind, active, limit } => {
            let operations = list(session, vm.as_ref(), kind, active, limit).await?;
            session.output.list(&operations, || table(&operations))
        }
        Verb::Show { operation } => show(session, operation).await,
        Verb::Wait { operation, timeout } => wait_for(session, operation, timeout).await,
        Verb::Cancel { operation, dry_run } => cancel(session, operation, dry_run).await,
    }
}

/// The operations, newest first.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn list(
    session: &Session,
    vm: Option<&VmRef>,
    kind: Option<OperationKind>,
    active: bool,
    limit: u32,
) -> Result<Vec<Operation>, Failure> {
    let query = |limit, cursor| OperationListQuery {
        vm: vm.map(|vm| vm.as_str().to_owned()),
        kind: kind.map(|kind| kind.as_str().to_owned()),
        active: active.then_some(true),
        limit,
        cursor,
    };
    session.pages::<OperationList, _>(&Nothing {}, Some(limit), query).await
}

/// Shows one.
///
/// # Errors
/// When there is none of this id, or the manager can't be reached.
pub async fn show(session: &Session, operation: OperationId) -> Result<(), Failure> {
    let operation = session.ask::<OperationShow>(&OperationPath { operation }, &Nothing {}).await?;
    let hosts = match operation.result {
        Some(OperationResult::Migration { .. }) => HostNames::load(session).await,
        _ => HostNames::default(),
    };
    session.output.one(&operation, || facts(&operation, &hosts))
}

/// Asks one to stop, and waits until what it did is undone.
///
/// # Errors
/// When it can't be cancelled any more, or the manager can't be reached.
pub async fn cancel(
    session: &Session,
    operation: OperationId,
    dry_run: DryRunArguments,
) -> Result<(), Failure> {
    let path = OperationPath { operation };
    if dry_run.dry_run {
        let found = session.ask::<OperationShow>(&path, &Nothing {}).await?;
        if found.state.is_over() {
            let text = format!("{} is {} already", found.id, found.state.as_str());
            return Err(Problem::new(ProblemCode::WrongState, text).into());
        }
        let summary = format!("would ask {} of {} to stop and undo", found.kind, found.subject);
        return session.tried(&summary);
    }
    let operation = session.ask::<OperationCancel>(&path, &Nothing {}).await?;
    let farewell = wait::farewell(&operation.id);
    let over = session.unless_interrupted(&farewell, wait::to_end(session, operation)).await?;
    if over.state == OperationState::Cancelled {
        return wait::done(session, &over, |over| {
            format!("{} of {} is cancelled, and what it had done is undone", over.kind, over.subject)
        });
    }
    let text =
        format!("{} of {} was {} before it could be cancelled", over.kind, over.subject, over.state.as_str());
    Err(Failure::Operation {
        operation: over.id,
        problem: Box::new(Problem::new(ProblemCode::WrongState, text)),
    })
}

async fn wait_for(session: &Session, operation: OperationId, timeout_s: Option<u64>) -> Result<(), Failure> {
    let begun = wait::show(session, &operation).await?;
    let farewell = wait::farewell(&operation);
    let waiting = session.unless_interrupted(&farewell, wait::to_success(session, begun));
    let over = match timeout_s {
        None => waiting.await?,
        Some(seconds) => {
            let limit = std::time::Duration::from_secs(seconds);
            tokio::time::timeout(limit, waiting).await.unwrap_or_else(|_| {
                let text = format!("{operation} is not over after {seconds} s; it goes on");
                Err(Failure::Operation {
                    operation: operation.clone(),
                    problem: Box::new(Problem::new(ProblemCode::Busy, text)),
                })
            })?
        }
    };
    let hosts = HostNames::load(session).await;
    wait::done(session, &over, |over| outcome(over, &hosts))
}

/// What an operation that succeeded has to say, in words.
pub fn outcome(operation: &Operation, hosts: &HostNames) -> String {
    match &operation.result {
        Some(OperationResult::Migration { report }) => migration::outcome(&operation.subject, report, hosts),
        Some(OperationResult::Snapshot { facts, .. }) => {
            format!("{}: snapshot taken, {}", operation.subject, snapshot::facts_in_words(facts))
        }
        Some(OperationResult::SnapshotDeleted { facts }) => {
            format!("{}: snapshot deleted, {}", operation.subject, snapshot::deletion_in_words(facts))
        }
        Some(OperationResult::Restore { facts, undo, .. }) => {
            format!("{} is back, {}", operation.subject, snapshot::restore_in_words(facts, undo.as_ref()))
        }
        Some(OperationResult::Clone { facts, .. }) => {
            format!("{} is made, {}", operation.subject, snapshot::clone_in_words(facts))
        }
        Some(OperationResult::Verification { verification, facts, .. }) => {
            format!(
                "{}: snapshot {}",
                operation.subject,
                snapshot::verification_in_words(verification, facts)
            )
        }
        Some(OperationResult::Export { facts, .. }) => {
            format!("{} is exported, {}", operation.subject, snapshot::export_in_words(facts))
        }
        Some(OperationResult::Import { facts, .. }) => {
            format!("{} is made, {}", operation.subject, snapshot::import_in_words(facts))
        }
        Some(OperationResult::Done) | None => format!("{} of {} is done", operation.kind, operation.subject),
    }
}

/// A table of operations.
pub fn table(operations: &[Operation]) -> Table {
    let headers = &["ID", "KIND", "SUBJECT", "STATE", "PHASE", "ACTOR", "BEGUN", "TOOK"];
    Table::of(headers, operations, |operation| {
        [
            operation.id.to_string(),
            operation.kind.to_string(),
            operation.subject.clone(),
            operation.state.as_str().to_owned(),
            operation.progress.phase.clone(),
            operation.actor.clone(),
            instant(operation.created_at),
            took(operation),
        ]
    })
}

fn took(operation: &Operation) -> String {
    crate::output::or_nothing(
        operation.finished_at.map(|end| units::millis(end.millis_since(operation.created_at))),
    )
}

fn facts(operation: &Operation, hosts: &HostNames) -> Facts {
    let facts = Facts::new()
        .with("id", &operation.id)
        .with("kind", operation.kind)
        .with("subject", &operation.subject)
        .with("state", operation.state.as_str())
        .with("phase", &operation.progress.phase)
        .with("actor", &operation.actor)
        .with("begun", instant(operation.created_at))
        .with_some("over", operation.finished_at.map(instant))
        .with("took", took(operation))
        .with("steps done", operation.steps_done.join(", "));
    let facts = match &operation.problem {
        Some(problem) => facts
            .with("problem", format!("{} ({})", problem.message, problem.code.as_str()))
            .with_some("field", problem.field.as_ref())
            .with_some("expected", problem.expected.as_ref()),
        None => facts,
    };
    match &operation.result {
        Some(OperationResult::Migration { report }) => migration::facts(facts, report, hosts),
        Some(OperationResult::Snapshot { facts: captured, snapshot }) => {
            facts.with("snapshot", snapshot).with("cost", snapshot::facts_in_words(captured))
        }
        Some(OperationResult::SnapshotDeleted { facts: deleted }) => {
            facts.with("cost", snapshot::deletion_in_words(deleted))
        }
        Some(OperationResult::Restore { facts: restored, snapshot, undo }) => facts
            .with("to snapshot", snapshot)
            .with("cost", snapshot::restore_in_words(restored, undo.as_ref())),
        Some(OperationResult::Clone { facts: cloned, snapshot }) => {
            facts.with("of snapshot", snapshot).with("cost", snapshot::clone_in_words(cloned))
        }
        Some(OperationResult::Verification { snapshot, verification, facts: read }) => facts
            .with("snapshot", snapshot)
            .with("verdict", snapshot::verification_in_words(verification, read)),
        Some(OperationResult::Export { facts: exported, snapshot }) => facts
            .with("snapshot", snapshot)
            .with("backup", &exported.backup)
            .with("cost", snapshot::export_in_words(exported)),
        Some(OperationResult::Import { facts: imported, backup }) => {
            facts.with("backup", backup).with("cost", snapshot::import_in_words(imported))
        }
        Some(OperationResult::Done) | None => facts,
    }
}
