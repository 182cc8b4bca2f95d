//! Through OpenID Connect: the browser's way and the device's way, and what is done to them on the way.

use berth_api::transport;
use http::Request;
use http::header::{COOKIE, LOCATION, SET_COOKIE};
use serde_json::{Value, json};

use super::provider::Provider;
use super::support::Got;

fn people() -> Value {
    json!({
        "person-1": {"name": "ada", "groups": ["ops", "staff"]},
        "person-2": {"name": "admin", "groups": ["admin", "administrators"]},
        "person-3": {"name": "Not A Name", "groups": []},
    })
}

/// A browser that begins at the manager: where it is sent, and its cookie.
async fn begin(provider: &Provider) -> (String, String) {
    let got = provider.world.ask("GET", "/v1/login/oidc/corp", None, json!(null)).await;
    assert_eq!(got.status, 302, "{}", got.json());
    let header = |name| got.headers[name].to_str().expect("text").to_owned();
    let cookie = header(SET_COOKIE);
    for attribute in ["__Host-", "Secure", "HttpOnly", "SameSite=Lax", "Path=/"] {
        assert!(cookie.contains(attribute), "{cookie}");
    }
    (header(LOCATION), cookie.split(';').next().expect("a pair").to_owned())
}

/// A browser that comes back to the manager.
async fn come_back(provider: &Provider, to: &str, cookie: &str) -> Got {
    let path = &to[to.find("/v1/").expect("the manager's")..];
    let request = Request::builder().uri(path).header(COOKIE, cookie);
    provider.world.send(request.body(transport::empty()).expect("a request")).await
}

#[tokio::test]
async fn a_browser_goes_to_the_provider_and_comes_back_with_a_session() {
    for in_token in [true, false] {
        let provider = Provider::start(people(), in_token, "create_users = true").await;
        let (url, cookie) = begin(&provider).await;
        assert!(
            url.contains("code_challenge_method=S256") && url.contains("nonce=") && url.contains("state=")
        );
        let back = provider.browser().sign_in(&url, "person-1").await;
        let got = come_back(&provider, &back, &cookie).await;
        assert_eq!(got.status, 200, "{}", got.json());
        let me = provider.world.whoami(&got.json()).await;
        assert_eq!((me["user"].as_str(), me["method"].as_str()), (Some("ada"), Some("oidc:corp")), "{me}");
        let user = provider.world.user("ada").await;
        let group = |name: &str| json!({"provider": "corp", "group": name});
        assert_eq!(
            user["external_groups"],
            json!([group("ops"), group("staff")]),
            "in the token: {in_token}"
        );

        // The same way back again, as somebody has it who looked over a shoulder.
        let twice = come_back(&provider, &back, &cookie).await;
        assert_eq!(twice.status, 401, "{}", twice.json());
    }
}

#[tokio::test]
async fn a_way_back_is_good_only_for_the_browser_that_was_sent() {
    let provider = Provider::start(people(), true, "create_users = true").await;
    let (url, _) = begin(&provider).await;
    let (other_url, other_cookie) = begin(&provider).await;
    let back = provider.browser().sign_in(&url, "person-1").await;
    let got = come_back(&provider, &back, &other_cookie).await;
    assert_eq!(got.status, 401, "somebody else's cookie: {}", got.json());

    let back = provider.browser().sign_in(&other_url, "person-1").await;
    let state = back.split("state=").nth(1).and_then(|rest| rest.split('&').next()).expect("a state");
    for (broken, why) in [
        (back.replace(state, "invented"), "another state"),
        (back.replace("corp/callback", "other/callback"), "another provider"),
    ] {
        let got = come_back(&provider, &broken, &other_cookie).await;
        assert_eq!(got.status, 401, "{why}: {}", got.json());
    }
    let (url, cookie) = begin(&provider).await;
    let back = provider.browser().sign_in(&url, "person-1").await;
    let issuer = back.split("iss=").nth(1).and_then(|rest| rest.split('&').next()).expect("an issuer");
    let mixed = back.replace(issuer, "https%3A%2F%2Fevil.example");
    assert_eq!(come_back(&provider, &mixed, &cookie).await.status, 401, "another issuer");
    let (url, cookie) = begin(&provider).await;
    let back = provider.browser().sign_in(&url, "person-1").await;
    assert_eq!(come_back(&provider, &back, "x=y").await.status, 401, "no cookie");
    assert_eq!(come_back(&provider, &back, &cookie).await.status, 401, "and that was its one chance");
    let (_, cookie) = begin(&provider).await;
    let got = come_back(&provider, "/v1/login/oidc/corp/callback?error=access_denied", &cookie).await;
    assert_eq!(got.status, 401, "{}", got.json());
}

#[tokio::test]
async fn a_code_for_one_walk_is_not_good_in_another() {
    let provider = Provider::start(people(), true, "create_users = true").await;
    let (victims, _) = begin(&provider).await;
    let stolen = provider.browser().sign_in(&victims, "person-1").await;
    let (own, cookie) = begin(&provider).await;
    let part = |url: &str, name: &str| {
        let rest = url.split(&format!("{name}=")).nth(1).expect("the part");
        rest.split('&').next().expect("its value").to_owned()
    };
    let injected = stolen.replace(&part(&stolen, "state"), &part(&own, "state"));
    let got = come_back(&provider, &injected, &cookie).await;
    assert_eq!(got.status, 401, "PKCE ties the code to the walk: {}", got.json());
}

#[tokio::test]
async fn names_and_groups_of_the_provider_give_nothing_by_themselves() {
    let provider = Provider::start(people(), true, "create_users = true").await;
    for (person, status) in [("person-2", 403), ("person-3", 403)] {
        let (url, cookie) = begin(&provider).await;
        let back = provider.browser().sign_in(&url, person).await;
        let got = come_back(&provider, &back, &cookie).await;
        assert_eq!(got.status.as_u16(), status, "{person}: {}", got.json());
    }
    let link = json!({"source": "corp", "subject": "person-3"});
    provider.world.admin("POST", "/v1/users", json!({"name": "carl"})).await;
    provider.world.admin("POST", "/v1/users/carl/identities", link).await;
    let (url, cookie) = begin(&provider).await;
    let back = provider.browser().sign_in(&url, "person-3").await;
    let me = provider.world.whoami(&come_back(&provider, &back, &cookie).await.json()).await;
    assert_eq!(me["user"], json!("carl"), "by who it is, not by what it is called");
}

#[tokio::test]
async fn a_device_waits_until_its_user_has_said_yes() {
    let provider = Provider::start(people(), false, "create_users = true").await;
    let world = &provider.world;
    let begun = world.ask("POST", "/v1/login/oidc/corp/device", None, json!(null)).await.json();
    assert_eq!(begun["needs"], json!("device"), "{begun}");
    let path = format!("/v1/login/{}", begun["login"].as_str().expect("a login"));
    let pending = world.ask("POST", &path, None, json!({})).await.json();
    assert_eq!(
        (pending["needs"].as_str(), pending["session"].is_null()),
        (Some("device"), true),
        "{pending}"
    );
    let wrong = world.ask("POST", &path, None, json!({"totp": "000000"})).await;
    assert_eq!(wrong.status, 400, "nothing else is taken: {}", wrong.json());

    let uri = begun["device"]["verification_uri_complete"].as_str().expect("an address").to_owned();
    provider.browser().sign_in(&uri, "person-1").await;
    let deadline = tokio::time::Instant::now() + super::support::UP_WITHIN;
    let done = loop {
        let reply = world.ask("POST", &path, None, json!({})).await.json();
        if reply["needs"] != json!("device") {
            break reply;
        }
        assert!(tokio::time::Instant::now() < deadline, "{reply}");
        // The provider says how often it may be asked; the manager keeps to that, whoever asks it.
        tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    };
    assert_eq!(world.whoami(&done).await["user"], json!("ada"), "{done}");
    assert_eq!(world.ask("POST", &path, None, json!({})).await.status, 401, "it is over");
}

#[tokio::test]
async fn a_provider_that_is_not_there_is_said_to_be_so() {
    let provider = Provider::start(people(), true, "").await;
    assert_eq!(provider.world.ask("GET", "/v1/login/oidc/other", None, json!(null)).await.status, 404);
    let ways = provider.world.ask("GET", "/v1/login", None, json!(null)).await.json();
    assert_eq!(ways, json!({"oidc": ["corp"], "ldap": []}));
    let (url, cookie) = begin(&provider).await;
    let back = provider.browser().sign_in(&url, "person-1").await;
    assert_eq!(
        come_back(&provider, &back, &cookie).await.status,
        403,
        "nobody here is that, and nobody is made"
    );
}
