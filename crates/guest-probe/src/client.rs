//! Asks a probe over UDP.
//!
//! Each request has an id of its own and is sent again until its reply comes or its time is over; the probe
//! carries it out once. A client may be used from several threads: every request has a socket of its own, so no
//! reply can be taken for another's.

use std::fmt;
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use crate::memory::Settings;
use crate::pattern::mix;

/// How long a request waits before it is sent again.
const RETRY: Duration = Duration::from_millis(200);

/// How long a guest that was told to panic has to be silent to be believed.
const DEAD_SILENCE: Duration = Duration::from_millis(600);

/// How long the quick requests may take.
const QUICK: Duration = Duration::from_secs(5);

/// Why a request brought no good reply.
#[derive(Debug)]
pub enum ProbeError {
    /// No reply came in time.
    Silent {
        /// What was asked.
        request: String,
        /// For how long it was asked.
        waited: Duration,
    },
    /// The probe refused.
    Refused {
        /// The probe's error code.
        code: String,
        /// The probe's explanation.
        message: String,
    },
    /// The reply lacks a field or has nonsense in it.
    Garbled {
        /// The field.
        field: &'static str,
        /// The whole reply.
        reply: String,
    },
    /// The socket failed.
    Socket(io::Error),
}

impl fmt::Display for ProbeError {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent { request, waited } => {
                write!(to, "the probe did not answer {request:?} within {} ms", waited.as_millis())
            }
            Self::Refused { code, message } => write!(to, "the probe refused ({code}): {message}"),
            Self::Garbled { field, reply } => write!(to, "the probe's reply has no good {field}: {reply}"),
            Self::Socket(_) => write!(to, "the socket to the probe failed"),
        }
    }
}

impl std::error::Error for ProbeError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Self::Socket(error) => Some(error),
            Self::Silent { .. } | Self::Refused { .. } | Self::Garbled { .. } => None,
        }
    }
}

/// The reply to `tick`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tick {
    /// Tells one start of the guest's probe from another.
    pub nonce: String,
    /// Milliseconds that the probe has counted.
    pub tick: u64,
}

/// The reply to `status`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Nonce and tick.
    pub tick: Tick,
    /// Pages that are filled.
    pub pages: u64,
    /// Whether the area has not yet its size.
    pub filling: bool,
    /// Pages rewritten since the start.
    pub dirtied_pages: u64,
    /// Files that were acknowledged.
    pub files: u64,
    /// Whether the guest has a data disk.
    pub files_possible: bool,
    /// Id of the verification that runs now.
    pub verifying: Option<String>,
    /// Id of the last verification that is done.
    pub verify_id: Option<String>,
}

/// The reply to `verify`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verification {
    /// Nonce and tick.
    pub tick: Tick,
    /// Pages looked at.
    pub pages: u64,
    /// Pages not as expected.
    pub pages_wrong: u64,
    /// Of these: intact, of another generation.
    pub pages_stale: u64,
    /// Of these: all zeros.
    pub pages_lost: u64,
    /// Files that must be there.
    pub files: u64,
    /// Files that are missing or differ.
    pub files_wrong: u64,
    /// How long the guest took, in milliseconds of its own clock.
    pub verify_ms: u64,
}

/// A probe's address and the ids of what was asked.
#[derive(Debug)]
pub struct ProbeClient {
    address: SocketAddr,
    prefix: u32,
    asked: AtomicU64,
}

impl ProbeClient {
    /// A client for the probe at this address; nothing is sent yet.
    ///
    /// # Errors
    /// When this machine has no socket to give.
    pub fn new(address: SocketAddr) -> io::Result<Self> {
        // Ids must differ from those of every other client: the port of a socket that is ours, and the time.
        let socket = socket_for(address)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let own = u64::from(socket.local_addr()?.port()) << 32 | u64::from(std::process::id());
        let prefix = (mix(own ^ mix(now.as_nanos() as u64)) >> 32) as u32;
        Ok(Self { address, prefix, asked: AtomicU64::new(0) })
    }

    /// The probe's address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends a request until its reply comes, and returns the whole reply.
    ///
    /// # Errors
    /// When no reply comes in time, or it is an error.
    pub fn ask(&self, verb: &str, arguments: &str, within: Duration) -> Result<Value, ProbeError> {
        let id = format!("{:08x}-{}", self.prefix, self.asked.fetch_add(1, Relaxed));
        let request = format!("{verb} {id} {arguments}");
        let socket = socket_for(self.address).map_err(ProbeError::Socket)?;
        let end = Instant::now() + within;
        loop {
            // A network that is being switched over refuses for a moment: that is no more than a lost datagram.
            let _ = socket.send_to(request.trim_end().as_bytes(), self.address);
            if let Some(reply) = reply_to(&socket, &id, end.min(Instant::now() + RETRY)) {
                return judged(reply);
            }
            if Instant::now() >= end {
                return Err(ProbeError::Silent { request, waited: within });
            }
        }
    }

    /// Nonce and tick.
    ///
    /// # Errors
    /// When the guest does not answer within five seconds.
    pub fn tick(&self) -> Result<Tick, ProbeError> {
        self.tick_within(QUICK)
    }

    /// Nonce and tick, for which it asks as long as told.
    ///
    /// # Errors
    /// When the guest does not answer in time.
    pub fn tick_within(&self, within: Duration) -> Result<Tick, ProbeError> {
        tick_of(&self.ask("tick", "", within)?)
    }

    /// What the probe knows without looking.
    ///
    /// # Errors
    /// When the guest does not answer within five seconds.
    pub fn status(&self) -> Result<Status, ProbeError> {
        let reply = self.ask("status", "", QUICK)?;
        Ok(Status {
            tick: tick_of(&reply)?,
            pages: count(&reply, "pages")?,
            filling: flag(&reply, "filling")?,
            dirtied_pages: count(&reply, "dirtied_pages")?,
            files: count(&reply, "files")?,
            files_possible: flag(&reply, "files_possible")?,
            verifying: reply["verifying"].as_str().map(str::to_owned),
            verify_id: reply["verify_id"].as_str().map(str::to_owned),
        })
    }

    /// Has every page and file looked at.
    ///
    /// # Errors
    /// When that takes longer than told.
    pub fn verify(&self, within: Duration) -> Result<Verification, ProbeError> {
        let reply = self.ask("verify", "", within)?;
        Ok(Verification {
            tick: tick_of(&reply)?,
            pages: count(&reply, "pages")?,
            pages_wrong: count(&reply, "pages_wrong")?,
            pages_stale: count(&reply, "pages_stale")?,
            pages_lost: count(&reply, "pages_lost")?,
            files: count(&reply, "files")?,
            files_wrong: count(&reply, "files_wrong")?,
            verify_ms: count(&reply, "verify_ms")?,
        })
    }

    /// Changes the memory area and its rate, and waits until it is filled.
    ///
    /// # Errors
    /// When the guest has not so much memory, or does not get there in time.
    pub fn set(&self, settings: Settings, within: Duration) -> Result<Status, ProbeError> {
        let Settings { memory_mib, rate_mib_s, hot_mib, rewrite } = settings;
        let pattern = rewrite.as_str();
        let arguments =
            format!("memory_mib={memory_mib} rate_mib_s={rate_mib_s} hot_mib={hot_mib} pattern={pattern}");
        self.ask("set", &arguments, within)?;
        let begun = Instant::now();
        loop {
            let status = self.status()?;
            if !status.filling {
                return Ok(status);
            }
            if begun.elapsed() > within {
                return Err(ProbeError::Silent { request: format!("set {arguments}"), waited: within });
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Has files written and fsynced; returns how many there are then.
    ///
    /// # Errors
    /// When the guest has no disk, the disk refuses, or it takes longer than a minute.
    pub fn write(&self, files: u32) -> Result<u64, ProbeError> {
        count(&self.ask("write", &files.to_string(), Duration::from_secs(60))?, "files")
    }

    /// Deletes the guest's data directory.
    ///
    /// # Errors
    /// When the guest has none or does not answer.
    pub fn break_data(&self) -> Result<(), ProbeError> {
        self.ask("break", "data", QUICK).map(drop)
    }

    /// Panics the guest's kernel, and comes back when the guest has fallen silent.
    ///
    /// # Errors
    /// When the guest does not answer at first, or still answers five seconds later.
    pub fn break_panic(&self) -> Result<(), ProbeError> {
        self.ask("break", "panic", QUICK)?;
        let begun = Instant::now();
        while begun.elapsed() < QUICK {
            match self.tick_within(DEAD_SILENCE) {
                Err(ProbeError::Silent { .. }) => return Ok(()),
                Err(other) => return Err(other),
                Ok(_) => {}
            }
        }
        let message = "the guest still answers".to_owned();
        Err(ProbeError::Refused { code: "not_broken".to_owned(), message })
    }
}

/// A socket that can send to this address.
pub(crate) fn socket_for(address: SocketAddr) -> io::Result<UdpSocket> {
    match address {
        SocketAddr::V4(_) => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)),
        SocketAddr::V6(_) => UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)),
    }
}

/// The reply with this id, if it comes before `until`; everything else is somebody else's or damaged.
fn reply_to(socket: &UdpSocket, id: &str, until: Instant) -> Option<Value> {
    let mut buffer = [0; 2048];
    loop {
        let left = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
        socket.set_read_timeout(Some(left)).ok()?;
        match socket.recv(&mut buffer) {
            Ok(length) => {
                let reply: Value = serde_json::from_slice(&buffer[..length]).unwrap_or_default();
                if reply["seq"].as_str() == Some(id) {
                    return Some(reply);
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => return None,
            // The other end refused an earlier datagram; it may be there for the next.
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn judged(reply: Value) -> Result<Value, ProbeError> {
    let Some(code) = reply["error"].as_str() else { return Ok(reply) };
    let message = reply["message"].as_str().unwrap_or_default().to_owned();
    Err(ProbeError::Refused { code: code.to_owned(), message })
}

fn tick_of(reply: &Value) -> Result<Tick, ProbeError> {
    let nonce = reply["nonce"].as_str().ok_or_else(|| garbled("nonce", reply))?;
    Ok(Tick { nonce: nonce.to_owned(), tick: count(reply, "tick")? })
}

fn count(reply: &Value, field: &'static str) -> Result<u64, ProbeError> {
    reply[field].as_u64().ok_or_else(|| garbled(field, reply))
}

fn flag(reply: &Value, field: &'static str) -> Result<bool, ProbeError> {
    reply[field].as_bool().ok_or_else(|| garbled(field, reply))
}

fn garbled(field: &'static str, reply: &Value) -> ProbeError {
    ProbeError::Garbled { field, reply: reply.to_string() }
}
