//! What is set by the person who runs a manager: `/etc/berth/manager.toml`.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::audit::forward::AuditConfig;
use crate::workflow::addresses::AddressRange;

/// The port that the manager listens on when nothing is said.
pub const PORT_DEFAULT: u16 = 8443;

/// A manager's configuration. Every field can be left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ManagerConfig {
    /// Where it listens, `address:port`; port 0: any free one.
    pub listen: SocketAddr,
    /// Where its records and keys are; made if it is not there.
    pub state_dir: PathBuf,
    /// Further names and addresses that its certificate is good for. `manager.berth` and `localhost` always are, and
    /// so is the address that it listens on.
    pub certificate_names: Vec<String>,
    /// The addresses that VMs are given, like `198.18.5.0/24`; none: they ask by DHCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addresses: Option<AddressRange>,
    /// Where to write the first administrator's token at the very first start, readable by the owner alone, instead
    /// of showing it on the terminal.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_token_file: Option<PathBuf>,
    /// Where audit records are sent on to.
    pub audit: AuditConfig,
}

impl Default for ManagerConfig {
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::UNSPECIFIED, PORT_DEFAULT).into(),
            state_dir: PathBuf::from("/var/lib/berth/manager"),
            certificate_names: Vec::new(),
            addresses: None,
            first_token_file: None,
            audit: AuditConfig::default(),
        }
    }
}

impl ManagerConfig {
    /// The store's file.
    pub fn store_path(&self) -> PathBuf {
        self.state_dir.join("store.sqlite")
    }

    /// The CA's certificate: what clients have to trust.
    pub fn ca_path(&self) -> PathBuf {
        self.pki_dir().join("ca.pem")
    }

    pub(crate) fn ca_key_path(&self) -> PathBuf {
        self.pki_dir().join("ca.key")
    }

    /// The key that the audit's checkpoints are signed with.
    pub(crate) fn audit_key_path(&self) -> PathBuf {
        self.pki_dir().join("audit.key")
    }

    /// Its public half, which auditors need.
    pub fn audit_public_key_path(&self) -> PathBuf {
        self.pki_dir().join("audit.pub")
    }

    pub(crate) fn pki_dir(&self) -> PathBuf {
        self.state_dir.join("pki")
    }
}
