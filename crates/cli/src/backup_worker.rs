//! `berth backup-worker`: works on a repository for an agent, as `berth_api::backup` says.

use std::io::{self, BufRead, Read, Write};
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use berth_api::backup::{CONTENTS_FILE, Work, WorkerEvent, WorkerReply, WorkerRequest};
use berth_backup::export::SourceFile;
use berth_backup::{BackupError, Label, Listed, Repository, StoreError, Watch};
use berth_model::repository::Backup;
use berth_model::{Problem, ProblemCode, Timestamp};

/// How much less than others it is worth to the processor: guests come first.
const NICENESS: i32 = 10;
/// How often it says how far it is.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// How long it may take to let go of the repository when it is no longer wanted.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest request, in bytes: the names of a VM's files are a thousandth of it.
const REQUEST_BYTES_MAX: u64 = 4 << 20;
/// Longest description of a backup, in bytes.
const CONTENTS_BYTES_MAX: u64 = 1 << 20;

/// Reads the request, does it, and says what came of it.
pub fn run() -> ExitCode {
    let mut line = String::new();
    let read = io::stdin().lock().take(REQUEST_BYTES_MAX).read_line(&mut line);
    let request = match read.map(|_| serde_json::from_str::<WorkerRequest>(&line)) {
        Ok(Ok(request)) => request,
        // The line holds a password: nothing of it is repeated.
        Ok(Err(_)) | Err(_) => {
            eprintln!("berth backup-worker is started by the agent, which writes it a request");
            return ExitCode::from(2);
        }
    };
    drop(line);
    // Refused, it works on as everybody else.
    let _ = rustix::process::nice(NICENESS);
    let watch = Arc::new(Watch::default());
    stop_with_the_agent(&watch);
    let (end, ended) = mpsc::channel::<()>();
    let told = Arc::clone(&watch);
    let teller = thread::spawn(move || {
        while ended.recv_timeout(PROGRESS_EVERY) == Err(mpsc::RecvTimeoutError::Timeout) {
            let (done, total) = (&told.done_bytes, &told.total_bytes);
            let (done_bytes, total_bytes) = (done.load(Ordering::Relaxed), total.load(Ordering::Relaxed));
            say(&WorkerEvent::Progress { done_bytes, total_bytes });
        }
    });
    let event = match work(&request, &watch) {
        Ok(reply) => WorkerEvent::Done { reply },
        Err(error) => WorkerEvent::Failed { problem: problem(&error) },
    };
    drop(end);
    // It writes lines and can't panic.
    let _ = teller.join();
    let failed = matches!(event, WorkerEvent::Failed { .. });
    say(&event);
    ExitCode::from(u8::from(failed))
}

/// The agent holds the other end of what is read here, for as long as it lives and wants this.
fn stop_with_the_agent(watch: &Arc<Watch>) {
    let watch = Arc::clone(watch);
    thread::spawn(move || {
        // Closed or broken, it means the same.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        watch.cancelled.store(true, Ordering::Relaxed);
        thread::sleep(END_TIMEOUT);
        std::process::exit(1);
    });
}

fn say(event: &WorkerEvent) {
    let mut line = serde_json::to_vec(event).expect("events are plain data");
    line.push(b'\n');
    // Nobody who hears it: then nobody wants it.
    let _ = io::stdout().lock().write_all(&line);
}

fn work(request: &WorkerRequest, watch: &Arc<Watch>) -> Result<WorkerReply, BackupError> {
    let access = &request.access;
    if matches!(request.work, Work::Init) {
        return Repository::init(access, watch).map(|_| WorkerReply::Done);
    }
    let repository = Repository::open(access, watch)?;
    match &request.work {
        Work::Init | Work::Open => Ok(WorkerReply::Done),
        Work::List => {
            let backups = repository.list()?.into_iter().map(backup).collect();
            Ok(WorkerReply::Backups { backups })
        }
        Work::Look { backup: id } => {
            let (listed, text) = repository.look(id, CONTENTS_FILE, CONTENTS_BYTES_MAX)?;
            let text = String::from_utf8_lossy(&text).into_owned();
            Ok(WorkerReply::Contents { backup: backup(listed), text })
        }
        Work::Export { full_name, vm, snapshot, operation, files } => {
            let label = Label {
                vm: full_name.clone(),
                vm_id: vm.to_string(),
                snapshot: snapshot.clone(),
                operation: operation.to_string(),
            };
            let files = files.iter().cloned().map(|(name, path)| SourceFile { name, path });
            let facts = repository.export(&label, &files.collect::<Vec<_>>())?;
            Ok(WorkerReply::Exported { facts })
        }
        Work::Import { backup, directory, bytes_max } => {
            let facts = repository.import(backup, directory, *bytes_max)?;
            Ok(WorkerReply::Imported { facts })
        }
    }
}

fn backup(listed: Listed) -> Backup {
    Backup {
        id: listed.id,
        vm: listed.vm,
        snapshot: listed.snapshot,
        created_at: Timestamp::from_millis(u64::try_from(listed.created_at_ms).unwrap_or_default()),
        bytes: listed.bytes,
        added_bytes: listed.added_bytes,
    }
}

fn problem(error: &BackupError) -> Problem {
    let code = match error {
        BackupError::Store(StoreError::NoSpace { .. }) => ProblemCode::NoSpace,
        BackupError::Store(_) => ProblemCode::Unreachable,
        BackupError::NoRepository { .. } | BackupError::NotOne { .. } => ProblemCode::NotFound,
        BackupError::AlreadyThere { .. } => ProblemCode::AlreadyExists,
        BackupError::WrongPassword { .. } => ProblemCode::WrongState,
        BackupError::Locked { .. } => ProblemCode::Busy,
        BackupError::Damaged { .. } | BackupError::Foreign { .. } => ProblemCode::BadImage,
        BackupError::Cancelled => ProblemCode::Cancelled,
        BackupError::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            ProblemCode::NoSpace
        }
        BackupError::File { .. } => ProblemCode::Internal,
    };
    let mut message = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        message = format!("{message}: {error}");
        cause = error.source();
    }
    Problem::new(code, message)
}
