//! What `berth up` made: the record of a cluster, which is also the marker of its directory.

use std::fmt;
use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use anyhow::{Context as _, Result};
use berth_model::name::Name;
use serde::{Deserialize, Serialize};

use crate::exit::Failure;

const ID_CHARS: usize = 5;

/// How the cluster is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Network namespaces, bridges, a user for each VM.
    Root,
    /// Loopback, user-mode networking.
    User,
}

/// A /24 out of 198.18.0.0/15, which is set aside for trying things.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet(pub u32);

impl Subnet {
    /// How many there are.
    pub const COUNT: u32 = 512;
    const FIRST: u32 = 198 << 24 | 18 << 16;

    /// One of them.
    pub const fn new(number: u32) -> Self {
        Self(Self::FIRST + (number % Self::COUNT) * 256)
    }

    /// An address in it.
    pub fn address(self, last: u8) -> Ipv4Addr {
        Ipv4Addr::from(self.0 + u32::from(last))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/24", Ipv4Addr::from(self.0))
    }
}

/// A host of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostEntry {
    /// Its name.
    pub name: Name,
    /// Where its agent listens; none until it was chosen.
    pub listen: Option<SocketAddr>,
}

/// What was made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What this file is, for people who find it.
    pub what: String,
    /// Short and random: part of the names of namespaces and devices.
    pub id: String,
    /// How it is run.
    pub mode: Mode,
    /// Whether the directory was made by us too, so that it goes too.
    pub made_directory: bool,
    /// Its hosts.
    pub hosts: Vec<HostEntry>,
    /// Where the manager listens; none until it was chosen.
    pub manager: Option<SocketAddr>,
    /// The addresses of hosts and VMs, as root.
    pub subnet: Option<Subnet>,
    /// The boot of the machine in which the network was made whole.
    pub network_of_boot: Option<String>,
    /// To what the hosts' links are shaped.
    pub link_mbit: Option<u32>,
}

impl Record {
    /// The record of a cluster that is going to be.
    ///
    /// # Errors
    /// When there are no random numbers.
    pub fn new(made_directory: bool) -> Result<Self> {
        let mode = if rustix::process::geteuid().is_root() { Mode::Root } else { Mode::User };
        Ok(Self {
            what: "a cluster made by 'berth up'; 'berth down --purge' removes it".to_owned(),
            id: random_id()?,
            mode,
            made_directory,
            hosts: Vec::new(),
            manager: None,
            subnet: None,
            network_of_boot: None,
            link_mbit: None,
        })
    }

    /// Sees to it that there are so many hosts; none is taken away.
    ///
    /// # Errors
    /// Never: the names are made here.
    pub fn add_hosts(&mut self, wanted: usize) -> Result<()> {
        for number in self.hosts.len() + 1..=wanted {
            let name = format!("h{number}").parse().context("a host's name")?;
            self.hosts.push(HostEntry { name, listen: None });
        }
        Ok(())
    }

    /// Refuses to let root's cluster be handled by somebody else, and the other way round.
    ///
    /// # Errors
    /// When it is so.
    pub fn check_user(&self, path: &Path) -> Result<(), Failure> {
        let is_root = rustix::process::geteuid().is_root();
        match (self.mode, is_root) {
            (Mode::Root, true) | (Mode::User, false) => Ok(()),
            (Mode::Root, false) => {
                Err(Failure::field("dir", path.display(), "root, who made the cluster that is in it"))
            }
            (Mode::User, true) => {
                let expected = "the ordinary user who made the cluster that is in it, not root";
                Err(Failure::field("dir", path.display(), expected))
            }
        }
    }

    /// The manager's URL.
    pub fn url(&self) -> String {
        self.manager.map_or_else(String::new, |address| format!("https://{address}"))
    }
}

fn random_id() -> Result<String> {
    const LETTERS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    let mut bytes = [0; ID_CHARS];
    let mut random = File::open("/dev/urandom").context("there are no random numbers")?;
    io::Read::read_exact(&mut random, &mut bytes).context("there are no random numbers")?;
    Ok(bytes.iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)])).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_added_and_never_taken_away() {
        let mut record = Record::new(true).expect("a record");
        record.add_hosts(3).expect("added");
        record.add_hosts(1).expect("nothing");
        let names: Vec<&str> = record.hosts.iter().map(|host| host.name.as_str()).collect();
        assert_eq!(names, ["h1", "h2", "h3"]);
    }

    #[test]
    fn subnets_stay_in_the_range_that_is_set_aside() {
        assert_eq!(Subnet::new(0).to_string(), "198.18.0.0/24");
        assert_eq!(Subnet::new(511).to_string(), "198.19.255.0/24");
        assert_eq!(Subnet::new(512).address(1), Ipv4Addr::new(198, 18, 0, 1));
    }
}
