//! Carries out requests: quick ones at once, long ones one after the other on a thread of their own.
//!
//! Whoever asks hands over an [`Answer`], a way to send one line back. `tick` and `status` are answered on the
//! asker's thread, whatever else is going on, because a client measures gaps by them. Everything else is a job.
//! The *ledger* remembers the latest jobs by id: a request that comes again while its job runs is answered when
//! the job is done, and one that comes later gets the same reply once more, without the work.

use std::collections::{HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use serde_json::{Map, Value, json};

use crate::files::{Files, FilesReport};
use crate::memory::{Memory, PagesReport, Settings};
use crate::protocol::{self, BadRequest, Breakage, Changes, Command, Request};

/// Jobs that may wait, and jobs that the ledger remembers.
const MOST_WAITING: usize = 64;
const MOST_REMEMBERED: usize = 512;

/// Askers that one running job answers.
const MOST_ASKERS: usize = 4;

/// Sends one line back to whoever asked.
pub type Answer = Box<dyn Fn(&str) + Send>;

/// How a probe is set up.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// Directories for files, which take turns; without any the probe has no files and says so.
    pub data: Vec<PathBuf>,
    /// What the memory area does at first.
    pub settings: Settings,
    /// The probe has the kernel for itself: it may drop its caches and panic it. Only true inside a test guest.
    pub own_kernel: bool,
}

/// A running probe.
pub struct Probe {
    nonce: u64,
    started: Instant,
    tick: AtomicU64,
    memory: Arc<Memory>,
    files: Option<Mutex<Files>>,
    file_count: AtomicU64,
    own_kernel: bool,
    verified: Mutex<Verified>,
    ledger: Mutex<Ledger>,
    jobs: SyncSender<Request>,
}

/// The last verification and the one that is running.
#[derive(Debug, Default)]
struct Verified {
    running: Option<String>,
    last: Option<(String, PagesReport, FilesReport)>,
}

/// What became of a job.
enum Entry {
    Running { line: Vec<u8>, askers: Vec<Answer> },
    Done { line: Vec<u8>, reply: String },
}

#[derive(Default)]
struct Ledger {
    entries: HashMap<String, Entry>,
    order: VecDeque<String>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Probe {
    /// Starts a probe with its threads, which live as long as the process.
    ///
    /// # Errors
    /// When a data directory can't be used, or the system has no random bytes or no room for threads.
    pub fn start(config: &Config) -> io::Result<Arc<Self>> {
        let nonce = random_word()?;
        let open = || Files::open(&config.data, nonce, config.own_kernel);
        let files = (!config.data.is_empty()).then(open).transpose()?;
        let memory = Memory::new(nonce, config.settings);
        let (jobs, queue) = sync_channel(MOST_WAITING);
        let probe = Arc::new(Self {
            nonce,
            started: Instant::now(),
            tick: AtomicU64::new(0),
            file_count: AtomicU64::new(files.as_ref().map_or(0, Files::count)),
            memory: Arc::clone(&memory),
            files: files.map(Mutex::new),
            own_kernel: config.own_kernel,
            verified: Mutex::default(),
            ledger: Mutex::default(),
            jobs,
        });
        memory.start()?;
        let ticker = Arc::clone(&probe);
        thread::Builder::new().name("tick".into()).spawn(move || ticker.keep_ticking())?;
        let worker = Arc::clone(&probe);
        thread::Builder::new().name("jobs".into()).spawn(move || worker.work(&queue))?;
        Ok(probe)
    }

    /// The number that tells this start of the probe from every other one, as requests and events show it.
    pub fn nonce(&self) -> String {
        format!("{:016x}", self.nonce)
    }

    /// Milliseconds that the probe has lived; brings the counter in memory up to date.
    pub fn tick(&self) -> u64 {
        let now = self.uptime_ms();
        self.tick.fetch_max(now, Relaxed).max(now)
    }

    /// An event for the virtio-serial port.
    pub fn event(&self, name: &str) -> String {
        let files = self.files.is_some();
        json!({"event": name, "nonce": self.nonce(), "tick": self.tick(), "files": files}).to_string()
    }

    /// Takes a request and answers it now or later, once for each time it is asked.
    pub fn handle(&self, line: &[u8], answer: Answer) {
        let line = line.trim_ascii();
        match protocol::parse(line) {
            Err(bad) => answer(&self.refusal(&bad)),
            Ok(Request { id, command: Command::Tick }) => answer(&self.reply(&id, Map::new())),
            Ok(Request { id, command: Command::Status }) => answer(&self.reply(&id, self.status())),
            Ok(request) => self.take_job(request, line, answer),
        }
    }

    fn take_job(&self, request: Request, line: &[u8], answer: Answer) {
        let mut ledger = lock(&self.ledger);
        match ledger.entries.get_mut(&request.id) {
            Some(Entry::Running { line: known, askers }) if known == line => {
                // Whoever asks again is most likely who asked first: the latest way back is the one to use.
                if askers.len() == MOST_ASKERS {
                    drop(askers.remove(0));
                }
                askers.push(answer);
            }
            Some(Entry::Done { line: known, reply }) if known == line => answer(reply),
            Some(_) => {
                answer(&self.error(Some(&request.id), "id_reused", "the id was used for another request"))
            }
            None => {
                let id = request.id.clone();
                if self.jobs.try_send(request).is_err() {
                    return answer(&self.error(Some(&id), "busy", "too many requests are waiting"));
                }
                ledger.insert(id, Entry::Running { line: line.to_vec(), askers: vec![answer] });
            }
        }
    }

    fn work(&self, queue: &Receiver<Request>) {
        while let Ok(Request { id, command }) = queue.recv() {
            let reply = match self.run(&id, command) {
                Ok(fields) => self.reply(&id, fields),
                Err((code, message)) => self.error(Some(&id), code, &message),
            };
            // An asker gets its line outside the lock: a slow port must not keep others from asking.
            let askers = lock(&self.ledger).finish(&id, &reply);
            askers.iter().for_each(|answer| answer(&reply));
            if matches!(command, Command::Break(Breakage::Panic)) && self.own_kernel {
                thread::sleep(Duration::from_millis(50));
                // A guest that refuses to be broken goes on ticking, which is what its client looks at.
                let _ = fs::write("/proc/sysrq-trigger", "c");
            }
        }
    }

    fn run(&self, id: &str, command: Command) -> Result<Map<String, Value>, (&'static str, String)> {
        match command {
            Command::Tick => Ok(Map::new()),
            Command::Status => Ok(self.status()),
            Command::Verify => Ok(self.verify(id)),
            Command::Set(changes) => self.set(changes),
            Command::Write { count, kib } => self.write(count, kib),
            Command::Break(Breakage::Data) => {
                self.with_files(|files| files.destroy())?;
                Ok(fields(json!({"broken": "data"})))
            }
            Command::Break(Breakage::Panic) if self.own_kernel => Ok(fields(json!({"broken": "panic"}))),
            Command::Break(Breakage::Panic) => {
                Err(("refused", "this probe does not have its kernel to itself".into()))
            }
        }
    }

    fn set(&self, changes: Changes) -> Result<Map<String, Value>, (&'static str, String)> {
        let settings = changes.applied_to(self.memory.settings());
        self.memory.set(settings).map_err(|most_mib| {
            let wanted = settings.memory_mib;
            ("too_much_memory", format!("memory_mib is {wanted}, the guest has room for {most_mib}"))
        })?;
        Ok(settings_fields(settings))
    }

    fn write(&self, count: u32, kib: u32) -> Result<Map<String, Value>, (&'static str, String)> {
        let files = self.with_files(|files| {
            let result = files.write(count, kib);
            self.file_count.store(files.count(), Relaxed);
            result.map(|()| files.count())
        })?;
        Ok(fields(json!({"written": count, "files": files})))
    }

    fn with_files<T>(
        &self,
        act: impl FnOnce(&mut Files) -> io::Result<T>,
    ) -> Result<T, (&'static str, String)> {
        let Some(files) = &self.files else {
            return Err(("no_files", "the guest has no data disk".into()));
        };
        act(&mut lock(files)).map_err(|error| ("disk", error.to_string()))
    }

    fn verify(&self, id: &str) -> Map<String, Value> {
        lock(&self.verified).running = Some(id.to_owned());
        let begun = Instant::now();
        let pages = self.memory.verify();
        let files = self.files.as_ref().map_or_else(FilesReport::default, |files| lock(files).verify());
        *lock(&self.verified) = Verified { running: None, last: Some((id.to_owned(), pages, files)) };
        let mut reply = report_fields(id, pages, files);
        reply.insert("verify_ms".into(), json!(begun.elapsed().as_millis() as u64));
        reply
    }

    fn status(&self) -> Map<String, Value> {
        let mut status = settings_fields(self.memory.settings());
        status.insert("filling".into(), json!(self.memory.filling()));
        status.insert("dirtied_pages".into(), json!(self.memory.dirtied_pages()));
        let verified = lock(&self.verified);
        status.insert("verifying".into(), json!(verified.running));
        if let Some((id, pages, files)) = &verified.last {
            status.extend(report_fields(id, *pages, *files));
        }
        status.insert("pages".into(), json!(self.memory.pages()));
        status.insert("files".into(), json!(self.file_count.load(Relaxed)));
        status.insert("files_possible".into(), json!(self.files.is_some()));
        status
    }

    fn reply(&self, id: &str, mut fields: Map<String, Value>) -> String {
        fields.insert("seq".into(), json!(id));
        fields.insert("nonce".into(), json!(self.nonce()));
        fields.insert("tick".into(), json!(self.tick()));
        fields.insert("uptime_ms".into(), json!(self.uptime_ms()));
        Value::Object(fields).to_string()
    }

    fn refusal(&self, bad: &BadRequest) -> String {
        self.error(bad.id.as_deref(), "bad_request", &bad.to_string())
    }

    fn error(&self, id: Option<&str>, code: &str, message: &str) -> String {
        json!({"seq": id, "nonce": self.nonce(), "error": code, "message": message}).to_string()
    }

    fn uptime_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Asking brings the tick up to date too; the thread is there so that it lives when nobody asks. Waking up is
    /// dear under emulation, where an idle guest should be idle.
    fn keep_ticking(&self) {
        loop {
            self.tick();
            thread::sleep(Duration::from_millis(100));
        }
    }
}

impl Ledger {
    fn insert(&mut self, id: String, entry: Entry) {
        if self.order.len() == MOST_REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.entries.remove(&oldest);
        }
        self.order.push_back(id.clone());
        self.entries.insert(id, entry);
    }

    fn finish(&mut self, id: &str, reply: &str) -> Vec<Answer> {
        let Some(entry) = self.entries.get_mut(id) else { return Vec::new() };
        let Entry::Running { line, askers } = entry else { return Vec::new() };
        let (line, askers) = (std::mem::take(line), std::mem::take(askers));
        *entry = Entry::Done { line, reply: reply.to_owned() };
        askers
    }
}

fn fields(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

fn settings_fields(settings: Settings) -> Map<String, Value> {
    fields(json!({
        "memory_mib": settings.memory_mib,
        "rate_mib_s": settings.rate_mib_s,
        "hot_mib": settings.hot_mib,
        "pattern": settings.rewrite.as_str(),
    }))
}

fn report_fields(id: &str, pages: PagesReport, files: FilesReport) -> Map<String, Value> {
    fields(json!({
        "verify_id": id,
        "pages": pages.pages,
        "pages_wrong": pages.wrong,
        "pages_stale": pages.stale,
        "pages_lost": pages.lost,
        "first_page_wrong": pages.first_wrong,
        "files": files.files,
        "files_wrong": files.wrong,
        "first_file_wrong": files.first_wrong,
    }))
}

fn random_word() -> io::Result<u64> {
    let mut bytes = [0; 8];
    io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}
