//! `berth segment`: what keeps teams apart.

mod quota;

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreateSegment, PageQuery, Segment, SegmentCreate, SegmentDelete, SegmentList, SegmentPath, SegmentReport,
    SegmentShow, SegmentUpdate, UpdateSegment,
};
use berth_model::access::Action;
use berth_model::name::Name;
use clap::{Args, Subcommand};

use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::names::Names;
use crate::options::nothing_to_change;
use crate::output::{Facts, Table, instant};
use crate::session::Session;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the segments that you may see
    List(ListArguments),
    /// Show a segment, and what is used of its quota
    Show {
        /// Its name or id
        segment: String,
    },
    /// Make a segment
    Create(Box<CreateArguments>),
    /// Rename a segment, or set its quota; what is not named stays. Quotas are set by who may so around the segment
    Update(Box<UpdateArguments>),
    /// Delete an empty segment
    Delete {
        /// Its name or id
        segment: String,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// What to make.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// Its name
    #[arg(value_parser = parse_name)]
    name: Name,
    /// The segment that it is to be inside of: what is granted there, is granted here as well
    #[arg(long, value_name = "SEGMENT")]
    parent: Option<String>,
    #[command(flatten)]
    quota: quota::Arguments,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// What to change.
#[derive(Debug, Args)]
pub struct UpdateArguments {
    /// Its name or id
    segment: String,
    /// Another name; its VMs are named after it from then on
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    rename: Option<Name>,
    #[command(flatten)]
    quota: quota::Arguments,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => list(session, arguments.limit).await,
        Verb::Show { segment } => {
            let report = show(session, &segment).await?;
            let names = Names::of_segments(session).await;
            session.output.one(&report, || facts(&report, &names))
        }
        Verb::Create(arguments) => create(session, *arguments).await,
        Verb::Update(arguments) => update(session, *arguments).await,
        Verb::Delete { segment, dry_run } if dry_run.dry_run => {
            let found = show(session, &segment).await?.segment;
            let summary = format!("would delete segment {}, if nothing is in it", found.name);
            session.would(Action::SegmentDelete, Some(found.id.as_str()), &summary).await
        }
        Verb::Delete { segment, .. } => {
            session.ask::<SegmentDelete>(&SegmentPath { segment: segment.clone() }, &Nothing {}).await?;
            session.output.done(&(), || format!("segment {segment} is deleted"))
        }
    }
}

async fn show(session: &Session, segment: &str) -> Result<SegmentReport, Failure> {
    session.ask::<SegmentShow>(&SegmentPath { segment: segment.to_owned() }, &Nothing {}).await
}

async fn list(session: &Session, limit: Option<u32>) -> Result<(), Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    let segments: Vec<Segment> = session.pages::<SegmentList, _>(&Nothing {}, limit, query).await?;
    // What a segment is inside of may be further down than the list goes.
    let needs_names = segments.iter().any(|segment| segment.parent.is_some());
    let names = if needs_names { Names::of_segments(session).await } else { Names::default() };
    session.output.list(&segments, || {
        Table::of(&["NAME", "INSIDE", "QUOTA", "ID", "MADE"], &segments, |segment| {
            [
                segment.name.to_string(),
                names.of_some(segment.parent.as_ref()),
                quota::in_words(&segment.quota),
                segment.id.to_string(),
                instant(segment.created_at),
            ]
        })
    })
}

async fn create(session: &Session, arguments: CreateArguments) -> Result<(), Failure> {
    let CreateArguments { name, parent, quota, dry_run } = arguments;
    if dry_run.dry_run {
        let place = parent.as_ref().map(|parent| format!(" inside {parent}")).unwrap_or_default();
        let summary = format!("would make segment {name}{place}");
        return session.would(Action::SegmentCreate, parent.as_deref(), &summary).await;
    }
    let wish = CreateSegment { name, parent, quota: quota.onto(berth_api::manager::Quota::default()) };
    let made = session.send::<SegmentCreate>(&Nothing {}, &Nothing {}, &wish).await?;
    session.output.done(&made, || format!("segment {} is there", made.name))
}

async fn update(session: &Session, arguments: UpdateArguments) -> Result<(), Failure> {
    let UpdateArguments { segment, rename, quota, dry_run } = arguments;
    if rename.is_none() && quota.is_empty() {
        return Err(nothing_to_change("--rename or one of the --quota- options"));
    }
    // A quota is set as a whole: what is not named is taken from what is there.
    let found = show(session, &segment).await?.segment;
    let then = quota.onto(found.quota);
    if dry_run.dry_run {
        let called = rename.as_ref().map(|name| format!("be called {name} and ")).unwrap_or_default();
        let summary = format!("would have segment {} {called}have {}", found.name, quota::sentence(&then));
        // Bounds are set from around a segment, so that nobody lifts its own.
        let place = if quota.is_empty() { Some(&found.id) } else { found.parent.as_ref() };
        let place = place.map(|segment| segment.as_str());
        return session.would(Action::SegmentConfigure, place, &summary).await;
    }
    let wish = UpdateSegment { name: rename, quota: (!quota.is_empty()).then_some(then) };
    let path = SegmentPath { segment: found.id.to_string() };
    let changed = session.send::<SegmentUpdate>(&path, &Nothing {}, &wish).await?;
    session
        .output
        .done(&changed, || format!("segment {} has {}", changed.name, quota::sentence(&changed.quota)))
}

fn facts(report: &SegmentReport, names: &Names) -> Facts {
    let SegmentReport { segment, usage } = report;
    let facts = Facts::new()
        .with("name", &segment.name)
        .with("id", &segment.id)
        .with("inside", names.of_some(segment.parent.as_ref()))
        .with("made", instant(segment.created_at));
    quota::lines(&segment.quota, usage).into_iter().fold(facts, |facts, (name, text)| facts.with(name, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use berth_api::manager::{Quota, Usage};
    use berth_model::{Problem, ProblemCode, SegmentId, Timestamp};
    use clap::Parser as _;

    fn report() -> SegmentReport {
        SegmentReport {
            segment: Segment {
                id: SegmentId::from_entropy([1; 10]),
                name: "accounting".parse().expect("a name"),
                parent: None,
                quota: Quota { vms: Some(10), memory_mib: Some(65_536), ..Quota::default() },
                created_at: Timestamp::from_millis(1_795_352_752_007),
            },
            usage: Usage { vms: 3, memory_mib: 1536, ..Usage::default() },
        }
    }

    fn verb(line: &str) -> Verb {
        let cli = crate::arguments::Cli::try_parse_from(line.split(' ')).expect(line);
        let crate::arguments::Command::Noun(crate::arguments::Noun::Segment { verb }) = cli.command else {
            panic!("{line}");
        };
        verb
    }

    #[tokio::test]
    async fn what_is_used_stands_beside_what_may_be() {
        let fake = Fake::new()
            .answer("GET /v1/segments/accounting", &report())
            .refuse("GET /v1/segments", &Problem::new(ProblemCode::NotAllowed, "no"));
        run(&fake.session(), verb("berth segment show accounting")).await.expect("shown");
        let said = fake.said().split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(said.contains("VMs 3 of 10 vcpus 0, no bound memory 1.5 GiB of 64 GiB disks 0 B"), "{said}");
    }

    #[tokio::test]
    async fn a_bound_that_is_not_named_stays_and_none_lifts_one() {
        let seg = SegmentId::from_entropy([1; 10]);
        let patch = format!("PATCH /v1/segments/{seg}");
        let fake =
            Fake::new().answer("GET /v1/segments/accounting", &report()).answer(&patch, &report().segment);
        let line = "berth segment update accounting --quota-vms none --quota-disk 1TiB";
        run(&fake.session(), verb(line)).await.expect("changed");
        let body: serde_json::Value = serde_json::from_slice(&fake.asked()[1].body).expect("json");
        let quota = serde_json::json!({"memory_mib": 65_536, "disk_mib": 1 << 20});
        assert_eq!(body["quota"], quota);
        assert!(body["name"].is_null(), "{body}");
    }

    #[tokio::test]
    async fn a_change_of_nothing_is_refused_before_anybody_is_asked() {
        let fake = Fake::new();
        let refused = run(&fake.session(), verb("berth segment update accounting")).await;
        assert_eq!(refused.expect_err("nothing").code(), 2);
        assert!(fake.asked().is_empty());
    }
}
