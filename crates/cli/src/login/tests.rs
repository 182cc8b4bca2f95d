use berth_api::manager::{DevicePrompt, Session as Login};
use berth_model::{Problem, Timestamp, TokenId, UserId};
use clap::Parser as _;

use super::*;
use crate::arguments::{Cli, Command};
use crate::fake::Fake;

fn needs(needs: LoginNeed) -> LoginReply {
    LoginReply { session: None, login: Some("walk".to_owned()), needs: Some(needs), device: None }
}

fn done() -> LoginReply {
    let session = Login {
        id: TokenId::from_entropy([1; 10]),
        user: UserId::from_entropy([2; 10]),
        user_name: "ada".parse().expect("a name"),
        method: "password".to_owned(),
        second_factor: false,
        address: "192.0.2.1".to_owned(),
        created_at: Timestamp::from_millis(1),
        used_at: Timestamp::from_millis(1),
        expires_at: Timestamp::from_millis(2),
        idle_s: 1,
        is_this: true,
    };
    let session = NewSession { session, secret: "berth_secret".to_owned() };
    LoginReply { session: Some(session), login: None, needs: None, device: None }
}

fn arguments(line: &str) -> Arguments {
    let cli = Cli::try_parse_from(line.split(' ')).expect(line);
    let Command::Login(arguments) = cli.command else { panic!("{line}") };
    arguments
}

fn bodies(fake: &Fake) -> Vec<serde_json::Value> {
    fake.asked().iter().map(|asked| serde_json::from_slice(&asked.body).unwrap_or_default()).collect()
}

#[tokio::test]
async fn it_answers_what_the_manager_needs_line_by_line() {
    let fake = Fake::new()
        .answer("POST /v1/login", &needs(LoginNeed::Totp))
        .answer("POST /v1/login/walk", &needs(LoginNeed::NewPassword))
        .answer("POST /v1/login/walk", &done());
    let mut prompt = Prompt::of_text("ada\nfirst password\n123 456\na new password\n");
    let new = walk(&fake.session(), &arguments("berth login"), &mut prompt).await.expect("a session");
    assert_eq!(new.secret, "berth_secret");
    let expected = [
        serde_json::json!({"user": "ada", "password": "first password"}),
        serde_json::json!({"totp": "123 456"}),
        serde_json::json!({"new_password": "a new password"}),
    ];
    assert_eq!(bodies(&fake), expected);
    assert!(!fake.said().contains("password") && !fake.remarked().contains("first"), "{}", fake.remarked());
}

#[tokio::test]
async fn what_has_letters_in_it_is_a_recovery_code_and_a_refusal_ends_it() {
    let refused = Problem::new(ProblemCode::Unauthenticated, "the code is wrong");
    let fake =
        Fake::new().answer("POST /v1/login", &needs(LoginNeed::Totp)).refuse("POST /v1/login/walk", &refused);
    let mut prompt = Prompt::of_text("password\nabcd-efgh-ijkl-2345\n");
    let result = walk(&fake.session(), &arguments("berth login --user ada"), &mut prompt).await;
    assert_eq!(result.expect_err("refused").code(), 3);
    assert_eq!(bodies(&fake)[1], serde_json::json!({"recovery": "abcd-efgh-ijkl-2345"}));
}

#[tokio::test(start_paused = true)]
async fn a_device_is_told_what_to_do_and_waited_for() {
    let prompt = DevicePrompt {
        verification_uri: "https://corp.example/device".to_owned(),
        verification_uri_complete: None,
        user_code: "ABCD-EFGH".to_owned(),
        interval_s: 5,
    };
    let ways = LoginWays { oidc: vec!["corp".parse().expect("a name")], ldap: Vec::new() };
    let fake = Fake::new()
        .answer("GET /v1/login", &ways)
        .answer(
            "POST /v1/login/oidc/corp/device",
            &LoginReply { device: Some(prompt), ..needs(LoginNeed::Device) },
        )
        .answer("POST /v1/login/walk", &needs(LoginNeed::Device))
        .answer("POST /v1/login/walk", &done());
    let result = walk(&fake.session(), &arguments("berth login --oidc"), &mut Prompt::of_text("")).await;
    assert_eq!(result.expect("a session").secret, "berth_secret");
    let told = fake.remarked();
    assert!(told.contains("https://corp.example/device") && told.contains("ABCD-EFGH"), "{told}");
}

#[tokio::test]
async fn a_directory_is_named_or_the_only_one() {
    let ways = LoginWays { oidc: Vec::new(), ldap: vec!["office".parse().expect("a name")] };
    let fake = Fake::new().answer("GET /v1/login", &ways).answer("POST /v1/login", &done());
    let mut prompt = Prompt::of_text("password\n");
    walk(&fake.session(), &arguments("berth login --user ada --ldap"), &mut prompt).await.expect("a session");
    assert_eq!(bodies(&fake)[1]["directory"], "office");
    assert_eq!(only("oidc", None, &[]).expect_err("none").code(), 2);
    let two = ["a".parse().expect("a name"), "b".parse().expect("a name")];
    assert_eq!(only("oidc", None, &two).expect_err("which?").code(), 2);
}

#[test]
fn a_token_is_still_taken_from_a_file_or_standard_input() {
    let mut prompt = Prompt::of_text("berth_token\n");
    let given = token(&arguments("berth login --token-file -"), &mut prompt).expect("a token");
    assert_eq!(given.as_deref(), Some("berth_token"));
    assert!(token(&arguments("berth login --token-file -"), &mut Prompt::of_text("no token")).is_err());
}
