//! `berth audit`: who did what, and by whose leave.

use berth_api::endpoint::Nothing;
use berth_api::manager::{AuditList, AuditRecord, PageQuery};
use clap::Subcommand;

use crate::exit::Failure;
use crate::output::{Table, instant, or_nothing};
use crate::session::Session;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the newest records, newest first
    List {
        /// At most so many
        #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..))]
        limit: u32,
    },
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    let Verb::List { limit } = verb;
    let query = |limit, cursor| PageQuery { limit, cursor };
    let records = session.pages::<AuditList, _>(&Nothing {}, Some(limit), query).await?;
    session.output.list(&records, || table(&records))
}

fn table(records: &[AuditRecord]) -> Table {
    let headers = &["NUMBER", "TIME", "ACTOR", "ACTION", "RESOURCE", "DECISION", "STATUS", "FROM"];
    Table::of(headers, records, |record| {
        [
            record.sequence.to_string(),
            instant(record.started_at),
            record.actor.clone(),
            record.action.as_str().to_owned(),
            record.resource.clone(),
            record.decision.clone(),
            or_nothing(record.status),
            record.remote.clone(),
        ]
    })
}
