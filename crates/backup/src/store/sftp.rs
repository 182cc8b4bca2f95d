//! A repository on another machine, over SFTP: the system's `ssh` does the connection, what is said over it is said here.
//!
//! The keys that the repository came with lie in files for as long as it takes `ssh` to log in, readable by nobody else.
//! A connection that breaks is made anew by the next try.

use std::fs;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use berth_model::repository::{Location, RepositoryKeys, SftpAddress};
use bytes::Bytes;
use rustic_core::Id;

use super::{Store, StoreError};
use wire::{Answer, Attributes, Packet};

mod wire;

/// How much one request reads or writes: what every server takes.
const CHUNK_BYTES: u32 = 32 * 1024;
/// How many requests are on their way at once. Fewer: the link's delay counts for each. More: memory on both sides.
const WINDOW: usize = 64;
/// How long it may take until a machine answers, in seconds.
const CONNECT_SECONDS: u32 = 20;
/// What a file that is being written ends in.
const UNFINISHED: &str = ".unfinished";
/// Most of what `ssh` complains that is kept, in bytes.
const COMPLAINT_BYTES_MAX: u64 = 4096;

const FLAG_READ: u32 = 1;
const FLAG_WRITE_CREATE_TRUNCATE: u32 = 2 | 8 | 16;

pub(super) struct Sftp {
    address: SftpAddress,
    keys: RepositoryKeys,
    place: String,
    session: Mutex<Option<Session>>,
}

/// A refusal of the server's, or that it can't be reached.
enum Refusal {
    Missing,
    Said(String),
    Broken(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Broken(error)
    }
}

impl Sftp {
    pub(super) fn new(address: &SftpAddress, keys: &RepositoryKeys) -> Result<Self, StoreError> {
        let place = Location::Sftp(address.clone()).to_string();
        Ok(Self { address: address.clone(), keys: keys.clone(), place, session: Mutex::new(None) })
    }

    fn full(&self, path: &str) -> String {
        format!("{}/{path}", self.address.path)
    }

    /// Asks the server something, over a connection that is made if there is none.
    fn ask<T>(
        &self,
        what: String,
        work: impl FnOnce(&mut Session) -> Result<T, Refusal>,
    ) -> Result<T, StoreError> {
        let mut held = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        let session = match &mut *held {
            Some(session) => session,
            none => {
                let session = Session::open(&self.address, &self.keys);
                none.insert(
                    session.map_err(|error| StoreError::failed(&self.place, "connecting to it", &error))?,
                )
            }
        };
        match work(session) {
            Ok(value) => Ok(value),
            Err(Refusal::Missing) => Err(StoreError::Missing { place: self.place.clone(), what }),
            Err(Refusal::Said(text)) => Err(StoreError::refused(&self.place, &what, &text)),
            Err(Refusal::Broken(error)) => {
                let complaint = held.take().map(Session::end).unwrap_or_default();
                let detail =
                    if complaint.is_empty() { error.to_string() } else { format!("{error}: {complaint}") };
                Err(StoreError::failed(&self.place, &what, &detail))
            }
        }
    }
}

impl Store for Sftp {
    fn place(&self) -> &str {
        &self.place
    }

    fn create(&self) -> Result<(), StoreError> {
        self.ask("making the directory".to_owned(), |session| session.make_directories(&self.address.path))
    }

    fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let full = self.full(directory);
        self.ask(format!("listing {directory}"), |session| {
            let (mut found, mut open) = (Vec::new(), vec![full]);
            while let Some(directory) = open.pop() {
                for (name, attributes) in session.list(&directory)? {
                    if attributes.is_directory() && name != "." && name != ".." {
                        open.push(format!("{directory}/{name}"));
                    } else if attributes.is_file() && !name.ends_with(UNFINISHED) {
                        found.push((name, attributes.bytes.unwrap_or_default()));
                    }
                }
            }
            Ok(found)
        })
    }

    fn length(&self, path: &str) -> Result<Option<u64>, StoreError> {
        let full = self.full(path);
        match self.ask(format!("looking at {path}"), |session| session.stat(&full)) {
            Ok(attributes) => Ok(Some(attributes.bytes.unwrap_or_default())),
            Err(StoreError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read(&self, path: &str, range: Option<Range<u64>>) -> Result<Bytes, StoreError> {
        let full = self.full(path);
        self.ask(format!("reading {path}"), |session| {
            let range = match range {
                Some(range) => range,
                None => 0..session.stat(&full)?.bytes.unwrap_or_default(),
            };
            session.read(&full, range).map(Bytes::from)
        })
    }

    fn write(&self, path: &str, parts: &[Bytes]) -> Result<(), StoreError> {
        let (full, directory) =
            (self.full(path), path.rsplit_once('/').map(|(directory, _)| self.full(directory)));
        self.ask(format!("writing {path}"), |session| {
            let unfinished = format!("{full}{UNFINISHED}");
            match session.write(&unfinished, parts) {
                Err(Refusal::Missing) => {
                    session.make_directories(directory.as_deref().unwrap_or(&self.address.path))?;
                    session.write(&unfinished, parts)?;
                }
                other => other?,
            }
            session.rename(&unfinished, &full)
        })
    }

    fn remove(&self, path: &str) -> Result<(), StoreError> {
        let full = self.full(path);
        match self.ask(format!("removing {path}"), |session| session.simple(wire::REMOVE, &full)) {
            Err(StoreError::Missing { .. }) => Ok(()),
            other => other,
        }
    }
}

/// A connection.
struct Session {
    child: Child,
    to: BufWriter<ChildStdin>,
    from: BufReader<ChildStdout>,
    complaint: Arc<Mutex<String>>,
    last_id: u32,
    renames_over: bool,
    syncs: bool,
}

impl Session {
    fn open(address: &SftpAddress, keys: &RepositoryKeys) -> io::Result<Self> {
        let files = KeyFiles::write(keys)?;
        let mut child = command(address, &files).spawn().map_err(|error| {
            io::Error::new(error.kind(), format!("the program 'ssh' can't be started: {error}"))
        })?;
        let (Some(to), Some(from), Some(errors)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(io::Error::other("a process without its pipes"));
        };
        let complaint = Arc::new(Mutex::new(String::new()));
        let kept = Arc::clone(&complaint);
        thread::spawn(move || {
            let mut text = String::new();
            let mut errors = errors;
            // What is not text is no help.
            let _ = (&mut errors).take(COMPLAINT_BYTES_MAX).read_to_string(&mut text);
            *kept.lock().unwrap_or_else(PoisonError::into_inner) = text;
            // Read on, so that it never waits for us.
            let _ = io::copy(&mut errors, &mut io::sink());
        });
        let (to, from) = (BufWriter::new(to), BufReader::new(from));
        let mut session = Self { child, to, from, complaint, last_id: 0, renames_over: false, syncs: false };
        match session.greet() {
            Ok(()) => Ok(session),
            Err(error) => {
                let complaint = session.end();
                let text = if complaint.is_empty() { error.to_string() } else { complaint };
                Err(io::Error::new(error.kind(), text))
            }
        }
    }

    fn greet(&mut self) -> io::Result<()> {
        Packet::new(wire::INIT).number(3).send(&mut self.to)?;
        self.to.flush()?;
        let mut answer = Answer::receive(&mut self.from)?;
        if answer.kind != wire::VERSION {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "what answers is no SFTP server"));
        }
        answer.number()?;
        while !answer.is_at_end() {
            match answer.text()?.as_str() {
                "posix-rename@openssh.com" => self.renames_over = true,
                "fsync@openssh.com" => self.syncs = true,
                _ => {}
            }
            answer.bytes()?;
        }
        Ok(())
    }

    /// Ends it; gives what `ssh` had to complain about, in one line.
    fn end(mut self) -> String {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // The thread that reads has an end as well now, and needs no more than a moment to say so.
        thread::sleep(std::time::Duration::from_millis(50));
        let text = std::mem::take(&mut *self.complaint.lock().unwrap_or_else(PoisonError::into_inner));
        text.lines().map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
    }

    fn send(&mut self, kind: u8, rest: impl FnOnce(Packet) -> Packet) -> Result<u32, Refusal> {
        self.last_id = self.last_id.wrapping_add(1);
        rest(Packet::new(kind).number(self.last_id)).send(&mut self.to)?;
        Ok(self.last_id)
    }

    /// The answer to the oldest question: the servers answer in order, and one that does not is left.
    fn receive(&mut self, id: u32, wanted: u8) -> Result<Option<Answer>, Refusal> {
        self.to.flush()?;
        let mut answer = Answer::receive(&mut self.from)?;
        let (kind, answered) = (answer.kind, answer.number()?);
        if answered != id {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it answers what was not asked").into());
        }
        if kind == wanted && kind != wire::STATUS {
            return Ok(Some(answer));
        }
        if kind != wire::STATUS {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it answers with a packet {kind}"),
            )
            .into());
        }
        match answer.number()? {
            wire::STATUS_OK if wanted == wire::STATUS => Ok(Some(answer)),
            wire::STATUS_EOF => Ok(None),
            wire::STATUS_NO_SUCH_FILE => Err(Refusal::Missing),
            code => {
                let text = answer.text().unwrap_or_default();
                Err(Refusal::Said(format!("it answers '{text}' ({code})")))
            }
        }
    }

    fn done(&mut self, id: u32) -> Result<(), Refusal> {
        match self.receive(id, wire::STATUS)? {
            Some(_) => Ok(()),
            None => Err(Refusal::Said("it is at an end where none can be".to_owned())),
        }
    }

    fn simple(&mut self, kind: u8, path: &str) -> Result<(), Refusal> {
        let id = self.send(kind, |packet| packet.bytes(path.as_bytes()))?;
        self.done(id)
    }

    fn handle(&mut self, id: u32) -> Result<Vec<u8>, Refusal> {
        match self.receive(id, wire::HANDLE)? {
            Some(mut answer) => Ok(answer.bytes()?.to_vec()),
            None => Err(Refusal::Missing),
        }
    }

    fn close(&mut self, handle: &[u8]) -> Result<(), Refusal> {
        let id = self.send(wire::CLOSE, |packet| packet.bytes(handle))?;
        self.done(id)
    }

    fn stat(&mut self, path: &str) -> Result<Attributes, Refusal> {
        let id = self.send(wire::STAT, |packet| packet.bytes(path.as_bytes()))?;
        match self.receive(id, wire::ATTRS)? {
            Some(mut answer) => Ok(answer.attributes()?),
            None => Err(Refusal::Missing),
        }
    }

    /// Makes a directory and those that it is in; nothing where one is.
    fn make_directories(&mut self, path: &str) -> Result<(), Refusal> {
        for (end, _) in path.match_indices('/').skip(1).chain([(path.len(), "")]) {
            let part = &path[..end];
            let id =
                self.send(wire::MKDIR, |packet| packet.bytes(part.as_bytes()).number(4).number(0o700))?;
            if let Err(refusal) = self.done(id)
                && !self.stat(part).is_ok_and(Attributes::is_directory)
            {
                return Err(refusal);
            }
        }
        Ok(())
    }

    fn list(&mut self, path: &str) -> Result<Vec<(String, Attributes)>, Refusal> {
        let id = self.send(wire::OPENDIR, |packet| packet.bytes(path.as_bytes()))?;
        let handle = match self.handle(id) {
            Ok(handle) => handle,
            Err(Refusal::Missing) => return Ok(Vec::new()),
            Err(other) => return Err(other),
        };
        let mut found = Vec::new();
        loop {
            let id = self.send(wire::READDIR, |packet| packet.bytes(&handle))?;
            let Some(mut answer) = self.receive(id, wire::NAME)? else { break };
            for _ in 0..answer.number()? {
                let name = answer.text()?;
                answer.bytes()?;
                found.push((name, answer.attributes()?));
            }
        }
        self.close(&handle)?;
        Ok(found)
    }

    fn read(&mut self, path: &str, range: Range<u64>) -> Result<Vec<u8>, Refusal> {
        let id = self.send(wire::OPEN, |packet| packet.bytes(path.as_bytes()).number(FLAG_READ).number(0))?;
        let handle = self.handle(id)?;
        let (mut bytes, mut asked) = (Vec::new(), std::collections::VecDeque::new());
        let mut next = range.start;
        while next < range.end || !asked.is_empty() {
            while next < range.end && asked.len() < WINDOW {
                let most = u32::try_from(range.end - next).map_or(CHUNK_BYTES, |left| left.min(CHUNK_BYTES));
                let id = self.send(wire::READ, |packet| packet.bytes(&handle).long(next).number(most))?;
                asked.push_back((id, most));
                next += u64::from(most);
            }
            let Some((id, wanted)) = asked.pop_front() else { break };
            let answer = self.receive(id, wire::DATA)?;
            let part = answer.map_or(Ok(Vec::new()), |mut answer| answer.bytes().map(<[u8]>::to_vec))?;
            if part.len() != usize::try_from(wanted).unwrap_or(usize::MAX) {
                // Later answers are still on their way: this connection is of no more use.
                return Err(
                    io::Error::new(io::ErrorKind::UnexpectedEof, "the file is shorter than it was").into()
                );
            }
            bytes.extend(part);
        }
        self.close(&handle)?;
        Ok(bytes)
    }

    fn write(&mut self, path: &str, parts: &[Bytes]) -> Result<(), Refusal> {
        let id = self.send(wire::OPEN, |packet| {
            packet.bytes(path.as_bytes()).number(FLAG_WRITE_CREATE_TRUNCATE).number(4).number(0o600)
        })?;
        let handle = self.handle(id)?;
        let (mut asked, mut at, mut refused) = (std::collections::VecDeque::new(), 0, None);
        let chunk = usize::try_from(CHUNK_BYTES).unwrap_or(usize::MAX);
        for part in parts.iter().flat_map(|part| part.chunks(chunk)) {
            let id = self.send(wire::WRITE, |packet| packet.bytes(&handle).long(at).bytes(part))?;
            asked.push_back(id);
            at += part.len() as u64;
            if asked.len() >= WINDOW
                && let Some(id) = asked.pop_front()
            {
                keep_first(&mut refused, self.done(id))?;
            }
        }
        for id in asked {
            keep_first(&mut refused, self.done(id))?;
        }
        if self.syncs && refused.is_none() {
            let id = self.send(wire::EXTENDED, |packet| packet.bytes(b"fsync@openssh.com").bytes(&handle))?;
            keep_first(&mut refused, self.done(id))?;
        }
        keep_first(&mut refused, self.close(&handle))?;
        refused.map_or(Ok(()), Err)
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), Refusal> {
        if self.renames_over {
            let id = self.send(wire::EXTENDED, |packet| {
                packet.bytes(b"posix-rename@openssh.com").bytes(from.as_bytes()).bytes(to.as_bytes())
            })?;
            return self.done(id);
        }
        match self.simple(wire::REMOVE, to) {
            Ok(()) | Err(Refusal::Missing) => {}
            Err(other) => return Err(other),
        }
        let id = self.send(wire::RENAME, |packet| packet.bytes(from.as_bytes()).bytes(to.as_bytes()))?;
        self.done(id)
    }
}

/// Keeps the first refusal and goes on, so that no answer is left unread; what broke ends it at once.
fn keep_first(kept: &mut Option<Refusal>, result: Result<(), Refusal>) -> Result<(), Refusal> {
    match result {
        Ok(()) => Ok(()),
        Err(Refusal::Broken(error)) => Err(Refusal::Broken(error)),
        Err(refusal) => {
            kept.get_or_insert(refusal);
            Ok(())
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn command(address: &SftpAddress, files: &KeyFiles) -> Command {
    let mut command = Command::new("ssh");
    let option = |command: &mut Command, text: String| {
        command.arg("-o").arg(text);
    };
    for fixed in
        ["BatchMode=yes", "StrictHostKeyChecking=yes", "ClearAllForwardings=yes", "PermitLocalCommand=no"]
    {
        option(&mut command, fixed.to_owned());
    }
    option(&mut command, format!("ConnectTimeout={CONNECT_SECONDS}"));
    for fixed in ["ServerAliveInterval=15", "ServerAliveCountMax=4", "ControlPath=none", "Compression=no"] {
        option(&mut command, fixed.to_owned());
    }
    if let Some(path) = &files.known_hosts {
        option(&mut command, format!("UserKnownHostsFile={}", path.display()));
        option(&mut command, "GlobalKnownHostsFile=/dev/null".to_owned());
    }
    if let Some(path) = &files.key {
        option(&mut command, "IdentitiesOnly=yes".to_owned());
        command.arg("-F").arg("none").arg("-i").arg(path);
    }
    if let Some(user) = &address.user {
        command.arg("-l").arg(user);
    }
    command.arg("-p").arg(address.port.to_string()).arg("-s").arg("--").arg(&address.host).arg("sftp");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// What `ssh` reads its keys from; goes when it is dropped.
struct KeyFiles {
    directory: PathBuf,
    key: Option<PathBuf>,
    known_hosts: Option<PathBuf>,
}

impl KeyFiles {
    fn write(keys: &RepositoryKeys) -> io::Result<Self> {
        let random = Id::random().to_hex();
        let directory = std::env::temp_dir().join(format!("berth-keys-{}", &random[..16]));
        fs::DirBuilder::new().mode(0o700).create(&directory)?;
        let mut files = Self { directory, key: None, known_hosts: None };
        if let Some(key) = &keys.key {
            // The program refuses a key whose last line has no end.
            files.key = Some(files.file("key", &format!("{}\n", key.reveal().trim_end()))?);
        }
        if let Some(hosts) = &keys.known_hosts {
            files.known_hosts = Some(files.file("known_hosts", hosts)?);
        }
        Ok(files)
    }

    fn file(&self, name: &str, text: &str) -> io::Result<PathBuf> {
        let path = self.directory.join(name);
        write_private(&path, text)?;
        Ok(path)
    }
}

fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}

impl Drop for KeyFiles {
    fn drop(&mut self) {
        // The directory that it lies in is emptied when the machine starts.
        let _ = fs::remove_dir_all(&self.directory);
    }
}
