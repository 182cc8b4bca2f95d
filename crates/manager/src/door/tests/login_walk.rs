//! The walk of a login: what is taken at which step, from where, how often, and what it tells to whom.

use std::time::Duration;

use axum::body::Body;
use berth_api::pki::Peer;
use berth_api::serve::Caller;
use http::Request;
use http::header::AUTHORIZATION;
use serde_json::{Value, json};

use super::support::{Fixture, Got, answer_to};
use crate::auth::totp::app_code;
use crate::clock::Clock;

pub const HOME: [u8; 4] = [192, 0, 2, 1];
pub const AWAY: [u8; 4] = [198, 51, 100, 7];
/// What users of these tests choose.
pub const CHOSEN: &str = "chosen by the user";

/// Asks from an address.
pub async fn from(
    fixture: &Fixture,
    address: [u8; 4],
    method: &str,
    path: &str,
    token: Option<&str>,
    body: Value,
) -> Got {
    let mut request = Request::builder().method(method).uri(path);
    if let Some(token) = token {
        request = request.header(AUTHORIZATION, format!("Bearer {token}"));
    }
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let caller = Caller { remote: (address, 40000).into(), peer: Peer::Anonymous };
    answer_to(fixture.router.clone(), request.body(Body::from(body)).expect("a request"), caller).await
}

pub async fn login(fixture: &Fixture, address: [u8; 4], user: &str, password: &str) -> Got {
    let body = json!({"user": user, "password": password});
    from(fixture, address, "POST", "/v1/login", None, body).await
}

pub async fn go_on(fixture: &Fixture, address: [u8; 4], walk: &str, body: Value) -> Got {
    from(fixture, address, "POST", &format!("/v1/login/{walk}"), None, body).await
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}

/// A user whom an administrator has given a first password: the password.
pub async fn make(fixture: &Fixture, name: &str) -> String {
    let made = fixture.admin("POST", "/v1/users", json!({"name": name})).await;
    assert_eq!(made.status, 200, "{}", made.json());
    let given = fixture.admin("POST", &format!("/v1/users/{name}/password"), json!({})).await;
    assert_eq!(given.status, 200, "{}", given.json());
    text(&given.json()["password"])
}

/// A user who has logged in once and chosen a password: the session's secret.
pub async fn settle(fixture: &Fixture, name: &str) -> String {
    let first = make(fixture, name).await;
    let walk = text(&login(fixture, HOME, name, &first).await.json()["login"]);
    let done = go_on(fixture, HOME, &walk, json!({"new_password": CHOSEN})).await;
    assert_eq!(done.status, 200, "{}", done.json());
    text(&done.json()["session"]["secret"])
}

/// The same with a second factor: the session's secret, the factor's secret, and the recovery codes.
pub async fn settle_with_codes(fixture: &Fixture, name: &str) -> (String, String, Vec<String>) {
    let session = settle(fixture, name).await;
    let own = |path: &'static str, body: Value| from(fixture, HOME, "POST", path, Some(&session), body);
    let secret = text(&own("/v1/self/totp", json!({})).await.json()["secret"]);
    let code = app_code(&secret, fixture.clock.now());
    let confirmed = own("/v1/self/totp/confirm", json!({"code": code})).await;
    assert_eq!(confirmed.status, 200, "{}", confirmed.json());
    let codes = confirmed.json()["recovery_codes"].as_array().expect("codes").iter().map(text).collect();
    fixture.clock.advance(Duration::from_secs(60));
    (session, secret, codes)
}

fn code(got: &Got) -> (u16, String) {
    (got.status.as_u16(), got.problem().0)
}

/// The answer without what differs in every answer.
fn plain(got: &Got) -> Value {
    let mut json = got.json();
    json["request_id"] = Value::Null;
    json
}

#[tokio::test]
async fn the_first_password_is_good_for_choosing_another_and_for_nothing_else() {
    let fixture = Fixture::new().await;
    let first = make(&fixture, "ada").await;
    let begun = login(&fixture, HOME, "ada", &first).await.json();
    assert_eq!(
        (begun["needs"].as_str(), begun["session"].is_null()),
        (Some("new-password"), true),
        "{begun}"
    );
    let walk = text(&begun["login"]);
    for bad in ["short", &first, "ada", "adaadaadaada"] {
        let got = go_on(&fixture, HOME, &walk, json!({"new_password": bad})).await;
        assert_eq!((got.status.as_u16(), got.problem().1.as_str()), (400, "new_password"), "{}", got.json());
        assert!(!got.json().to_string().contains(&first));
    }
    let done = go_on(&fixture, HOME, &walk, json!({"new_password": CHOSEN})).await.json();
    let secret = text(&done["session"]["secret"]);
    let me = from(&fixture, HOME, "GET", "/v1/whoami", Some(&secret), json!(null)).await.json();
    assert_eq!((me["user"].as_str(), me["method"].as_str()), (Some("ada"), Some("password")), "{me}");
    assert_eq!(code(&login(&fixture, HOME, "ada", &first).await).0, 401, "the first one is good no more");
    let again = login(&fixture, HOME, "ada", CHOSEN).await.json();
    assert!(again["session"]["secret"].is_string() && again["needs"].is_null(), "{again}");
}

#[tokio::test]
async fn whatever_is_wrong_with_a_name_or_a_password_gets_one_answer() {
    let fixture = Fixture::new().await;
    settle(&fixture, "ada").await;
    settle(&fixture, "shut").await;
    fixture.admin("POST", "/v1/users/shut/disable", json!(null)).await;
    let mut answers = Vec::new();
    for (user, password) in [
        ("ada", "wrong password"),
        ("ada", ""),
        ("ada", &"x".repeat(5000)),
        ("shut", CHOSEN),
        ("nobody", "has no password"),
        ("ghost", CHOSEN),
        ("Ada", CHOSEN),
        ("ada ", CHOSEN),
        ("аda", CHOSEN),
        ("", CHOSEN),
        ("admin", CHOSEN),
    ] {
        let got = login(&fixture, HOME, user, password).await;
        assert_eq!(got.status, 401, "{user}");
        answers.push(plain(&got));
    }
    answers.dedup();
    assert_eq!(answers.len(), 1, "{answers:#?}");
}

#[tokio::test]
async fn no_step_can_be_left_out_done_twice_or_done_from_elsewhere() {
    let fixture = Fixture::new().await;
    let (_, secret, _) = settle_with_codes(&fixture, "ada").await;
    let walk = text(&login(&fixture, HOME, "ada", CHOSEN).await.json()["login"]);
    let totp = || app_code(&secret, fixture.clock.now());
    for wrong in [
        json!({}),
        json!({"new_password": "another password"}),
        json!({"totp": totp(), "new_password": "another password"}),
        json!({"totp": totp(), "recovery": "x"}),
    ] {
        assert_eq!(code(&go_on(&fixture, HOME, &walk, wrong.clone()).await).0, 400, "{wrong}");
    }
    let unknown = json!({"totp": totp(), "step": "done"});
    assert_eq!(code(&go_on(&fixture, HOME, &walk, unknown).await).0, 400);
    let away = go_on(&fixture, AWAY, &walk, json!({"totp": totp()})).await;
    let invented = go_on(&fixture, HOME, "invented", json!({"totp": totp()})).await;
    assert_eq!((away.status.as_u16(), plain(&away)), (401, plain(&invented)), "as if there were none");
    let done = go_on(&fixture, HOME, &walk, json!({"totp": totp()})).await.json();
    assert_eq!(done["session"]["session"]["second_factor"], json!(true), "{done}");
    let twice = go_on(&fixture, HOME, &walk, json!({"totp": totp()})).await;
    assert_eq!(plain(&twice), plain(&invented), "it is over");
}

#[tokio::test]
async fn a_walk_of_one_user_is_no_way_in_for_another() {
    let fixture = Fixture::new().await;
    let (_, adas, _) = settle_with_codes(&fixture, "ada").await;
    let (_, bobs, _) = settle_with_codes(&fixture, "bob").await;
    let walk_of_ada = text(&login(&fixture, HOME, "ada", CHOSEN).await.json()["login"]);
    let walk_of_bob = text(&login(&fixture, HOME, "bob", CHOSEN).await.json()["login"]);
    let now = fixture.clock.now();
    let crossed = go_on(&fixture, HOME, &walk_of_ada, json!({"totp": app_code(&bobs, now)})).await;
    assert_eq!(crossed.status, 401);
    let done = go_on(&fixture, HOME, &walk_of_bob, json!({"totp": app_code(&bobs, now)})).await.json();
    assert_eq!(done["session"]["session"]["user_name"], json!("bob"), "{done}");
    let done = go_on(&fixture, HOME, &walk_of_ada, json!({"totp": app_code(&adas, now)})).await.json();
    assert_eq!(done["session"]["session"]["user_name"], json!("ada"), "{done}");
}

#[tokio::test]
async fn a_code_is_good_once_whoever_is_at_it() {
    let fixture = Fixture::new().await;
    let (_, secret, _) = settle_with_codes(&fixture, "ada").await;
    let one = text(&login(&fixture, HOME, "ada", CHOSEN).await.json()["login"]);
    let other = text(&login(&fixture, HOME, "ada", CHOSEN).await.json()["login"]);
    let body = json!({"totp": app_code(&secret, fixture.clock.now())});
    let answers = tokio::join!(
        go_on(&fixture, HOME, &one, body.clone()),
        go_on(&fixture, HOME, &one, body.clone()),
        go_on(&fixture, HOME, &other, body.clone()),
    );
    let good = [answers.0.status, answers.1.status, answers.2.status];
    assert_eq!(good.iter().filter(|status| status.is_success()).count(), 1, "{good:?}");
}

#[tokio::test]
async fn codes_can_not_be_guessed_in_one_walk_nor_in_many() {
    let fixture = Fixture::new().await;
    let (_, secret, _) = settle_with_codes(&fixture, "ada").await;
    let mut guesses = 0;
    for _ in 0..20 {
        let begun = login(&fixture, AWAY, "ada", CHOSEN).await;
        if begun.status != 200 {
            break;
        }
        let walk = text(&begun.json()["login"]);
        while go_on(&fixture, AWAY, &walk, json!({"totp": "000000"})).await.json()["message"]
            .as_str()
            .is_some_and(|message| message.starts_with("the code"))
        {
            guesses += 1;
        }
    }
    assert!(guesses <= 10, "{guesses} guesses from one address without a wait");
    let right = app_code(&secret, fixture.clock.now());
    let walk = login(&fixture, HOME, "ada", CHOSEN).await.json();
    let done = go_on(&fixture, HOME, &text(&walk["login"]), json!({"totp": right})).await;
    assert_eq!(done.status, 200, "and its user gets in as ever, from where it always does: {}", done.json());
}

#[tokio::test]
async fn a_recovery_code_stands_in_once() {
    let fixture = Fixture::new().await;
    let (_, _, codes) = settle_with_codes(&fixture, "ada").await;
    for (expected, code) in [(200, &codes[0]), (401, &codes[0]), (200, &codes[1])] {
        let walk = text(&login(&fixture, HOME, "ada", CHOSEN).await.json()["login"]);
        let got = go_on(&fixture, HOME, &walk, json!({"recovery": code})).await;
        assert_eq!(got.status.as_u16(), expected, "{}", got.json());
    }
    let shown = fixture.get("/v1/users/ada/login").await.json();
    assert_eq!(shown["recovery_codes_left"], json!(8), "{shown}");
}

#[tokio::test]
async fn a_locked_account_says_nothing_and_lets_its_user_in_from_where_it_always_does() {
    let fixture = Fixture::new().await;
    settle(&fixture, "ada").await;
    let mut last = Value::Null;
    for _ in 0..10 {
        last = plain(&login(&fixture, AWAY, "ada", "wrong password").await);
    }
    let right = login(&fixture, AWAY, "ada", CHOSEN).await;
    assert_eq!(
        (right.status.as_u16(), plain(&right)),
        (401, last),
        "the right password, as if it were wrong"
    );
    assert_eq!(login(&fixture, HOME, "ada", CHOSEN).await.status, 200, "at home");
    fixture.clock.advance(Duration::from_secs(16 * 60));
    assert_eq!(login(&fixture, AWAY, "ada", CHOSEN).await.status, 200, "and there again after the wait");
}

#[tokio::test]
async fn a_restart_forgives_nobody() {
    let fixture = Fixture::new().await;
    settle(&fixture, "ada").await;
    for _ in 0..10 {
        login(&fixture, AWAY, "ada", "wrong password").await;
    }
    let user = crate::door::target::user(fixture.cluster(), "ada").expect("ada").value.id.clone();
    fixture.cluster().logins.lockout.save(&fixture.cluster().records, &user).await.expect("saved");
    let records = crate::records::Records::open(fixture.store.clone()).await.expect("records");
    let fresh = crate::auth::lockout::Lockout::default();
    let attempt = fresh.attempt(&records, Some(&user), AWAY.into(), fixture.clock.now());
    assert_eq!(attempt, crate::auth::lockout::Attempt::AccountHeld);
}

#[tokio::test]
async fn a_walk_is_over_after_a_while_and_when_its_user_is_disabled() {
    let fixture = Fixture::new().await;
    let (_, secret, _) = settle_with_codes(&fixture, "ada").await;
    let walk = text(&login(&fixture, HOME, "ada", CHOSEN).await.json()["login"]);
    fixture.clock.advance(Duration::from_secs(301));
    let body = json!({"totp": app_code(&secret, fixture.clock.now())});
    assert_eq!(go_on(&fixture, HOME, &walk, body).await.status, 401);
    let walk = text(&login(&fixture, HOME, "ada", CHOSEN).await.json()["login"]);
    fixture.admin("POST", "/v1/users/ada/disable", json!(null)).await;
    let body = json!({"totp": app_code(&secret, fixture.clock.now())});
    assert_eq!(go_on(&fixture, HOME, &walk, body).await.status, 401);

    let first = make(&fixture, "bob").await;
    let walk = text(&login(&fixture, HOME, "bob", &first).await.json()["login"]);
    fixture.admin("POST", "/v1/users/bob/password", json!({})).await;
    let late = go_on(&fixture, HOME, &walk, json!({"new_password": CHOSEN})).await;
    assert_eq!(late.status, 401, "an administrator has given another first password: {}", late.json());
}
