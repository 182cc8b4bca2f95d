//! Random requests after the served API description: whatever comes, the manager has no fault of its own.

use std::process::Stdio;

use berth_api::endpoint::Nothing;
use berth_api::manager::{AuditList, AuditListQuery};

use super::start;

/// How long requests are made. Longer finds more; this goes through every route with its edge cases.
const SECONDS: &str = "90";
/// What the script exits with when Python is missing.
const SKIPPED: i32 = 77;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_that_schemathesis_makes_up_is_answered_by_a_fault() {
    let dir = tempfile::tempdir().expect("a directory");
    let running = start(dir.path()).await;
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, &running.ca_pem).expect("written");
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let output = tokio::process::Command::new(root.join("scripts/schemathesis.sh"))
        .arg(format!("https://{}", running.address))
        .arg(&ca)
        .arg(SECONDS)
        .env("BERTH_TOKEN", running.secret.as_deref().expect("a first start"))
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .expect("the script starts");
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.code() == Some(SKIPPED) {
        eprintln!("SKIPPED, and nothing is proved: {text}");
        return;
    }
    println!("{text}");
    assert!(output.status.success(), "it found faults");
    // Whatever was changed and deleted, the caller was an administrator to the end.
    let (client, mut query, mut written) = (running.user(), AuditListQuery::default(), 0);
    while written <= 100 {
        // A page may be short although there are more.
        let page =
            client.call::<AuditList>(&Nothing {}, &query, &()).await.expect("the caller is still let in");
        written += page.items.len();
        let Some(cursor) = page.next_cursor else { break };
        query.cursor = Some(cursor);
    }
    assert!(written > 100, "{written} requests were let in and written down");
    running.end().await;
}
