//! `berth approval`: what waits for a second person.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    Approval, ApprovalApprove, ApprovalDeny, ApprovalList, ApprovalPath, ApprovalState, PageQuery,
};
use berth_model::access::Action;
use berth_model::{ApprovalId, Problem};
use clap::{Args, Subcommand};

use crate::arguments::DryRunArguments;
use crate::exit::Failure;
use crate::output::{Facts, Table, instant, or_nothing, word};
use crate::session::Session;
use crate::units;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List what waits, or is approved and not used yet: your own requests, and what you may decide
    List {
        /// Also what was denied or used, or has expired
        #[arg(long)]
        all: bool,
        /// At most so many; all without it
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        limit: Option<u32>,
    },
    /// Show a request that needs a second person
    Show {
        /// Its id
        approval: ApprovalId,
    },
    /// Approve somebody else's request: it may be made again, once; a role that was asked for is given at once
    Approve(Which),
    /// Deny somebody else's request
    Deny(Which),
}

/// Which request.
#[derive(Debug, Args)]
pub struct Which {
    /// Its id
    approval: ApprovalId,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List { all, limit } => {
            let mut approvals = list(session, if all { limit } else { None }).await?;
            if !all {
                approvals.retain(is_open);
                approvals.truncate(limit.map_or(usize::MAX, |limit| limit as usize));
            }
            session.output.list(&approvals, || table(&approvals))
        }
        Verb::Show { approval } => {
            let approval = find(session, &approval).await?;
            session.output.one(&approval, || facts(&approval))
        }
        Verb::Approve(which) => approve(session, which).await,
        Verb::Deny(which) => deny(session, which).await,
    }
}

fn is_open(approval: &Approval) -> bool {
    let is_undone = matches!(approval.state, ApprovalState::Pending | ApprovalState::Approved);
    is_undone && units::now() < approval.expires_at
}

/// How it stands, in a word.
fn state(approval: &Approval) -> String {
    let is_undone = matches!(approval.state, ApprovalState::Pending | ApprovalState::Approved);
    if is_undone && !is_open(approval) { "expired".to_owned() } else { word(&approval.state) }
}

async fn list(session: &Session, limit: Option<u32>) -> Result<Vec<Approval>, Failure> {
    let query = |limit, cursor| PageQuery { limit, cursor };
    session.pages::<ApprovalList, _>(&Nothing {}, limit, query).await
}

async fn find(session: &Session, id: &ApprovalId) -> Result<Approval, Failure> {
    let found = list(session, None).await?.into_iter().find(|approval| approval.id == *id);
    found.ok_or_else(|| Problem::not_found("approval", id).into())
}

async fn approve(session: &Session, which: Which) -> Result<(), Failure> {
    if which.dry_run.dry_run {
        return would(session, &which.approval, "approve").await;
    }
    let path = ApprovalPath { approval: which.approval };
    let decided = session.ask::<ApprovalApprove>(&path, &Nothing {}).await?;
    session.output.done(&decided, || match &decided.grant {
        Some(wish) => format!("approved: {} has role {} from now on", decided.requester, wish.role),
        None => format!(
            "approved: {} may make the same request again, once, until {}",
            decided.requester,
            instant(decided.expires_at)
        ),
    })
}

async fn deny(session: &Session, which: Which) -> Result<(), Failure> {
    if which.dry_run.dry_run {
        return would(session, &which.approval, "deny").await;
    }
    let path = ApprovalPath { approval: which.approval };
    let decided = session.ask::<ApprovalDeny>(&path, &Nothing {}).await?;
    session.output.done(&decided, || format!("denied: {} of {}", decided.id, decided.requester))
}

async fn would(session: &Session, id: &ApprovalId, verb: &str) -> Result<(), Failure> {
    let found = find(session, id).await?;
    let summary =
        format!("would {verb} {} of {}, if it still waits and is not your own", found.id, found.requester);
    let segment = found.segment.as_ref().map(|segment| segment.as_str());
    session.would(Action::ApprovalDecide, segment, &summary).await
}

/// What whoever asked does next.
pub fn what_next(approval: &Approval) -> String {
    let (id, expires) = (&approval.id, instant(approval.expires_at));
    if state(approval) == "expired" {
        return "it has expired: make the request again, and it is put up anew".to_owned();
    }
    match (approval.state, &approval.grant) {
        (ApprovalState::Pending, None) => {
            format!(
                "somebody else who may decide:  berth approval approve {id}  (until {expires}); then make the same request again"
            )
        }
        (ApprovalState::Pending, Some(_)) => {
            format!(
                "somebody else who may decide:  berth approval approve {id}  (until {expires}); the role counts from then on"
            )
        }
        (ApprovalState::Approved, _) => format!("make the same request again, once, until {expires}"),
        (ApprovalState::Denied, _) => "it was denied; ask again only with a new reason".to_owned(),
        (ApprovalState::Used, _) => "it is done".to_owned(),
    }
}

fn table(approvals: &[Approval]) -> Table {
    let headers = &["ID", "STATE", "WHO", "WHAT", "ABOUT", "REASON", "ASKED", "EXPIRES"];
    Table::of(headers, approvals, |approval| {
        [
            approval.id.to_string(),
            state(approval),
            approval.requester.to_string(),
            what(approval),
            approval.resource.clone(),
            approval.reason.clone(),
            instant(approval.created_at),
            instant(approval.expires_at),
        ]
    })
}

fn what(approval: &Approval) -> String {
    match &approval.grant {
        Some(wish) => format!("role {}", wish.role),
        None => approval.action.as_str().to_owned(),
    }
}

fn facts(approval: &Approval) -> Facts {
    Facts::new()
        .with("id", &approval.id)
        .with("state", state(approval))
        .with("who", &approval.requester)
        .with("what", what(approval))
        .with("about", &approval.resource)
        .with("request", &approval.request)
        .with("sha256", &approval.request_sha256)
        .with("reason", &approval.reason)
        .with("decided by", or_nothing(approval.decided_by.as_ref()))
        .with("asked", instant(approval.created_at))
        .with("expires", instant(approval.expires_at))
        .with("next", what_next(approval))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::Fake;
    use berth_api::manager::Page;
    use berth_model::{Timestamp, UserId};

    fn approval(state: ApprovalState) -> Approval {
        Approval {
            approver: None,
            id: ApprovalId::from_entropy([1; 10]),
            requested_by: UserId::from_entropy([1; 10]),
            requester: "ada".parse().expect("a name"),
            action: Action::SnapshotRestore,
            resource: "snapshot:accounting/books@baseline".to_owned(),
            segment: None,
            request: "POST /v1/vms/accounting%2Fbooks/restore".to_owned(),
            request_sha256: "00".repeat(32),
            reason: "restoring a VM of class production".to_owned(),
            grant: None,
            state,
            decided_by: None,
            created_at: Timestamp::from_millis(1_795_352_752_007),
            expires_at: Timestamp::from_millis(4_102_444_800_000),
        }
    }

    #[tokio::test]
    async fn what_is_over_is_listed_only_on_demand() {
        let expired = Approval { expires_at: Timestamp::default(), ..approval(ApprovalState::Pending) };
        assert_eq!(state(&expired), "expired");
        let page = Page {
            items: vec![approval(ApprovalState::Used), approval(ApprovalState::Pending), expired],
            next_cursor: None,
        };
        for (all, lines) in [(false, 2), (true, 4)] {
            let fake = Fake::new().answer("GET /v1/approvals", &page);
            run(&fake.session(), Verb::List { all, limit: None }).await.expect("listed");
            assert_eq!(fake.said().lines().count(), lines);
        }
    }

    #[tokio::test]
    async fn whoever_approves_is_told_what_comes_of_it() {
        let decided = approval(ApprovalState::Approved);
        let route = format!("POST /v1/approvals/{}/approve", decided.id);
        let fake = Fake::new().answer(&route, &decided);
        let which = Which { approval: decided.id.clone(), dry_run: DryRunArguments::default() };
        run(&fake.session(), Verb::Approve(which)).await.expect("approved");
        let expected = "approved: ada may make the same request again, once, until 2100-01-01 00:00:00Z\n";
        assert_eq!(fake.said(), expected);
    }

    #[tokio::test]
    async fn one_that_can_not_be_seen_is_not_found() {
        let fake =
            Fake::new().answer("GET /v1/approvals", &Page::<Approval> { items: vec![], next_cursor: None });
        let show = Verb::Show { approval: ApprovalId::from_entropy([2; 10]) };
        assert_eq!(run(&fake.session(), show).await.expect_err("none").code(), 4);
    }
}
