//! What an agent is told: one file, read once at the start, with no key that is not known.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use berth_model::host::NetworkMode;
use berth_model::name::Name;
use berth_model::schedule::reserve::{RESERVE_PERCENT, RESERVE_PERCENT_MAX};
use serde::{Deserialize, Serialize};

/// The first user id that is given to a VM's QEMU. Far above people and services, below where user namespaces are
/// commonly put.
pub const USER_ID_BASE: u32 = 2_000_000;
/// The most layers that a VM's disk may lie on. Fewer: they are merged more often, which costs the disk. More: a cluster
/// that nobody wrote to lately is looked for in more files, and starting a VM opens them all.
pub const LAYERS_MAX: usize = 16;
/// The least that `layers_max` may be: below it merging would never end.
const LAYERS_MAX_LEAST: usize = 4;
/// Longest name of a network device in Linux, in bytes.
const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// A directory that disks and snapshots are kept in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// The pool's name; a shared pool has the same one on each host.
    pub name: Name,
    /// The directory; it must exist.
    pub path: PathBuf,
}

/// How VMs get their network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// A tap on a bridge, which needs root, or QEMU's own user-mode network.
    pub mode: NetworkMode,
    /// The bridge.
    #[serde(default)]
    pub bridge: Option<String>,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self { mode: NetworkMode::User, bridge: None }
    }
}

/// Where what machines are made of is, beside QEMU. A host may lack it: then it takes no VM that needs it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MachineConfig {
    /// The UEFI firmware's program, for a flash chip of its own.
    pub firmware_code: PathBuf,
    /// Variables as a new machine has them, for a second chip.
    pub firmware_variables: PathBuf,
    /// The software TPM, a swtpm.
    pub tpm_binary: PathBuf,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            firmware_code: "/usr/share/OVMF/OVMF_CODE_4M.fd".into(),
            firmware_variables: "/usr/share/OVMF/OVMF_VARS_4M.fd".into(),
            tpm_binary: "/usr/bin/swtpm".into(),
        }
    }
}

impl MachineConfig {
    /// Whether this host has UEFI firmware.
    pub fn has_firmware(&self) -> bool {
        self.firmware_code.is_file() && self.firmware_variables.is_file()
    }

    /// Whether this host has a software TPM.
    pub fn has_tpm(&self) -> bool {
        self.tpm_binary.is_file()
    }
}

/// An agent's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// The host's name in the cluster.
    pub name: Name,
    /// Where the agent listens.
    pub listen: SocketAddr,
    /// The manager, `host:port`: where certificates are renewed.
    pub manager: String,
    /// What must survive a reboot.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// Sockets and logs of running VMs: what is worth nothing after a reboot.
    #[serde(default = "default_run_dir")]
    pub run_dir: PathBuf,
    /// Where disks and snapshots are kept.
    pub pools: Vec<PoolConfig>,
    /// What part of each pool has to stay free for schedules to go on, in percent.
    #[serde(default = "default_pool_reserve_percent")]
    pub pool_reserve_percent: u8,
    /// QEMU.
    #[serde(default = "default_qemu_binary")]
    pub qemu_binary: PathBuf,
    /// Words that every QEMU is started with before all others: `-L DIRECTORY` for one that is not installed where it
    /// was built for.
    #[serde(default)]
    pub qemu_arguments: Vec<String>,
    /// QEMU's tool for images.
    #[serde(default = "default_qemu_img_binary")]
    pub qemu_img_binary: PathBuf,
    /// What machines are made of beside QEMU.
    #[serde(default)]
    pub machine: MachineConfig,
    /// How VMs get their network.
    #[serde(default)]
    pub network: NetworkConfig,
    /// Each VM's QEMU runs as this user id plus the VM's number, when the agent is root.
    #[serde(default = "default_user_id_base")]
    pub user_id_base: u32,
    /// The most layers that a VM's disk may lie on, its writable one counted; layers are merged in the background so that
    /// it is not reached. 0: layers are never merged, and there is no limit.
    #[serde(default = "default_layers_max")]
    pub layers_max: usize,
}

fn default_state_dir() -> PathBuf {
    "/var/lib/berth/agent".into()
}

fn default_run_dir() -> PathBuf {
    "/run/berth".into()
}

const fn default_pool_reserve_percent() -> u8 {
    RESERVE_PERCENT
}

fn default_qemu_binary() -> PathBuf {
    "/usr/bin/qemu-system-x86_64".into()
}

fn default_qemu_img_binary() -> PathBuf {
    "/usr/bin/qemu-img".into()
}

const fn default_user_id_base() -> u32 {
    USER_ID_BASE
}

const fn default_layers_max() -> usize {
    LAYERS_MAX
}

/// A configuration that can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file can't be read.
    #[error("{} can't be read", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML, has an unknown key, or a value of the wrong kind.
    #[error("{} is not a configuration of an agent", path.display())]
    Parse {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Values that can't be. All of them at once, so that they are put right at once.
    #[error("the configuration has wrong values: {}", faults.join("; "))]
    Values {
        /// One sentence each.
        faults: Vec<String>,
    },
}

impl AgentConfig {
    /// Reads and checks a file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        let config: Self = toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })?;
        config.check()?;
        Ok(config)
    }

    /// Checks what can be known without looking at the machine.
    ///
    /// # Errors
    /// Every value that can't be.
    pub fn check(&self) -> Result<(), ConfigError> {
        let mut faults = Vec::new();
        let directories = [("state_dir", &self.state_dir), ("run_dir", &self.run_dir)];
        let pools = self.pools.iter().map(|pool| ("pools.path", &pool.path));
        let programs = [
            ("qemu_binary", &self.qemu_binary),
            ("qemu_img_binary", &self.qemu_img_binary),
            ("machine.firmware_code", &self.machine.firmware_code),
            ("machine.firmware_variables", &self.machine.firmware_variables),
            ("machine.tpm_binary", &self.machine.tpm_binary),
        ];
        for (key, path) in directories.into_iter().chain(pools).chain(programs) {
            if !path.is_absolute() {
                faults.push(format!("{key} is '{}': expected an absolute path", path.display()));
            }
        }
        if self.pools.is_empty() {
            faults.push("pools is empty: expected at least one".to_owned());
        }
        let mut names = BTreeSet::new();
        for pool in &self.pools {
            if !names.insert(&pool.name) {
                faults.push(format!("pools has '{}' twice", pool.name));
            }
        }
        if let Some(fault) = self.network.fault() {
            faults.push(fault);
        }
        if self.pool_reserve_percent > RESERVE_PERCENT_MAX {
            let expected = format!("expected 0 to {RESERVE_PERCENT_MAX}");
            faults.push(format!("pool_reserve_percent is {}: {expected}", self.pool_reserve_percent));
        }
        if self.user_id_base < 1000 {
            faults.push(format!("user_id_base is {}: expected 1000 or more", self.user_id_base));
        }
        if (1..LAYERS_MAX_LEAST).contains(&self.layers_max) {
            let expected = format!("{LAYERS_MAX_LEAST} or more, or 0 for no limit");
            faults.push(format!("layers_max is {}: expected {expected}", self.layers_max));
        }
        if faults.is_empty() { Ok(()) } else { Err(ConfigError::Values { faults }) }
    }
}

impl NetworkConfig {
    fn fault(&self) -> Option<String> {
        match (self.mode, self.bridge.as_deref()) {
            (NetworkMode::User, _) => None,
            (NetworkMode::Bridge, None) => {
                Some("network.bridge is missing: expected a bridge's name".to_owned())
            }
            (NetworkMode::Bridge, Some(name)) => {
                let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
                let good = !name.is_empty()
                    && name.len() <= INTERFACE_NAME_BYTES_MAX
                    && name.bytes().all(plain)
                    && name != "."
                    && name != "..";
                (!good).then(|| format!("network.bridge is '{name}': expected a network device's name"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALLEST: &str = r#"
        name = "h1"
        listen = "127.0.0.1:7443"
        manager = "127.0.0.1:7444"
        pools = [{ name = "local", path = "/var/lib/berth/pool" }]
    "#;

    fn parse(text: &str) -> Result<AgentConfig, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn the_smallest_file_is_enough_and_reads_back() {
        let config = parse(SMALLEST).expect("parse");
        config.check().expect("good");
        assert_eq!(config.user_id_base, USER_ID_BASE);
        let text = toml::to_string(&config).expect("TOML");
        assert_eq!(parse(&text).expect("own text"), config);
    }

    #[test]
    fn unknown_keys_are_refused() {
        assert!(parse(&format!("{SMALLEST}\nlisten_adress = 5")).is_err());
    }

    #[test]
    fn all_wrong_values_are_named_at_once() {
        let mut config = parse(SMALLEST).expect("parse");
        config.state_dir = "relative".into();
        config.user_id_base = 0;
        config.pool_reserve_percent = 91;
        config.layers_max = 3;
        config.pools.push(config.pools[0].clone());
        config.network = NetworkConfig { mode: NetworkMode::Bridge, bridge: Some("br0/../x".into()) };
        let text = config.check().expect_err("wrong").to_string();
        for part in [
            "state_dir",
            "user_id_base",
            "pool_reserve_percent",
            "layers_max",
            "'local' twice",
            "network.bridge",
        ] {
            assert!(text.contains(part), "{text} lacks {part}");
        }
    }
}
