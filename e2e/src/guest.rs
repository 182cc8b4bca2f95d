//! The guest inside a VM, as its probe tells.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use guest_probe::client::{ProbeClient, Verification};
use serde_json::Value;

/// The UDP port that the probe answers on.
const PROBE_PORT: u16 = 7007;

/// How long a verification of a large memory may take under translation.
const VERIFY_LIMIT: Duration = Duration::from_secs(300);

/// A guest that can be asked.
#[derive(Debug)]
pub struct Guest {
    /// The probe.
    pub probe: ProbeClient,
    /// It is asked through a forwarded port of its present host: gaps seen from outside say nothing then.
    pub forwarded: bool,
}

impl Guest {
    /// The guest of a VM, as the API shows the VM.
    ///
    /// # Errors
    /// When it has neither an address nor a forwarded port.
    pub fn of(vm: &Value) -> Result<Self> {
        let nic = &vm["spec"]["nics"][0];
        let forward = nic["forwards"]
            .as_array()
            .into_iter()
            .flatten()
            .find(|forward| forward["guest_port"] == PROBE_PORT);
        let port = forward
            .and_then(|forward| forward["host_port"].as_u64())
            .and_then(|port| u16::try_from(port).ok());
        let (address, forwarded) = match port.filter(|port| *port != 0) {
            Some(port) => (SocketAddr::from(([127, 0, 0, 1], port)), true),
            None => {
                let address = nic["address"].as_str().context("the VM's first interface has no address")?;
                let address: IpAddr =
                    address.split('/').next().unwrap_or_default().parse().context("its address")?;
                (SocketAddr::new(address, PROBE_PORT), false)
            }
        };
        Ok(Self { probe: ProbeClient::new(address)?, forwarded })
    }

    /// Verifies every page and every file, and fails unless all are right.
    ///
    /// # Errors
    /// When one is wrong, or the guest is silent.
    pub fn verify(&self) -> Result<Verification> {
        let seen = self.probe.verify(VERIFY_LIMIT)?;
        ensure!(seen.pages_wrong == 0, "{} of {} pages are wrong", seen.pages_wrong, seen.pages);
        ensure!(seen.files_wrong == 0, "{} of {} files are wrong", seen.files_wrong, seen.files);
        Ok(seen)
    }
}
