//! The network of a cluster on one machine, as root.
//!
//! ```text
//!  here            namespace berth-ID-sw      namespace berth-ID-h1          namespace berth-ID-h2
//!  berth-ID ────── up0 ─┐
//!  .1                   br0 ─── h1 ────────── up0 ─ br0 .2 ─ taps of VMs
//!                       └────── h2 ─────────────────────────────────────── up0 ─ br0 .3 ─ taps of VMs
//! ```
//!
//! One /24 for all of it: so this machine reaches guests and agents directly, and a guest keeps its address when it
//! moves. The links between hosts and switch can be shaped, both ways, which makes the hosts as far apart as machines
//! are. The namespaces are ours by name; nothing outside of them is changed but the one device and its route.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use rustix::fs::FlockOperation;

use super::directory::Directory;
use super::process;
use super::record::{Record, Subnet};

const BRIDGE: &str = "br0";
const UPLINK: &str = "up0";
const NAMESPACES: &str = "/run/netns";
/// Held while a subnet is chosen and taken, so that two clusters don't choose the same.
const CHOICE_LOCK: &str = "/run/berth-up.lock";
/// Where this machine is in the subnet.
const GATEWAY: u8 = 1;
/// How much a shaped link lets through at once, in KiB. Less than the rate makes in one tick of a slow kernel timer,
/// and the link is slower than asked for; more, and short bursts aren't shaped.
const BURST_KIB: u32 = 256;
/// How long a shaped link holds what is too much before it drops it, in milliseconds.
const LATENCY_MS: u32 = 20;

/// The namespace of a host, or of the switch (`sw`).
pub fn namespace(record: &Record, name: &str) -> String {
    format!("berth-{}-{name}", record.id)
}

fn device(record: &Record) -> String {
    format!("berth-{}", record.id)
}

/// This machine's address in the subnet.
pub fn own_address(subnet: Subnet) -> Ipv4Addr {
    subnet.address(GATEWAY)
}

/// The address of the host with this number, from 0.
pub fn host_address(subnet: Subnet, number: usize) -> Ipv4Addr {
    let last = u8::try_from(number).unwrap_or(u8::MAX).saturating_add(GATEWAY + 1);
    subnet.address(last)
}

/// Makes the network, or what of it is missing.
///
/// # Errors
/// When `ip` or `tc` refuses, with what it said.
pub fn bring_up(directory: &Directory, record: &mut Record, link_mbit: Option<u32>) -> Result<()> {
    let boot = process::boot_id()?;
    if record.network_of_boot.as_ref() != Some(&boot) || !exists(&namespace(record, "sw")) {
        // Half of a network, or none since the last boot: nothing that lives depends on it.
        take_down(record)?;
        record.network_of_boot = None;
        directory.save(record)?;
        make_switch(directory, record)?;
        record.network_of_boot = Some(boot);
        directory.save(record)?;
    }
    let subnet = record.subnet.context("the cluster has no subnet")?;
    for (number, host) in record.hosts.iter().enumerate() {
        if !exists(&namespace(record, host.name.as_str())) {
            join_host(record, host.name.as_str(), host_address(subnet, number))?;
        }
    }
    if let Some(mbit) = link_mbit.or(record.link_mbit) {
        for host in &record.hosts {
            shape(record, host.name.as_str(), mbit)?;
        }
        record.link_mbit = Some(mbit);
        directory.save(record)?;
    }
    Ok(())
}

fn exists(namespace: &str) -> bool {
    fs::exists(format!("{NAMESPACES}/{namespace}")).unwrap_or(false)
}

fn make_switch(directory: &Directory, record: &mut Record) -> Result<()> {
    let lock = fs::File::create(CHOICE_LOCK).with_context(|| format!("{CHOICE_LOCK} can't be used"))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive).context("the lock can't be had")?;
    let taken = taken()?;
    let subnet = match record.subnet {
        None => free_subnet(&record.id, &taken)?,
        Some(subnet) if is_free(&taken, subnet) => subnet,
        // Hosts are known to the manager by their addresses, so it must be this one.
        Some(subnet) => bail!("the cluster's addresses {subnet} have a route that leads elsewhere now"),
    };
    record.subnet = Some(subnet);
    directory.save(record)?;
    let (switch, device) = (namespace(record, "sw"), device(record));
    ip(&["netns", "add", &switch])?;
    make_bridge(&switch)?;
    ip(&["link", "add", &device, "type", "veth", "peer", "name", UPLINK, "netns", &switch])?;
    ip(&["-n", &switch, "link", "set", UPLINK, "master", BRIDGE, "up"])?;
    ip(&["addr", "add", &format!("{}/24", own_address(subnet)), "dev", &device])?;
    ip(&["link", "set", &device, "up"])
}

fn make_bridge(namespace: &str) -> Result<()> {
    ip(&["-n", namespace, "link", "set", "lo", "up"])?;
    ip(&["-n", namespace, "link", "add", BRIDGE, "type", "bridge"])?;
    ip(&["-n", namespace, "link", "set", BRIDGE, "up"])
}

fn join_host(record: &Record, host: &str, address: Ipv4Addr) -> Result<()> {
    let (own, switch) = (namespace(record, host), namespace(record, "sw"));
    let making = || -> Result<()> {
        ip(&["netns", "add", &own])?;
        make_bridge(&own)?;
        // Its own, whatever the addresses of its ports: a host whose address changes is cut off for a while.
        let [_, b, c, d] = address.octets();
        let hardware = format!("02:62:65:{b:02x}:{c:02x}:{d:02x}");
        ip(&["-n", &own, "link", "set", BRIDGE, "address", &hardware])?;
        ip(&["-n", &own, "link", "add", UPLINK, "type", "veth", "peer", "name", host, "netns", &switch])?;
        ip(&["-n", &own, "link", "set", UPLINK, "master", BRIDGE, "up"])?;
        ip(&["-n", &switch, "link", "set", host, "master", BRIDGE, "up"])?;
        ip(&["-n", &own, "addr", "add", &format!("{address}/24"), "dev", BRIDGE])
    };
    let made = making();
    if made.is_err() {
        // Half a host would be taken for a whole one the next time.
        let _ = ip(&["netns", "del", &own]);
    }
    made
}

fn shape(record: &Record, host: &str, mbit: u32) -> Result<()> {
    let ends = [(namespace(record, host), UPLINK), (namespace(record, "sw"), host)];
    let (rate, burst, latency) = (format!("{mbit}mbit"), format!("{BURST_KIB}kb"), format!("{LATENCY_MS}ms"));
    for (namespace, device) in ends {
        let shaping = ["tbf", "rate", &rate, "burst", &burst, "latency", &latency];
        let replace = ["-n", &namespace, "qdisc", "replace", "dev", device, "root"];
        run("tc", &[&replace[..], &shaping[..]].concat())?;
    }
    Ok(())
}

/// Removes the network, whatever of it is there.
///
/// # Errors
/// When `ip` refuses, with what it said.
pub fn take_down(record: &Record) -> Result<()> {
    let device = device(record);
    if fs::exists(format!("/sys/class/net/{device}")).unwrap_or(false) {
        ip(&["link", "del", &device])?;
    }
    let hosts = record.hosts.iter().map(|host| host.name.as_str());
    for name in hosts.chain(["sw"]) {
        let namespace = namespace(record, name);
        if exists(&namespace) {
            ip(&["netns", "del", &namespace])?;
        }
    }
    Ok(())
}

/// A subnet that no route of this machine leads to. Where to begin comes from the id, so that clusters that are made
/// at once begin apart.
fn free_subnet(id: &str, taken: &[Block]) -> Result<Subnet> {
    let start = id.bytes().fold(0u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
    (0..Subnet::COUNT)
        .map(|offset| Subnet::new(start.wrapping_add(offset) % Subnet::COUNT))
        .find(|subnet| is_free(taken, *subnet))
        .context("every /24 in 198.18.0.0/15 has a route already")
}

fn is_free(taken: &[Block], subnet: Subnet) -> bool {
    !taken.iter().any(|block| block.overlaps(subnet))
}

/// Addresses that a route leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    first: u32,
    last: u32,
}

impl Block {
    fn parse(text: &str) -> Option<Self> {
        let (address, bits) = text.split_once('/').unwrap_or((text, "32"));
        let address = u32::from(address.parse::<Ipv4Addr>().ok()?);
        let bits: u32 = bits.parse().ok().filter(|bits| *bits <= 32)?;
        let mask = u32::MAX.checked_shr(bits).unwrap_or(0);
        Some(Self { first: address & !mask, last: address | mask })
    }

    const fn overlaps(self, subnet: Subnet) -> bool {
        self.first <= subnet.0 + 255 && subnet.0 <= self.last
    }
}

fn taken() -> Result<Vec<Block>> {
    Ok(parse_routes(&run("ip", &["-4", "route", "show", "table", "all"])?))
}

/// The destinations in `ip route`'s list; a default route leads everywhere and takes nothing.
fn parse_routes(text: &str) -> Vec<Block> {
    const KINDS: [&str; 7] =
        ["unicast", "local", "broadcast", "multicast", "blackhole", "unreachable", "prohibit"];
    let destination = |line: &str| {
        let word = line.split_whitespace().find(|word| !KINDS.contains(word))?;
        Block::parse(word).filter(|block| (block.first, block.last) != (0, u32::MAX))
    };
    text.lines().filter_map(destination).collect()
}

fn ip(arguments: &[&str]) -> Result<()> {
    run("ip", arguments).map(drop)
}

fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let told = || format!("{program} {}", arguments.join(" "));
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("'{}' can't be run: is iproute2 installed?", told()))?;
    if !output.status.success() {
        bail!("'{}' failed: {}", told(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_that_a_route_leads_to_is_not_taken() {
        let routes = "\
default via 192.0.2.1 dev eth0
192.0.2.0/24 dev eth0 proto kernel scope link
198.18.0.0/16 dev tun0
blackhole 198.19.0.0/17
local 198.19.128.1 dev berth-x table local proto kernel scope host
broadcast 198.19.129.255 dev berth-y table local
";
        let taken = parse_routes(routes);
        assert_eq!(taken.len(), 5);
        assert!(!is_free(&taken, Subnet::new(7)), "in the /16");
        assert!(!is_free(&taken, Subnet::new(256)), "in the blackhole");
        assert!(!is_free(&taken, Subnet::new(256 + 128)), "an address of it is ours");
        assert!(!is_free(&taken, Subnet::new(256 + 129)), "its end is somebody's");
        assert!(is_free(&taken, Subnet::new(256 + 130)));
        let found = free_subnet("abcde", &taken).expect("there are some left");
        assert!(is_free(&taken, found));
    }

    #[test]
    fn no_subnet_is_made_up_when_all_are_taken() {
        assert!(free_subnet("abcde", &parse_routes("198.18.0.0/15 dev tun0")).is_err());
    }

    #[test]
    fn hosts_come_after_this_machine_and_before_vms() {
        let subnet = Subnet::new(0);
        assert_eq!(own_address(subnet), Ipv4Addr::new(198, 18, 0, 1));
        assert_eq!(host_address(subnet, 0), Ipv4Addr::new(198, 18, 0, 2));
        // The manager gives VMs addresses from .10 on.
        assert_eq!(
            host_address(subnet, usize::from(super::super::HOSTS_MAX) - 1),
            Ipv4Addr::new(198, 18, 0, 9)
        );
    }
}
