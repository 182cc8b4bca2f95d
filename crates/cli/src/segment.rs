//! `berth segment`: tenancy and network boundaries.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreateSegment, PageQuery, Segment, SegmentCreate, SegmentDelete, SegmentList, SegmentPath,
};
use berth_model::Problem;
use berth_model::access::Action;
use berth_model::name::Name;
use clap::Subcommand;

use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::output::{Table, instant};
use crate::session::Session;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the segments
    List(ListArguments),
    /// Make a segment
    Create {
        /// Its name
        #[arg(value_parser = parse_name)]
        name: Name,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Delete an empty segment
    Delete {
        /// Its name or id
        segment: String,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => {
            let segments = list(session, arguments.limit).await?;
            session.output.list(&segments, || {
                Table::of(&["NAME", "ID", "MADE"], &segments, |segment| {
                    [segment.name.to_string(), segment.id.to_string(), instant(segment.created_at)]
                })
            })
        }
        Verb::Create { name, dry_run } if dry_run.dry_run => {
            session.would(Action::SegmentCreate, None, &format!("would make segment {name}")).await
        }
        Verb::Create { name, .. } => {
            let wish = CreateSegment { name, parent: None, quota: berth_api::manager::Quota::default() };
            let made = session.send::<SegmentCreate>(&Nothing {}, &Nothing {}, &wish).await?;
            session.output.done(&made, || format!("segment {} is there", made.name))
        }
        Verb::Delete { segment, dry_run } if dry_run.dry_run => {
            let found = list(session, None).await?;
            let is_meant = |one: &&Segment| one.name.as_str() == segment || one.id.as_str() == segment;
            let found = found.iter().find(is_meant).ok_or_else(|| Problem::not_found("segment", &segment))?;
            let summary = format!("would delete segment {}, if no VM is in it", found.name);
            session.would(Action::SegmentDelete, Some(found.name.as_str()), &summary).await
        }
        Verb::Delete { segment, .. } => {
            session.ask::<SegmentDelete>(&SegmentPath { segment: segment.clone() }, &Nothing {}).await?;
            session.output.done(&(), || format!("segment {segment} is deleted"))
        }
    }
}

async fn list(session: &Session, limit: Option<u32>) -> Result<Vec<Segment>, Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    session.pages::<SegmentList, _>(&Nothing {}, limit, query).await
}
