//! `berth policy`: policies of one's own, in Cedar.

use std::io::Read as _;
use std::path::PathBuf;

use anyhow::Context as _;
use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreatePolicy, PageQuery, Policy, PolicyActivate, PolicyCreate, PolicyDeactivate, PolicyDelete,
    PolicyList, PolicyPath, PolicyReport, PolicyShow, ShadowDifference,
};
use berth_model::access::Action;
use berth_model::name::Name;
use clap::{Args, Subcommand};

use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::lookup::parse_name;
use crate::options::named;
use crate::output::{Facts, Table, instant};
use crate::session::Session;

/// The API's fields, and the options that they come from.
const OPTIONS: &[(&str, &str)] = &[("text", "file")];
/// Longest text that is sent, in bytes: what the manager takes, and more only so that it can say no.
const TEXT_BYTES_MAX: u64 = 128 * 1024;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the policies that somebody wrote
    List(ListArguments),
    /// Show a policy, and what it changes or would change among recent decisions
    Show {
        /// Its name or id
        policy: String,
    },
    /// Write a policy; it is checked strictly, and in shadow until it is activated
    Create {
        /// Its name
        #[arg(value_parser = parse_name)]
        name: Name,
        /// File with one or more Cedar policies; - is standard input
        #[arg(long)]
        file: PathBuf,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Let a policy count; needs a second person
    Activate(Which),
    /// Put a policy back into shadow; needs a second person
    Deactivate(Which),
    /// Delete a policy; needs a second person
    Delete(Which),
}

/// Which policy.
#[derive(Debug, Args)]
pub struct Which {
    /// Its name or id
    policy: String,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => {
            let query = |limit, cursor| PageQuery { limit, cursor };
            let policies: Vec<Policy> =
                session.pages::<PolicyList, _>(&Nothing {}, arguments.limit, query).await?;
            session.output.list(&policies, || table(&policies))
        }
        Verb::Show { policy } => {
            let report = find(session, &policy).await?;
            session.output.done(&report, || {
                let text = lines(&report.policy.text);
                format!("{}\n\n{}\n\n{text}", facts(&report.policy).render(), effect(&report))
            })
        }
        Verb::Create { name, file, dry_run } => create(session, name, file, dry_run).await,
        Verb::Activate(which) if which.dry_run.dry_run => would(session, &which, "let").await,
        Verb::Activate(Which { policy, .. }) => {
            let report = session.ask::<PolicyActivate>(&PolicyPath { policy }, &Nothing {}).await?;
            told(session, &report, "counts from now on")
        }
        Verb::Deactivate(which) if which.dry_run.dry_run => would(session, &which, "no longer let").await,
        Verb::Deactivate(Which { policy, .. }) => {
            let report = session.ask::<PolicyDeactivate>(&PolicyPath { policy }, &Nothing {}).await?;
            told(session, &report, "is in shadow, and counts no longer")
        }
        Verb::Delete(which) if which.dry_run.dry_run => {
            let found = find(session, &which.policy).await?.policy;
            let summary = format!("would delete policy {}, once a second person approves", found.name);
            session.would(Action::PolicyManage, None, &summary).await
        }
        Verb::Delete(Which { policy, .. }) => {
            session.ask::<PolicyDelete>(&PolicyPath { policy: policy.clone() }, &Nothing {}).await?;
            session.output.done(&(), || format!("policy {policy} is deleted"))
        }
    }
}

async fn find(session: &Session, policy: &str) -> Result<PolicyReport, Failure> {
    session.ask::<PolicyShow>(&PolicyPath { policy: policy.to_owned() }, &Nothing {}).await
}

async fn would(session: &Session, which: &Which, verb: &str) -> Result<(), Failure> {
    let report = find(session, &which.policy).await?;
    let summary = format!(
        "would {verb} policy {} count, once a second person approves\n{}",
        report.policy.name,
        effect(&report)
    );
    session.would(Action::PolicyManage, None, &summary).await
}

async fn create(
    session: &Session,
    name: Name,
    file: PathBuf,
    dry_run: DryRunArguments,
) -> Result<(), Failure> {
    let text = read(&file)?;
    if dry_run.dry_run {
        let summary = format!("would write policy {name}, in shadow, if it fits the schema");
        return session.would(Action::PolicyManage, None, &summary).await;
    }
    let wish = CreatePolicy { name, text };
    let report = named(session.send::<PolicyCreate>(&Nothing {}, &Nothing {}, &wish).await, OPTIONS)?;
    let next = format!("is in shadow; let it count with 'berth policy activate {}'", report.policy.name);
    told(session, &report, &next)
}

fn told(session: &Session, report: &PolicyReport, what: &str) -> Result<(), Failure> {
    session.output.done(report, || format!("policy {} {what}\n{}", report.policy.name, effect(report)))
}

fn read(file: &PathBuf) -> Result<String, Failure> {
    let mut text = String::new();
    let read = if file.as_os_str() == "-" {
        std::io::stdin().lock().take(TEXT_BYTES_MAX).read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(TEXT_BYTES_MAX).read_to_string(&mut text))
    };
    read.with_context(|| file.display().to_string()).map_err(|error| {
        let expected = format!("a text file that can be read ({:#})", error.root_cause());
        Failure::field("file", file.display(), &expected)
    })?;
    Ok(text)
}

/// What a policy changes or would change, in words and a table.
fn effect(report: &PolicyReport) -> String {
    let (verb, all) = (if report.policy.active { "changes" } else { "would change" }, report.decisions);
    let mut text = match report.differences.len() {
        0 => format!("it {verb} none of {all} recent decisions"),
        some => {
            let times: u64 = report.differences.iter().map(|difference| difference.times).sum();
            let rows = differences(&report.differences).render();
            let kinds = if some == 1 { "one kind".to_owned() } else { format!("{some} kinds") };
            format!("it {verb} {times} of {all} recent decisions, of {kinds}:\n{rows}")
        }
    };
    for error in &report.errors {
        text.push_str("\nit fails, which denies: ");
        text.push_str(&crate::output::plain(error));
    }
    text
}

fn differences(all: &[ShadowDifference]) -> Table {
    Table::of(&["WHO", "ACTION", "RESOURCE", "WITHOUT", "WITH", "TIMES"], all, |one| {
        [
            one.actor.clone(),
            one.action.as_str().to_owned(),
            one.resource.clone(),
            one.was.clone(),
            one.would_be.clone(),
            one.times.to_string(),
        ]
    })
}

/// Text of several lines without what would drive a terminal.
fn lines(text: &str) -> String {
    text.trim_end().lines().map(crate::output::plain).collect::<Vec<_>>().join("\n")
}

const fn state(policy: &Policy) -> &'static str {
    if policy.active { "active" } else { "in shadow" }
}

fn table(policies: &[Policy]) -> Table {
    Table::of(&["NAME", "STATE", "BY", "ID", "MADE"], policies, |policy| {
        [
            policy.name.to_string(),
            state(policy).to_owned(),
            policy.written_by.clone(),
            policy.id.to_string(),
            instant(policy.created_at),
        ]
    })
}

fn facts(policy: &Policy) -> Facts {
    Facts::new()
        .with("name", &policy.name)
        .with("id", &policy.id)
        .with("state", state(policy))
        .with("written by", &policy.written_by)
        .with("made", instant(policy.created_at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use berth_model::{PolicyId, Problem, Timestamp};

    fn report(differences: Vec<ShadowDifference>) -> PolicyReport {
        let policy = Policy {
            id: PolicyId::from_entropy([1; 10]),
            name: "no-moves".parse().expect("a name"),
            text: "forbid (principal, action, resource);\n\x1b[2J".to_owned(),
            active: false,
            written_by: "admin".to_owned(),
            created_at: Timestamp::from_millis(1_795_352_752_007),
        };
        PolicyReport { policy, decisions: 40, differences, errors: Vec::new() }
    }

    #[tokio::test]
    async fn a_policy_is_shown_with_what_it_would_change() {
        let difference = ShadowDifference {
            actor: "ada".to_owned(),
            action: Action::VmMigrate,
            resource: "vm:accounting/books".to_owned(),
            was: "allow".to_owned(),
            would_be: "deny".to_owned(),
            times: 3,
        };
        let fake = Fake::new().answer("GET /v1/policies/no-moves", &report(vec![difference]));
        run(&fake.session(), Verb::Show { policy: "no-moves".to_owned() }).await.expect("shown");
        let said = fake.said();
        assert!(said.contains("it would change 3 of 40 recent decisions, of one kind:"), "{said}");
        assert!(said.contains("ada  vm.migrate  vm:accounting/books  allow    deny  3"), "{said}");
        assert!(!said.contains('\x1b'), "{said:?}");
    }

    #[tokio::test]
    async fn a_text_that_does_not_fit_is_told_by_its_option() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("policy.cedar");
        std::fs::write(&file, "permit (nonsense);").expect("written");
        let bad = Problem::field("text", "no-moves", "Cedar policies that fit the schema");
        let fake = Fake::new().refuse("POST /v1/policies", &bad);
        let create = |file| Verb::Create {
            name: "no-moves".parse().expect("a name"),
            file,
            dry_run: DryRunArguments::default(),
        };
        let failure = run(&fake.session(), create(file)).await.expect_err("refused");
        assert_eq!(failure.problem().and_then(|problem| problem.field.as_deref()), Some("file"));
        let nowhere = run(&fake.session(), create(folder.path().join("none"))).await.expect_err("no file");
        assert_eq!(nowhere.code(), 2);
        assert_eq!(fake.asked().len(), 1);
    }
}
