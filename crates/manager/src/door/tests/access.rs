//! The golden matrix: who may do what to what, printed from the policies.
//!
//! `BERTH_BLESS=1` writes it anew; the difference is then for a person to read. Each role is granted in one segment:
//! things are asked about in it, in a segment inside it, in a foreign one, and in the cluster.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::PathBuf;

use berth_api::manager::{Segment, TokenKind, User};
use berth_model::access::{Action, BUILT_IN_ROLES};
use berth_model::{HostId, SegmentId, TokenId};

use super::support::{Fixture, NOW, add_user, grant_of};
use crate::auth::{Principal, UserPrincipal};
use crate::door::target::segment_resource;
use crate::policy::{Policies, Resource, ResourceKind};
use crate::records::Transaction;

pub fn principal_of(user: &User) -> Principal {
    Principal::User(UserPrincipal {
        id: user.id.clone(),
        name: user.name.clone(),
        token: TokenId::from_entropy([2; 10]),
        kind: TokenKind::Session,
        method: "password".to_owned(),
        second_factor: false,
        scope: None,
    })
}

struct Places {
    own: Segment,
    nested: Segment,
    foreign: Segment,
}

async fn places(fixture: &Fixture) -> Places {
    let segment = |number: u8, name: &str, parent: Option<&Segment>| Segment {
        id: SegmentId::from_entropy([number; 10]),
        name: name.parse().expect("a name"),
        parent: parent.map(|parent| parent.id.clone()),
        quota: berth_api::manager::Quota::default(),
        created_at: NOW,
    };
    let own = segment(1, "own", None);
    let places =
        Places { nested: segment(2, "nested", Some(&own)), foreign: segment(3, "foreign", None), own };
    let mut transaction = Transaction::new();
    for segment in [&places.own, &places.nested, &places.foreign] {
        transaction.create(segment);
    }
    fixture.cluster().records.commit(transaction).await.expect("recorded");
    places
}

/// One user for each role, granted in the own segment; and one with none.
async fn principals(fixture: &Fixture, places: &Places) -> Vec<(String, Principal)> {
    let cluster = fixture.cluster();
    let mut all = Vec::new();
    for role in BUILT_IN_ROLES.iter().map(|role| role.name).chain(["nothing"]) {
        let name = format!("a-{role}");
        add_user(cluster, &name, &[]).await;
        let row = crate::door::target::user(cluster, &name).expect("just made");
        let mut transaction = Transaction::new();
        if role != "nothing" {
            transaction.create(&grant_of(cluster, &row, role, Some(&places.own)));
        }
        cluster.records.commit(transaction).await.expect("recorded");
        all.push((role.to_owned(), principal_of(&row)));
    }
    let root = crate::door::target::user(cluster, "admin").expect("the first administrator");
    all.push(("everywhere".to_owned(), principal_of(&root)));
    all.push(("agent".to_owned(), Principal::Host(HostId::from_entropy([9; 10]))));
    all.push(("join-token".to_owned(), Principal::JoinToken("hash".to_owned())));
    all.push(("anonymous".to_owned(), Principal::Anonymous));
    all
}

fn resources(fixture: &Fixture, places: &Places) -> Vec<(ResourceKind, String, Resource)> {
    let cluster = fixture.cluster();
    let mut all = Vec::new();
    for &kind in ResourceKind::ALL {
        let inside = [("own", &places.own), ("nested", &places.nested), ("foreign", &places.foreign)];
        for (place, segment) in inside {
            let around = segment_resource(cluster, &segment.id);
            let resource = match kind {
                ResourceKind::Segment => around,
                ResourceKind::Snapshot => Resource::inside(
                    Resource::inside(around, ResourceKind::Vm, "vm", "vm"),
                    kind,
                    "thing",
                    "thing",
                ),
                ResourceKind::Vm
                | ResourceKind::Image
                | ResourceKind::Operation
                | ResourceKind::Grant
                | ResourceKind::Approval => Resource::inside(around, kind, "thing", "thing"),
                _ => continue,
            };
            all.push((kind, place.to_owned(), resource));
        }
        all.push((kind, "-".to_owned(), Resource::absent(kind, "any")));
    }
    let host = HostId::from_entropy([9; 10]);
    let itself = Resource::of_cluster(ResourceKind::Host, host.as_str(), "itself");
    all.push((ResourceKind::Host, "itself".to_owned(), itself));
    all
}

fn matrix(
    policies: &Policies,
    principals: &[(String, Principal)],
    things: &[(ResourceKind, String, Resource)],
) -> String {
    let mut text = format!("{:<20}{:<11}{:<9}", "action", "resource", "where");
    for (name, _) in principals {
        let _ = write!(text, "{name:<18}");
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    for action in Action::ALL {
        for (kind, place, resource) in things {
            let can_ask = |principal: &Principal| policies.engine().can_be_asked(principal, *action, *kind);
            if !principals.iter().any(|(_, principal)| can_ask(principal)) {
                continue;
            }
            let _ = write!(text, "{:<20}{:<11}{place:<9}", action.as_str(), kind.noun());
            for (_, principal) in principals {
                let allowed = policies.look(principal, *action, resource, false).allowed;
                let word = match (allowed, can_ask(principal)) {
                    (true, _) => "allow",
                    (false, true) => "deny",
                    (false, false) => "-",
                };
                let _ = write!(text, "{word:<18}");
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
    }
    text
}

#[tokio::test]
async fn the_policies_say_what_the_golden_matrix_says() {
    let fixture = Fixture::new().await;
    let places = places(&fixture).await;
    let principals = principals(&fixture, &places).await;
    let things = resources(&fixture, &places);
    let text = matrix(&fixture.manager.gate().policies, &principals, &things);
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/access.txt");
    if std::env::var_os("BERTH_BLESS").is_some() {
        std::fs::write(&path, &text).expect("written");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, golden, "who may do what has changed: read it, then run with BERTH_BLESS=1");
    let asked: BTreeSet<&str> =
        text.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    let all: BTreeSet<&str> = Action::ALL.iter().map(|action| action.as_str()).collect();
    assert_eq!(asked, all, "every action can be asked about something");
}
