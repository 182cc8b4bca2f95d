//! Waiting for an operation: follow it until it is over, show how far it is, and let the user go at any time.
//!
//! Operations are durable, so a lost connection or a manager that restarts is no failure: we ask again until
//! [`RETRY_LIMIT`] has passed without an answer.

use std::time::{Duration, Instant};

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    OperationEvents, OperationPath, OperationRef, OperationShow, OperationWait, WaitQuery,
};
use berth_model::operation::{Operation, OperationState};
use berth_model::{OperationId, Problem, ProblemCode};
use futures_util::StreamExt;
use serde::Serialize;

use crate::arguments::ChangeArguments;
use crate::exit::Failure;
use crate::output::Format;
use crate::progress::Reporter;
use crate::session::Session;

/// How long a manager may be away before we give up. Shorter, and an upgrade of the manager breaks every script that
/// waits; longer, and a dead one is noticed late.
const RETRY_LIMIT: Duration = Duration::from_secs(60);
/// Between two rounds of asking, when its events have ended before the operation has.
const RETRY_INTERVAL: Duration = Duration::from_millis(500);
/// How long the manager may hold back its answer then.
const FALLBACK_WAIT_MS: u64 = 2_000;

/// What programs are told at the beginning and at the end of a change.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    /// Begun, and not waited for.
    Begun { summary: &'a str, operation: &'a Operation },
    /// Over.
    Done { operation: &'a Operation },
}

/// Carries a change through as the user wants it: only tried, only begun, or waited for. Gives the operation when it
/// was waited for and succeeded.
///
/// # Errors
/// The operation's failure; [`Failure::Detached`] after Ctrl-C.
pub async fn carry_through(
    session: &Session,
    change: ChangeArguments,
    reply: OperationRef,
) -> Result<Option<Operation>, Failure> {
    let OperationRef { operation, summary, .. } = reply;
    let Some(operation) = operation else {
        // Only tried, or there was nothing to do.
        let would = if change.dry_run { "would " } else { "" };
        session.tried(&format!("{would}{summary}"))?;
        return Ok(None);
    };
    if !change.wait() {
        begun(session, &summary, &operation)?;
        return Ok(None);
    }
    let (id, farewell) = (operation.id.clone(), farewell(&operation.id));
    let followed = session.unless_interrupted(&farewell, to_success(session, operation)).await;
    followed.map(Some).map_err(|failure| unfollowed(failure, &summary, &id))
}

/// Who may begin something and may not see operations is told that it was begun: it is not the change that was refused.
fn unfollowed(failure: Failure, summary: &str, operation: &OperationId) -> Failure {
    match failure {
        Failure::Problem(mut problem) if problem.code == ProblemCode::NotAllowed => {
            problem.message = format!(
                "{summary}: begun as {operation}, and how it goes can't be seen: {}; --no-wait does not look",
                problem.message
            );
            Failure::Problem(problem)
        }
        other => other,
    }
}

/// The same, and tells the outcome: `tell` says it to people, programs get the operation.
///
/// # Errors
/// As [`carry_through`].
pub async fn carry_through_and_tell(
    session: &Session,
    change: ChangeArguments,
    reply: OperationRef,
    tell: impl FnOnce(&Operation) -> String,
) -> Result<(), Failure> {
    match carry_through(session, change, reply).await? {
        Some(operation) => done(session, &operation, tell),
        None => Ok(()),
    }
}

/// Tells that an operation is done.
///
/// # Errors
/// When nobody reads any more.
pub fn done(
    session: &Session,
    operation: &Operation,
    tell: impl FnOnce(&Operation) -> String,
) -> Result<(), Failure> {
    match session.output.format() {
        Format::Json => session.output.event(&Event::Done { operation }),
        Format::Table | Format::Yaml => session.output.done(operation, || tell(operation)),
    }
}

fn begun(session: &Session, summary: &str, operation: &Operation) -> Result<(), Failure> {
    match session.output.format() {
        Format::Json => session.output.event(&Event::Begun { summary, operation }),
        Format::Table | Format::Yaml => session
            .output
            .done(operation, || format!("{summary}: begun\n  berth operation wait {}", operation.id)),
    }
}

/// What a user who leaves is told.
pub fn farewell(operation: &OperationId) -> String {
    format!(
        "left it going on; look further:  berth operation wait {operation}\n            \
         or cancel it:  berth operation cancel {operation}"
    )
}

/// Follows an operation until it is over, and makes a failure of one that did not succeed.
///
/// # Errors
/// Its failure, or that the manager can't be reached any more.
pub async fn to_success(session: &Session, operation: Operation) -> Result<Operation, Failure> {
    let over = to_end(session, operation).await?;
    match over.state {
        OperationState::Succeeded => Ok(over),
        OperationState::Running
        | OperationState::Undoing
        | OperationState::Failed
        | OperationState::Cancelled => Err(failure_of(over)),
    }
}

/// The failure that an operation ended with.
pub fn failure_of(operation: Operation) -> Failure {
    let problem = operation.problem.unwrap_or_else(|| {
        let (code, text) = match operation.state {
            OperationState::Cancelled => (ProblemCode::Cancelled, "it was cancelled"),
            _ => (ProblemCode::Internal, "it failed without a reason"),
        };
        Problem::new(code, text)
    });
    let message = format!("{} of {} failed: {}", operation.kind, operation.subject, problem.message);
    let message = if operation.state == OperationState::Cancelled {
        format!("{} of {} was cancelled, and what it had done is undone", operation.kind, operation.subject)
    } else {
        message
    };
    let problem = Box::new(Problem { message, ..problem });
    Failure::Operation { operation: operation.id, problem }
}

/// Follows an operation until it is over.
///
/// # Errors
/// That the manager can't be reached any more.
pub async fn to_end(session: &Session, operation: Operation) -> Result<Operation, Failure> {
    let mut reporter = Reporter::new(&session.output);
    reporter.operation(&operation)?;
    if operation.state.is_over() {
        return Ok(operation);
    }
    let path = OperationPath { operation: operation.id };
    let mut answered = Instant::now();
    loop {
        match next_end(session, &path, &mut reporter).await {
            Ok(Some(over)) => return Ok(over),
            Ok(None) => answered = Instant::now(),
            Err(Failure::Problem(problem)) if is_passing(&problem) && answered.elapsed() < RETRY_LIMIT => {}
            Err(failure) => return Err(failure),
        }
        // Also after an answer: one that says "not yet" at once must not be asked for in a circle.
        tokio::time::sleep(RETRY_INTERVAL).await;
    }
}

fn is_passing(problem: &Problem) -> bool {
    problem.code == ProblemCode::Unreachable
}

/// Reads events until the operation is over or they end, then asks how it stands.
async fn next_end(
    session: &Session,
    path: &OperationPath,
    reporter: &mut Reporter,
) -> Result<Option<Operation>, Failure> {
    if let Ok(events) = session.client.events::<OperationEvents>(path, &Nothing {}).await {
        let mut events = std::pin::pin!(events);
        while let Some(Ok(operation)) = events.next().await {
            reporter.operation(&operation)?;
            if operation.state.is_over() {
                return Ok(Some(operation));
            }
        }
    }
    let query = WaitQuery { wait_ms: Some(FALLBACK_WAIT_MS) };
    let operation = session.ask::<OperationWait>(path, &query).await?;
    reporter.operation(&operation)?;
    Ok(operation.state.is_over().then_some(operation))
}

/// How an operation stands now.
///
/// # Errors
/// When there is no such operation, or the manager can't be reached.
pub async fn show(session: &Session, operation: &OperationId) -> Result<Operation, Failure> {
    session.ask::<OperationShow>(&OperationPath { operation: operation.clone() }, &Nothing {}).await
}

#[cfg(test)]
mod tests;
