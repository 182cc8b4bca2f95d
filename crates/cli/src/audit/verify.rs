//! `berth audit verify`: holds an export against the key, and against what was seen of the log before.
//!
//! With a file and a key nothing else is needed: no manager, no configuration. Without a file the manager is asked for
//! its whole log; what it showed last, and the key that it was signed with, are kept beside the configuration, so that
//! a manager that forgets or rewrites history, or changes its key, is found out by whoever asked before.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc;

use anyhow::Context as _;
use berth_api::endpoint::Nothing;
use berth_api::manager::{AuditExport, AuditExportQuery, AuditKeyShow};
use berth_model::{Problem, ProblemCode};
use berth_tlog::export::{self, Fault, Question, Verified};
use berth_tlog::{Checkpoint, VerifyingKey};
use bytes::Bytes;
use clap::Args;
use http_body_util::BodyExt as _;
use serde::{Deserialize, Serialize};

use super::broken_off;
use crate::config;
use crate::exit::Failure;
use crate::output::{Facts, Output};
use crate::session::Session;

pub const AFTER: &str = "\
With FILE (from 'berth audit export') and --key or --key-text nothing is asked of any manager. Without FILE the manager's
own log is fetched; it must also contain what this user verified last.
Exit code 0: every record is as it was logged. 1: one is not; the first is named.";

/// Bytes that are read of a file at once.
const READ_BYTES: usize = 1 << 20;
/// How many parts of an export may wait to be checked.
const PARTS_WAITING: usize = 32;

/// What to check, and by which keys.
#[derive(Debug, Args)]
pub struct VerifyArguments {
    /// The export to check, '-' for standard input; the manager's own log without it
    pub file: Option<PathBuf>,
    /// File with the public key, a line each ('berth audit key' shows it; pki/audit.pub beside the manager's records)
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,
    /// The public key itself: name+id+base64
    #[arg(long, value_name = "KEY")]
    key_text: Vec<String>,
    /// File with a checkpoint that was seen earlier: the log must still contain it
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
}

impl VerifyArguments {
    fn keys(&self) -> Result<Vec<VerifyingKey>, Failure> {
        let mut keys = Vec::new();
        for path in &self.key {
            let text = read(path, "key")?;
            for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
                keys.push(parse_key("key", line)?);
            }
        }
        for text in &self.key_text {
            keys.push(parse_key("key-text", text)?);
        }
        Ok(keys)
    }

    fn known(&self, keys: &[VerifyingKey]) -> Result<Option<Checkpoint>, Failure> {
        let Some(path) = &self.checkpoint else { return Ok(None) };
        let wrong =
            |error| Failure::field("checkpoint", path.display(), &format!("a signed checkpoint: {error}"));
        Checkpoint::open(&read(path, "checkpoint")?, keys).map(Some).map_err(wrong)
    }
}

fn parse_key(field: &str, text: &str) -> Result<VerifyingKey, Failure> {
    text.parse().map_err(|error| Failure::field(field, text, &format!("a public key: {error}")))
}

fn read(path: &Path, field: &str) -> Result<String, Failure> {
    fs::read_to_string(path)
        .map_err(|error| Failure::field(field, path.display(), &format!("a file that can be read ({error})")))
}

/// Checks a file, with nothing but the keys.
///
/// # Errors
/// What is wrong with the file, or with the arguments.
pub(super) fn offline(arguments: &VerifyArguments, output: &Output) -> Result<(), Failure> {
    let Some(path) = &arguments.file else { return Ok(()) };
    let keys = arguments.keys()?;
    if keys.is_empty() {
        let expected = "the log's public key, by --key or --key-text ('berth audit key' shows it)";
        return Err(Failure::field("key", "", expected));
    }
    let known = arguments.known(&keys)?;
    let question = Question { keys, known };
    let result = if path == Path::new("-") {
        export::verify(BufReader::with_capacity(READ_BYTES, io::stdin()), &question)
    } else {
        let file = File::open(path).map_err(|error| {
            Failure::field("file", path.display(), &format!("a file that can be read ({error})"))
        })?;
        export::verify(BufReader::with_capacity(READ_BYTES, file), &question)
    };
    let found = result.map_err(|fault| wrong(&path.display().to_string(), &fault))?;
    say(output, &found)
}

/// What is remembered of a manager's log.
#[derive(Debug, Serialize, Deserialize)]
struct Seen {
    /// The keys that its checkpoints were good by.
    keys: Vec<String>,
    /// The last checkpoint.
    note: String,
}

/// Checks the manager's own log.
///
/// # Errors
/// What is wrong with it, or that the manager can't be asked.
pub(super) async fn online(session: &Session, arguments: &VerifyArguments) -> Result<(), Failure> {
    let place = config::directory().map(|directory| directory.join(file_name(session.client.address())));
    verify_online(session, arguments, place.as_deref()).await
}

async fn verify_online(
    session: &Session,
    arguments: &VerifyArguments,
    place: Option<&Path>,
) -> Result<(), Failure> {
    let seen = place.map(load).transpose()?.flatten();
    let mut keys = arguments.keys()?;
    for text in seen.iter().flat_map(|seen| &seen.keys) {
        keys.push(parse_key("remembered key", text)?);
    }
    let shown = session.ask::<AuditKeyShow>(&Nothing {}, &Nothing {}).await?.key;
    let shown = parse_key("the manager's key", &shown)?;
    if keys.is_empty() {
        session.output.remark(&format!(
            "the log's key is seen for the first time, and trusted from now on: {shown}\n\
             compare it with pki/audit.pub on the manager's machine"
        ));
        keys.push(shown);
    } else if !keys.contains(&shown) {
        let message = "the manager signs its log with another key than the one that is known; \
                       if it was replaced on purpose, give the new one with --key or --key-text";
        return Err(anyhow::anyhow!(message).into());
    }
    let known = match (arguments.known(&keys)?, &seen) {
        (Some(known), _) => Some(known),
        (None, Some(seen)) => {
            Some(Checkpoint::open(&seen.note, &keys).context("the remembered checkpoint can't be believed")?)
        }
        (None, None) => None,
    };
    let question = Question { keys: keys.clone(), known };
    let found = fetch_and_verify(session, question).await?;
    if let Some(place) = place {
        let mut keys: Vec<String> = keys.iter().map(ToString::to_string).collect();
        keys.dedup();
        let seen = Seen { keys, note: found.note.clone() };
        let text = serde_json::to_string_pretty(&seen).context("what was seen can't be written")?;
        config::write_private(place, text.as_bytes())?;
    }
    say(&session.output, &found)
}

/// One file for each manager.
fn file_name(address: &str) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || c == '.' || c == '-' { c } else { '_' };
    format!("audit-{}.json", address.chars().map(safe).collect::<String>())
}

fn load(place: &Path) -> Result<Option<Seen>, Failure> {
    match fs::read(place) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(anyhow::Error::new(error).context(format!("{} can't be read", place.display())).into())
        }
        // Not passed over: whoever destroys it would have history forgotten.
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .with_context(|| format!("{} is damaged: look why, and remove it to begin anew", place.display()))
            .map_err(Failure::from),
    }
}

async fn fetch_and_verify(session: &Session, question: Question) -> Result<Verified, Failure> {
    let response = session.client.download::<AuditExport>(&Nothing {}, &AuditExportQuery::default()).await?;
    let mut body = response.into_body();
    let (sender, parts) = mpsc::sync_channel::<io::Result<Bytes>>(PARTS_WAITING);
    let checking = std::thread::spawn(move || {
        let reader = Parts { parts, rest: Bytes::new() };
        export::verify(BufReader::with_capacity(READ_BYTES, reader), &question)
    });
    let mut trouble = None;
    while let Some(frame) = body.frame().await {
        let part = match frame {
            Ok(frame) => frame.into_data().map(Ok).unwrap_or_else(|_| Ok(Bytes::new())),
            Err(error) => {
                trouble = Some(broken_off(session, &*error));
                Err(io::Error::from(io::ErrorKind::ConnectionReset))
            }
        };
        // Nobody takes it any more: something is wrong, which the thread says.
        if part.as_ref().map_or(true, |part| !part.is_empty()) && sender.send(part).is_err() {
            break;
        }
    }
    drop(sender);
    let result = checking.join().map_err(|_| anyhow::anyhow!("checking the log broke off"))?;
    match (result, trouble) {
        (_, Some(trouble)) => Err(trouble),
        (Ok(found), None) => Ok(found),
        (Err(fault), None) => Err(wrong(session.client.address(), &fault)),
    }
}

/// An export as it comes in.
struct Parts {
    parts: mpsc::Receiver<io::Result<Bytes>>,
    rest: Bytes,
}

impl Read for Parts {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.rest.is_empty() {
            match self.parts.recv() {
                Ok(part) => self.rest = part?,
                Err(mpsc::RecvError) => return Ok(0),
            }
        }
        let length = self.rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&self.rest.split_to(length));
        Ok(length)
    }
}

/// What is said of a log that is not as it should be. It is the answer, not a fault of Berth's own.
fn wrong(of: &str, fault: &Fault) -> Failure {
    let cause = std::error::Error::source(fault).map(|cause| format!(": {cause}")).unwrap_or_default();
    let message = format!("the audit of {of} is not as it was logged: {fault}{cause}");
    Failure::Local(Box::new(Problem::new(ProblemCode::Internal, message)))
}

#[derive(Serialize)]
struct Answer<'a> {
    verified: bool,
    origin: &'a str,
    first: u64,
    end: u64,
    size: u64,
    root: String,
    whole: bool,
    contains_known: Option<bool>,
}

fn say(output: &Output, found: &Verified) -> Result<(), Failure> {
    let Checkpoint { origin, size, root } = &found.checkpoint;
    let answer = Answer {
        verified: true,
        origin,
        first: found.first,
        end: found.end,
        size: *size,
        root: root.to_string(),
        whole: found.is_whole(),
        contains_known: found.contains_known,
    };
    output.one(&answer, || {
        let records = match (found.end - found.first, found.is_whole()) {
            (count, true) => format!("all {count} records are as they were logged"),
            (0, false) => format!("none of a log of {size} or more"),
            (count, false) => {
                let last = found.end - 1;
                format!(
                    "{count} records ({} to {last}) are as they were logged; the log has more",
                    found.first
                )
            }
        };
        let before = found.contains_known.map(|_| "contained, nothing of it was rewritten");
        Facts::new()
            .with("verified", records)
            .with("log", origin)
            .with("size", size)
            .with("root", root)
            .with_some("earlier checkpoint", before)
    })
}

#[cfg(test)]
mod tests;
