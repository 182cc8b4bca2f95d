//! For tests: a manager that answers from a script, and things for it to answer with.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use berth_api::transport::{self, BoxFuture};
use berth_api::{Body, Client, Transport, TransportError};
use berth_model::operation::{Operation, OperationKind, OperationState, Progress};
use berth_model::vm::{GuestState, Nic, Vm, VmSpec, VmState, VmStatus};
use berth_model::{HostId, ImageId, LayerId, OperationId, Problem, SegmentId, Timestamp, VmId};
use http::{Request, Response};
use http_body_util::BodyExt as _;
use serde::Serialize;
use tokio::sync::Notify;

use crate::output::{Format, Output};
use crate::session::Session;

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Method, path and query.
    pub line: String,
    /// The body.
    pub body: Vec<u8>,
}

/// What is answered: none breaks the connection.
type Answer = Option<(u16, Vec<u8>)>;

#[derive(Default)]
struct State {
    script: Mutex<HashMap<String, VecDeque<Answer>>>,
    asked: Mutex<Vec<Asked>>,
    answers: Mutex<Vec<u8>>,
    remarks: Mutex<Vec<u8>>,
}

/// The scripted manager. The last answer to a route is given again and again.
#[derive(Clone, Default)]
pub struct Fake {
    state: Arc<State>,
    /// Ends waiting, as Ctrl-C does.
    pub interrupt: Arc<Notify>,
}

impl Fake {
    /// One that knows no route.
    pub fn new() -> Self {
        Self::default()
    }

    /// Answers `METHOD /path` with this.
    pub fn answer<T: Serialize>(self, route: &str, reply: &T) -> Self {
        self.script(route, Some((200, serde_json::to_vec(reply).expect("json"))))
    }

    /// Answers it with these bytes.
    pub fn answer_bytes(self, route: &str, bytes: Vec<u8>) -> Self {
        self.script(route, Some((200, bytes)))
    }

    /// Refuses it.
    pub fn refuse(self, route: &str, problem: &Problem) -> Self {
        self.script(route, Some((problem.code.http_status(), serde_json::to_vec(problem).expect("json"))))
    }

    /// Answers with these events, then ends.
    pub fn events<T: Serialize>(self, route: &str, events: &[T]) -> Self {
        let mut body = b": keep alive\n\n".to_vec();
        for event in events {
            body.extend(format!("data: {}\n\n", serde_json::to_string(event).expect("json")).bytes());
        }
        self.script(route, Some((200, body)))
    }

    /// Breaks the connection instead of answering.
    pub fn break_off(self, route: &str) -> Self {
        self.script(route, None)
    }

    fn script(self, route: &str, answer: Answer) -> Self {
        self.state.script.lock().expect("lock").entry(route.to_owned()).or_default().push_back(answer);
        self
    }

    /// A session that asks this manager and answers in tables.
    pub fn session(&self) -> Session {
        self.session_in(Format::Table)
    }

    /// The same in a format.
    pub fn session_in(&self, format: Format) -> Session {
        let answers = Sink(Arc::clone(&self.state), |state| &state.answers);
        let remarks = Sink(Arc::clone(&self.state), |state| &state.remarks);
        let output = Output::to_writers(format, Box::new(answers), Box::new(remarks));
        Session::for_test(Client::new(Arc::new(self.clone())), output, Arc::clone(&self.interrupt))
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state.asked.lock().expect("lock").clone()
    }

    /// What was answered on standard output.
    pub fn said(&self) -> String {
        String::from_utf8(self.state.answers.lock().expect("lock").clone()).expect("text")
    }

    /// What was remarked on standard error.
    pub fn remarked(&self) -> String {
        String::from_utf8(self.state.remarks.lock().expect("lock").clone()).expect("text")
    }
}

struct Sink(Arc<State>, fn(&State) -> &Mutex<Vec<u8>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        (self.1)(&self.0).lock().expect("lock").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Fake {
    fn send(&self, request: Request<Body>) -> BoxFuture<'_, Result<Response<Body>, TransportError>> {
        Box::pin(async move {
            let route = format!("{} {}", request.method(), request.uri().path());
            let line = match request.uri().query() {
                Some(query) => format!("{route}?{query}"),
                None => route.clone(),
            };
            let body = request.into_body().collect().await.expect("a body").to_bytes().to_vec();
            self.state.asked.lock().expect("lock").push(Asked { line, body });
            let mut script = self.state.script.lock().expect("lock");
            let answers = script.get_mut(&route).unwrap_or_else(|| panic!("nothing is scripted for {route}"));
            let answer = if answers.len() > 1 { answers.pop_front() } else { answers.front().cloned() };
            match answer.expect("an answer") {
                Some((status, body)) => {
                    Ok(Response::builder().status(status).body(transport::full(body)).expect("a response"))
                }
                None => {
                    let source = io::Error::from(io::ErrorKind::ConnectionReset).into();
                    Err(TransportError::Broken { address: "fake:1".to_owned(), source })
                }
            }
        })
    }

    fn address(&self) -> &'static str {
        "fake:1"
    }
}

/// A VM in segment `default` that runs and is ready, and has no baseline.
pub fn vm(name: &str) -> Vm {
    Vm {
        id: VmId::from_entropy([1; 10]),
        number: 1,
        segment: SegmentId::from_entropy([1; 10]),
        segment_name: "default".parse().expect("a name"),
        name: name.parse().expect("a name"),
        spec: VmSpec {
            vcpus: 2,
            memory_mib: 256,
            disk_mib: 1024,
            data_disks_mib: Vec::new(),
            image: ImageId::from_entropy([1; 10]),
            pool: "default".parse().expect("a name"),
            machine_type: "pc-q35-7.2".to_owned(),
            firmware: berth_model::vm::Firmware::default(),
            tpm: false,
            cpu_model: "qemu64".to_owned(),
            nics: vec![Nic {
                mac: "52:54:00:12:34:56".to_owned(),
                address: Some("198.18.5.20/24".to_owned()),
                gateway: None,
                forwards: Vec::new(),
            }],
            user_data: None,
            protected: false,
            class: berth_model::vm::standard_class(),
            ready_timeout_s: 300,
            isolated: false,
        },
        status: VmStatus {
            state: VmState::Running,
            host: Some(HostId::from_entropy([1; 10])),
            guest: GuestState::Ready,
            baseline: None,
            baseline_note: None,
            at_snapshot: None,
            top_layer: LayerId::from_entropy([1; 10]),
            layers: 1,
            operation: None,
            generation: 1,
            trouble: None,
        },
        created_at: Timestamp::from_millis(1_795_352_752_007),
    }
}

/// An operation that runs.
pub fn operation(kind: OperationKind) -> Operation {
    Operation {
        id: OperationId::from_entropy([1; 10]),
        kind,
        vm: Some(VmId::from_entropy([1; 10])),
        image: None,
        segment: None,
        subject: "default/books".to_owned(),
        actor: "admin".to_owned(),
        state: OperationState::Running,
        progress: Progress::default(),
        steps_done: Vec::new(),
        cancel_requested: false,
        result: None,
        problem: None,
        created_at: Timestamp::from_millis(1_795_352_752_007),
        finished_at: None,
    }
}
