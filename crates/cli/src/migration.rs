//! `berth migration`, and what `berth vm migrate` says: a VM on its way to another host.

use berth_api::manager::ChangeQuery;
use berth_api::manager::{MigrateVm, VmMigrate};
use berth_model::migration::MigrationReport;
use berth_model::operation::{Operation, OperationKind, OperationResult};
use berth_model::{OperationId, Problem};
use clap::{Args, Subcommand};

use crate::arguments::{ChangeArguments, DryRunArguments};
use crate::exit::Failure;
use crate::lookup::{HostNames, VmRef};
use crate::output::{Facts, NOTHING, Table, instant};
use crate::session::Session;
use crate::{operation, units, wait};

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List migrations, newest first
    List {
        /// Only those of this VM
        #[arg(long)]
        vm: Option<VmRef>,
        /// Only those that are not over
        #[arg(long)]
        active: bool,
        /// At most so many
        #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
    /// Show a migration: its phases with times, bytes, rounds, blackout
    Show {
        /// Its operation's id
        migration: OperationId,
    },
    /// Cancel a migration; the VM goes on on its source
    Cancel {
        /// Its operation's id
        migration: OperationId,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// Where a VM is to go, and how.
#[derive(Debug, Args)]
pub struct MigrateArguments {
    /// The VM
    vm: VmRef,
    /// The host to go to (name or id); Berth chooses without it
    #[arg(long, value_name = "HOST")]
    to: Option<String>,
    /// Send at most this much, like 800mbit; as the link takes without it
    #[arg(long, value_name = "BANDWIDTH", value_parser = units::parse_bandwidth, allow_hyphen_values = true)]
    bandwidth: Option<u64>,
    #[command(flatten)]
    change: ChangeArguments,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { vm, active, limit } => {
            let kind = Some(OperationKind::VmMigrate);
            let migrations = operation::list(session, vm.as_ref(), kind, active, limit).await?;
            let hosts = HostNames::load(session).await;
            session.output.list(&migrations, || table(&migrations, &hosts))
        }
        Verb::Show { migration } => {
            must_be_migration(session, &migration).await?;
            operation::show(session, migration).await
        }
        Verb::Cancel { migration, dry_run } => {
            must_be_migration(session, &migration).await?;
            operation::cancel(session, migration, dry_run).await
        }
    }
}

/// `berth vm migrate`.
///
/// # Errors
/// When the manager refuses or can't be reached, and the migration's failure.
pub async fn migrate(session: &Session, arguments: MigrateArguments) -> Result<(), Failure> {
    let MigrateArguments { vm, to, bandwidth, change } = arguments;
    let query = ChangeQuery { dry_run: change.dry_run.then_some(true) };
    let wish = MigrateVm { target: to, bandwidth_bytes_per_second: bandwidth };
    let reply = session.send::<VmMigrate>(&vm.path(), &query, &wish).await?;
    if let Some(over) = wait::carry_through(session, change, reply).await? {
        let hosts = HostNames::load(session).await;
        wait::done(session, &over, |over| operation::outcome(over, &hosts))?;
    }
    Ok(())
}

async fn must_be_migration(session: &Session, id: &OperationId) -> Result<(), Failure> {
    let found = wait::show(session, id).await?;
    if found.kind == OperationKind::VmMigrate {
        return Ok(());
    }
    Err(Problem::not_found("migration", id)
        .at("migration", id, format!("a migration, not a {}", found.kind))
        .into())
}

/// What a migration that is done measured, in words.
pub fn outcome(subject: &str, report: &MigrationReport, hosts: &HostNames) -> String {
    let (source, target) = (hosts.of(&report.source), hosts.of(&report.target));
    let facts = measured(Facts::new(), report);
    let indented: Vec<String> = facts.render().lines().map(|line| format!("  {line}")).collect();
    let total = units::millis(report.total_ms);
    format!("moved {subject} from {source} to {target} in {total}\n{}", indented.join("\n"))
}

/// The same as facts of an operation.
pub fn facts(facts: Facts, report: &MigrationReport, hosts: &HostNames) -> Facts {
    let facts = facts.with("source", hosts.of(&report.source)).with("target", hosts.of(&report.target));
    measured(facts.with("total", units::millis(report.total_ms)), report)
}

fn measured(mut facts: Facts, report: &MigrationReport) -> Facts {
    for timing in &report.phases {
        facts = facts.with(timing.phase.as_str(), units::micros(timing.took_us));
    }
    let rounds = if report.rounds == 1 { "1 round".to_owned() } else { format!("{} rounds", report.rounds) };
    facts = facts.with("memory sent", format!("{} in {rounds}", units::bytes(report.memory_bytes)));
    if report.storage_bytes > 0 {
        facts = facts.with("storage sent", units::bytes(report.storage_bytes));
    }
    facts.with("blackout", format!("{} (measured, STOP to RESUME)", units::micros(report.blackout_us)))
}

fn table(migrations: &[Operation], hosts: &HostNames) -> Table {
    let headers = &["ID", "VM", "STATE", "PHASE", "SOURCE", "TARGET", "BEGUN", "TOTAL", "BLACKOUT"];
    Table::of(headers, migrations, |operation| {
        let report = match &operation.result {
            Some(OperationResult::Migration { report }) => Some(report),
            _ => None,
        };
        let known =
            |value: &dyn Fn(&MigrationReport) -> String| report.map_or_else(|| NOTHING.to_owned(), value);
        [
            operation.id.to_string(),
            operation.subject.clone(),
            operation.state.as_str().to_owned(),
            operation.progress.phase.clone(),
            known(&|report| hosts.of(&report.source)),
            known(&|report| hosts.of(&report.target)),
            instant(operation.created_at),
            known(&|report| units::millis(report.total_ms)),
            known(&|report| units::micros(report.blackout_us)),
        ]
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_model::HostId;
    use berth_model::migration::{MigrationPhase, PhaseTiming};

    #[test]
    fn a_finished_migration_tells_phases_bytes_and_blackout() {
        let report = MigrationReport {
            source: HostId::from_entropy([1; 10]),
            target: HostId::from_entropy([2; 10]),
            phases: vec![
                PhaseTiming { phase: MigrationPhase::Preparing, took_us: 120_400 },
                PhaseTiming { phase: MigrationPhase::WarmUp, took_us: 980_000 },
                PhaseTiming { phase: MigrationPhase::StopAndCopy, took_us: 21_900 },
                PhaseTiming { phase: MigrationPhase::HandedOver, took_us: 4_200 },
            ],
            total_ms: 1154,
            blackout_us: 12_345,
            memory_bytes: 129 << 20,
            storage_bytes: 0,
            rounds: 3,
            clock_offset_us: 0,
        };
        let hosts = HostNames::single(report.source.clone(), "h1");
        let target = report.target.clone();
        let expected = format!(
            "moved default/books from h1 to {target} in 1.15 s\n  \
             preparing      120 ms\n  \
             warm-up        980 ms\n  \
             stop-and-copy  21.9 ms\n  \
             handed-over    4.20 ms\n  \
             memory sent    129 MiB in 3 rounds\n  \
             blackout       12.3 ms (measured, STOP to RESUME)"
        );
        assert_eq!(outcome("default/books", &report, &hosts), expected);
    }
}
