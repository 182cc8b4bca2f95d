//! Operations: seeing them, waiting for them, following them, cancelling them.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use berth_api::manager::{
    OperationCancel, OperationEvents, OperationList, OperationRef, OperationShow, OperationWait, Page,
    WAIT_MS_MAX, WaitQuery,
};
use berth_model::Problem;
use berth_model::access::Action;
use berth_model::operation::{Operation, OperationKind};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http::Response;
use http::header::{CONTENT_TYPE, HeaderValue};
use tokio::sync::watch;

use super::list;
use crate::auth::standing::Standing;
use crate::cluster::Cluster;
use crate::door::target::{self, TheList, TheOperation};
use crate::door::{Answer, Call, Done, Door};
use crate::operations::{Begin, Filter};

/// How often a stream of events that has nothing to say sends a comment. Rarer, and proxies cut it off; and a caller
/// that is gone is noticed late.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Mounts the routes of this file.
pub fn mount(door: Door) -> Door {
    door.mount(show_all).mount(show).mount(wait).mount_raw(events).mount(cancel)
}

/// Begins an operation, or only tries it.
///
/// # Errors
/// What the operation's own checks refuse.
pub async fn submit(
    cluster: &Arc<Cluster>,
    begin: Begin,
    dry_run: bool,
) -> Result<Answer<OperationRef>, Problem> {
    let operations = &cluster.operations;
    let result = if dry_run { operations.dry_run(begin).await } else { operations.begin(begin).await };
    result.map(Answer::begun)
}

async fn show_all(call: Call<OperationList, TheList>) -> Result<Answer<Page<Operation>>, Problem> {
    let (ctx, query) = (&call.ctx, &call.input.query);
    let vm = query.vm.as_deref().map(|name| ctx.vm(name, Action::VmView)).transpose()?;
    let kind = query.kind.as_deref().map(kind_of).transpose()?;
    let filter =
        Filter { vm: vm.map(|vm| vm.0.value.id.clone()), kind, active: query.active.unwrap_or_default() };
    let (cluster, visible) = (ctx.cluster(), ctx.visible(Action::OperationView));
    let mut found = cluster.operations.list(&filter);
    found.retain(|operation| {
        let segment = operation.segment.as_ref();
        visible.may_show(segment) && visible.shows(segment, || target::operation_resource(cluster, operation))
    });
    let key = |operation: &Operation| format!("{:020} {}", operation.created_at.as_millis(), operation.id);
    let page = list::page_descending(&found, query.limit, query.cursor.as_deref(), key, Operation::clone)?;
    Ok(Answer::new(page))
}

fn kind_of(text: &str) -> Result<OperationKind, Problem> {
    let found = OperationKind::ALL.into_iter().find(|kind| kind.as_str() == text);
    found.ok_or_else(|| {
        let all: Vec<&str> = OperationKind::ALL.iter().map(|kind| kind.as_str()).collect();
        Problem::field("kind", text, format!("one of: {}", all.join(", ")))
    })
}

async fn show(call: Call<OperationShow, TheOperation>) -> Result<Answer<Operation>, Problem> {
    Ok(Answer::new(call.target.0))
}

async fn wait(call: Call<OperationWait, TheOperation>) -> Result<Answer<Operation>, Problem> {
    let at_most = wait_of(&call.input.query)?;
    let operation = call.ctx.cluster().operations.wait(&call.target.0.id, at_most).await?;
    Ok(Answer::new(operation))
}

fn wait_of(query: &WaitQuery) -> Result<Duration, Problem> {
    match query.wait_ms {
        Some(millis) if millis > WAIT_MS_MAX => {
            Err(Problem::field("wait_ms", millis, format!("at most {WAIT_MS_MAX} milliseconds")))
        }
        wait_ms => Ok(Duration::from_millis(wait_ms.unwrap_or(WAIT_MS_MAX))),
    }
}

async fn cancel(call: Call<OperationCancel, TheOperation>) -> Result<Answer<Operation>, Problem> {
    let cluster = call.ctx.cluster();
    let operation = cluster.operations.cancel(&call.target.0.id, &call.ctx.actor()).await?;
    Ok(Answer::new(operation))
}

async fn events(call: Call<OperationEvents, TheOperation>) -> Result<Done, Problem> {
    let receiver = call.ctx.cluster().operations.subscribe(&call.target.0.id)?;
    let resource = target::operation_resource(call.ctx.cluster(), &call.target.0);
    let standing = Standing::of(Arc::clone(call.ctx.cluster()), call.ctx.principal.clone()).while_allowed(
        Arc::clone(call.ctx.gate()),
        Action::OperationView,
        resource,
    );
    let ended = Box::pin(async move { standing.ended().await });
    let mut response = Response::new(Body::from_stream(event_stream(receiver).take_until(ended)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    Ok(Done::streaming(response))
}

/// The operation as it is now and each time it has changed, to the one that is over, which is the last.
fn event_stream(
    receiver: watch::Receiver<Operation>,
) -> impl Stream<Item = Result<Bytes, Infallible>> + Send {
    let start = Following { receiver, first: true, over: false };
    futures_util::stream::unfold(start, |mut following| async move {
        if following.over {
            return None;
        }
        let news = if std::mem::take(&mut following.first) {
            true
        } else {
            match tokio::time::timeout(KEEP_ALIVE, following.receiver.changed()).await {
                Ok(Ok(())) => true,
                // Nobody changes it any more.
                Ok(Err(_)) => return None,
                Err(_) => false,
            }
        };
        if !news {
            return Some((Ok(Bytes::from_static(b":\n\n")), following));
        }
        let operation = following.receiver.borrow_and_update().clone();
        following.over = operation.state.is_over();
        let json = serde_json::to_string(&operation).expect("operations are plain data");
        Some((Ok(Bytes::from(format!("data: {json}\n\n"))), following))
    })
}

struct Following {
    receiver: watch::Receiver<Operation>,
    first: bool,
    over: bool,
}
