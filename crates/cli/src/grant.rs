//! `berth grant`: who has which role where, and until when.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreateGrant, Grant, GrantCreate, GrantDelete, GrantList, GrantListQuery, GrantPath, GrantRequest,
    RequestGrant,
};
use berth_model::access::Action;
use berth_model::{GrantId, Problem, Timestamp};
use clap::{Args, Subcommand};

use crate::arguments::DryRunArguments;
use crate::exit::Failure;
use crate::names::Names;
use crate::options::named;
use crate::output::{Table, instant, or_nothing};
use crate::session::Session;
use crate::{approval, units};

/// The API's fields, and the options that they come from.
const OPTIONS: &[(&str, &str)] = &[("for_s", "for")];

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the grants: your own, and those that you may see
    List(ListArguments),
    /// Give a team or a user a role; one can give only what one has
    Create(CreateArguments),
    /// Ask for a role for some time; somebody else approves
    Request(RequestArguments),
    /// Take a grant away, at once
    Delete {
        /// Its id
        grant: GrantId,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// Which grants.
#[derive(Debug, Args)]
pub struct ListArguments {
    /// Only those of this team
    #[arg(long)]
    team: Option<String>,
    /// Only those of this user itself, not of its teams
    #[arg(long)]
    user: Option<String>,
    /// Only those in this segment
    #[arg(long)]
    segment: Option<String>,
    /// At most so many; all without it
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
}

/// What to give.
#[derive(Debug, Args)]
pub struct CreateArguments {
    /// The team that is to have it
    #[arg(long, required_unless_present = "user", conflicts_with = "user")]
    team: Option<String>,
    /// The user that is to have it
    #[arg(long)]
    user: Option<String>,
    /// The role; 'berth role list' shows them
    #[arg(long)]
    role: String,
    /// The segment, with those inside it; the whole cluster without it
    #[arg(long)]
    segment: Option<String>,
    /// Until when, like 2026-12-31T18:00Z; until it is taken away without it
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    until: Option<Timestamp>,
    /// For how long from now on, like 8h
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_span_s, conflicts_with = "until")]
    for_s: Option<u64>,
    /// A word about it
    #[arg(long, default_value = "")]
    note: String,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// What to ask for.
#[derive(Debug, Args)]
pub struct RequestArguments {
    /// The role; 'berth role list' shows them
    #[arg(long)]
    role: String,
    /// The segment, with those inside it; the whole cluster without it
    #[arg(long)]
    segment: Option<String>,
    /// For how long from the approval on, like 4h
    #[arg(long = "for", value_name = "DURATION", value_parser = parse_span_s)]
    for_s: u64,
    /// Why: whoever decides reads it
    #[arg(long, value_name = "TEXT")]
    reason: String,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

fn parse_time(text: &str) -> Result<Timestamp, String> {
    text.parse().map_err(|_| "expected a time like 2026-12-31T18:00Z or 2026-12-31T19:00+01:00".to_owned())
}

/// A duration after which there is still a calendar.
fn parse_span_s(text: &str) -> Result<u64, String> {
    const YEARS_100_S: u64 = 100 * 366 * 86_400;
    let seconds = units::parse_duration_s(text)?;
    if (1..=YEARS_100_S).contains(&seconds) {
        Ok(seconds)
    } else {
        Err("expected a duration of 1s to 100 years".to_owned())
    }
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => list(session, arguments).await,
        Verb::Create(arguments) => create(session, arguments).await,
        Verb::Request(arguments) => request(session, arguments).await,
        Verb::Delete { grant, dry_run } => delete(session, grant, dry_run).await,
    }
}

async fn all(session: &Session, arguments: ListArguments) -> Result<Vec<Grant>, Failure> {
    let ListArguments { team, user, segment, limit } = arguments;
    let query = |limit, cursor| GrantListQuery {
        team: team.clone(),
        user: user.clone(),
        segment: segment.clone(),
        limit,
        cursor,
    };
    session.pages::<GrantList, _>(&Nothing {}, limit, query).await
}

async fn list(session: &Session, arguments: ListArguments) -> Result<(), Failure> {
    let grants = all(session, arguments).await?;
    let names = GrantNames::load(session).await;
    session.output.list(&grants, || {
        Table::of(&["ID", "WHO", "ROLE", "WHERE", "UNTIL", "BY", "NOTE"], &grants, |grant| {
            [
                grant.id.to_string(),
                names.who(grant),
                grant.role.to_string(),
                names.place(grant),
                or_nothing(grant.until.map(instant)),
                grant.granted_by.clone(),
                grant.note.clone(),
            ]
        })
    })
}

/// What grants are told with.
struct GrantNames {
    teams: Names,
    users: Names,
    segments: Names,
}

impl GrantNames {
    async fn load(session: &Session) -> Self {
        let (teams, users, segments) =
            tokio::join!(Names::of_teams(session), Names::of_users(session), Names::of_segments(session));
        Self { teams, users, segments }
    }

    fn who(&self, grant: &Grant) -> String {
        match (&grant.team, &grant.user) {
            (Some(team), _) => format!("team {}", self.teams.of(team)),
            (None, user) => format!("user {}", self.users.of_some(user.as_ref())),
        }
    }

    fn place(&self, grant: &Grant) -> String {
        let segment = grant.segment.as_ref().map(|segment| format!("segment {}", self.segments.of(segment)));
        segment.unwrap_or_else(|| "cluster".to_owned())
    }

    fn sentence(&self, grant: &Grant) -> String {
        let until = grant.until.map(|until| format!(" until {}", instant(until))).unwrap_or_default();
        format!("{} has role {} in {}{until}", self.who(grant), grant.role, self.place(grant))
    }
}

async fn create(session: &Session, arguments: CreateArguments) -> Result<(), Failure> {
    let CreateArguments { team, user, role, segment, until, for_s, note, dry_run } = arguments;
    if dry_run.dry_run {
        let who = match (&team, &user) {
            (Some(team), _) => format!("team {team}"),
            (None, user) => format!("user {}", or_nothing(user.as_ref())),
        };
        let place = segment.as_deref().unwrap_or("the whole cluster");
        let summary =
            format!("would give {who} role {role} in {place}, if you hold yourself all that it allows");
        return session.would(Action::GrantManage, segment.as_deref(), &summary).await;
    }
    let until = until.or_else(|| for_s.map(|seconds| units::now().plus_millis(seconds.saturating_mul(1000))));
    let wish = CreateGrant { team, user, role, segment, until, note };
    let made = named(session.send::<GrantCreate>(&Nothing {}, &Nothing {}, &wish).await, OPTIONS)?;
    let names = GrantNames::load(session).await;
    session.output.done(&made, || format!("{}: {}", made.id, names.sentence(&made)))
}

async fn request(session: &Session, arguments: RequestArguments) -> Result<(), Failure> {
    let RequestArguments { role, segment, for_s, reason, dry_run } = arguments;
    if dry_run.dry_run {
        let place = segment.as_deref().unwrap_or("the whole cluster");
        let summary = format!("would ask for role {role} in {place}");
        return session.would(Action::GrantRequest, None, &summary).await;
    }
    let wish = RequestGrant { role, segment, for_s, reason };
    let waiting = named(session.send::<GrantRequest>(&Nothing {}, &Nothing {}, &wish).await, OPTIONS)?;
    session.output.done(&waiting, || {
        format!("{} waits: {}\n{}", waiting.id, waiting.request, approval::what_next(&waiting))
    })
}

async fn delete(session: &Session, grant: GrantId, dry_run: DryRunArguments) -> Result<(), Failure> {
    if dry_run.dry_run {
        let every = ListArguments { team: None, user: None, segment: None, limit: None };
        let grants = all(session, every).await?;
        let found = grants.iter().find(|one| one.id == grant);
        let found = found.ok_or_else(|| Problem::not_found("grant", &grant))?;
        let names = GrantNames::load(session).await;
        let summary = format!("would take away {grant}: {}", names.sentence(found));
        let place = found.segment.as_ref().map(|segment| segment.as_str());
        return session.would(Action::GrantManage, place, &summary).await;
    }
    session.ask::<GrantDelete>(&GrantPath { grant: grant.clone() }, &Nothing {}).await?;
    session.output.done(&(), || format!("{grant} is taken away"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use crate::output::Format;
    use berth_api::manager::Page;
    use berth_model::{ProblemCode, SegmentId, TeamId};
    use clap::Parser as _;

    fn verb(line: &str) -> Verb {
        let cli = crate::arguments::Cli::try_parse_from(line.split(' ')).expect(line);
        let crate::arguments::Command::Noun(crate::arguments::Noun::Grant { verb }) = cli.command else {
            panic!("{line}");
        };
        verb
    }

    fn grant() -> Grant {
        Grant {
            id: GrantId::from_entropy([1; 10]),
            team: Some(TeamId::from_entropy([1; 10])),
            user: None,
            role: "operator".parse().expect("a name"),
            segment: Some(SegmentId::from_entropy([1; 10])),
            until: Some(Timestamp::from_millis(1_798_740_000_000)),
            note: String::new(),
            granted_by: "admin".to_owned(),
            created_at: Timestamp::from_millis(1_795_352_752_007),
        }
    }

    #[test]
    fn an_end_is_read_with_and_without_seconds() {
        let at = Timestamp::from_millis(1_798_740_000_000);
        for text in ["2026-12-31T18:00Z", "2026-12-31T18:00:00Z", "2026-12-31T19:00+01:00"] {
            assert_eq!(parse_time(text), Ok(at), "{text}");
        }
        for text in ["", "2026-12-31", "2026-12-31T18:00", "18:00Z", "tomorrow"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
        assert!(parse_span_s("0s").is_err() && parse_span_s("99999999d").is_err());
    }

    #[tokio::test]
    async fn a_grant_is_asked_for_in_the_api_s_words() {
        let fake = Fake::new().answer("POST /v1/grants", &grant());
        let line =
            "berth grant create --team ledger --role operator --segment accounting --until 2026-12-31T18:00Z";
        run(&fake.session_in(Format::Json), verb(line)).await.expect("given");
        let body: serde_json::Value = serde_json::from_slice(&fake.asked()[0].body).expect("json");
        assert_eq!(body["until"], "2026-12-31T18:00:00.000Z");
        assert_eq!((&body["team"], &body["segment"]), (&"ledger".into(), &"accounting".into()));
        assert_eq!(fake.asked().len(), 1, "programs get what the manager said, and nothing more is asked");
    }

    #[tokio::test]
    async fn who_may_not_see_teams_and_segments_sees_ids_of_its_grants() {
        let no = Problem::new(ProblemCode::NotAllowed, "no");
        let fake = Fake::new()
            .answer("GET /v1/grants", &Page { items: vec![grant()], next_cursor: None })
            .refuse("GET /v1/teams", &no)
            .refuse("GET /v1/users", &no)
            .refuse("GET /v1/segments", &no);
        run(&fake.session(), verb("berth grant list")).await.expect("listed");
        let said = fake.said();
        assert!(said.contains(&format!("team {}", TeamId::from_entropy([1; 10]))), "{said}");
    }
}
