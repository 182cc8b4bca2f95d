//! Every route of the contract: mounted, shut to strangers and to users without roles, and written down once.

use std::collections::BTreeSet;

use axum::body::Body;
use berth_api::EndpointInfo;
use berth_api::manager::ENDPOINTS;
use berth_api::pki::Peer;
use berth_model::HostId;
use berth_model::access::Action;
use http::Request;

use super::support::{Fixture, Got};

/// The path of a route with things that are there.
fn path_of(endpoint: &EndpointInfo) -> String {
    endpoint
        .path
        .replace("{vm}", "default%2Fbooks")
        .replace("{snapshot}", "first")
        .replace("{host}", "host-1")
        .replace("{segment}", "default")
        .replace("{image}", "debian")
        .replace("{role}", "disk")
        .replace("{operation}", "op-0000000000000000")
        .replace("{user}", "nobody")
        .replace("{token}", "token-0000000000000000")
        .replace("{team}", "administrators")
        .replace("{role_name}", "helpers")
        .replace("{grant}", "g-0000000000000000")
        .replace("{policy}", "night")
        .replace("{approval}", "apr-0000000000000000")
        .replace("{schedule}", "default%2Fnightly")
        .replace("{repository}", "offsite")
        .replace("{login}", "none")
        .replace("{provider}", "none")
        .replace("{session}", "token-0000000000000000")
}

/// A body that says enough for the route to find out what it is about.
fn body_of(endpoint: &EndpointInfo) -> &'static str {
    match endpoint.name {
        "VmCreate" => r#"{"segment":"default","name":"new","image":"debian"}"#,
        "SnapshotClone" => r#"{"name":"new"}"#,
        "SnapshotExport" => r#"{"repository":"offsite"}"#,
        "SnapshotImport" => r#"{"backup":"00","name":"new","segment":"default"}"#,
        "RepositoryCreate" => r#"{"name":"new","url":"/srv/x","keys":{"password":"x"}}"#,
        "ImageCreate" => r#"{"name":"new","parts":[]}"#,
        "RoleCreate" | "TeamCreate" => r#"{"name":"new"}"#,
        "PolicyCreate" => r#"{"name":"new","text":"x"}"#,
        "GrantCreate" => r#"{"user":"nobody","role":"viewer","segment":"default"}"#,
        "GrantRequest" => r#"{"role":"viewer","segment":"default","for_s":60}"#,
        "ScheduleCreate" => r#"{"name":"new","segment":"default","cron":"0 2 * * *","keep":{"daily":7}}"#,
        "SegmentCreate" | "UserCreate" => r#"{"name":"new"}"#,
        "TokenCreate" => r#"{"user":"nobody"}"#,
        "HostEnrol" => r#"{"token":"x","name":"new","address":"192.0.2.1:1","csr_pem":"x"}"#,
        "LoginBegin" => r#"{"user":"nobody","password":"wrong"}"#,
        "OwnPasswordChange" => r#"{"old_password":"x","new_password":"y"}"#,
        "OwnTotpConfirm" | "OwnTotpRemove" => r#"{"code":"000000"}"#,
        "UserIdentityLink" => r#"{"source":"none","subject":"x"}"#,
        "CertificateRenew" => r#"{"csr_pem":"x"}"#,
        _ => "",
    }
}

async fn ask(fixture: &Fixture, endpoint: &EndpointInfo, token: Option<&str>) -> Got {
    fixture.call(endpoint.method, &path_of(endpoint), token, body_of(endpoint)).await
}

#[tokio::test]
async fn every_route_of_the_contract_is_mounted_and_no_other() {
    let fixture = Fixture::new().await;
    let gate = std::sync::Arc::clone(fixture.manager.gate());
    let door = crate::http::mount(crate::door::Door::new(gate));
    let contract: BTreeSet<&str> = ENDPOINTS.iter().map(|endpoint| endpoint.name).collect();
    assert_eq!(*door.mounted(), contract);
}

#[tokio::test]
async fn every_route_is_shut_to_strangers_and_writes_them_down() {
    let fixture = Fixture::new().await;
    for endpoint in ENDPOINTS {
        // A new minute for each, because a flood of strangers is not all written down.
        fixture.clock.advance(std::time::Duration::from_secs(61));
        let before = fixture.audit().await.len();
        let got = ask(&fixture, endpoint, None).await;
        let expected = match (endpoint.action, endpoint.name) {
            (Action::Public, _) | (_, "LoginShow") => 200,
            // Strangers log in; there is no such provider.
            (_, "OidcBegin" | "OidcDevice") => 404,
            _ => 401,
        };
        assert_eq!(got.status.as_u16(), expected, "{} {}: {}", endpoint.method, endpoint.path, got.json());
        let records = fixture.audit().await;
        assert_eq!(records.len(), before + 1, "{} left exactly one record", endpoint.name);
        let record = records.last().expect("one");
        assert_eq!(record.status, Some(expected), "{}", endpoint.name);
        assert!(record.finished_at.is_some() && record.action == endpoint.action.as_str(), "{record:?}");
        let is_let_through = matches!(endpoint.action, Action::Public | Action::Login);
        assert_eq!(record.decision, if is_let_through { "allow" } else { "deny" });
    }
}

#[tokio::test]
async fn every_route_is_shut_to_a_user_without_roles_and_writes_it_down() {
    let fixture = Fixture::new().await;
    for endpoint in ENDPOINTS {
        let before = fixture.audit().await.len();
        if endpoint.name == "Logout" {
            // It would end the session that the others are asked with; it has tests of its own.
            continue;
        }
        let got = ask(&fixture, endpoint, Some(&fixture.nobody)).await;
        let expected = match endpoint.action {
            // What everybody may: also the lists, which are filtered, and one's own tokens.
            Action::Public
            | Action::SelfView
            | Action::SelfChange
            | Action::TokenCreate
            | Action::GrantRequest => continue_with_anything(&got),
            _ if endpoint.name.ends_with("List") && got.status == 200 => {
                let seen = got.json()["items"].as_array().map_or(0, Vec::len);
                assert_eq!(seen, seen_by_anybody(endpoint.name), "{}: {}", endpoint.name, got.json());
                200
            }
            // An image for all is seen by all.
            _ if endpoint.name == "ImageShow" => 200,
            // A user's token is not what admits a machine.
            Action::Enrol => 401,
            _ => 403,
        };
        assert_eq!(got.status.as_u16(), expected, "{} {}: {}", endpoint.method, endpoint.path, got.json());
        let records = fixture.audit().await;
        assert_eq!(records.len(), before + 1, "{} left exactly one record", endpoint.name);
        let record = records.last().expect("one");
        assert_eq!(record.status, Some(expected));
        assert!(record.finished_at.is_some(), "{record:?}");
        if expected == 403 {
            assert_eq!(
                (record.actor.as_str(), record.decision.as_str()),
                ("nobody", "deny"),
                "{}",
                endpoint.name
            );
        }
    }
}

/// How much a user without grants sees in a list: what is for all, and what is its own.
fn seen_by_anybody(name: &str) -> usize {
    match name {
        // The image for all; its own session; the wish that it made itself.
        "ImageList" | "TokenList" | "ApprovalList" | "UserList" => 1,
        "RoleList" => berth_model::access::BUILT_IN_ROLES.len(),
        _ => 0,
    }
}

fn continue_with_anything(got: &Got) -> u16 {
    got.status.as_u16()
}

#[tokio::test]
async fn no_user_route_takes_a_hosts_certificate() {
    let fixture = Fixture::new().await;
    let host = HostId::from_entropy([1; 10]);
    for endpoint in ENDPOINTS {
        if matches!(endpoint.action, Action::Public | Action::Enrol | Action::CertificateRenew) {
            continue;
        }
        let request = Request::builder().method(endpoint.method).uri(path_of(endpoint));
        let request = request.body(Body::from(body_of(endpoint))).expect("a request");
        let got = fixture.send(request, Peer::Host(host.clone())).await;
        assert_eq!(got.status.as_u16(), 403, "{} {}: {}", endpoint.method, endpoint.path, got.json());
    }
}

#[tokio::test]
async fn what_is_about_a_thing_is_decided_about_that_thing() {
    let fixture = Fixture::new().await;
    for endpoint in ENDPOINTS {
        let noun = [
            "{vm}/snapshots/{snapshot}",
            "{vm}",
            "{host}",
            "{segment}",
            "{image}",
            "{operation}",
            "{user}",
            "{token}",
            "{team}",
            "{role_name}",
            "{grant}",
            "{policy}",
            "{approval}",
            "{schedule}",
        ]
        .into_iter()
        .find(|part| endpoint.path.contains(part));
        let Some(noun) = noun else { continue };
        let noun = match (noun, endpoint.name) {
            ("{vm}/snapshots/{snapshot}", _) | (_, "VmRestore") => "snapshot",
            ("{role_name}", _) => "role",
            _ => noun.trim_matches(['{', '}']),
        };
        ask(&fixture, endpoint, Some(&fixture.nobody)).await;
        let records = fixture.audit().await;
        let resource = &records.last().expect("one").resources[0];
        assert!(resource.starts_with(&format!("{noun}:")), "{} was decided about {resource}", endpoint.name);
    }
}

#[tokio::test]
async fn what_is_not_there_and_what_may_not_be_touched_get_the_same_answer() {
    let fixture = Fixture::new().await;
    for (there, absent) in [
        ("/v1/vms/default%2Fbooks", "/v1/vms/default%2Fghost"),
        ("/v1/vms/default%2Fbooks/snapshots", "/v1/vms/nowhere%2Fbooks/snapshots"),
        ("/v1/hosts/host-1", "/v1/hosts/host-9"),
        (
            "/v1/can-i?action=vm.view&resource=default/books",
            "/v1/can-i?action=vm.view&resource=default/ghost",
        ),
        ("/v1/can-i?action=host.view&resource=host-1", "/v1/can-i?action=host.view&resource=host-9"),
    ] {
        let mut answers = Vec::new();
        for path in [there, absent] {
            let got = fixture.call("GET", path, Some(&fixture.nobody), "").await;
            let mut json = got.json();
            if let Some(fields) = json.as_object_mut() {
                fields.remove("request_id");
            }
            answers.push((got.status, json));
        }
        assert_eq!(answers[0], answers[1], "{there}");
    }
    let body = |image: &str| format!(r#"{{"segment":"default","name":"x","image":"{image}"}}"#);
    let there = fixture.call("POST", "/v1/vms", Some(&fixture.nobody), &body("debian")).await;
    let absent = fixture.call("POST", "/v1/vms", Some(&fixture.nobody), &body("windows")).await;
    assert_eq!(there.problem(), absent.problem());
}
