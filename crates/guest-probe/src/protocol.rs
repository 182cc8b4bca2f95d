//! The requests that the probe understands, one line each, and how a reply begins.
//!
//! A request is `VERB ID [ARGUMENTS]`. The id is the asker's: it comes back as `seq`, and a request that is sent
//! twice with the same id is carried out once and answered twice, so that a client may repeat itself over a
//! network that loses datagrams. Anything that is not a request gets an error that says what was expected.

use std::fmt;

use crate::files::MOST_FILE_KIB;
use crate::memory::{Rewrite, Settings};

/// Longest request in bytes.
pub const MOST_REQUEST_BYTES: usize = 512;

/// Longest id in bytes.
pub const MOST_ID_BYTES: usize = 64;

/// Most files that one request may write.
pub const MOST_FILES: u32 = 10_000;

/// What a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// The tick and nothing else; answered at once.
    Tick,
    /// Everything that is known without looking; answered at once.
    Status,
    /// Look at every page and file; answered when done.
    Verify,
    /// Change the memory area and its rate.
    Set(Changes),
    /// Write files durably; answered when done.
    Write {
        /// How many.
        count: u32,
        /// Size of each in KiB.
        kib: u32,
    },
    /// Break the guest.
    Break(Breakage),
}

/// How to break the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breakage {
    /// Delete the data directory.
    Data,
    /// Panic the kernel.
    Panic,
}

/// Changes to [`Settings`]; what is not named stays.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// New size of the area in MiB.
    pub memory_mib: Option<u32>,
    /// New rate in MiB a second.
    pub rate_mib_s: Option<u32>,
    /// New size of the rewritten part in MiB.
    pub hot_mib: Option<u32>,
    /// New way to rewrite.
    pub rewrite: Option<Rewrite>,
}

impl Changes {
    /// The settings after the changes.
    pub fn applied_to(self, settings: Settings) -> Settings {
        Settings {
            memory_mib: self.memory_mib.unwrap_or(settings.memory_mib),
            rate_mib_s: self.rate_mib_s.unwrap_or(settings.rate_mib_s),
            hot_mib: self.hot_mib.unwrap_or(settings.hot_mib),
            rewrite: self.rewrite.unwrap_or(settings.rewrite),
        }
    }

    /// Takes one `name=value` setting.
    ///
    /// # Errors
    /// When the name is unknown or the value is not one.
    pub fn take(&mut self, setting: &str) -> Result<(), BadRequest> {
        let Some((name, value)) = setting.split_once('=') else {
            return Err(BadRequest::new("setting", setting, "name=value"));
        };
        match name {
            "memory_mib" => self.memory_mib = Some(number(name, value)?),
            "rate_mib_s" => self.rate_mib_s = Some(number(name, value)?),
            "hot_mib" => self.hot_mib = Some(number(name, value)?),
            "pattern" => self.rewrite = Some(rewrite(value)?),
            _ => {
                return Err(BadRequest::new("setting", name, "memory_mib, rate_mib_s, hot_mib or pattern"));
            }
        }
        Ok(())
    }
}

/// A request that was understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The asker's id.
    pub id: String,
    /// What is wanted.
    pub command: Command,
}

/// Why a line is not a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BadRequest {
    /// The id, when that much could be read.
    pub id: Option<String>,
    /// Which part is bad.
    pub field: &'static str,
    /// What stood there, shortened.
    pub value: String,
    /// What was expected.
    pub expected: String,
}

impl BadRequest {
    fn new(field: &'static str, value: &str, expected: impl Into<String>) -> Self {
        let value = value.chars().take(MOST_ID_BYTES).collect();
        Self { id: None, field, value, expected: expected.into() }
    }
}

impl fmt::Display for BadRequest {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{} is {:?}, expected {}", self.field, self.value, self.expected)
    }
}

impl std::error::Error for BadRequest {}

/// Reads a request.
///
/// # Errors
/// When it is not one; see [`BadRequest`].
pub fn parse(line: &[u8]) -> Result<Request, BadRequest> {
    if line.len() > MOST_REQUEST_BYTES {
        let expected = format!("at most {MOST_REQUEST_BYTES} bytes");
        return Err(BadRequest::new("request", &format!("{} bytes", line.len()), expected));
    }
    let Ok(text) = std::str::from_utf8(line) else {
        return Err(BadRequest::new("request", &String::from_utf8_lossy(line), "UTF-8"));
    };
    let mut words = text.split_ascii_whitespace();
    let verb = words.next().unwrap_or_default();
    let id = words.next().unwrap_or_default();
    if !is_id(id) {
        let expected = format!("1 to {MOST_ID_BYTES} letters, digits, '-', '_', '.'");
        return Err(BadRequest::new("id", id, expected));
    }
    let arguments: Vec<&str> = words.collect();
    match command(verb, &arguments) {
        Ok(command) => Ok(Request { id: id.to_owned(), command }),
        Err(bad) => Err(BadRequest { id: Some(id.to_owned()), ..bad }),
    }
}

fn is_id(id: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
    (1..=MOST_ID_BYTES).contains(&id.len()) && id.bytes().all(plain)
}

fn command(verb: &str, arguments: &[&str]) -> Result<Command, BadRequest> {
    match (verb, arguments) {
        ("tick", []) => Ok(Command::Tick),
        ("status", []) => Ok(Command::Status),
        ("verify", []) => Ok(Command::Verify),
        ("set", [_, ..]) => {
            let mut changes = Changes::default();
            arguments.iter().try_for_each(|setting| changes.take(setting))?;
            Ok(Command::Set(changes))
        }
        ("write", [count]) => write(count, "16"),
        ("write", [count, kib]) => write(count, kib),
        ("break", ["data"]) => Ok(Command::Break(Breakage::Data)),
        ("break", ["panic"]) => Ok(Command::Break(Breakage::Panic)),
        ("tick" | "status" | "verify", _) => Err(BadRequest::new("arguments", &arguments.join(" "), "none")),
        ("set", _) => Err(BadRequest::new("arguments", "", "name=value settings")),
        ("write", _) => Err(BadRequest::new("arguments", &arguments.join(" "), "COUNT [KIB]")),
        ("break", _) => Err(BadRequest::new("arguments", &arguments.join(" "), "data or panic")),
        _ => Err(BadRequest::new("verb", verb, "tick, status, verify, set, write or break")),
    }
}

fn write(count: &str, kib: &str) -> Result<Command, BadRequest> {
    let (count, kib) = (number("count", count)?, number("kib", kib)?);
    if !(1..=MOST_FILES).contains(&count) {
        return Err(BadRequest::new("count", &count.to_string(), format!("1 to {MOST_FILES}")));
    }
    if kib > MOST_FILE_KIB {
        return Err(BadRequest::new("kib", &kib.to_string(), format!("0 to {MOST_FILE_KIB}")));
    }
    Ok(Command::Write { count, kib })
}

fn number(name: &str, value: &str) -> Result<u32, BadRequest> {
    let field = match name {
        "memory_mib" => "memory_mib",
        "rate_mib_s" => "rate_mib_s",
        "hot_mib" => "hot_mib",
        "kib" => "kib",
        _ => "count",
    };
    value.parse().map_err(|_| BadRequest::new(field, value, format!("0 to {}", u32::MAX)))
}

fn rewrite(value: &str) -> Result<Rewrite, BadRequest> {
    match value {
        "word" => Ok(Rewrite::Word),
        "whole" => Ok(Rewrite::Whole),
        _ => Err(BadRequest::new("pattern", value, "word or whole")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command_of(line: &str) -> Command {
        parse(line.as_bytes()).expect("a good request").command
    }

    #[test]
    fn good_requests_are_understood() {
        assert_eq!(command_of("tick 1"), Command::Tick);
        assert_eq!(command_of("  status\tab-1.x_2 \r\n"), Command::Status);
        assert_eq!(command_of("write 3 7"), Command::Write { count: 7, kib: 16 });
        assert_eq!(command_of("write 3 7 0"), Command::Write { count: 7, kib: 0 });
        assert_eq!(command_of("break 9 panic"), Command::Break(Breakage::Panic));
        let changes = Changes {
            memory_mib: Some(600),
            rate_mib_s: Some(20),
            rewrite: Some(Rewrite::Whole),
            ..Changes::default()
        };
        assert_eq!(command_of("set 1 memory_mib=600 rate_mib_s=20 pattern=whole"), Command::Set(changes));
    }

    #[test]
    fn nonsense_gets_an_error_that_names_the_field_and_what_was_expected() {
        let cases: [(&[u8], &str); 18] = [
            (b"", "id"),
            (b"tick", "id"),
            (b"tick a/b", "id"),
            (b"tick \xff\xfe", "request"),
            (b"tick 1 2", "arguments"),
            (b"Tick 1", "verb"),
            (b"verify 1 now", "arguments"),
            (b"set 1", "arguments"),
            (b"set 1 memory_mib", "setting"),
            (b"set 1 colour=red", "setting"),
            (b"set 1 memory_mib=-1", "memory_mib"),
            (b"set 1 memory_mib=4294967296", "memory_mib"),
            (b"set 1 rate_mib_s=", "rate_mib_s"),
            (b"set 1 pattern=random", "pattern"),
            (b"write 1 0", "count"),
            (b"write 1 1 5000", "kib"),
            (b"write 1 10001", "count"),
            (b"break 1 everything", "arguments"),
        ];
        for (line, field) in cases {
            let bad = parse(line).expect_err(&String::from_utf8_lossy(line));
            assert_eq!(bad.field, field, "{}", String::from_utf8_lossy(line));
            assert!(!bad.expected.is_empty());
        }
        let long = [b'a'; MOST_REQUEST_BYTES + 1];
        assert_eq!(parse(&long).expect_err("too long").field, "request");
        let id = format!("tick {}", "a".repeat(MOST_ID_BYTES + 1));
        assert_eq!(parse(id.as_bytes()).expect_err("too long an id").field, "id");
    }

    #[test]
    fn an_error_keeps_the_id_so_that_it_finds_its_asker() {
        assert_eq!(parse(b"write 77 many").expect_err("not a number").id.as_deref(), Some("77"));
    }
}
