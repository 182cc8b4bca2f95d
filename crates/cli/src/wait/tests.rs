use super::*;
use crate::fake::{self, Fake};
use berth_api::manager::OperationRef;
use berth_model::operation::{OperationKind, Progress};
use berth_model::snapshot::SnapshotFacts;
use berth_model::{SnapshotId, operation::OperationResult};
use clap::Parser;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    change: ChangeArguments,
}

fn change(line: &[&str]) -> ChangeArguments {
    Line::parse_from([&["x"], line].concat()).change
}

fn running() -> Operation {
    fake::operation(OperationKind::VmMigrate)
}

fn in_phase(phase: &str) -> Operation {
    Operation { progress: Progress { phase: phase.into(), ..Progress::default() }, ..running() }
}

fn over(state: OperationState) -> Operation {
    Operation { state, ..running() }
}

fn reply(operation: Operation) -> OperationRef {
    OperationRef { operation: Some(operation), summary: "move default/books to h2".into(), vm: None }
}

fn route(verb: &str) -> String {
    format!("GET /v1/operations/{}/{verb}", running().id)
}

#[tokio::test]
async fn events_are_followed_to_the_end_and_shown() {
    let events = [in_phase("preparing"), in_phase("warm-up"), over(OperationState::Succeeded)];
    let fake = Fake::new().events(&route("events"), &events);
    carry_through_and_tell(&fake.session(), change(&[]), reply(running()), |over| {
        format!("{} moved", over.subject)
    })
    .await
    .expect("done");
    assert_eq!(fake.said(), "default/books moved\n");
    let expected = "vm.migrate default/books: working\nvm.migrate default/books: preparing\n\
                    vm.migrate default/books: warm-up\n";
    assert_eq!(fake.remarked(), expected);
}

#[tokio::test]
async fn programs_get_a_line_for_each_event_and_the_last_is_the_outcome() {
    let events = [in_phase("warm-up"), over(OperationState::Succeeded)];
    let fake = Fake::new().events(&route("events"), &events);
    let session = fake.session_in(Format::Json);
    carry_through_and_tell(&session, change(&[]), reply(running()), |_| String::new()).await.expect("done");
    let lines: Vec<serde_json::Value> =
        fake.said().lines().map(|line| serde_json::from_str(line).expect("a line of json")).collect();
    let events: Vec<&str> = lines.iter().filter_map(|line| line["event"].as_str()).collect();
    assert_eq!(events, ["progress", "progress", "progress", "done"]);
    assert_eq!(lines[1]["operation"]["progress"]["phase"], "warm-up");
    assert_eq!(lines[3]["operation"]["state"], "succeeded");
    assert_eq!(fake.remarked(), "");
}

#[tokio::test(start_paused = true)]
async fn a_manager_that_restarts_is_waited_for() {
    let fake = Fake::new()
        .break_off(&route("events"))
        .events(&route("events"), &[in_phase("warm-up")])
        .events(&route("events"), &[] as &[Operation])
        .break_off(&route("wait"))
        .answer(&route("wait"), &in_phase("stop-and-copy"))
        .answer(&route("wait"), &over(OperationState::Succeeded));
    let ended = to_success(&fake.session(), running()).await.expect("done");
    assert_eq!(ended.state, OperationState::Succeeded);
}

#[tokio::test]
async fn a_failed_operation_is_exit_code_1_with_its_reason() {
    let problem = Problem::new(ProblemCode::NotFound, "there is no pool 'fast'");
    let failed = Operation { problem: Some(problem), ..over(OperationState::Failed) };
    let fake = Fake::new().events(&route("events"), &[failed]);
    let failure = to_success(&fake.session(), running()).await.expect_err("failed");
    assert_eq!(failure.code(), 1);
    let said = &failure.problem().expect("a problem").message;
    assert_eq!(said, "vm.migrate of default/books failed: there is no pool 'fast'");
}

#[tokio::test]
async fn a_refusal_while_waiting_is_not_retried() {
    let refused = Problem::new(ProblemCode::NotAllowed, "no");
    let fake = Fake::new().refuse(&route("events"), &refused).refuse(&route("wait"), &refused);
    assert_eq!(to_end(&fake.session(), running()).await.expect_err("refused").code(), 3);
    assert_eq!(fake.asked().len(), 2);
}

#[tokio::test]
async fn ctrl_c_leaves_and_says_how_to_go_on() {
    let fake = Fake::new()
        .events(&route("events"), &[in_phase("warm-up")])
        .answer(&route("wait"), &in_phase("warm-up"));
    fake.interrupt.notify_one();
    let failure = carry_through(&fake.session(), change(&[]), reply(running())).await.expect_err("left");
    assert_eq!(failure.code(), 130);
    assert!(failure.problem().is_none());
    assert!(fake.remarked().contains(&format!("berth operation cancel {}", running().id)));
}

#[tokio::test]
async fn without_waiting_nothing_is_asked_and_the_id_is_told() {
    let fake = Fake::new();
    let outcome = carry_through(&fake.session(), change(&["--no-wait"]), reply(running())).await;
    assert!(outcome.expect("begun").is_none() && fake.asked().is_empty());
    let expected = format!("move default/books to h2: begun\n  berth operation wait {}\n", running().id);
    assert_eq!(fake.said(), expected);
}

#[tokio::test]
async fn a_trial_says_what_would_be() {
    let fake = Fake::new();
    let tried = OperationRef { operation: None, ..reply(running()) };
    let outcome = carry_through(&fake.session_in(Format::Json), change(&["--dry-run"]), tried).await;
    assert!(outcome.expect("tried").is_none());
    let said: serde_json::Value = serde_json::from_str(&fake.said()).expect("json");
    assert_eq!(said, serde_json::json!({"dry_run": true, "summary": "would move default/books to h2"}));
}

#[tokio::test]
async fn a_snapshot_tells_its_pause_and_a_restore_its_time() {
    let facts = SnapshotFacts {
        has_memory: true,
        paused_us: 12_345,
        total_ms: 1100,
        memory_stored_bytes: 410 << 20,
        ..SnapshotFacts::default()
    };
    assert_eq!(crate::snapshot::facts_in_words(&facts), "guest paused 12.3 ms, 410 MiB on disk, in 1.10 s");
    let frozen = SnapshotFacts { has_memory: false, quiesced: true, memory_stored_bytes: 0, ..facts };
    let said = crate::snapshot::facts_in_words(&frozen);
    assert_eq!(said, "disk only, file systems frozen for 12.3 ms, 0 B on disk, in 1.10 s");
    let undo = SnapshotId::from_entropy([7; 10]);
    let result = OperationResult::Restore {
        snapshot: SnapshotId::from_entropy([8; 10]),
        undo: Some(undo.clone()),
        facts: berth_model::snapshot::RestoreFacts {
            running_us: 93_000,
            undo_us: 600_000,
            warm_process: true,
            clock: berth_model::snapshot::ClockSetting::Set,
            ..Default::default()
        },
    };
    let restored = Operation { result: Some(result), ..over(OperationState::Succeeded) };
    assert_eq!(
        crate::operation::outcome(&restored, &crate::lookup::HostNames::default()),
        format!(
            "default/books is back, running 93.0 ms after the command (its process was ready), clock set; {undo} undoes it (taken before in 600 ms)"
        )
    );
}

#[test]
fn the_last_word_on_waiting_counts() {
    assert!(change(&[]).wait());
    assert!(change(&["--no-wait", "--wait"]).wait());
    assert!(!change(&["--wait", "--no-wait"]).wait());
}

#[tokio::test]
async fn who_may_not_see_operations_is_told_that_it_was_begun() {
    let no = Problem::new(ProblemCode::NotAllowed, "ada may not 'operation.view'");
    let fake = Fake::new().refuse(&route("events"), &no).refuse(&route("wait"), &no);
    let failed = carry_through(&fake.session(), change(&[]), reply(running())).await.expect_err("not seen");
    assert_eq!(failed.code(), 3);
    let said = &failed.problem().expect("a problem").message;
    assert!(said.starts_with("move default/books to h2: begun as op-"), "{said}");
    assert!(said.contains("ada may not 'operation.view'; --no-wait"), "{said}");
}
