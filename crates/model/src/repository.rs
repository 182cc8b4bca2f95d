//! Repositories: where backups are, off the hosts.
//!
//! A repository is restic's: anybody who has its password can list, check and restore what is in it with `restic` alone.
//! Where it is stands in a URL, which never holds a secret:
//!
//! ```text
//! /srv/backup                              a directory that each host has, from the same server
//! sftp://backup@nas.example:22/srv/backup  a directory behind SSH
//! s3://bucket/prefix?endpoint=https://s3.example:9000&region=eu-central-1
//! ```

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::snapshot::Snapshot;
use crate::vm::VmSpec;
use crate::{RepositoryId, SegmentId, Timestamp};

/// Longest URL, in characters.
const URL_CHARS_MAX: usize = 1024;
/// The region of a store that has none.
const REGION_DEFAULT: &str = "us-east-1";
/// The port of SSH.
const SSH_PORT: u16 = 22;

/// What a URL must look like, for error texts.
pub const URL_RULE: &str = "/DIRECTORY, sftp://[USER@]HOST[:PORT]/DIRECTORY or \
                            s3://BUCKET[/PREFIX][?endpoint=https://HOST[:PORT]&region=REGION], without a password";

/// A repository, without what opens it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Repository {
    /// Its id.
    pub id: RepositoryId,
    /// Its name, unique in the cluster.
    pub name: Name,
    /// Where it is.
    pub url: Location,
    /// The segment that it is for; none: it is the cluster's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment: Option<SegmentId>,
    /// When it was made known.
    pub created_at: Timestamp,
}

/// A backup in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Backup {
    /// Its id in the repository, as `restic` knows it: 64 hexadecimal digits.
    pub id: String,
    /// The VM that it is of, as it was called then: `segment/name`.
    pub vm: String,
    /// What its snapshot was called.
    pub snapshot: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// How long its files are in all, holes counted.
    pub bytes: u64,
    /// What it added to the repository when it was made.
    pub added_bytes: u64,
}

/// What a backup is of: `backup.json` in it. It comes from a repository, so nothing in it is to be believed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct BackupContents {
    /// [`BackupContents::FORMAT`].
    pub format: u32,
    /// What the VM was called: `segment/name`.
    pub vm: String,
    /// What it was to be when the snapshot was taken.
    pub spec: VmSpec,
    /// Its image.
    pub image: crate::image::Image,
    /// The snapshot.
    pub snapshot: Snapshot,
}

impl BackupContents {
    /// The format that this version writes, and reads.
    pub const FORMAT: u32 = 1;
}

/// What an export measured.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ExportFacts {
    /// The backup's id in the repository.
    pub backup: String,
    /// How many files it has.
    pub files: u64,
    /// How long they are in all, holes counted.
    pub bytes: u64,
    /// What had to be read: not what the VM's last backup has.
    pub read_bytes: u64,
    /// What was added to the repository, compressed.
    pub added_bytes: u64,
    /// How long it took, in milliseconds.
    pub total_ms: u64,
}

/// What an import measured.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImportFacts {
    /// How long the files are in all, holes counted.
    pub bytes: u64,
    /// What of them was written: no holes.
    pub written_bytes: u64,
    /// How long it took until the guest ran, in milliseconds.
    pub total_ms: u64,
}

/// Where a repository is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Location {
    /// A directory that the hosts have.
    Directory(String),
    /// A directory on a machine that has an SSH server.
    Sftp(SftpAddress),
    /// A bucket.
    S3(S3Address),
}

impl utoipa::PartialSchema for Location {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
        String::schema()
    }
}

impl utoipa::ToSchema for Location {}

/// A directory behind SSH.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SftpAddress {
    /// Who to log in as; none: who the agent is.
    pub user: Option<String>,
    /// The machine.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The directory there, from the root.
    pub path: String,
}

/// A part of a bucket.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct S3Address {
    /// The bucket.
    pub bucket: String,
    /// What the names in it begin with, without slashes around it; may be empty.
    pub prefix: String,
    /// Where the service is; none: Amazon's, in the region.
    pub endpoint: Option<String>,
    /// The region.
    pub region: String,
}

/// Text that says no place for a repository. It does not repeat the text, which may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not where a repository can be: expected {URL_RULE}")]
pub struct LocationError;

impl FromStr for Location {
    type Err = LocationError;
    fn from_str(text: &str) -> Result<Self, LocationError> {
        let plain = !text.is_empty()
            && text.len() <= URL_CHARS_MAX
            && text
                .bytes()
                .all(|byte| byte.is_ascii_graphic() && !matches!(byte, b'#' | b'%' | b'\\' | b'"' | b'\''));
        if !plain {
            return Err(LocationError);
        }
        if let Some(rest) = text.strip_prefix("sftp://") {
            return sftp(rest).map(Self::Sftp).ok_or(LocationError);
        }
        if let Some(rest) = text.strip_prefix("s3://") {
            return s3(rest).map(Self::S3).ok_or(LocationError);
        }
        directory(text).map(Self::Directory).ok_or(LocationError)
    }
}

/// An absolute path without steps up, and without a slash at its end.
fn directory(text: &str) -> Option<String> {
    let path = text.trim_end_matches('/');
    let good = path.starts_with('/')
        && path[1..].split('/').all(|part| !part.is_empty() && part != "." && part != "..");
    good.then(|| path.to_owned())
}

fn sftp(rest: &str) -> Option<SftpAddress> {
    let (authority, path) = rest.split_at(rest.find('/')?);
    let (user, host) = match authority.rsplit_once('@') {
        Some((user, host)) => (Some(user), host),
        None => (None, authority),
    };
    let (host, port) = match host.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().ok().filter(|port| *port != 0)?),
        None => (host, SSH_PORT),
    };
    // What begins with a dash would be an option of the program that is called with it.
    let word = |text: &str| {
        !text.is_empty()
            && !text.starts_with('-')
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
    };
    let good = word(host) && user.is_none_or(word);
    let path = directory(path)?;
    good.then(|| SftpAddress { user: user.map(str::to_owned), host: host.to_owned(), port, path })
}

fn s3(rest: &str) -> Option<S3Address> {
    let (place, query) = rest.split_once('?').map_or((rest, ""), |(place, query)| (place, query));
    let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
    let word = |text: &str| {
        !text.is_empty()
            && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
    };
    let prefix = prefix.trim_end_matches('/');
    let parts_are_words = prefix.split('/').all(|part| word(part) && part != "." && part != "..");
    if !word(bucket) || !(prefix.is_empty() || parts_are_words) {
        return None;
    }
    let (mut endpoint, mut region) = (None, REGION_DEFAULT.to_owned());
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=')? {
            ("endpoint", url) => endpoint = Some(service(url)?),
            ("region", name) if word(name) => region = name.to_owned(),
            _ => return None,
        }
    }
    Some(S3Address { bucket: bucket.to_owned(), prefix: prefix.to_owned(), endpoint, region })
}

fn service(url: &str) -> Option<String> {
    let url = url.trim_end_matches('/');
    let host = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"))?;
    let good = !host.is_empty()
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']'));
    good.then(|| url.to_owned())
}

impl fmt::Display for Location {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => formatter.write_str(path),
            Self::Sftp(SftpAddress { user, host, port, path }) => {
                formatter.write_str("sftp://")?;
                if let Some(user) = user {
                    write!(formatter, "{user}@")?;
                }
                formatter.write_str(host)?;
                if *port != SSH_PORT {
                    write!(formatter, ":{port}")?;
                }
                formatter.write_str(path)
            }
            Self::S3(S3Address { bucket, prefix, endpoint, region }) => {
                write!(formatter, "s3://{bucket}")?;
                if !prefix.is_empty() {
                    write!(formatter, "/{prefix}")?;
                }
                let mut mark = '?';
                if let Some(endpoint) = endpoint {
                    write!(formatter, "{mark}endpoint={endpoint}")?;
                    mark = '&';
                }
                if region != REGION_DEFAULT {
                    write!(formatter, "{mark}region={region}")?;
                }
                Ok(())
            }
        }
    }
}

impl TryFrom<String> for Location {
    type Error = LocationError;
    fn try_from(text: String) -> Result<Self, LocationError> {
        text.parse()
    }
}

impl From<Location> for String {
    fn from(location: Location) -> Self {
        location.to_string()
    }
}

/// Text that opens something. It is sent and stored as it is, and never shown by a log.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(transparent)]
#[schema(value_type = String)]
pub struct Secret(String);

impl Secret {
    /// Takes text that opens something.
    pub const fn new(text: String) -> Self {
        Self(text)
    }

    /// The text.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret(…)")
    }
}

/// What opens a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RepositoryKeys {
    /// The repository's password.
    pub password: Secret,
    /// What lets one in where it is. For SFTP a private key, for S3 two lines: `access_key_id=…` and
    /// `secret_access_key=…`. None: what the agent's own user has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<Secret>,
    /// For SFTP: the machine's keys, as in `known_hosts`. None: those that the agent's own user knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known_hosts: Option<String>,
    /// For S3: the certificates of who vouches for the service, in PEM. None: the public ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<String>,
}

/// What a key file for S3 says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct S3Keys {
    /// Whose key it is.
    pub access_key_id: String,
    /// The key.
    pub secret_access_key: Secret,
}

impl S3Keys {
    /// What a key file must look like, for error texts.
    pub const RULE: &'static str = "two lines: access_key_id=… and secret_access_key=…";

    /// Reads a key file: as `RULE` says, also with `aws_` before the names, with spaces around the sign, and below a
    /// heading in brackets.
    pub fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once('=')?;
                let key = key.trim();
                (key.strip_prefix("aws_").unwrap_or(key) == name).then(|| value.trim().to_owned())
            })
        };
        let found = Self {
            access_key_id: value("access_key_id")?,
            secret_access_key: Secret::new(value("secret_access_key")?),
        };
        (!found.access_key_id.is_empty() && !found.secret_access_key.reveal().is_empty()).then_some(found)
    }
}

/// A repository with what opens it, as an agent is given it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct RepositoryAccess {
    /// Where it is.
    pub url: Location,
    /// What opens it.
    pub keys: RepositoryKeys,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Location {
        text.parse().expect(text)
    }

    #[test]
    fn places_are_read_and_written_as_they_were_given() {
        for text in [
            "/srv/backup",
            "sftp://nas.example/srv/backup",
            "sftp://berth@nas.example:2222/srv/backup",
            "s3://bucket",
            "s3://bucket/a/b?endpoint=http://[::1]:9000&region=eu-central-1",
            "s3://bucket?region=eu-central-1",
        ] {
            assert_eq!(parsed(text).to_string(), text);
            let json = serde_json::to_string(&parsed(text)).expect("json");
            assert_eq!(serde_json::from_str::<Location>(&json).expect("own json"), parsed(text));
        }
        assert_eq!(parsed("/srv/backup/").to_string(), "/srv/backup");
        let Location::S3(address) = parsed("s3://b/p/?endpoint=https://minio:9000/") else { panic!("S3") };
        assert_eq!((address.prefix.as_str(), address.endpoint.as_deref()), ("p", Some("https://minio:9000")));
        assert_eq!(address.region, "us-east-1");
    }

    #[test]
    fn what_could_mean_something_else_is_no_place() {
        for text in [
            "",
            "/",
            "srv/backup",
            "/srv/../etc",
            "/srv//x",
            "/srv/./x",
            "/srv/a b",
            "file:///srv",
            "https://x/y",
            "sftp://nas.example",
            "sftp://user:password@nas/srv",
            "sftp://-oProxyCommand=x/srv",
            "sftp://-x@nas/srv",
            "sftp://nas:0/srv",
            "sftp://nas:99999/srv",
            "sftp://nas/srv/../x",
            "s3://",
            "s3://b/../c",
            "s3://b?key=x",
            "s3://b?endpoint=ftp://x",
            "s3://b?endpoint=https://u:p@x",
            "s3://b/p#x",
            "/srv/%2e%2e",
        ] {
            assert_eq!(text.parse::<Location>(), Err(LocationError), "{text}");
        }
    }

    #[test]
    fn a_key_file_is_read_in_both_spellings_and_not_shown() {
        let text = "[default]\naws_access_key_id = AK\naws_secret_access_key = hunter2hunter2\n";
        let keys = S3Keys::parse(text).expect("keys");
        assert_eq!((keys.access_key_id.as_str(), keys.secret_access_key.reveal()), ("AK", "hunter2hunter2"));
        assert_eq!(S3Keys::parse("access_key_id=AK\nsecret_access_key=hunter2hunter2"), Some(keys.clone()));
        assert!(!format!("{keys:?}").contains("hunter2"));
        for text in ["", "access_key_id=AK", "access_key_id=AK\nsecret_access_key="] {
            assert_eq!(S3Keys::parse(text), None, "{text}");
        }
    }
}
