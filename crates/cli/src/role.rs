//! `berth role`: sets of actions that can be granted together.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreateRole, PageQuery, Role, RoleCreate, RoleDelete, RoleList, RolePath, RoleUpdate, UpdateRole,
};
use berth_model::Problem;
use berth_model::access::{Action, ActionGroup};
use berth_model::name::Name;
use clap::{Args, Subcommand};

use crate::access::parse_action;
use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::options::{named, nothing_to_change};
use crate::output::{Facts, Table};
use crate::session::Session;

/// The API's fields, and the options that they come from.
const OPTIONS: &[(&str, &str)] = &[
    ("copy_of", "copy-of"),
    ("actions", "action"),
    ("add_actions", "action"),
    ("remove_actions", "without"),
];

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the roles, built-in ones first
    List(ListArguments),
    /// Show a role with its actions
    Show {
        /// Its name
        role: String,
    },
    /// Make a role, from nothing or as a copy
    Create(CreateArguments),
    /// Change a role that somebody made; built-in ones can only be copied
    Update(UpdateArguments),
    /// Delete a role that nobody has
    Delete {
        /// Its name
        role: String,
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
    /// A role whose actions it begins with
    #[arg(long, value_name = "ROLE", value_parser = parse_name)]
    copy_of: Option<Name>,
    #[command(flatten)]
    actions: ActionArguments,
    /// What it is for
    #[arg(long, value_name = "TEXT", default_value = "")]
    summary: String,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// What to change.
#[derive(Debug, Args)]
pub struct UpdateArguments {
    /// Its name
    role: String,
    #[command(flatten)]
    actions: ActionArguments,
    /// What it is for
    #[arg(long, value_name = "TEXT")]
    summary: Option<String>,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// Which actions.
#[derive(Debug, Args)]
pub struct ActionArguments {
    /// An action that it has; several with commas, or given several times
    #[arg(long = "action", value_name = "ACTION", value_parser = parse_action, value_delimiter = ',')]
    actions: Vec<Action>,
    /// An action that it does not have; several with commas, or given several times
    #[arg(long = "without", value_name = "ACTION", value_parser = parse_action, value_delimiter = ',')]
    without: Vec<Action>,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => {
            let roles = list(session, arguments.limit).await?;
            session.output.list(&roles, || table(&roles))
        }
        Verb::Show { role } => {
            let role = find(session, &role).await?;
            session.output.one(&role, || facts(&role))
        }
        Verb::Create(arguments) => create(session, arguments).await,
        Verb::Update(arguments) => update(session, arguments).await,
        Verb::Delete { role, dry_run } if dry_run.dry_run => {
            let found = find(session, &role).await?;
            let summary = format!("would delete role {}, if nobody has it", found.name);
            session.would(Action::RoleManage, None, &summary).await
        }
        Verb::Delete { role, .. } => {
            session.ask::<RoleDelete>(&RolePath { role_name: role.clone() }, &Nothing {}).await?;
            session.output.done(&(), || format!("role {role} is deleted"))
        }
    }
}

async fn list(session: &Session, limit: Option<u32>) -> Result<Vec<Role>, Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    session.pages::<RoleList, _>(&Nothing {}, limit, query).await
}

async fn find(session: &Session, name: &str) -> Result<Role, Failure> {
    let mut roles = list(session, None).await?;
    let is_meant =
        |role: &Role| role.name.as_str() == name || role.id.as_ref().is_some_and(|id| id.as_str() == name);
    match roles.iter().position(is_meant) {
        Some(at) => Ok(roles.swap_remove(at)),
        None => Err(Problem::not_found("role", name).into()),
    }
}

async fn create(session: &Session, arguments: CreateArguments) -> Result<(), Failure> {
    let CreateArguments { name, copy_of, actions: ActionArguments { actions, without }, summary, dry_run } =
        arguments;
    if copy_of.is_none() && actions.is_empty() {
        return Err(nothing_to_change("--copy-of or --action, or it would allow nothing"));
    }
    if dry_run.dry_run {
        if let Some(copied) = &copy_of {
            find(session, copied.as_str()).await?;
        }
        return session.would(Action::RoleManage, None, &format!("would make role {name}")).await;
    }
    let wish = CreateRole { name, summary, copy_of, actions, without };
    let made = named(session.send::<RoleCreate>(&Nothing {}, &Nothing {}, &wish).await, OPTIONS)?;
    session.output.done(&made, || format!("role {} is there, with {} actions", made.name, made.actions.len()))
}

async fn update(session: &Session, arguments: UpdateArguments) -> Result<(), Failure> {
    let UpdateArguments { role, actions: ActionArguments { actions, without }, summary, dry_run } = arguments;
    if actions.is_empty() && without.is_empty() && summary.is_none() {
        return Err(nothing_to_change("--action, --without or --summary"));
    }
    if dry_run.dry_run {
        let found = find(session, &role).await?;
        let summary =
            format!("would change role {}, if you hold what comes in wherever it is granted", found.name);
        return session.would(Action::RoleManage, None, &summary).await;
    }
    let wish = UpdateRole { summary, add_actions: actions, remove_actions: without };
    let path = RolePath { role_name: role };
    let changed = named(session.send::<RoleUpdate>(&path, &Nothing {}, &wish).await, OPTIONS)?;
    session
        .output
        .done(&changed, || format!("role {} has {} actions now", changed.name, changed.actions.len()))
}

fn table(roles: &[Role]) -> Table {
    Table::of(&["NAME", "KIND", "ACTIONS", "FOR"], roles, |role| {
        let kind = if role.id.is_some() { "own" } else { "built-in" };
        [role.name.to_string(), kind.to_owned(), role.actions.len().to_string(), role.summary.clone()]
    })
}

fn facts(role: &Role) -> Facts {
    let facts = Facts::new()
        .with("name", &role.name)
        .with("kind", if role.id.is_some() { "own" } else { "built-in" })
        .with_some("id", role.id.as_ref())
        .with_some("for", (!role.summary.is_empty()).then_some(&role.summary));
    ActionGroup::GRANTABLE.iter().fold(facts, |facts, group| {
        let actions = of_group(&role.actions, *group);
        facts.with_some(group.as_str(), (!actions.is_empty()).then(|| actions.join(", ")))
    })
}

fn of_group(actions: &[Action], group: ActionGroup) -> Vec<&'static str> {
    actions.iter().filter(|action| action.group() == group).map(|action| action.as_str()).collect()
}

/// Actions in a cell: whole groups by their name, others one by one.
pub fn actions_in_words(actions: &[Action]) -> String {
    let words = ActionGroup::GRANTABLE.iter().flat_map(|group| {
        let (all, held) = (of_group(Action::ALL, *group), of_group(actions, *group));
        if held.len() == all.len() { vec![group.as_str()] } else { held }
    });
    words.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_groups_are_called_by_their_name() {
        let operator = berth_model::access::built_in_role("operator").expect("there");
        let actions: Vec<Action> = operator.actions().chain([Action::VmConsole]).collect();
        assert_eq!(actions_in_words(&actions), "view, operate, vm.console");
        assert_eq!(actions_in_words(&[Action::VmStart, Action::VmView]), "vm.view, vm.start");
    }

    #[test]
    fn a_role_is_shown_group_by_group() {
        let role = Role {
            id: None,
            name: "mover".parse().expect("a name"),
            summary: String::new(),
            actions: vec![Action::VmView, Action::VmMigrate, Action::HostView],
        };
        let said = facts(&role).render();
        assert!(said.contains("view     vm.view, host.view\noperate  vm.migrate"), "{said}");
    }
}
