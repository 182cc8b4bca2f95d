//! Syslog: messages of RFC 5424, over TLS with counted octets (RFC 5425).
//!
//! Syslog has no acknowledgement: what was written into a connection that breaks may be lost, and nobody is told.
//! Therefore each batch has a connection of its own, and counts as delivered when the receiver, having been told that
//! nothing more comes, has ended the connection too: a receiver that had not read everything would have reset it.

use std::sync::Arc;

use berth_api::manager::AuditRecord;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{Format, Parcel, SendError, SyslogDestination, tls};
use crate::audit::{ALLOW, reading::time_of};

/// Facility 13 ("log audit").
const FACILITY: u8 = 13;
const WARNING: u8 = 4;
const INFORMATIONAL: u8 = 6;
/// Longest message id, by RFC 5424.
const MESSAGE_ID_CHARS_MAX: usize = 32;
/// Most bytes that a receiver may say at the end, though it has nothing to say.
const FAREWELL_BYTES_MAX: u64 = 64 * 1024;

pub(super) struct Syslog {
    address: String,
    name: ServerName<'static>,
    connector: TlsConnector,
    host: String,
    format: Format,
}

impl Syslog {
    pub fn new(set: &SyslogDestination, format: Format) -> Result<Self, String> {
        let identity = match (&set.certificate, &set.key) {
            (Some(certificate), Some(key)) => Some((&**certificate, &**key)),
            (None, None) => None,
            _ => return Err("'certificate' and 'key' go together".to_owned()),
        };
        let (host, _) = tls::split_address(&set.address, None)?;
        let name = ServerName::try_from(host).map_err(|_| format!("'{}' names no server", set.address))?;
        let config = tls::client(set.ca.as_deref(), identity)?;
        let own = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let connector = TlsConnector::from(Arc::new(config));
        Ok(Self { address: set.address.clone(), name, connector, host: word(own.trim(), 255), format })
    }

    pub async fn send(&self, parcels: &[Parcel]) -> Result<(), SendError> {
        let mut frames = Vec::new();
        for parcel in parcels {
            let message = self.message(&parcel.record, &parcel.text(self.format));
            frames.extend(format!("{} ", message.len()).bytes());
            frames.extend(message);
        }
        let failed = |doing| move |source| SendError::Io { doing, source };
        let tcp = TcpStream::connect(&self.address).await.map_err(failed("it can't be reached"))?;
        let connecting = self.connector.connect(self.name.clone(), tcp);
        let mut stream = connecting.await.map_err(failed("no TLS with it"))?;
        stream.write_all(&frames).await.map_err(failed("it hung up"))?;
        stream.shutdown().await.map_err(failed("it hung up"))?;
        let mut farewell = Vec::new();
        match stream.take(FAREWELL_BYTES_MAX).read_to_end(&mut farewell).await {
            Ok(_) => Ok(()),
            // The end without TLS's own word for it, but in good order: all that was sent was read.
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(()),
            Err(error) => Err(failed("it hung up before the end")(error)),
        }
    }

    fn message(&self, record: &AuditRecord, text: &[u8]) -> Vec<u8> {
        let severity = if record.decision == ALLOW { INFORMATIONAL } else { WARNING };
        let priority = FACILITY * 8 + severity;
        let (time, id) = (time_of(record), word(&record.action, MESSAGE_ID_CHARS_MAX));
        let mut message = format!("<{priority}>1 {time} {} berth - {id} - ", self.host).into_bytes();
        message.extend(text);
        message
    }
}

/// A field of a message's head: printable ASCII without blanks, and a dash for nothing.
fn word(text: &str, chars_max: usize) -> String {
    let word: String = text.chars().filter(char::is_ascii_graphic).take(chars_max).collect();
    if word.is_empty() { "-".to_owned() } else { word }
}
