//! The process that works on a repository: started, told, listened to, and ended.

use std::process::Stdio;
use std::time::Duration;

use berth_api::backup::{WORKER_COMMAND, Work, WorkerEvent, WorkerReply, WorkerRequest};
use berth_model::operation::Progress;
use berth_model::repository::RepositoryAccess;
use berth_model::{Problem, ProblemCode};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};

use crate::services::Services;
use crate::task::{TaskContext, cancelled};

/// What this very program is, also when another one lies in its place by now.
const OWN_PROGRAM: &str = "/proc/self/exe";
/// How long a question may take that somebody waits for.
const ASK_TIMEOUT: Duration = Duration::from_secs(120);
/// How long the process may take to let go of the repository once it is no longer wanted, before it is killed.
const END_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest line that it may say, in bytes: a list of some ten thousand backups.
const LINE_BYTES_MAX: u64 = 16 << 20;

/// Asks something that is answered soon.
///
/// # Errors
/// What the process refuses; that it does not answer.
pub async fn ask(services: &Services, access: RepositoryAccess, work: Work) -> Result<WorkerReply, Problem> {
    let place = access.url.to_string();
    let mut worker = Worker::start(services, &WorkerRequest { access, work }).await?;
    match tokio::time::timeout(ASK_TIMEOUT, worker.listen(|_, _| {})).await {
        Ok(reply) => reply,
        Err(_) => {
            let message =
                format!("the repository at {place} does not answer within {} s", ASK_TIMEOUT.as_secs());
            Err(Problem::new(ProblemCode::Unreachable, message))
        }
    }
}

/// Has something done that takes its time, for a task, which says how far it is.
///
/// # Errors
/// What the process refuses; [`ProblemCode::Cancelled`].
pub async fn work(
    services: &Services,
    task: &TaskContext,
    phase: &str,
    request: &WorkerRequest,
) -> Result<WorkerReply, Problem> {
    let mut worker = Worker::start(services, request).await?;
    let tell = |done_bytes, total_bytes| {
        task.progress(Progress { phase: phase.to_owned(), done_bytes, total_bytes, ..Progress::default() });
    };
    tell(0, 0);
    tokio::select! {
        biased;
        () = task.cancel().cancelled() => {}
        reply = worker.listen(tell) => return reply,
    }
    // What it reads from is closed: it lets go of the repository, and ends.
    worker.input = None;
    // Killed when it is dropped, if it takes longer.
    let _ = tokio::time::timeout(END_TIMEOUT, worker.listen(|_, _| {})).await;
    Err(cancelled())
}

struct Worker {
    child: Child,
    input: Option<ChildStdin>,
    output: tokio::io::Take<BufReader<tokio::process::ChildStdout>>,
}

impl Worker {
    async fn start(services: &Services, request: &WorkerRequest) -> Result<Self, Problem> {
        let failed = |what: &str, error: &dyn std::fmt::Display| {
            Problem::new(ProblemCode::Internal, format!("the process for backups {what}: {error}"))
        };
        let mut command = Command::new(OWN_PROGRAM);
        command.arg(WORKER_COMMAND).stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        // Where `ssh` is to read keys from, for a moment: nobody else comes there, and nothing of it stays.
        command.env("TMPDIR", services.layout.run());
        let mut child = command.spawn().map_err(|error| failed("can't be started", &error))?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("can't be spoken to", &"it has no pipes"));
        };
        let mut line = serde_json::to_vec(request).expect("requests are plain data");
        line.push(b'\n');
        let told = input.write_all(&line).await.and(input.flush().await);
        told.map_err(|error| failed("does not listen", &error))?;
        let output = tokio::io::AsyncReadExt::take(BufReader::new(output), LINE_BYTES_MAX);
        Ok(Self { child, input: Some(input), output })
    }

    async fn listen(&mut self, mut tell: impl FnMut(u64, u64)) -> Result<WorkerReply, Problem> {
        let mut line = String::new();
        loop {
            line.clear();
            self.output.set_limit(LINE_BYTES_MAX);
            let read = self.output.read_line(&mut line).await;
            match read.map(|_| serde_json::from_str::<WorkerEvent>(&line)) {
                Ok(Ok(WorkerEvent::Progress { done_bytes, total_bytes })) => tell(done_bytes, total_bytes),
                Ok(Ok(WorkerEvent::Done { reply })) => return Ok(reply),
                Ok(Ok(WorkerEvent::Failed { problem })) => return Err(problem),
                Ok(Err(_)) | Err(_) => return Err(self.died().await),
            }
        }
    }

    async fn died(&mut self) -> Problem {
        let how = match tokio::time::timeout(END_TIMEOUT, self.child.wait()).await {
            Ok(Ok(status)) => status.to_string(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it says what nobody understands".to_owned(),
        };
        Problem::new(ProblemCode::Internal, format!("the process for backups broke off ({how}): try again"))
    }
}

/// That it answered what was not asked.
pub fn astray() -> Problem {
    Problem::new(ProblemCode::Internal, "the process for backups answered what was not asked")
}
