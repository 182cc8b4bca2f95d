//! `berth schedule`: snapshots by the clock, and what is kept of them.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    ChangeQuery, CreateSchedule, Doomed, ScheduleCreate, ScheduleDelete, ScheduleList, ScheduleListQuery,
    SchedulePath, SchedulePause, ScheduleReport, ScheduleResume, ScheduleRunNow, ScheduleShow,
    ScheduleUpdate, ScheduledVm, UpdateSchedule,
};
use berth_model::name::Name;
use berth_model::schedule::reserve::{PoolRoom, Room};
use berth_model::schedule::{Cron, Keep, Outcome, Schedule, ScheduleRun, Tally, Zone};
use berth_model::snapshot::SnapshotExtent;
use berth_model::{Problem, ProblemCode, ScheduleId};
use clap::{Args, Subcommand};

use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::{VmRef, parse_name};
use crate::names::Names;
use crate::options::nothing_to_change;
use crate::output::{Facts, Table, instant, or_nothing, word};
use crate::session::Session;
use crate::units;

/// How many names are said in a sentence.
const NAMES_SHOWN: usize = 10;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Take snapshots of a VM, or of all of a segment, by the clock
    Create(Box<CreateArguments>),
    /// List the schedules that you may see
    List {
        /// Only those of this segment
        #[arg(long)]
        segment: Option<String>,
        #[command(flatten)]
        list: ListArguments,
    },
    /// Show a schedule: how its last run went, of what VMs, and what comes next
    Show {
        /// Its name, segment/name or id
        schedule: String,
    },
    /// Change a schedule, and answer for it from now on; what is not named stays
    Update(Box<UpdateArguments>),
    /// Let a schedule do nothing for now
    Pause(Which),
    /// Let it go on; what came due meanwhile is not made up for
    Resume(Which),
    /// Delete a schedule; the snapshots that it took stay
    Delete(Which),
    /// Run a schedule now
    Run(Which),
}

/// Which schedule.
#[derive(Debug, Args)]
pub struct Which {
    /// Its name, segment/name or id
    schedule: String,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// What to make.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// Its name
    #[arg(value_parser = parse_name)]
    name: Name,
    /// All VMs of this segment and of those inside it, whenever they come there
    #[arg(long, required_unless_present = "vm", conflicts_with = "vm")]
    segment: Option<String>,
    /// This VM alone
    #[arg(long)]
    vm: Option<VmRef>,
    /// When: minute, hour, day, month, weekday, like "0 2 * * *"
    #[arg(long)]
    cron: Cron,
    /// By the clock of this time zone, like Europe/Berlin
    #[arg(long, default_value = "UTC")]
    timezone: Zone,
    /// What to keep, like hourly=24,daily=7,weekly=4,monthly=12,last=3
    #[arg(long)]
    keep: Keep,
    /// The disk alone, as after a power cut
    #[arg(long)]
    no_memory: bool,
    /// The disk alone, the guest's file systems flushed and frozen by its guest agent
    #[arg(long, conflicts_with = "no_memory")]
    filesystem: bool,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// What to change.
#[derive(Debug, Args)]
pub struct UpdateArguments {
    /// Its name, segment/name or id
    schedule: String,
    /// Another name
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    rename: Option<Name>,
    /// When: minute, hour, day, month, weekday
    #[arg(long)]
    cron: Option<Cron>,
    /// By the clock of this time zone
    #[arg(long)]
    timezone: Option<Zone>,
    /// What to keep
    #[arg(long)]
    keep: Option<Keep>,
    /// Change nothing, but answer for it from now on
    #[arg(long)]
    take_over: bool,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Create(arguments) => create(session, *arguments).await,
        Verb::List { segment, list } => show_all(session, segment, list.limit).await,
        Verb::Show { schedule } => {
            let path = find(session, &schedule).await?;
            let report = session.ask::<ScheduleShow>(&path, &Nothing {}).await?;
            session.output.done(&report, || in_words(&report))
        }
        Verb::Update(arguments) => update(session, *arguments).await,
        Verb::Pause(which) => pause(session, &which).await,
        Verb::Resume(which) => resume(session, &which).await,
        Verb::Delete(which) => delete(session, &which).await,
        Verb::Run(which) => run_now(session, &which).await,
    }
}

/// The schedule that a text means: a name alone is looked for in all segments that one sees.
async fn find(session: &Session, text: &str) -> Result<SchedulePath, Failure> {
    if text.contains('/') || text.parse::<ScheduleId>().is_ok() {
        return Ok(SchedulePath { schedule: text.to_owned() });
    }
    let all = list(session, None, None).await?;
    let mut found = all.iter().filter(|schedule| schedule.name.as_str() == text);
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(SchedulePath { schedule: one.id.to_string() }),
        (Some(_), Some(_)) => {
            let message = format!("several segments have a schedule '{text}': say SEGMENT/{text}");
            Err(Problem::new(ProblemCode::InvalidInput, message).into())
        }
        (None, _) => Err(Problem::not_found("schedule", text).into()),
    }
}

async fn list(
    session: &Session,
    segment: Option<String>,
    limit: Option<u32>,
) -> Result<Vec<Schedule>, Failure> {
    let query = |limit, cursor| ScheduleListQuery { segment: segment.clone(), limit, cursor };
    session.pages::<ScheduleList, Schedule>(&Nothing {}, limit, query).await
}

async fn show_all(session: &Session, segment: Option<String>, limit: Option<u32>) -> Result<(), Failure> {
    let schedules = list(session, segment, limit).await?;
    let names = Names::of_segments(session).await;
    session.output.list(&schedules, || {
        let headers = &["NAME", "OF", "CRON", "TIMEZONE", "KEEPS", "LAST RUN", "RESULT"];
        Table::of(headers, &schedules, |schedule| {
            let run = schedule.status.run.as_ref();
            [
                format!("{}/{}", names.of(&schedule.segment), schedule.name),
                schedule.vm.as_ref().map_or_else(|| "segment".to_owned(), ToString::to_string),
                schedule.cron.to_string(),
                schedule.timezone.to_string(),
                schedule.keep.to_string(),
                or_nothing(run.map(|run| instant(run.begun_at))),
                if schedule.paused { "paused".to_owned() } else { or_nothing(run.map(result)) },
            ]
        })
    })
}

async fn create(session: &Session, arguments: CreateArguments) -> Result<(), Failure> {
    let CreateArguments { name, segment, vm, cron, timezone, keep, no_memory, filesystem, dry_run } =
        arguments;
    let extent = match (no_memory, filesystem) {
        (true, _) => SnapshotExtent::Disk,
        (false, true) => SnapshotExtent::Filesystem,
        (false, false) => SnapshotExtent::Machine,
    };
    let vm = vm.map(|vm| vm.as_str().to_owned());
    let wish = CreateSchedule { name, segment, vm, cron, timezone: Some(timezone), keep, extent };
    let report = session.send::<ScheduleCreate>(&Nothing {}, &query(dry_run), &wish).await?;
    let name = &report.schedule.name;
    if dry_run.dry_run {
        return session.output.done(&report, || format!("would make schedule {name}\n{}", preview(&report)));
    }
    session.output.done(&report, || format!("schedule {name} is there\n{}", preview(&report)))
}

async fn update(session: &Session, arguments: UpdateArguments) -> Result<(), Failure> {
    let UpdateArguments { schedule, rename, cron, timezone, keep, take_over, dry_run } = arguments;
    let is_empty = rename.is_none() && cron.is_none() && timezone.is_none() && keep.is_none();
    if is_empty && !take_over {
        return Err(nothing_to_change("--rename, --cron, --timezone, --keep or --take-over"));
    }
    let path = find(session, &schedule).await?;
    let wish = UpdateSchedule { name: rename, cron, timezone, keep };
    let report = session.send::<ScheduleUpdate>(&path, &query(dry_run), &wish).await?;
    let (name, goes) = (&report.schedule.name, going(&report.would_delete));
    if dry_run.dry_run {
        let text = || format!("would change schedule {name}\n{}\n{goes}", preview(&report));
        return session.output.done(&report, text);
    }
    session.output.done(&report, || format!("schedule {name} is changed\n{}", preview(&report)))
}

async fn pause(session: &Session, which: &Which) -> Result<(), Failure> {
    let path = find(session, &which.schedule).await?;
    if which.dry_run.dry_run {
        return tried(session, &path, |name| format!("would pause schedule {name}")).await;
    }
    let paused = session.ask::<SchedulePause>(&path, &Nothing {}).await?;
    session.output.done(&paused, || format!("schedule {} is paused", paused.name))
}

async fn resume(session: &Session, which: &Which) -> Result<(), Failure> {
    let path = find(session, &which.schedule).await?;
    if which.dry_run.dry_run {
        return tried(session, &path, |name| format!("would let schedule {name} go on")).await;
    }
    let resumed = session.ask::<ScheduleResume>(&path, &Nothing {}).await?;
    session.output.done(&resumed, || format!("schedule {} goes on", resumed.name))
}

async fn delete(session: &Session, which: &Which) -> Result<(), Failure> {
    let path = find(session, &which.schedule).await?;
    if which.dry_run.dry_run {
        let report = session.ask::<ScheduleShow>(&path, &Nothing {}).await?;
        let (name, snapshots) = (&report.schedule.name, report.snapshots);
        return session.tried(&format!("would delete schedule {name}; its {snapshots} snapshots would stay"));
    }
    session.ask::<ScheduleDelete>(&path, &Nothing {}).await?;
    session.output.done(&(), || format!("schedule {} is deleted; its snapshots stay", which.schedule))
}

async fn run_now(session: &Session, which: &Which) -> Result<(), Failure> {
    let path = find(session, &which.schedule).await?;
    let report = session.ask::<ScheduleRunNow>(&path, &query(which.dry_run)).await?;
    let (name, vms) = (&report.schedule.name, vms_in_words(&report.vms));
    if which.dry_run.dry_run {
        let text = format!("would take snapshots of {vms}\n{}", going(&report.would_delete));
        return session.output.done(&report, || text);
    }
    session.output.done(&report, || {
        format!("schedule {name} runs for {vms}; 'berth schedule show {name}' says how it goes")
    })
}

/// For a change that the manager can't be asked to only try.
async fn tried(
    session: &Session,
    path: &SchedulePath,
    summary: impl Fn(&Name) -> String,
) -> Result<(), Failure> {
    let report = session.ask::<ScheduleShow>(path, &Nothing {}).await?;
    session.tried(&summary(&report.schedule.name))
}

const fn query(dry_run: DryRunArguments) -> ChangeQuery {
    ChangeQuery { dry_run: if dry_run.dry_run { Some(true) } else { None } }
}

/// When it runs next and of what.
fn preview(report: &ScheduleReport) -> String {
    let runs: Vec<String> = report.next_runs.iter().map(|at| instant(*at)).collect();
    let runs = if runs.is_empty() { "never".to_owned() } else { runs.join(", ") };
    format!("next runs: {runs}\nVMs: {}", vms_in_words(&report.vms))
}

fn vms_in_words(vms: &[ScheduledVm]) -> String {
    let names: Vec<&str> = vms.iter().take(NAMES_SHOWN).map(|vm| vm.name.as_str()).collect();
    match vms.len().saturating_sub(NAMES_SHOWN) {
        _ if names.is_empty() => "none now".to_owned(),
        0 => names.join(", "),
        more => format!("{} and {more} more", names.join(", ")),
    }
}

/// What a rule would delete.
fn going(doomed: &[Doomed]) -> String {
    if doomed.is_empty() {
        return "nothing would be deleted".to_owned();
    }
    let bytes: u64 = doomed.iter().map(|one| one.stored_bytes).sum();
    let table = Table::of(&["VM", "SNAPSHOT", "TAKEN", "OWN SIZE"], doomed, |one| {
        [one.vm_name.clone(), one.name.to_string(), instant(one.taken_at), units::bytes(one.stored_bytes)]
    });
    let count = doomed.len();
    format!("would delete {count} snapshots, up to {}:\n{}", units::bytes(bytes), table.render())
}

/// What came of a run.
fn result(run: &ScheduleRun) -> String {
    if !run.is_over() {
        return "runs".to_owned();
    }
    let Tally { taken, skipped, failed, deleted } = run.tally;
    let parts = [(taken, "taken"), (skipped, "skipped"), (failed, "failed"), (deleted, "deleted")];
    let said: Vec<String> = parts
        .iter()
        .filter(|(number, _)| *number > 0)
        .map(|(number, word)| format!("{number} {word}"))
        .collect();
    if said.is_empty() { "no VMs".to_owned() } else { said.join(", ") }
}

fn in_words(report: &ScheduleReport) -> String {
    let schedule = &report.schedule;
    let run = schedule.status.run.as_ref();
    let missed = run.map_or(0, |run| run.missed);
    let next: Vec<String> = report.next_runs.iter().map(|at| instant(*at)).collect();
    let facts = Facts::new()
        .with("name", &schedule.name)
        .with("id", &schedule.id)
        .with("cron", format!("{} ({})", schedule.cron, schedule.timezone))
        .with("keeps", schedule.keep)
        .with("extent", word(&schedule.extent))
        .with("paused", if schedule.paused { "yes" } else { "no" })
        .with_some("held", report.held.as_ref())
        .with("next runs", if next.is_empty() { "none".to_owned() } else { next.join(", ") })
        .with_some("last run", run.map(|run| instant(run.begun_at)))
        .with_some("result", run.map(result))
        .with_some("made up for", (missed > 0).then(|| format!("{missed} missed runs")))
        .with("runs", schedule.status.runs)
        .with("missed", schedule.status.missed)
        .with("snapshots", format!("{}, {}", report.snapshots, units::bytes(report.stored_bytes)));
    let table = Table::of(&["VM", "LAST", "RESULT", "WHY"], &report.vms, |vm| {
        let last = vm.last.as_ref();
        [
            vm.name.clone(),
            or_nothing(last.map(|part| instant(part.at))),
            or_nothing(last.map(|part| match part.outcome {
                Outcome::Taken => part.outcome.as_str().to_owned(),
                other => format!("{} ({} in a row)", other.as_str(), part.in_a_row),
            })),
            or_nothing(last.and_then(|part| part.why.as_ref())),
        ]
    });
    let facts = report.pools.iter().fold(facts, |facts, pool| {
        facts.with(format!("pool {}/{}", pool.host, pool.pool), room_in_words(pool))
    });
    format!("{}\n\n{}", facts.render(), table.render())
}

/// How far a pool is from its reserve.
fn room_in_words(pool: &PoolRoom) -> String {
    let (free, reserve) = (units::bytes(pool.free_bytes), units::bytes(pool.reserve_bytes));
    let when = pool.reached_at.map_or_else(String::new, |at| format!(", at this pace until {}", instant(at)));
    match pool.room {
        Room::Below => {
            format!("below: {} missing to {reserve} that have to stay free", units::bytes(pool.missing_bytes))
        }
        Room::Low => format!("low: {free} free, {reserve} of it in reserve{when}"),
        Room::Ample => format!("{free} free, {reserve} of it in reserve{when}"),
    }
}

#[cfg(test)]
mod tests;
