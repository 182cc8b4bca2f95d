//! The golden matrix: who may do what to what, printed from the policies.
//!
//! `BERTH_BLESS=1` writes it anew; the difference is then for a person to read.

use std::fmt::Write as _;
use std::path::PathBuf;

use berth_model::access::Action;
use berth_model::{HostId, TokenId, UserId};

use crate::auth::{Principal, UserPrincipal};
use crate::policy::{Policies, Resource, ResourceKind};

fn user(role: Option<&str>) -> Principal {
    Principal::User(UserPrincipal {
        id: UserId::from_entropy([1; 10]),
        name: "somebody".parse().expect("a name"),
        roles: role.map(str::to_owned).into_iter().collect(),
        token: TokenId::from_entropy([2; 10]),
    })
}

fn matrix(policies: &Policies) -> String {
    let host = HostId::from_entropy([9; 10]);
    let principals = [
        ("admin", user(Some("admin"))),
        ("none", user(None)),
        ("host", Principal::Host(host.clone())),
        ("join-token", Principal::JoinToken("hash".to_owned())),
        ("anonymous", Principal::Anonymous),
    ];
    let mut text = format!("{:<20}{:<12}", "action", "resource");
    for (name, _) in &principals {
        let _ = write!(text, "{name:<12}");
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    let own_host = Resource::of_cluster(ResourceKind::Host, host.as_str(), "own");
    let resources = ResourceKind::ALL
        .iter()
        .map(|&kind| (kind, kind.noun().to_owned(), Resource::absent(kind, "any")))
        .chain([(ResourceKind::Host, "host itself".to_owned(), own_host)]);
    let resources: Vec<_> = resources.collect();
    for action in Action::ALL {
        for (kind, noun, resource) in &resources {
            if !principals.iter().any(|(_, principal)| policies.can_be_asked(principal, *action, *kind)) {
                continue;
            }
            let _ = write!(text, "{:<20}{noun:<12}", action.as_str());
            for (_, principal) in &principals {
                let decision = policies.decide(principal, *action, resource);
                let word = match (decision.allowed, policies.can_be_asked(principal, *action, *kind)) {
                    (true, _) => "allow",
                    (false, true) => "deny",
                    (false, false) => "-",
                };
                let _ = write!(text, "{word:<12}");
            }
            text.truncate(text.trim_end().len());
            text.push('\n');
        }
    }
    text
}

#[test]
fn the_policies_say_what_the_golden_matrix_says() {
    let text = matrix(&Policies::built_in().expect("valid policies"));
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/access.txt");
    if std::env::var_os("BERTH_BLESS").is_some() {
        std::fs::write(&path, &text).expect("written");
    }
    let golden = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, golden, "who may do what has changed: read it, then run with BERTH_BLESS=1");
}

#[test]
fn every_action_can_be_asked_about_something() {
    let text = matrix(&Policies::built_in().expect("valid policies"));
    for action in Action::ALL {
        assert!(
            text.lines().any(|line| line.split_whitespace().next() == Some(action.as_str())),
            "{action:?}"
        );
    }
}
