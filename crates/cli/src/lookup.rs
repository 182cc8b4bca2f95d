//! Names from the command line, and names for ids in answers.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use berth_api::endpoint::Nothing;
use berth_api::manager::{HostList, PageQuery, SegmentList, SnapshotPath, VmPath};
use berth_model::name::{NAME_RULE, Name};
use berth_model::{HostId, SegmentId, VmId};

use crate::output::NOTHING;
use crate::session::Session;

/// The segment of a VM that is named without one.
pub const DEFAULT_SEGMENT: &str = "default";

/// A VM as it is named on the command line: `segment/name`, `name`, or an id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRef(String);

impl VmRef {
    /// The VM in a path.
    pub fn path(&self) -> VmPath {
        VmPath { vm: self.0.clone() }
    }

    /// A snapshot of the VM in a path.
    pub fn snapshot_path(&self, snapshot: &str) -> SnapshotPath {
        SnapshotPath { vm: self.0.clone(), snapshot: snapshot.to_owned() }
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for VmRef {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl FromStr for VmRef {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        // A name may look like an id; then the id is meant, and `default/vm-…` says the other.
        if text.parse::<VmId>().is_ok() {
            return Ok(Self(text.to_owned()));
        }
        let (segment, name) = parse_full_name(text)?;
        Ok(Self(format!("{segment}/{name}")))
    }
}

/// A VM's name to be, with its segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVmName {
    /// The segment.
    pub segment: Name,
    /// The name.
    pub name: Name,
}

impl FromStr for NewVmName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let (segment, name) = parse_full_name(text)?;
        Ok(Self { segment, name })
    }
}

fn parse_full_name(text: &str) -> Result<(Name, Name), String> {
    let wrong = || format!("expected SEGMENT/NAME or NAME, each {NAME_RULE}");
    let (segment, name) = text.split_once('/').unwrap_or((DEFAULT_SEGMENT, text));
    Ok((segment.parse().map_err(|_| wrong())?, name.parse().map_err(|_| wrong())?))
}

/// Reads a name.
///
/// # Errors
/// What was expected instead.
pub fn parse_name(text: &str) -> Result<Name, String> {
    text.parse().map_err(|_| format!("expected {NAME_RULE}"))
}

/// Names of segments by id.
#[derive(Default)]
pub struct SegmentNames(HashMap<SegmentId, Name>);

impl SegmentNames {
    /// Asks for them. Who may not see segments sees ids, so nothing here fails.
    pub async fn load(session: &Session) -> Self {
        let query = |limit, cursor| PageQuery { limit, cursor };
        let segments = session.pages::<SegmentList, _>(&Nothing {}, None, query).await.unwrap_or_default();
        Self(segments.into_iter().map(|segment| (segment.id, segment.name)).collect())
    }

    /// The segment's name, else its id.
    pub fn of(&self, segment: &SegmentId) -> String {
        self.0.get(segment).map_or_else(|| segment.to_string(), Name::to_string)
    }
}

/// Names of hosts by id.
#[derive(Default)]
pub struct HostNames(HashMap<HostId, Name>);

impl HostNames {
    /// Asks for them. Who may not see hosts sees ids, so nothing here fails.
    pub async fn load(session: &Session) -> Self {
        let query = |limit, cursor| PageQuery { limit, cursor };
        let hosts = session.pages::<HostList, _>(&Nothing {}, None, query).await.unwrap_or_default();
        Self(hosts.into_iter().map(|host| (host.id, host.name)).collect())
    }

    /// The host's name, else its id.
    pub fn of(&self, host: &HostId) -> String {
        self.0.get(host).map_or_else(|| host.to_string(), Name::to_string)
    }

    /// The same for a host that may not be.
    pub fn of_some(&self, host: Option<&HostId>) -> String {
        host.map_or_else(|| NOTHING.to_owned(), |host| self.of(host))
    }
}

#[cfg(test)]
impl HostNames {
    /// For tests: one host.
    pub fn single(id: HostId, name: &str) -> Self {
        Self(HashMap::from([(id, name.parse().expect("a name"))]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_name_is_in_the_default_segment() {
        assert_eq!("books".parse::<VmRef>().expect("name").as_str(), "default/books");
        assert_eq!("accounting/books".parse::<VmRef>().expect("name").as_str(), "accounting/books");
        let id = VmId::from_entropy([3; 10]);
        assert_eq!(id.as_str().parse::<VmRef>().expect("id").as_str(), id.as_str());
        for bad in ["", "/", "a/", "/a", "a/b/c", "A", "a b", "../a", "a/\u{1b}[2J"] {
            assert!(bad.parse::<VmRef>().is_err(), "{bad}");
        }
    }
}
