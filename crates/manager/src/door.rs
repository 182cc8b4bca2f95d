//! The one door: every request is authenticated, authorised, written down, answered, and its record closed.
//!
//! A route is mounted by its type and a handler, and the handler's own signature says what the route is about
//! (`Call<VmStart, TheVm>`): the door finds that thing and asks the policies about it before the handler runs. There
//! is no other way to add a route, so none can forget it. What is not there and what may not be touched get the same
//! answer, unless the caller could touch it wherever it were.
//!
//! In order: who asks; what is asked, and is it well-formed; what is it about; is it allowed; write that down, durably;
//! only then run the handler. Changes run to their end even when the caller hangs up, so that nothing is left half
//! done by a lost connection; reads are dropped. A handler that panics fails its own request and nothing else.

use std::collections::BTreeSet;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::routing::{MethodFilter, MethodRouter};
use berth_api::endpoint::{Endpoint, EndpointKind};
use berth_api::join::Fingerprint;
use berth_api::manager::AuditRecord;
use berth_api::serve::Caller;
use berth_api::transport::BoxFuture;
use berth_model::access::Action;
use berth_model::{Problem, ProblemCode, Timestamp};
use futures_util::FutureExt;
use http::request::Parts;
use http::{Method, Request, Response};

use crate::audit::{ALLOW, Audit, AuditError, DENY, End, Open};
use crate::auth::guessing::Guessing;
use crate::auth::{Principal, Shown, accounts, shown, unauthenticated};
use crate::cluster::Cluster;
use crate::metrics::Metrics;
use crate::policy::{Decision, Policies, Resource};

pub mod call;
pub mod input;
pub mod reply;
pub mod target;

pub use call::{Call, Ctx};
pub use input::Input;
pub use reply::{Answer, Done};
pub use target::{Located, Target};

/// Longest path that is written down, in characters.
const AUDIT_PATH_CHARS_MAX: usize = 300;

/// What the door needs to judge requests.
pub struct Gate {
    /// What is asked about.
    pub cluster: Arc<Cluster>,
    /// Who may do what.
    pub policies: Policies,
    /// Where it is written down.
    pub audit: Audit,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// The fingerprint of the cluster's CA, which join tokens carry.
    pub ca: Fingerprint,
    guessing: Guessing,
}

impl Gate {
    /// One with nothing counted yet.
    pub fn new(
        cluster: Arc<Cluster>,
        policies: Policies,
        audit: Audit,
        metrics: Arc<Metrics>,
        ca: Fingerprint,
    ) -> Self {
        Self { cluster, policies, audit, metrics, ca, guessing: Guessing::default() }
    }

    fn now(&self) -> Timestamp {
        self.cluster.clock.now()
    }

    /// Who shows this; none: what is shown is not good, or something had to be shown.
    fn identify(&self, action: Action, shown: Shown) -> Option<Principal> {
        match (shown, action) {
            (Shown::Bearer(bearer), _) => {
                accounts::authenticate(&self.cluster.records, &bearer, self.now()).map(Principal::User)
            }
            (Shown::HostCertificate(host), _) => {
                let known = self.cluster.records.get::<berth_model::host::Host>(host.as_str()).is_some();
                known.then_some(Principal::Host(host))
            }
            // Who joins proves it in the body, which has not been read yet.
            (Shown::Nothing, Action::Public | Action::Enrol) => Some(Principal::Anonymous),
            (Shown::Nothing | Shown::Nonsense, _) => None,
        }
    }

    fn join_token(&self, text: &str) -> Option<Principal> {
        accounts::join_token(&self.cluster.records, text, self.ca, self.now())
            .map(|row| Principal::JoinToken(row.id.clone()))
    }
}

/// Collects routes.
pub struct Door {
    gate: Arc<Gate>,
    router: Router,
    mounted: BTreeSet<&'static str>,
}

impl Door {
    /// A door without routes.
    pub fn new(gate: Arc<Gate>) -> Self {
        Self { gate, router: Router::new(), mounted: BTreeSet::new() }
    }

    /// Mounts a handler that answers with the contract's reply.
    #[must_use]
    pub fn mount<E, T, H, F>(self, handler: H) -> Self
    where
        E: Endpoint,
        T: Target<E>,
        H: Fn(Call<E, T>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Answer<E::Reply>, Problem>> + Send + 'static,
    {
        const { assert!(matches!(E::KIND, EndpointKind::Json | EndpointKind::Upload)) };
        self.add::<E, T, _>(move |call| {
            let answer = handler(call);
            Box::pin(async move { Ok(answer.await?.into_done()) })
        })
    }

    /// Mounts a handler whose answer is not JSON: text, events, websockets.
    #[must_use]
    pub fn mount_raw<E, T, H, F>(self, handler: H) -> Self
    where
        E: Endpoint,
        T: Target<E>,
        H: Fn(Call<E, T>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Done, Problem>> + Send + 'static,
    {
        const { assert!(!matches!(E::KIND, EndpointKind::Json | EndpointKind::Upload)) };
        self.add::<E, T, _>(move |call| Box::pin(handler(call)))
    }

    fn add<E, T, R>(mut self, run: R) -> Self
    where
        E: Endpoint,
        T: Target<E>,
        R: Fn(Call<E, T>) -> BoxFuture<'static, Result<Done, Problem>> + Clone + Send + Sync + 'static,
    {
        assert!(self.mounted.insert(E::NAME), "{} is mounted twice", E::NAME);
        let method = Method::from_bytes(E::METHOD.as_bytes()).expect("methods of the contract are valid");
        let filter = MethodFilter::try_from(method).expect("methods of the contract are HTTP's own");
        let gate = Arc::clone(&self.gate);
        let route = MethodRouter::new().on(filter, move |request: Request<Body>| {
            pass::<E, T, R>(Arc::clone(&gate), request, run.clone())
        });
        self.router = self.router.route(E::PATH, route);
        self
    }

    /// The names of the routes that are mounted.
    pub const fn mounted(&self) -> &BTreeSet<&'static str> {
        &self.mounted
    }

    /// The service: the routes, and the answers to what is none of them.
    pub fn into_router(self) -> Router {
        let (unknown, wrong_method) = (Arc::clone(&self.gate), self.gate);
        self.router
            .method_not_allowed_fallback(move |request: Request<Body>| {
                let response = reply::wrong_method(&request, &new_request_id(&wrong_method.cluster));
                wrong_method.metrics.answered("none", response.status().as_u16());
                std::future::ready(response)
            })
            .fallback(move |request: Request<Body>| {
                let response = reply::unknown_route(&request, &new_request_id(&unknown.cluster));
                unknown.metrics.answered("none", response.status().as_u16());
                std::future::ready(response)
            })
    }
}

fn new_request_id(cluster: &Cluster) -> String {
    let mut bytes = [0; 8];
    cluster.entropy.fill(&mut bytes);
    format!("req-{:016x}", u64::from_be_bytes(bytes))
}

/// A request on its way through.
struct Arrival {
    gate: Arc<Gate>,
    endpoint: &'static str,
    action: Action,
    request_id: String,
    caller: Caller,
    request: String,
    started_at: Timestamp,
}

impl Arrival {
    fn new<E: Endpoint>(gate: Arc<Gate>, parts: &Parts) -> Self {
        let caller = parts.extensions.get::<Caller>().cloned().unwrap_or_else(|| Caller {
            remote: ([0, 0, 0, 0], 0).into(),
            peer: berth_api::pki::Peer::Anonymous,
        });
        let path: String = parts.uri.path().chars().take(AUDIT_PATH_CHARS_MAX).collect();
        Self {
            request_id: new_request_id(&gate.cluster),
            endpoint: E::NAME,
            action: E::ACTION,
            caller,
            request: format!("{} {path}", parts.method),
            started_at: gate.now(),
            gate,
        }
    }

    /// Writes down that it came and how it was decided; on return that is durable.
    async fn write_down(
        &self,
        actor: String,
        resource: &Resource,
        decision: &Decision,
    ) -> Result<Open, Problem> {
        let record = AuditRecord {
            sequence: 0,
            request_id: self.request_id.clone(),
            actor,
            action: self.action,
            request: self.request.clone(),
            resource: resource.label().to_owned(),
            decision: if decision.allowed { ALLOW } else { DENY }.to_owned(),
            reason: decision.reason.clone(),
            started_at: self.started_at,
            finished_at: None,
            interrupted: false,
            status: None,
            operation: None,
            remote: self.caller.remote.to_string(),
        };
        self.gate.audit.begin(record).await.map_err(|error| match error {
            AuditError::Closed => Problem::new(ProblemCode::Unreachable, error.to_string()),
            AuditError::Store(berth_store::Error::NoSpace { .. }) => {
                Problem::new(ProblemCode::NoSpace, "the manager's disk is full: nothing can be recorded")
            }
            AuditError::Store(_) | AuditError::Refused(_) => Problem::new(
                ProblemCode::Unreachable,
                format!("nothing is done without a record of it, and {error}"),
            ),
        })
    }

    /// The answer to a request that was refused before it came to a handler.
    async fn refuse(
        &self,
        actor: String,
        resource: &Resource,
        reason: &str,
        problem: Problem,
    ) -> Response<Body> {
        let decision = Decision { allowed: false, reason: reason.to_owned() };
        let address = self.caller.remote.ip();
        let quiet = problem.code == ProblemCode::Unauthenticated
            && !self.gate.guessing.failed(address, self.started_at);
        if quiet {
            return self.conclude(Err(problem), None);
        }
        match self.write_down(actor, resource, &decision).await {
            Ok(open) => self.conclude(Err(problem), Some(open)),
            Err(unwritten) => self.conclude(Err(unwritten), None),
        }
    }

    async fn refuse_stranger(&self, reason: &str, problem: Problem) -> Response<Body> {
        self.refuse(Principal::Anonymous.actor(), &Resource::cluster(), reason, problem).await
    }

    /// Makes the answer, and says in the record how it ended.
    fn conclude(&self, result: Result<Done, Problem>, open: Option<Open>) -> Response<Body> {
        let denied = match &result {
            Err(problem) if problem.code == ProblemCode::NotAllowed => Some(problem.message.clone()),
            _ => None,
        };
        let (mut response, operation, rest) = match result {
            Ok(done) => done.into_parts(),
            Err(problem) => (reply::problem(problem, &self.request_id), None, reply::Rest::Nothing),
        };
        reply::stamp(&mut response, &self.request_id);
        let status = response.status().as_u16();
        self.gate.metrics.answered(self.endpoint, status);
        let Some(mut open) = open else { return response };
        open.set(End { status, operation, denied });
        match rest {
            reply::Rest::Nothing => response,
            reply::Rest::Streaming => reply::holding(response, open),
            reply::Rest::Task(task) => {
                self.gate.cluster.spawn(async move {
                    task.await;
                    drop(open);
                });
                response
            }
        }
    }
}

/// The door itself.
async fn pass<E, T, R>(gate: Arc<Gate>, request: Request<Body>, run: R) -> Response<Body>
where
    E: Endpoint,
    T: Target<E>,
    R: Fn(Call<E, T>) -> BoxFuture<'static, Result<Done, Problem>> + Send + 'static,
{
    let (mut parts, body) = request.into_parts();
    let arrival = Arrival::new::<E>(gate, &parts);
    let gate = Arc::clone(&arrival.gate);

    let Some(shown) = gate.identify(E::ACTION, shown(&parts.headers, &arrival.caller)) else {
        return arrival.refuse_stranger("no valid credential", unauthenticated()).await;
    };
    let input::Read { input, named, body } = input::read::<E>(&mut parts, body).await;
    let principal = match (E::ACTION, &input) {
        (Action::Enrol, Err(problem)) => {
            return arrival.refuse_stranger("no join token", problem.clone()).await;
        }
        (Action::Enrol, Ok(input)) => match T::join_token(input).and_then(|text| gate.join_token(text)) {
            Some(joining) => joining,
            None => return arrival.refuse_stranger("no valid join token", target::bad_join_token()).await,
        },
        _ => shown,
    };
    let located = match &input {
        Ok(input) => T::find(&gate.cluster, &principal, input),
        Err(problem) => Err(problem.clone()),
    };
    let resource = match &located {
        Ok(located) => located.resource.clone(),
        Err(_) => Resource::absent(T::KIND, &named),
    };
    let decision = gate.policies.decide(&principal, E::ACTION, &resource);
    if !decision.allowed {
        let problem = not_allowed(E::ACTION, &principal);
        return arrival.refuse(principal.actor(), &resource, &decision.reason, problem).await;
    }
    let open = match arrival.write_down(principal.actor(), &resource, &decision).await {
        Ok(open) => open,
        Err(problem) => return arrival.conclude(Err(problem), None),
    };
    let (input, located) = match input.and_then(|input| Ok((input, located?))) {
        Ok(ready) => ready,
        Err(problem) => return arrival.conclude(Err(problem), Some(open)),
    };
    let is_change = parts.method != Method::GET && parts.method != Method::HEAD;
    let ctx = Ctx::new(gate, principal, &arrival);
    let call = Call { ctx, target: located.target, input, parts, body };
    let handled = handle(arrival, open, Box::pin(async move { run(call).await }));
    if is_change { run_to_the_end(handled).await } else { handled.await }
}

/// Goes on also when the caller hangs up.
async fn run_to_the_end(handled: impl Future<Output = Response<Body>> + Send + 'static) -> Response<Body> {
    tokio::spawn(handled).await.unwrap_or_else(|_| {
        // Only while the runtime is being taken down; panics of handlers are caught further in.
        reply::problem(Problem::new(ProblemCode::Unreachable, "the manager is stopping"), "")
    })
}

async fn handle(
    arrival: Arrival,
    open: Open,
    run: BoxFuture<'static, Result<Done, Problem>>,
) -> Response<Body> {
    let result = match AssertUnwindSafe(run).catch_unwind().await {
        Ok(result) => result,
        Err(panic) => {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("a panic without words");
            tracing::error!(
                request_id = arrival.request_id,
                endpoint = arrival.endpoint,
                text,
                "a handler panicked"
            );
            Err(Problem::new(
                ProblemCode::Internal,
                "this is a fault in Berth; please report it with the request id",
            ))
        }
    };
    if let Err(problem) = &result
        && problem.code == ProblemCode::Internal
    {
        tracing::error!(request_id = arrival.request_id, endpoint = arrival.endpoint, %problem, "a request failed");
    }
    arrival.conclude(result, Some(open))
}

/// What somebody gets who is known and may not. It is the same whether the thing exists or not.
pub fn not_allowed(action: Action, principal: &Principal) -> Problem {
    Problem::new(
        ProblemCode::NotAllowed,
        format!("{} may not '{}' here, or there is no such thing", principal.actor(), action.as_str()),
    )
}

#[cfg(test)]
mod tests;
