//! `berth audit`: who did what, by whose leave, and how to know that the log of it is whole.

use std::io::Write as _;
use std::path::PathBuf;

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    AuditExport, AuditExportQuery, AuditKeyShow, AuditList, AuditListQuery, AuditRecord,
};
use berth_model::Timestamp;
use clap::{Args, Subcommand, ValueEnum};
use http_body_util::BodyExt as _;

use crate::exit::Failure;
use crate::output::{Facts, Output, Table, instant, or_nothing};
use crate::session::Session;
use crate::units;

mod verify;

pub use verify::VerifyArguments;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List records, newest first
    List(Box<ListArguments>),
    /// Check that no record was changed, removed, moved or forged: the manager's log, or a file, offline
    #[command(after_help = verify::AFTER)]
    Verify(VerifyArguments),
    /// Write the records out
    Export(ExportArguments),
    /// Show the public key that auditors need
    Key,
}

/// Which records.
#[derive(Debug, Args)]
pub struct ListArguments {
    /// Only those of this actor: name or id
    #[arg(long, value_name = "USER")]
    actor: Option<String>,
    /// Only those of this action (vm.delete), or of this noun (vm)
    #[arg(long)]
    action: Option<String>,
    /// Only those about this (default/books, vm:default/books)
    #[arg(long)]
    resource: Option<String>,
    /// Only those that were decided so
    #[arg(long, value_enum)]
    decision: Option<Decision>,
    /// Only those that ended since then: an RFC 3339 time, or a duration until now (1h)
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// Only those that ended before then
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<Timestamp>,
    /// Those that are under way instead, which are not in the log yet
    #[arg(long)]
    open: bool,
    /// At most so many
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..))]
    limit: u32,
}

/// How a request was decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Decision {
    Allow,
    Deny,
}

/// What to write out, and where.
#[derive(Debug, Args)]
pub struct ExportArguments {
    /// jsonl can be verified; ocsf and cef are for other systems
    #[arg(long, value_enum, default_value = "jsonl")]
    format: ExportFormat,
    /// The file to write; standard output without it
    #[arg(long, value_name = "FILE")]
    output_file: Option<PathBuf>,
    /// Only what ended since then: an RFC 3339 time, or a duration until now (24h)
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    since: Option<Timestamp>,
    /// Only what ended before then
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<Timestamp>,
}

/// A format of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ExportFormat {
    Jsonl,
    Ocsf,
    Cef,
}

/// A time, or how long ago it was.
fn parse_time(text: &str) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    let ago_s = units::parse_duration_s(text).map_err(|_| {
        "expected a time like 2026-11-22T13:05:52Z, or a duration like 90s, 1h, 7d".to_owned()
    })?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    Ok(Timestamp::from_millis(now_ms.saturating_sub(ago_s.saturating_mul(1000))))
}

/// Whether no manager is needed for it, nor a configuration that says which.
pub fn is_offline(verb: &Verb) -> bool {
    matches!(verb, Verb::Verify(arguments) if arguments.file.is_some())
}

/// Does what needs no manager.
///
/// # Errors
/// When the file is not as it was logged, or can't be read.
pub fn run_offline(verb: &Verb, output: &Output) -> Result<(), Failure> {
    match verb {
        Verb::Verify(arguments) => verify::offline(arguments, output),
        Verb::List(_) | Verb::Export(_) | Verb::Key => Ok(()),
    }
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached, or the log is not what it should be.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => {
            let records = list(session, &arguments).await?;
            session.output.list(&records, || table(&records))
        }
        Verb::Verify(arguments) => verify::online(session, &arguments).await,
        Verb::Export(arguments) => export(session, &arguments).await,
        Verb::Key => {
            let key = session.ask::<AuditKeyShow>(&Nothing {}, &Nothing {}).await?;
            session.output.one(&key, || {
                Facts::new().with("log", &key.origin).with("algorithm", &key.algorithm).with("key", &key.key)
            })
        }
    }
}

/// Pages may be short, or empty, when the filter takes little: the manager looks only so far for each.
async fn list(session: &Session, arguments: &ListArguments) -> Result<Vec<AuditRecord>, Failure> {
    let wanted = arguments.limit as usize;
    let mut query = AuditListQuery {
        actor: arguments.actor.clone(),
        action: arguments.action.clone(),
        resource: arguments.resource.clone(),
        decision: arguments.decision.map(|decision| match decision {
            Decision::Allow => "allow".to_owned(),
            Decision::Deny => "deny".to_owned(),
        }),
        since: arguments.since,
        until: arguments.until,
        open: arguments.open.then_some(true),
        limit: Some(arguments.limit.min(berth_api::manager::PAGE_LIMIT_MAX)),
        cursor: None,
    };
    let mut records = Vec::new();
    loop {
        let page = session.ask::<AuditList>(&Nothing {}, &query).await?;
        records.extend(page.items);
        if records.len() >= wanted || page.next_cursor.is_none() || page.next_cursor == query.cursor {
            records.truncate(wanted);
            return Ok(records);
        }
        query.cursor = page.next_cursor;
    }
}

fn table(records: &[AuditRecord]) -> Table {
    let headers = &["NUMBER", "TIME", "ACTOR", "ACTION", "RESOURCE", "DECISION", "RESULT", "FROM"];
    Table::of(headers, records, |record| {
        [
            or_nothing(record.sequence),
            instant(record.started_at),
            record.actor.clone(),
            record.action.clone(),
            record.resources.join(" "),
            record.decision.clone(),
            or_nothing(Some(&record.result).filter(|result| !result.is_empty())),
            or_nothing(Some(&record.address).filter(|address| !address.is_empty())),
        ]
    })
}

async fn export(session: &Session, arguments: &ExportArguments) -> Result<(), Failure> {
    let format = match arguments.format {
        ExportFormat::Jsonl => "jsonl",
        ExportFormat::Ocsf => "ocsf",
        ExportFormat::Cef => "cef",
    };
    let query =
        AuditExportQuery { format: Some(format.to_owned()), since: arguments.since, until: arguments.until };
    let response = session.client.download::<AuditExport>(&Nothing {}, &query).await?;
    let mut body = response.into_body();
    let mut file: Box<dyn std::io::Write> = match &arguments.output_file {
        Some(path) => Box::new(std::fs::File::create(path).map_err(|error| {
            Failure::field("output-file", path.display(), &format!("a file that can be written ({error})"))
        })?),
        None => Box::new(std::io::stdout()),
    };
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|error| broken_off(session, &*error))?.into_data() else { continue };
        match file.write_all(&data) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                return Err(Failure::OutputClosed);
            }
            written => written.map_err(anyhow::Error::new)?,
        }
    }
    file.flush().map_err(anyhow::Error::new)?;
    Ok(())
}

/// The manager hung up in the middle of an export.
fn broken_off(session: &Session, error: &(dyn std::error::Error + Send + Sync)) -> Failure {
    let message = format!("{} broke off in the middle of the export: {error}", session.client.address());
    berth_model::Problem::new(berth_model::ProblemCode::Unreachable, message).into()
}
