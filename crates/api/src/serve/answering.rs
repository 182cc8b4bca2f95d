//! A service as it is seen by one connection: it learns who asks, and the caller learns when the connection ends.
//!
//! An answer may come before the request's body was read: to a stranger, say, of whom nothing is read but who it is. HTTP/1
//! can't go on after that without reading the rest, so the connection is closed behind the answer. The answer says so
//! (`connection: close`), or a caller that keeps connections sends its next request into one that is gone.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use http::header::CONNECTION;
use http::{HeaderValue, Request, Response};
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tower::{Service, ServiceExt};

use super::Caller;
use crate::transport::BoxFuture;

/// See the module's head.
#[derive(Debug, Clone)]
pub(super) struct Answering<S> {
    pub(super) service: S,
    pub(super) caller: Caller,
}

impl<S, B> hyper::service::Service<Request<Incoming>> for Answering<S>
where
    S: Service<Request<Arriving>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
{
    type Response = Response<B>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<B>, Infallible>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let is_read = Arc::new(AtomicBool::new(request.body().is_end_stream()));
        let mut request = request.map(|body| Arriving { body, is_read: Arc::clone(&is_read) });
        request.extensions_mut().insert(self.caller.clone());
        let service = self.service.clone();
        Box::pin(async move {
            let mut response = service.oneshot(request).await?;
            if !is_read.load(Ordering::Acquire) {
                response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            Ok(response)
        })
    }
}

/// The body of a request, as it arrives.
#[derive(Debug)]
pub struct Arriving {
    body: Incoming,
    /// Whether it was read to its end.
    is_read: Arc<AtomicBool>,
}

impl Body for Arriving {
    type Data = bytes::Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if frame.is_none() || self.body.is_end_stream() {
            self.is_read.store(true, Ordering::Release);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, Full};
    use hyper_util::rt::TokioIo;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
    use tower::service_fn;

    use super::*;
    use crate::pki::Peer;

    async fn answer(request: Request<Arriving>) -> Result<Response<Full<bytes::Bytes>>, Infallible> {
        assert!(request.extensions().get::<Caller>().is_some(), "it is known who asks");
        if request.uri().path() == "/read" {
            request.into_body().collect().await.expect("a body");
        }
        Ok(Response::new(Full::from("answered")))
    }

    fn connected() -> DuplexStream {
        let (ours, theirs) = tokio::io::duplex(4096);
        let caller = Caller { remote: ([127, 0, 0, 1], 1).into(), peer: Peer::Anonymous };
        let service = Answering { service: service_fn(answer), caller };
        let serving =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(theirs), service);
        tokio::spawn(async move { serving.await.expect("served") });
        ours
    }

    /// Sends a head and what may come with it; what is answered up to its end.
    async fn ask(connection: &mut DuplexStream, request: &str) -> String {
        connection.write_all(request.as_bytes()).await.expect("sent");
        let mut seen = Vec::new();
        while !seen.ends_with(b"answered") {
            assert!(connection.read_buf(&mut seen).await.expect("read") > 0, "it broke off");
        }
        String::from_utf8(seen).expect("text").to_ascii_lowercase()
    }

    #[tokio::test]
    async fn a_connection_that_ends_because_nobody_read_the_body_is_said_to_end() {
        let mut connection = connected();
        let head = "POST /unread HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\n";
        assert!(ask(&mut connection, head).await.contains("connection: close"));
        let mut rest = Vec::new();
        connection.read_to_end(&mut rest).await.expect("it ends");
        assert!(rest.is_empty());
    }

    #[tokio::test]
    async fn one_whose_bodies_are_read_goes_on_and_so_does_one_without_bodies() {
        let mut connection = connected();
        for request in [
            "GET /unread HTTP/1.1\r\nhost: h\r\n\r\n",
            "POST /read HTTP/1.1\r\nhost: h\r\ncontent-length: 4\r\n\r\nbody",
            "POST /read HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
            "GET /unread HTTP/1.1\r\nhost: h\r\n\r\n",
        ] {
            let answered = ask(&mut connection, request).await;
            assert!(!answered.contains("connection: close"), "{request}: {answered}");
        }
    }
}
