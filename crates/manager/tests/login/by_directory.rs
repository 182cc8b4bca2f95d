//! Through OpenLDAP.

use serde_json::{Value, json};

use super::directory::Slapd;
use super::support::World;

fn as_user(name: &str, password: &str) -> Value {
    json!({"user": name, "password": password, "directory": "office"})
}

async fn world(slapd: &Slapd, more: &str) -> World {
    let url = format!("ldaps://localhost:{}", slapd.ldaps_port);
    World::new(0, &slapd.table(&url, more)).await
}

fn groups(user: &Value) -> Vec<String> {
    let groups = user["external_groups"].as_array().cloned().unwrap_or_default();
    groups.iter().map(|group| group["group"].as_str().unwrap_or_default().to_owned()).collect()
}

#[tokio::test]
async fn a_user_of_the_directory_logs_in_and_brings_its_nested_groups() {
    let slapd = Slapd::start();
    let start_tls = format!("ldap://localhost:{}", slapd.ldap_port);
    for world in [
        world(&slapd, "create_users = true").await,
        World::new(0, &slapd.table(&start_tls, "start_tls = true\ncreate_users = true")).await,
    ] {
        let got = world.login(as_user("ada", "password of ada")).await;
        assert_eq!(got.status, 200, "{}", got.json());
        let me = world.whoami(&got.json()).await;
        assert_eq!((me["user"].as_str(), me["method"].as_str()), (Some("ada"), Some("ldap:office")), "{me}");
        let expected =
            ["everybody", "ops", "staff"].map(|name| format!("cn={name},ou=groups,dc=example,dc=org"));
        assert_eq!(groups(&world.user("ada").await), expected, "in a circle, and case does not count");
        let again = world.login(as_user("ADA", "password of ada")).await;
        assert_eq!(world.whoami(&again.json()).await["id"], me["id"], "the same user, however it is written");
    }
}

#[tokio::test]
async fn whatever_is_wrong_gets_one_answer_and_nobody_gets_in_without_a_password() {
    let slapd = Slapd::start();
    let world = world(&slapd, "create_users = true").await;
    let mut answers = Vec::new();
    for (name, password) in [
        ("ada", "password of bob"),
        ("ada", ""),
        ("nobody", "password of ada"),
        ("nobody", ""),
        ("shut", "password of shut"),
        ("twin", "password of twin"),
        ("*", "password of ada"),
        ("ad*", "password of ada"),
        ("ada)(uid=*", "password of ada"),
        ("ada)(|(uid=*", "password of bob"),
        ("", "password of ada"),
        ("\u{0}", "x"),
        ("uid=ada,ou=people,dc=example,dc=org", "password of ada"),
    ] {
        let got = world.login(as_user(name, password)).await;
        let mut json = got.json();
        json["request_id"] = json!(null);
        assert_eq!(got.status, 401, "{name}: {json}");
        answers.push(json);
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:#?}");
}

#[tokio::test]
async fn a_group_called_admin_means_nothing() {
    let slapd = Slapd::start();
    let world = world(&slapd, "create_users = true").await;
    let got = world.login(as_user("bob", "password of bob")).await.json();
    assert_eq!(groups(&world.user("bob").await), ["cn=admin,ou=groups,dc=example,dc=org"]);
    let secret = got["session"]["secret"].as_str().expect("a session").to_owned();
    let refused = world.ask("GET", "/v1/can-i?action=user.manage", Some(&secret), json!(null)).await.json();
    assert_eq!(refused["allowed"], json!(false), "{refused}");
    let team = json!({"name": "ops", "external_groups": [
        {"provider": "office", "group": "cn=admin,ou=groups,dc=example,dc=org"}
    ]});
    world.admin("POST", "/v1/teams", team).await;
    world.admin("POST", "/v1/grants", json!({"team": "ops", "role": "admin"})).await;
    let allowed = world.ask("GET", "/v1/can-i?action=user.manage", Some(&secret), json!(null)).await.json();
    assert_eq!(allowed["allowed"], json!(true), "what an administrator wrote on a team counts: {allowed}");
}

#[tokio::test]
async fn more_or_deeper_groups_than_was_set_are_no_login() {
    let slapd = Slapd::start();
    let world = world(&slapd, "create_users = true\ngroups_max = 5").await;
    for name in ["deep", "wide"] {
        let got = world.login(as_user(name, &format!("password of {name}"))).await;
        assert_eq!(
            (got.status.as_u16(), got.json()["session"].is_null()),
            (503, true),
            "{name}: {}",
            got.json()
        );
    }
}

#[tokio::test]
async fn a_name_that_somebody_here_has_is_not_taken_over_until_an_administrator_says_so() {
    let slapd = Slapd::start();
    let world = world(&slapd, "create_users = true").await;
    let got = world.login(as_user("admin", "password of admin")).await;
    let message = got.json()["message"].as_str().unwrap_or_default().to_owned();
    assert_eq!(got.status, 403, "{message}");
    let subject =
        message.split("--subject ").nth(1).and_then(|rest| rest.split('\'').next()).expect("a subject");
    let link = json!({"source": "office", "subject": subject});
    world.admin("POST", "/v1/users/admin/identities", link.clone()).await;
    let me = world.whoami(&world.login(as_user("admin", "password of admin")).await.json()).await;
    assert_eq!(me["user"], json!("admin"));
    world.admin("POST", "/v1/users", json!({"name": "other"})).await;
    let shown = world.admin("GET", "/v1/users/admin/login", json!(null)).await;
    assert_eq!(shown["identities"][0]["subject"], json!(subject), "{shown}");
}

#[tokio::test]
async fn users_are_not_made_unless_that_was_set_and_a_disabled_one_stays_out() {
    let slapd = Slapd::start();
    let closed = world(&slapd, "").await;
    assert_eq!(closed.login(as_user("ada", "password of ada")).await.status, 403);
    let open = world(&slapd, "create_users = true").await;
    let session = open.login(as_user("ada", "password of ada")).await.json();
    open.admin("POST", "/v1/users/ada/disable", json!(null)).await;
    let secret = session["session"]["secret"].as_str().expect("a session");
    assert_eq!(open.ask("GET", "/v1/whoami", Some(secret), json!(null)).await.status, 401);
    assert_eq!(open.login(as_user("ada", "password of ada")).await.status, 401);
}

#[tokio::test]
async fn a_directory_with_another_certificate_is_not_told_a_password() {
    let (slapd, other) = (Slapd::start(), super::support::Authority::new());
    let url = format!("ldaps://localhost:{}", slapd.ldaps_port);
    let own = slapd.authority.path("ca.pem").display().to_string();
    let table =
        slapd.table(&url, "create_users = true").replace(&own, &other.path("ca.pem").display().to_string());
    let world = World::new(0, &table).await;
    let got = world.login(as_user("ada", "password of ada")).await;
    assert_eq!(got.status, 503, "{}", got.json());
}
