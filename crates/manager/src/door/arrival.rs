//! A request on its way through: what is written down of it, and how it is answered.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::body::Body;
use berth_api::endpoint::Endpoint;
use berth_api::pki::Peer;
use berth_api::serve::Caller;
use berth_model::access::Action;
use berth_model::{Problem, ProblemCode, Timestamp};
use http::Response;
use http::request::Parts;

use super::reply::{self, Done, Rest};
use super::{Gate, new_request_id, written};
use crate::audit::{AuditError, End, Named, Open};
use crate::auth::Principal;
use crate::auth::strangers::Strangers;
use crate::policy::{Decision, Resource};

/// Longest path that is written down, in characters.
const PATH_CHARS_MAX: usize = 300;

/// A request on its way through.
pub(super) struct Arrival {
    pub(super) gate: Arc<Gate>,
    pub(super) endpoint: &'static str,
    pub(super) request_id: String,
    pub(super) caller: Caller,
    pub(super) action: Action,
    pub(super) request: String,
    pub(super) started_at: Timestamp,
    /// What else the request turns out to name.
    pub(super) named: Named,
}

impl Arrival {
    pub(super) fn new<E: Endpoint>(gate: Arc<Gate>, parts: &Parts) -> Self {
        let nobody = || Caller { remote: SocketAddr::from(([0, 0, 0, 0], 0)), peer: Peer::Anonymous };
        let path: String = parts.uri.path().chars().take(PATH_CHARS_MAX).collect();
        Self {
            request_id: new_request_id(&gate.cluster),
            endpoint: E::NAME,
            action: E::ACTION,
            caller: parts.extensions.get::<Caller>().cloned().unwrap_or_else(nobody),
            request: format!("{} {path}", parts.method),
            started_at: gate.cluster.clock.now(),
            named: Named::default(),
            gate,
        }
    }

    /// Writes down that it came and how it was decided; on return that is durable. None: strangers have come so often
    /// that it is not worth a record.
    pub(super) async fn write_down(
        &self,
        principal: &Principal,
        resource: &Resource,
        decision: &Decision,
    ) -> Result<Option<Open>, Problem> {
        let is_stranger = *principal == Principal::Anonymous;
        if is_stranger && !self.is_worth_a_record(&self.gate.passing) {
            return Ok(None);
        }
        let record = written::record(self, principal, resource, decision);
        let mut open = self.gate.audit.begin(record).await.map_err(unwritten)?;
        open.share(self.named.clone());
        Ok(Some(open))
    }

    fn is_worth_a_record(&self, strangers: &Strangers) -> bool {
        strangers.came(self.caller.remote.ip(), self.started_at)
    }

    /// The answer to somebody known who may not.
    pub(super) async fn refuse(
        &self,
        principal: &Principal,
        resource: &Resource,
        decision: Decision,
        problem: Problem,
    ) -> Response<Body> {
        let record = written::record(self, principal, resource, &decision);
        // No handler follows: start and end are one.
        let end = End {
            status: problem.code.http_status(),
            operation: None,
            denied: None,
            problem: Some(problem.code),
        };
        match self.gate.audit.write(record, end).await {
            Ok(()) => self.conclude(Err(problem), None),
            Err(error) => self.conclude(Err(unwritten(error)), None),
        }
    }

    /// The answer to somebody who has shown nothing good.
    pub(super) async fn refuse_stranger(&self, reason: &str, problem: Problem) -> Response<Body> {
        if !self.is_worth_a_record(&self.gate.refused) {
            return self.conclude(Err(problem), None);
        }
        self.refuse(&Principal::Anonymous, &Resource::cluster(), Decision::denied(reason), problem).await
    }

    /// Makes the answer, and says in the record how it ended.
    pub(super) fn conclude(&self, result: Result<Done, Problem>, open: Option<Open>) -> Response<Body> {
        let denied = match &result {
            Err(problem) if problem.code == ProblemCode::NotAllowed => Some(problem.message.clone()),
            _ => None,
        };
        let code = result.as_ref().err().map(|problem| problem.code);
        let (mut response, operation, rest) = match result {
            Ok(done) => done.into_parts(),
            Err(problem) => (self.failed(problem), None, Rest::Nothing),
        };
        reply::stamp(&mut response, &self.request_id);
        let status = response.status().as_u16();
        self.gate.metrics.answered(self.endpoint, status);
        tracing::debug!(request_id = self.request_id, endpoint = self.endpoint, status, "answered");
        let open = open.map(|mut open| {
            open.set(End { status, operation, denied, problem: code });
            open
        });
        match rest {
            Rest::Nothing => response,
            Rest::Streaming => reply::holding(response, open),
            Rest::Task(task) => {
                self.gate.cluster.spawn(async move {
                    task.await;
                    drop(open);
                });
                response
            }
        }
    }

    fn failed(&self, problem: Problem) -> Response<Body> {
        if problem.code == ProblemCode::Internal {
            let (request_id, endpoint) = (&self.request_id, self.endpoint);
            tracing::error!(request_id, endpoint, %problem, "a request failed");
        }
        reply::problem(problem, &self.request_id)
    }
}

/// What somebody gets whose request could not be written down.
fn unwritten(error: AuditError) -> Problem {
    match error {
        AuditError::Closed => Problem::new(ProblemCode::Unreachable, error.to_string()),
        AuditError::NoSpace => {
            Problem::new(ProblemCode::NoSpace, "the manager's disk is full: nothing can be recorded")
        }
        AuditError::Store(_)
        | AuditError::Refused(_)
        | AuditError::Damaged { .. }
        | AuditError::OutOfLog(_) => Problem::new(
            ProblemCode::Unreachable,
            format!("nothing is done without a record of it, and {error}"),
        ),
    }
}
