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
//!
//! Everybody who is known leaves a record of each request. So do strangers, up to so many a minute from one address:
//! beyond that a flood of them would only fill the disk.

use std::collections::BTreeSet;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::routing::{MethodFilter, MethodRouter};
use berth_api::endpoint::{Endpoint, EndpointKind};
use berth_api::join::Fingerprint;
use berth_api::transport::BoxFuture;
use berth_model::access::Action;
use berth_model::{Problem, ProblemCode};
use futures_util::FutureExt;
use http::{Method, Request, Response};

use crate::audit::{Audit, Open};
use crate::auth::strangers::Strangers;
use crate::auth::{Principal, Shown, accounts, session, shown, unauthenticated};
use crate::cluster::Cluster;
use crate::metrics::Metrics;
use crate::policy::{Decision, Policies, Resource};

mod arrival;
mod written;

pub mod call;
pub mod input;
pub mod reply;
pub mod second_person;
pub mod target;

use arrival::Arrival;

pub use call::{Call, Ctx};
pub use input::Input;
pub use reply::{Answer, Done};
pub use target::{Located, Target};

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
    /// Those who showed nothing good, and those who asked for what anybody may.
    refused: Strangers,
    passing: Strangers,
    logging_in: Strangers,
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
        Self {
            cluster,
            policies,
            audit,
            metrics,
            ca,
            refused: Strangers::default(),
            passing: Strangers::default(),
            logging_in: Strangers::default(),
        }
    }

    /// Who shows this; none: what is shown is not good, or something had to be shown.
    fn identify(&self, action: Action, shown: Shown) -> Option<Principal> {
        match (shown, action) {
            (Shown::Bearer(bearer), _) => {
                accounts::authenticate(&self.cluster.records, &bearer, self.policies.now())
                    .filter(|user| session::is_in_use(&self.cluster, user))
                    .map(Principal::User)
            }
            (Shown::HostCertificate(host), _) => {
                let known = self.cluster.records.get::<berth_model::host::Host>(host.as_str()).is_some();
                known.then_some(Principal::Host(host))
            }
            // Who joins proves it in the body, which has not been read yet.
            (Shown::Nothing, Action::Public | Action::Enrol | Action::Login) => Some(Principal::Anonymous),
            (Shown::Nothing | Shown::Nonsense, _) => None,
        }
    }

    /// What the policies say at first sight.
    fn judge(&self, principal: &Principal, action: Action, resource: &Resource) -> Decision {
        let decision = self.policies.decide(principal, action, resource, false);
        if decision.failed {
            self.metrics.policy_failed();
        }
        decision
    }

    /// What somebody gets who is known and may not. It is the same whether the thing exists or not; who may see the
    /// thing is told what would allow it.
    pub fn not_allowed(&self, action: Action, principal: &Principal, resource: &Resource) -> Problem {
        let message =
            format!("{} may not '{}' here, or there is no such thing", principal.actor(), action.as_str());
        let problem = Problem::new(ProblemCode::NotAllowed, message);
        match self.policies.what_would_allow(principal, action, resource) {
            Some(hint) => Problem {
                message: format!("{} may not '{}': {hint}", principal.actor(), action.as_str()),
                ..problem
            },
            None => problem,
        }
    }

    fn join_token(&self, text: &str) -> Option<Principal> {
        accounts::join_token(&self.cluster.records, text, self.ca, self.policies.now())
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
            without_panics(E::NAME, pass::<E, T, R>(Arc::clone(&gate), request, run.clone()))
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
    let mut decision = gate.judge(&principal, E::ACTION, &resource);
    let sha256 = match (&input, &located, &principal) {
        (Ok(input), Ok(_), Principal::User(user)) if decision.needs_approval.is_some() => {
            second_person::hash_of(user, &resource, input)
        }
        _ => String::new(),
    };
    let request = format!("{} {}", parts.method, parts.uri);
    let dry_run = is_dry_run(parts.uri.query());
    let asked = Asked { principal: &principal, action: E::ACTION, resource: &resource };
    let approved = match second_look(&gate, asked, &mut decision, sha256, request, dry_run).await {
        Ok(approved) => approved,
        Err(problem) => return arrival.refuse(&principal, &resource, decision, problem).await,
    };
    if !decision.allowed {
        let problem = match (&input, &principal) {
            // What is wrong with the request's form says nothing of what there is.
            (Err(problem), Principal::User(_)) => problem.clone(),
            _ => gate.not_allowed(E::ACTION, &principal, &resource),
        };
        return arrival.refuse(&principal, &resource, decision, problem).await;
    }
    let open = match arrival.write_down(&principal, &resource, &decision).await {
        Ok(open) => open,
        Err(problem) => return arrival.conclude(Err(problem), None),
    };
    let (input, located) = match input.and_then(|input| Ok((input, located?))) {
        Ok(ready) => ready,
        Err(problem) => return arrival.conclude(Err(problem), open),
    };
    let is_change = parts.method != Method::GET && parts.method != Method::HEAD;
    let ctx = Ctx::new(gate, principal, &arrival, approved);
    let call = Call { ctx, target: located.target, input, parts, body };
    let handled = handle(arrival, open, Box::pin(async move { run(call).await }));
    if is_change { run_to_the_end(handled).await } else { handled.await }
}

struct Asked<'a> {
    principal: &'a Principal,
    action: Action,
    resource: &'a Resource,
}

/// For what needs a second person: whether one has approved this very request, which has this hash; none is needed or
/// would help when there is no hash.
async fn second_look(
    gate: &Gate,
    asked: Asked<'_>,
    decision: &mut Decision,
    sha256: String,
    request: String,
    dry_run: bool,
) -> Result<bool, Problem> {
    let Asked { principal, action, resource } = asked;
    let (Some(about), Principal::User(user)) = (&decision.needs_approval, principal) else {
        return Ok(false);
    };
    if sha256.is_empty() {
        return Ok(false);
    }
    let wanted = second_person::Wanted { user, action, resource, request, sha256, about, dry_run };
    let approval = second_person::pass(gate, &wanted).await?;
    *decision = gate.policies.decide(principal, action, resource, true);
    decision.reason = format!("{}; approved by {approval}", decision.reason);
    Ok(true)
}

/// Whether a query says to only try. What the query means otherwise is the route's business.
fn is_dry_run(query: Option<&str>) -> bool {
    query.is_some_and(|query| query.split('&').any(|pair| pair == "dry_run=true"))
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
    open: Option<Open>,
    run: BoxFuture<'static, Result<Done, Problem>>,
) -> Response<Body> {
    let result = AssertUnwindSafe(run).catch_unwind().await;
    arrival.conclude(result.unwrap_or_else(|panic| Err(fault(arrival.endpoint, &*panic))), open)
}

/// The last line: a fault outside a handler fails its request as well, and no other.
async fn without_panics(
    endpoint: &'static str,
    passing: impl Future<Output = Response<Body>> + Send,
) -> Response<Body> {
    let result = AssertUnwindSafe(passing).catch_unwind().await;
    result.unwrap_or_else(|panic| reply::problem(fault(endpoint, &*panic), ""))
}

fn fault(endpoint: &'static str, panic: &(dyn std::any::Any + Send)) -> Problem {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without words");
    tracing::error!(endpoint, text, "a request panicked");
    Problem::new(ProblemCode::Internal, "this is a fault in Berth; please report it with the request id")
}

#[cfg(test)]
pub(crate) mod tests;
