//! A network for peers, of the shape that `berth up` makes: a switch, and hosts at the ends of links that can be shaped.
//!
//! ```text
//!  here          namespace …-sw          namespace …-a
//!  bench-PID ─── up0 ─┐
//!  .1                 br0 ─── a ──────── up0 ─ br0 .2 ─ taps of guests
//!                     └────── b ──────── …
//! ```

use std::net::Ipv4Addr;
use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::run_program;

/// A range that is only for documents, so nobody's hosts are in it.
const SUBNET: [u8; 3] = [198, 51, 100];
/// How a shaped link is shaped, the same as `berth up` does it.
const SHAPE: [&str; 4] = ["burst", "256kb", "latency", "20ms"];

/// The network; gone when dropped.
#[derive(Debug)]
pub struct Net {
    device: String,
    namespaces: Vec<String>,
    hosts: u8,
}

impl Net {
    /// Makes the switch and this machine's link to it.
    ///
    /// # Errors
    /// When the range is in use here, or `ip` refuses.
    pub fn make() -> Result<Self> {
        let [a, b, c] = SUBNET;
        let range = format!("{a}.{b}.{c}.0/24");
        let routes = ip(&["-4", "route", "show", "root", &range])?;
        ensure!(routes.trim().is_empty(), "{range} is in use on this machine: {}", routes.trim());
        let device = format!("bench-{}", std::process::id());
        // Held from the first step on, so that what fails half-way is taken away again.
        let mut net = Self { device: device.clone(), namespaces: Vec::new(), hosts: 0 };
        let switch = net.namespace("sw");
        net.add_namespace(&switch)?;
        ip(&["link", "add", &device, "type", "veth", "peer", "name", "up0", "netns", &switch])?;
        ip(&["-n", &switch, "link", "set", "up0", "master", "br0", "up"])?;
        ip(&["addr", "add", &format!("{}/24", address(1)), "dev", &device])?;
        ip(&["link", "set", &device, "up"])?;
        Ok(net)
    }

    /// Adds a host, its link shaped both ways when told; gives its namespace and its address.
    ///
    /// # Errors
    /// When `ip` or `tc` refuses.
    pub fn add_host(&mut self, name: &str, link_mbit: Option<u32>) -> Result<(String, Ipv4Addr)> {
        let (own, switch) = (self.namespace(name), self.namespace("sw"));
        self.add_namespace(&own)?;
        ip(&["-n", &own, "link", "add", "up0", "type", "veth", "peer", "name", name, "netns", &switch])?;
        ip(&["-n", &own, "link", "set", "up0", "master", "br0", "up"])?;
        ip(&["-n", &switch, "link", "set", name, "master", "br0", "up"])?;
        self.hosts += 1;
        let address = address(1 + self.hosts);
        ip(&["-n", &own, "addr", "add", &format!("{address}/24"), "dev", "br0"])?;
        if let Some(mbit) = link_mbit {
            let rate = format!("{mbit}mbit");
            for (namespace, device) in [(&own, "up0"), (&switch, name)] {
                let place =
                    ["-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", "rate", &rate];
                run_program("tc", &[&place[..], &SHAPE[..]].concat())?;
            }
        }
        Ok((own, address))
    }

    /// Adds a tap to a host's bridge.
    ///
    /// # Errors
    /// When `ip` refuses.
    pub fn add_tap(&self, namespace: &str, tap: &str) -> Result<()> {
        ip(&["-n", namespace, "tuntap", "add", tap, "mode", "tap"])?;
        ip(&["-n", namespace, "link", "set", tap, "master", "br0", "up"]).map(drop)
    }

    fn namespace(&self, name: &str) -> String {
        format!("berth-{}-{name}", self.device)
    }

    fn add_namespace(&mut self, name: &str) -> Result<()> {
        ip(&["netns", "add", name])?;
        self.namespaces.push(name.to_owned());
        ip(&["-n", name, "link", "set", "lo", "up"])?;
        ip(&["-n", name, "link", "add", "br0", "type", "bridge"])?;
        ip(&["-n", name, "link", "set", "br0", "up"]).map(drop)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if std::path::Path::new("/sys/class/net").join(&self.device).exists() {
            say_trouble(ip(&["link", "del", &self.device]));
        }
        for namespace in &self.namespaces {
            say_trouble(ip(&["netns", "del", namespace]));
        }
    }
}

fn say_trouble(outcome: Result<String>) {
    if let Err(error) = outcome {
        eprintln!("the bench's network is not quite gone: {error:#}");
    }
}

/// The file that stands for a namespace.
pub fn file(namespace: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(namespace)
}

/// An address of the network.
pub fn address(last: u8) -> Ipv4Addr {
    let [a, b, c] = SUBNET;
    Ipv4Addr::new(a, b, c, last)
}

fn ip(words: &[&str]) -> Result<String> {
    run_program("ip", words)
}
