//! Sessions, one's own password and second factor, and what administrators do about others'.

use std::time::Duration;

use berth_store::{Query, Store};
use serde_json::{Value, json};

use super::login_walk::{AWAY, CHOSEN, HOME, from, go_on, login, make, settle, settle_with_codes, text};
use super::support::{Fixture, Got, add_user};
use crate::auth::totp::app_code;
use crate::clock::Clock;

async fn whoami(fixture: &Fixture, token: &str) -> u16 {
    from(fixture, HOME, "GET", "/v1/whoami", Some(token), json!(null)).await.status.as_u16()
}

async fn own(fixture: &Fixture, token: &str, method: &str, path: &str, body: Value) -> Got {
    from(fixture, HOME, method, path, Some(token), body).await
}

#[tokio::test]
async fn a_session_ends_unused_after_its_idle_life_and_used_after_its_whole_life() {
    let fixture = Fixture::new().await;
    let (one, hour) = (settle(&fixture, "ada").await, Duration::from_secs(3600));
    for _ in 0..3 {
        fixture.clock.advance(hour * 7);
        assert_eq!(whoami(&fixture, &one).await, 200);
    }
    fixture.clock.advance(hour * 3);
    assert_eq!(whoami(&fixture, &one).await, 401, "a day, whatever happens");
    let other = text(&login(&fixture, HOME, "ada", CHOSEN).await.json()["session"]["secret"]);
    fixture.clock.advance(hour * 8 - Duration::from_secs(1));
    let list = own(&fixture, &other, "GET", "/v1/self/sessions", json!(null)).await.json();
    assert_eq!(list["items"].as_array().map(Vec::len), Some(1), "those that are over are not shown: {list}");
    fixture.clock.advance(hour * 8);
    assert_eq!(whoami(&fixture, &other).await, 401, "unused");
}

#[tokio::test]
async fn a_session_is_listed_revoked_and_logged_out() {
    let fixture = Fixture::new().await;
    let one = settle(&fixture, "ada").await;
    fixture.clock.advance(Duration::from_secs(1));
    let other = text(&login(&fixture, AWAY, "ada", CHOSEN).await.json()["session"]["secret"]);
    let strangers = settle(&fixture, "bob").await;
    let list = own(&fixture, &one, "GET", "/v1/self/sessions", json!(null)).await.json();
    let items = list["items"].as_array().expect("a list").clone();
    let facts = |item: &Value| (text(&item["address"]), item["is_this"] == json!(true));
    let expected = [("198.51.100.7".to_owned(), false), ("192.0.2.1".to_owned(), true)];
    assert_eq!(items.iter().map(facts).collect::<Vec<_>>(), expected, "{list}");
    let path = format!("/v1/self/sessions/{}", text(&items[0]["id"]));
    assert_eq!(own(&fixture, &strangers, "DELETE", &path, json!(null)).await.status, 404, "not another's");
    assert_eq!(own(&fixture, &one, "DELETE", &path, json!(null)).await.status, 200);
    assert_eq!((whoami(&fixture, &other).await, whoami(&fixture, &one).await), (401, 200));
    assert_eq!(own(&fixture, &one, "POST", "/v1/logout", json!(null)).await.status, 200);
    assert_eq!(whoami(&fixture, &one).await, 401);
}

#[tokio::test]
async fn a_new_password_needs_the_old_one_and_ends_the_other_sessions() {
    let fixture = Fixture::new().await;
    let one = settle(&fixture, "ada").await;
    let other = text(&login(&fixture, AWAY, "ada", CHOSEN).await.json()["session"]["secret"]);
    let wish = |old: &str, new: &str| json!({"old_password": old, "new_password": new});
    let change = |body: Value| own(&fixture, &one, "POST", "/v1/self/password", body);
    assert_eq!(change(wish("not the old one", "a better password")).await.status, 401);
    assert_eq!(change(wish(CHOSEN, "short")).await.problem().1, "new_password");
    assert_eq!(change(wish(CHOSEN, CHOSEN)).await.problem().1, "new_password");
    assert_eq!(change(wish(CHOSEN, "a better password")).await.status, 200);
    assert_eq!((whoami(&fixture, &one).await, whoami(&fixture, &other).await), (200, 401));
    assert_eq!(login(&fixture, HOME, "ada", CHOSEN).await.status, 401);
    assert_eq!(login(&fixture, HOME, "ada", "a better password").await.status, 200);
}

#[tokio::test]
async fn the_old_password_can_not_be_guessed_with_a_session_that_was_left_open() {
    let fixture = Fixture::new().await;
    let session = settle(&fixture, "ada").await;
    let guess = |old: &'static str| {
        let body = json!({"old_password": old, "new_password": "a better password"});
        from(&fixture, AWAY, "POST", "/v1/self/password", Some(&session), body)
    };
    for _ in 0..10 {
        assert_eq!(guess("a wrong guess").await.status, 401);
    }
    assert_eq!(guess(CHOSEN).await.status, 401, "held, like a login");
}

#[tokio::test]
async fn a_token_is_no_way_to_take_an_account_over() {
    let fixture = Fixture::new().await;
    settle(&fixture, "ada").await;
    let made = fixture.admin("POST", "/v1/tokens", json!({"user": "ada"})).await.json();
    let (token, admin) = (text(&made["secret"]), fixture.admin.clone());
    for token in [token, admin] {
        for (path, body) in [
            ("/v1/self/password", json!({"old_password": CHOSEN, "new_password": "a better password"})),
            ("/v1/self/totp", json!({"password": CHOSEN})),
            ("/v1/self/totp/confirm", json!({"code": "000000"})),
            ("/v1/self/totp/remove", json!({"code": "000000"})),
        ] {
            assert_eq!(own(&fixture, &token, "POST", path, body).await.status, 403, "{path}");
        }
    }
}

#[tokio::test]
async fn a_second_factor_needs_a_fresh_proof_a_code_to_count_and_a_code_to_go() {
    let fixture = Fixture::new().await;
    let session = settle(&fixture, "ada").await;
    fixture.clock.advance(Duration::from_secs(601));
    let own = |path: &'static str, body: Value| own(&fixture, &session, "POST", path, body);
    assert_eq!(own("/v1/self/totp", json!({})).await.status, 401, "the login was too long ago");
    assert_eq!(own("/v1/self/totp", json!({"password": "wrong password"})).await.status, 401);
    let offer = own("/v1/self/totp", json!({"password": CHOSEN})).await.json();
    let secret = text(&offer["secret"]);
    assert!(text(&offer["uri"]).starts_with("otpauth://totp/Berth:ada?secret="), "{offer}");
    let unconfirmed = login(&fixture, HOME, "ada", CHOSEN).await.json();
    assert!(unconfirmed["session"].is_object(), "it does not count before it is confirmed: {unconfirmed}");
    assert_eq!(own("/v1/self/totp/confirm", json!({"code": "000000"})).await.problem().1, "code");
    let code = || json!({"code": app_code(&secret, fixture.clock.now())});
    assert_eq!(own("/v1/self/totp/confirm", code()).await.status, 200);
    assert_eq!(own("/v1/self/totp/confirm", code()).await.status, 409);
    assert_eq!(own("/v1/self/totp", json!({"password": CHOSEN})).await.status, 409, "not replaced unasked");
    assert_eq!(login(&fixture, HOME, "ada", CHOSEN).await.json()["needs"], json!("totp"));
    assert_eq!(own("/v1/self/totp/remove", code()).await.status, 401, "the code was used");
    fixture.clock.advance(Duration::from_secs(30));
    assert_eq!(own("/v1/self/totp/remove", code()).await.status, 200);
    assert!(login(&fixture, HOME, "ada", CHOSEN).await.json()["session"].is_object());
}

#[tokio::test]
async fn a_disabled_user_is_out_at_once_with_all_tokens_and_in_again_without_old_sessions() {
    let fixture = Fixture::new().await;
    let session = settle(&fixture, "ada").await;
    let token = text(&fixture.admin("POST", "/v1/tokens", json!({"user": "ada"})).await.json()["secret"]);
    assert_eq!(fixture.admin("POST", "/v1/users/ada/disable", json!(null)).await.status, 200);
    assert_eq!((whoami(&fixture, &session).await, whoami(&fixture, &token).await), (401, 401));
    assert_eq!(login(&fixture, HOME, "ada", CHOSEN).await.status, 401);
    assert_eq!(fixture.admin("POST", "/v1/users/ada/enable", json!(null)).await.status, 200);
    assert_eq!((whoami(&fixture, &session).await, whoami(&fixture, &token).await), (401, 200));
    assert_eq!(login(&fixture, HOME, "ada", CHOSEN).await.status, 200);
}

#[tokio::test]
async fn nobody_gives_a_password_or_an_identity_to_who_has_more() {
    let fixture = Fixture::new().await;
    let segment = "default";
    let role = json!({"name": "helpdesk", "actions": ["user.manage", "user.view"]});
    assert_eq!(fixture.admin("POST", "/v1/roles", role).await.status, 200);
    let helper = add_user(fixture.cluster(), "helper", &["helpdesk"]).await;
    make(&fixture, "ada").await;
    make(&fixture, "boss").await;
    let grant = json!({"user": "boss", "role": "viewer", "segment": segment});
    assert_eq!(fixture.admin("POST", "/v1/grants", grant).await.status, 200);
    for (user, expected) in [("ada", true), ("boss", false), ("admin", false)] {
        for (path, body) in [("password", json!({})), ("totp/reset", json!(null)), ("enable", json!(null))] {
            let got = own(&fixture, &helper, "POST", &format!("/v1/users/{user}/{path}"), body).await;
            let expected = if expected { 200 } else { 403 };
            assert_eq!(got.status.as_u16(), expected, "{user} {path}: {}", got.json());
        }
    }
    let link = json!({"source": "none", "subject": "x"});
    assert_eq!(own(&fixture, &helper, "POST", "/v1/users/boss/identities", link).await.status, 403);
}

#[tokio::test]
async fn the_last_administrator_is_not_shut_out() {
    let fixture = Fixture::new().await;
    let got = fixture.admin("POST", "/v1/users/admin/disable", json!(null)).await;
    assert_eq!((got.status.as_u16(), got.problem().0.as_str()), (409, "protected"), "{}", got.json());
    make(&fixture, "boss").await;
    let grant = json!({"user": "boss", "role": "admin"});
    assert_eq!(fixture.admin("POST", "/v1/grants", grant).await.status, 200);
    assert_eq!(
        fixture.admin("POST", "/v1/users/admin/disable", json!(null)).await.status,
        200,
        "boss has a password"
    );
}

#[tokio::test]
async fn a_reset_ends_sessions_and_has_to_be_changed_again() {
    let fixture = Fixture::new().await;
    let (session, secret, _) = settle_with_codes(&fixture, "ada").await;
    let given = json!({"password": "given by an administrator"});
    let reset = fixture.admin("POST", "/v1/users/ada/password", given).await.json();
    assert!(reset["password"].is_null(), "what was given is not repeated: {reset}");
    assert_eq!(whoami(&fixture, &session).await, 401);
    let begun = login(&fixture, HOME, "ada", "given by an administrator").await.json();
    assert_eq!(begun["needs"], json!("totp"), "a new password does not take the second factor away: {begun}");
    let body = json!({"totp": app_code(&secret, fixture.clock.now())});
    let next = go_on(&fixture, HOME, &text(&begun["login"]), body).await.json();
    assert_eq!(next["needs"], json!("new-password"), "{next}");
    fixture.admin("POST", "/v1/users/ada/totp/reset", json!(null)).await;
    let begun = login(&fixture, HOME, "ada", "given by an administrator").await.json();
    assert_eq!(begun["needs"], json!("new-password"), "{begun}");
}

#[tokio::test]
async fn passwords_codes_and_sessions_are_nowhere_in_the_store_or_the_audit() {
    let fixture = Fixture::new().await;
    let (session, _, codes) = settle_with_codes(&fixture, "ada").await;
    let first = make(&fixture, "bob").await;
    login(&fixture, HOME, "ada", "a wrong password of ada").await;
    let tail = session.rsplit('_').next().expect("a part").to_owned();
    let secrets = [CHOSEN, "a wrong password of ada", &tail, &codes[0], &first];
    let audit = format!("{:?}", fixture.audit().await);
    let everything = fixture.store.list(Query::prefix("")).await.expect("a list");
    for entry in everything.entries {
        let text = String::from_utf8_lossy(&entry.value).into_owned() + &entry.key;
        for secret in secrets {
            assert!(!text.contains(secret), "{}: {secret}", entry.key);
        }
    }
    assert!(secrets.iter().all(|secret| !audit.contains(secret)));
}

#[tokio::test]
async fn the_audit_says_who_logged_in_and_no_login_is_without_a_record() {
    let fixture = Fixture::new().await;
    settle(&fixture, "ada").await;
    login(&fixture, HOME, "ada", "wrong password").await;
    login(&fixture, HOME, "a password in the wrong field", "x").await;
    let session = login(&fixture, HOME, "ada", CHOSEN).await.json();
    let records = fixture.audit().await;
    let text: Vec<String> = records.iter().rev().take(3).map(|record| format!("{record:?}")).collect();
    assert!(
        text[0].contains("user:ada")
            && text[0].contains(session["session"]["session"]["id"].as_str().expect("an id")),
        "{}",
        text[0]
    );
    assert!(!text[1].contains("wrong field") && text[2].contains("user:ada"), "{text:?}");

    let before = records.len();
    let mut taken = 0;
    for _ in 0..700 {
        let got = from(&fixture, AWAY, "GET", "/v1/login", None, json!(null)).await;
        taken += usize::from(got.status == 200);
    }
    assert_eq!((taken, fixture.audit().await.len() - before), (600, 600));
}

#[tokio::test]
async fn a_deleted_user_leaves_nothing_to_log_in_with() {
    let fixture = Fixture::new().await;
    let (session, _, _) = settle_with_codes(&fixture, "ada").await;
    assert_eq!(fixture.admin("DELETE", "/v1/users/ada", json!(null)).await.status, 200);
    assert_eq!(
        (whoami(&fixture, &session).await, login(&fixture, HOME, "ada", CHOSEN).await.status.as_u16()),
        (401, 401)
    );
    let left = fixture.store.list(Query::prefix("/credentials/")).await.expect("a list").entries.len();
    assert_eq!(left, 0);
    make(&fixture, "ada").await;
    assert_eq!(
        login(&fixture, HOME, "ada", CHOSEN).await.status,
        401,
        "a new user of the name is another user"
    );
}

#[tokio::test]
async fn what_is_open_ends_when_the_grant_is_taken_away_that_it_was_opened_by() {
    let fixture = Fixture::new().await;
    let cluster = fixture.cluster();
    let secret = super::support::add_user(cluster, "eve", &["configurator"]).await;
    let bearer = secret.parse().expect("a bearer secret");
    let user = crate::auth::accounts::authenticate(&cluster.records, &bearer, fixture.clock.now());
    let principal = crate::auth::Principal::User(user.expect("good"));
    let vm = cluster.records.find_vm("default/books").expect("there");
    let resource = crate::door::target::vm_resource(cluster, &vm);
    let gate = std::sync::Arc::clone(fixture.manager.gate());
    let standing = crate::auth::standing::Standing::of(std::sync::Arc::clone(cluster), principal)
        .while_allowed(gate, berth_model::access::Action::VmConsole, resource);
    assert!(standing.is_good());
    let ended = {
        let standing = standing.clone();
        tokio::spawn(async move { standing.ended().await })
    };
    tokio::task::yield_now().await;
    assert!(!ended.is_finished());
    let grants = cluster.records.list_where::<berth_api::manager::Grant>(|grant| grant.user.is_some());
    for grant in grants {
        let gone = fixture.admin("DELETE", &format!("/v1/grants/{}", grant.id), json!(null)).await;
        assert_eq!(gone.status, 200, "{}", gone.json());
    }
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("in time").expect("ended");
    assert!(!standing.is_good());
}

#[tokio::test]
async fn a_session_that_is_revoked_or_over_ends_what_it_has_open() {
    let fixture = Fixture::new().await;
    let cluster = fixture.cluster();
    for revoked in [true, false] {
        let name = if revoked { "ada" } else { "bob" };
        let session = settle(&fixture, name).await;
        let bearer = session.parse().expect("a bearer secret");
        let user = crate::auth::accounts::authenticate(&cluster.records, &bearer, fixture.clock.now());
        let principal = crate::auth::Principal::User(user.expect("good"));
        let standing = crate::auth::standing::Standing::of(std::sync::Arc::clone(cluster), principal);
        assert!(standing.is_good());
        let ended = {
            let standing = standing.clone();
            tokio::spawn(async move { standing.ended().await })
        };
        tokio::task::yield_now().await;
        if revoked {
            assert_eq!(own(&fixture, &session, "POST", "/v1/logout", json!(null)).await.status, 200);
        } else {
            fixture.clock.advance(Duration::from_secs(9 * 3600));
            // Any change of a token makes it look; by itself it does so twice a minute.
            make(&fixture, "carl").await;
            fixture.admin("POST", "/v1/tokens", json!({"user": "carl"})).await;
        }
        tokio::time::timeout(Duration::from_secs(20), ended).await.expect("in time").expect("ended");
        assert!(!standing.is_good());
    }
}
