//! `berth team`: people who have something in common.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreateTeam, ExternalGroup, PageQuery, Team, TeamCreate, TeamDelete, TeamList, TeamPath, TeamShow,
    TeamUpdate, UpdateTeam,
};
use berth_model::ProblemCode;
use berth_model::access::Action;
use berth_model::name::Name;
use clap::{Args, Subcommand};

use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::names::Names;
use crate::options::{named, nothing_to_change};
use crate::output::{Facts, NOTHING, Table, instant};
use crate::session::Session;

/// The API's fields, and the options that they come from.
const OPTIONS: &[(&str, &str)] = &[
    ("members", "member"),
    ("add_members", "add-member"),
    ("remove_members", "remove-member"),
    ("external_groups", "external-group"),
    ("add_external_groups", "add-external-group"),
];

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the teams: your own, and those that you may see
    List(ListArguments),
    /// Show a team with its members
    Show {
        /// Its name or id
        team: String,
    },
    /// Make a team
    Create(CreateArguments),
    /// Let people in and out, or change a team; what is not named stays
    Update(Box<UpdateArguments>),
    /// Delete a team that has no grants and no teams in it
    Delete {
        /// Its name or id
        team: String,
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
    /// A user that is to be in it; may be given several times
    #[arg(long = "member", value_name = "USER")]
    members: Vec<String>,
    /// The team that it is to be a part of: what is granted to that one, its members have as well
    #[arg(long, value_name = "TEAM")]
    parent: Option<String>,
    /// A group of a login provider whose members are to be in it; may be given several times
    #[arg(long = "external-group", value_name = "PROVIDER:GROUP", value_parser = parse_group)]
    groups: Vec<ExternalGroup>,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// What to change.
#[derive(Debug, Args)]
pub struct UpdateArguments {
    /// Its name or id
    team: String,
    /// A user that comes in; may be given several times
    #[arg(long = "add-member", value_name = "USER")]
    add_members: Vec<String>,
    /// A user that goes out; may be given several times
    #[arg(long = "remove-member", value_name = "USER")]
    remove_members: Vec<String>,
    /// The team that it is to be a part of
    #[arg(long, value_name = "TEAM")]
    parent: Option<String>,
    /// It is to be a part of no team any more
    #[arg(long, conflicts_with = "parent")]
    no_parent: bool,
    /// Another name
    #[arg(long, value_name = "NAME", value_parser = parse_name)]
    rename: Option<Name>,
    /// A group of a login provider that comes in; may be given several times
    #[arg(long = "add-external-group", value_name = "PROVIDER:GROUP", value_parser = parse_group)]
    add_groups: Vec<ExternalGroup>,
    /// A group of a login provider that goes out; may be given several times
    #[arg(long = "remove-external-group", value_name = "PROVIDER:GROUP", value_parser = parse_group)]
    remove_groups: Vec<ExternalGroup>,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

impl UpdateArguments {
    fn is_empty(&self) -> bool {
        let lists = [&self.add_members, &self.remove_members];
        let groups = [&self.add_groups, &self.remove_groups];
        lists.iter().all(|list| list.is_empty())
            && groups.iter().all(|list| list.is_empty())
            && self.parent.is_none()
            && self.rename.is_none()
            && !self.no_parent
    }
}

fn parse_group(text: &str) -> Result<ExternalGroup, String> {
    match text.split_once(':') {
        Some((provider, group)) if !provider.is_empty() && !group.is_empty() => {
            Ok(ExternalGroup { provider: provider.to_owned(), group: group.to_owned() })
        }
        _ => Err("expected PROVIDER:GROUP, the provider as the manager's configuration calls it".to_owned()),
    }
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => list(session, arguments.limit).await,
        Verb::Show { team } => show(session, team).await,
        Verb::Create(arguments) => create(session, arguments).await,
        Verb::Update(arguments) => update(session, *arguments).await,
        Verb::Delete { team, dry_run } if dry_run.dry_run => {
            let found = find(session, &team).await?;
            let summary = format!("would delete team {}, if it has no grants and no teams in it", found.name);
            session.would(Action::TeamManage, None, &summary).await
        }
        Verb::Delete { team, .. } => {
            session.ask::<TeamDelete>(&TeamPath { team: team.clone() }, &Nothing {}).await?;
            session.output.done(&(), || format!("team {team} is deleted"))
        }
    }
}

async fn find(session: &Session, team: &str) -> Result<Team, Failure> {
    let asked = session.ask::<TeamShow>(&TeamPath { team: team.to_owned() }, &Nothing {}).await;
    let is_refused =
        |failure: &Failure| failure.problem().is_some_and(|problem| problem.code == ProblemCode::NotAllowed);
    if asked.as_ref().is_err_and(is_refused) {
        // One's own teams are in the list, also for who may see no others.
        let is_meant = |one: &Team| one.name.as_str() == team || one.id.as_str() == team;
        if let Some(own) = teams(session, None).await.ok().and_then(|all| all.into_iter().find(is_meant)) {
            return Ok(own);
        }
    }
    asked
}

async fn teams(session: &Session, limit: Option<u32>) -> Result<Vec<Team>, Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    session.pages::<TeamList, _>(&Nothing {}, limit, query).await
}

async fn list(session: &Session, limit: Option<u32>) -> Result<(), Failure> {
    let teams = teams(session, limit).await?;
    let needs_names = teams.iter().any(|team| team.parent.is_some());
    let names = if needs_names { Names::of_teams(session).await } else { Names::default() };
    session.output.list(&teams, || {
        Table::of(&["NAME", "PART OF", "MEMBERS", "GROUPS", "ID", "MADE"], &teams, |team| {
            [
                team.name.to_string(),
                names.of_some(team.parent.as_ref()),
                team.members.len().to_string(),
                team.external_groups.len().to_string(),
                team.id.to_string(),
                instant(team.created_at),
            ]
        })
    })
}

async fn show(session: &Session, team: String) -> Result<(), Failure> {
    let team = find(session, &team).await?;
    let (teams, users) = tokio::join!(Names::of_teams(session), Names::of_users(session));
    session.output.one(&team, || facts(&team, &teams, &users))
}

fn facts(team: &Team, teams: &Names, users: &Names) -> Facts {
    let listed = |mut names: Vec<String>| {
        names.sort();
        if names.is_empty() { NOTHING.to_owned() } else { names.join(", ") }
    };
    let members = team.members.iter().map(|user| users.of(user)).collect();
    let groups =
        team.external_groups.iter().map(|group| format!("{}:{}", group.provider, group.group)).collect();
    Facts::new()
        .with("name", &team.name)
        .with("id", &team.id)
        .with("part of", teams.of_some(team.parent.as_ref()))
        .with("members", listed(members))
        .with("external groups", listed(groups))
        .with("made", instant(team.created_at))
}

async fn create(session: &Session, arguments: CreateArguments) -> Result<(), Failure> {
    let CreateArguments { name, members, parent, groups, dry_run } = arguments;
    if dry_run.dry_run {
        let summary = format!("would make team {name} with {}", people(members.len()));
        return session.would(Action::TeamManage, None, &summary).await;
    }
    let wish = CreateTeam { name: name.to_string(), parent, members, external_groups: groups };
    let made = named(session.send::<TeamCreate>(&Nothing {}, &Nothing {}, &wish).await, OPTIONS)?;
    session.output.done(&made, || format!("team {} is there, with {}", made.name, people(made.members.len())))
}

fn people(count: usize) -> String {
    match count {
        0 => "nobody in it".to_owned(),
        1 => "one member".to_owned(),
        more => format!("{more} members"),
    }
}

async fn update(session: &Session, arguments: UpdateArguments) -> Result<(), Failure> {
    if arguments.is_empty() {
        return Err(nothing_to_change("--add-member, --remove-member, --parent, --rename, or a group"));
    }
    let path = TeamPath { team: arguments.team };
    if arguments.dry_run.dry_run {
        let found = find(session, &path.team).await?;
        let summary =
            format!("would change team {}, if you hold yourself what this would give others", found.name);
        return session.would(Action::TeamManage, None, &summary).await;
    }
    let wish = UpdateTeam {
        name: arguments.rename,
        // The API's word for no team at all is an empty one.
        parent: if arguments.no_parent { Some(String::new()) } else { arguments.parent },
        add_members: arguments.add_members,
        remove_members: arguments.remove_members,
        add_external_groups: arguments.add_groups,
        remove_external_groups: arguments.remove_groups,
    };
    let changed = named(session.send::<TeamUpdate>(&path, &Nothing {}, &wish).await, OPTIONS)?;
    session.output.done(&changed, || {
        format!("team {} is changed, with {}", changed.name, people(changed.members.len()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use berth_api::manager::Page;
    use berth_model::{Problem, TeamId, Timestamp};

    #[test]
    fn groups_are_read_whatever_they_are_called() {
        let group = parse_group("corp:cn=ledger,ou=teams,dc=example").expect("a group");
        assert_eq!(
            (group.provider.as_str(), group.group.as_str()),
            ("corp", "cn=ledger,ou=teams,dc=example")
        );
        for bad in ["", "corp", "corp:", ":group"] {
            assert!(parse_group(bad).is_err(), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_member_that_is_not_there_is_told_by_its_option() {
        let fake = Fake::new().refuse("POST /v1/teams", &Problem::field("members.0", "eve", "a user"));
        let wish = CreateArguments {
            name: "ledger".parse().expect("a name"),
            members: vec!["eve".to_owned()],
            parent: None,
            groups: Vec::new(),
            dry_run: DryRunArguments::default(),
        };
        let failure = run(&fake.session(), Verb::Create(wish)).await.expect_err("refused");
        let text = crate::exit::text(&failure, crate::output::Format::Table).expect("a problem");
        assert_eq!(text, "error: --member is 'eve': expected a user");
    }
    #[tokio::test]
    async fn one_s_own_team_is_shown_to_who_may_see_no_others() {
        let team = Team {
            id: TeamId::from_entropy([1; 10]),
            name: "ledger".parse().expect("a name"),
            parent: None,
            members: Vec::new(),
            external_groups: Vec::new(),
            created_at: Timestamp::from_millis(1_795_352_752_007),
        };
        let no = Problem::new(ProblemCode::NotAllowed, "no");
        let fake = Fake::new()
            .refuse("GET /v1/teams/ledger", &no)
            .refuse("GET /v1/teams/builders", &no)
            .refuse("GET /v1/users", &no)
            .answer("GET /v1/teams", &Page { items: vec![team], next_cursor: None });
        run(&fake.session(), Verb::Show { team: "ledger".to_owned() }).await.expect("its own");
        let other = run(&fake.session(), Verb::Show { team: "builders".to_owned() }).await;
        assert_eq!(other.expect_err("another's").code(), 3);
    }
}
