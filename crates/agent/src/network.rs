//! How a VM's interfaces reach the world: a tap on a bridge, or QEMU's own network with forwarded ports.
//!
//! A tap lives as long as somebody has it open. The agent makes it, puts it on the bridge and gives it to QEMU; when QEMU
//! ends, however it ends, the tap is gone, so there is nothing to clean up.

use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::Duration;

use berth_api::agent::VmDefinition;
use berth_model::host::NetworkMode;
use berth_model::vm::{Nic as NicSpec, PortForward};
use berth_model::{Problem, ProblemCode};
use berth_qmp::Qmp;
use berth_qmp::commands::HumanMonitorCommand;

use crate::durable::blocking;
use crate::launcher::Descriptor;
use crate::qemu::{Nic, UserSubnet};
use crate::services::Services;

pub mod tap;

/// Ports of the guest that can be reached in user mode without being asked for: the probe's, and SSH.
const FORWARDED: [(&str, u16); 2] = [("udp", 7007), ("tcp", 22)];
/// How long a tap of the same name may take to go: a killed QEMU lets go of it after its memory.
const TAP_WAIT: Duration = Duration::from_secs(20);
const TAP_RETRY: Duration = Duration::from_millis(5);
/// The longest prefix that has room for the guest, the gateway and the name server of QEMU's network.
const PREFIX_MAX: u8 = 29;

/// What a process is given to reach the network.
#[derive(Debug, Default)]
pub struct Lease {
    /// For the command line, one for each interface.
    pub nics: Vec<Nic>,
    /// For the report, one for each interface in user mode.
    pub forwards: Vec<Vec<PortForward>>,
    /// The open taps.
    pub taps: Vec<(Descriptor, OwnedFd)>,
}

/// What gives a process that was started beside another one its network, once the other is off it.
#[derive(Debug, Default)]
pub struct Plug {
    /// Rules of user-mode networks' forwarding, each with its network's id.
    rules: Vec<String>,
    /// Taps whose frames still go to the other process.
    taps: Vec<OwnedFd>,
}

impl Plug {
    /// Gives the process the network. May be done again after it failed.
    ///
    /// # Errors
    /// When QEMU or the system refuses: the other process may not have let go yet.
    pub async fn plug(&mut self, qmp: &Qmp) -> Result<(), Problem> {
        let refused = |text: String| Problem::new(ProblemCode::Hypervisor, text);
        while let Some(rule) = self.rules.last() {
            let command_line = format!("hostfwd_add {rule}");
            let said = qmp.call(HumanMonitorCommand { command_line }).await;
            let said = said.map_err(|error| refused(crate::durable::with_causes(&error)))?;
            if !said.trim().is_empty() {
                return Err(refused(format!("the VM's ports can't be forwarded: {}", said.trim())));
            }
            self.rules.pop();
        }
        while let Some(tap) = self.taps.last() {
            tap::take_frames(tap)
                .map_err(|error| refused(format!("the VM's tap can't be taken: {error}")))?;
            self.taps.pop();
        }
        Ok(())
    }
}

/// Gets what a process needs that is started while another of the same VM, with these forwards, has the network.
///
/// # Errors
/// When a tap can't be shared, or no port is free for a forward that is new.
pub async fn lease_beside(
    services: &Services,
    definition: &VmDefinition,
    before: &[Vec<PortForward>],
) -> Result<(Lease, Plug), Problem> {
    match services.config.network.mode {
        NetworkMode::Bridge => bridged_beside(services, definition).await,
        NetworkMode::User if definition.spec.isolated => {
            Ok((nowhere(&definition.spec.nics)?, Plug::default()))
        }
        NetworkMode::User => user_beside(&definition.spec.nics, before),
    }
}

/// Gets what a new process of a VM needs. `before` are the ports that it had last: it gets them again where they are free.
///
/// # Errors
/// When a tap can't be made, or an address has no room in a network of QEMU's own.
pub async fn lease(
    services: &Services,
    definition: &VmDefinition,
    before: &[Vec<PortForward>],
) -> Result<Lease, Problem> {
    match services.config.network.mode {
        NetworkMode::Bridge => bridged(services, definition).await,
        NetworkMode::User if definition.spec.isolated => nowhere(&definition.spec.nics),
        NetworkMode::User => user(&definition.spec.nics, before),
    }
}

async fn bridged(services: &Services, definition: &VmDefinition) -> Result<Lease, Problem> {
    let mut lease = Lease::default();
    for (index, request) in requests(services, definition).enumerate() {
        lease.taps.push((Descriptor::Tap(index), open_tap(request).await?));
        lease.nics.push(Nic::Tap);
    }
    Ok(lease)
}

async fn bridged_beside(services: &Services, definition: &VmDefinition) -> Result<(Lease, Plug), Problem> {
    let (mut lease, mut plug) = (Lease::default(), Plug::default());
    for (index, request) in requests(services, definition).enumerate() {
        let opened = blocking(move || {
            tap::open_beside(&request).and_then(|tap| Ok((tap.try_clone()?, tap))).map_err(|error| {
                let text = format!("tap '{}' can't be shared for a moment: {error}", request.name);
                Problem::new(ProblemCode::Hypervisor, text)
            })
        });
        let (kept, given) = opened.await?;
        lease.taps.push((Descriptor::Tap(index), given));
        lease.nics.push(Nic::Tap);
        plug.taps.push(kept);
    }
    Ok((lease, plug))
}

/// The taps that a VM is to have, one for each interface.
fn requests(services: &Services, definition: &VmDefinition) -> impl Iterator<Item = tap::Request> {
    let bridge = services.config.network.bridge.clone().filter(|_| !definition.spec.isolated);
    let (number, owner) = (definition.number, services.user_id(definition.number));
    (0..definition.spec.nics.len()).map(move |index| tap::Request {
        name: tap_name(number, index),
        bridge: bridge.clone(),
        owner,
    })
}

/// The name of a tap.
pub fn tap_name(vm_number: u32, index: usize) -> String {
    format!("bt{vm_number}n{index}")
}

async fn open_tap(request: tap::Request) -> Result<OwnedFd, Problem> {
    let began = tokio::time::Instant::now();
    loop {
        let wanted = request.clone();
        match blocking(move || Ok(tap::open(&wanted))).await? {
            Ok(tap) => return Ok(tap),
            Err(error) if error.is_busy() && began.elapsed() < TAP_WAIT => {
                tokio::time::sleep(TAP_RETRY).await
            }
            Err(error) => {
                let text = crate::durable::with_causes(&error);
                return Err(Problem::new(ProblemCode::Hypervisor, format!("the VM has no network: {text}")));
            }
        }
    }
}

/// Interfaces that lead nowhere.
fn nowhere(nics: &[NicSpec]) -> Result<Lease, Problem> {
    let reach = nics.iter().enumerate().map(|(index, nic)| {
        let subnet = subnet(index, nic)?;
        Ok(Nic::User { subnet, forwards: Vec::new(), isolated: true })
    });
    Ok(Lease { nics: reach.collect::<Result<_, Problem>>()?, ..Lease::default() })
}

fn user(nics: &[NicSpec], before: &[Vec<PortForward>]) -> Result<Lease, Problem> {
    let mut lease = Lease::default();
    // Held until all are chosen, so that none is chosen twice.
    let mut held = Vec::new();
    for (index, nic) in nics.iter().enumerate() {
        let mut forwards = wanted_forwards(nic);
        for forward in &mut forwards {
            let same =
                |old: &&PortForward| old.protocol == forward.protocol && old.guest_port == forward.guest_port;
            let old = before.get(index).and_then(|old| old.iter().find(same)).map(|old| old.host_port);
            let (port, guard) = choose_port(forward, old)?;
            forward.host_port = port;
            held.push(guard);
        }
        lease.nics.push(Nic::User {
            subnet: subnet(index, nic)?,
            forwards: forwards.clone(),
            isolated: false,
        });
        lease.forwards.push(forwards);
    }
    Ok(lease)
}

fn user_beside(nics: &[NicSpec], before: &[Vec<PortForward>]) -> Result<(Lease, Plug), Problem> {
    let (mut lease, mut plug, mut held) = (Lease::default(), Plug::default(), Vec::new());
    for (index, nic) in nics.iter().enumerate() {
        let mut forwards = wanted_forwards(nic);
        let subnet = subnet(index, nic)?;
        let guest = subnet.map(|subnet| subnet.guest.to_string()).unwrap_or_default();
        for forward in &mut forwards {
            let had = before.get(index).into_iter().flatten().find(|old| {
                old.protocol == forward.protocol
                    && old.guest_port == forward.guest_port
                    && (forward.host_port == 0 || forward.host_port == old.host_port)
            });
            match had {
                // The other process has it now.
                Some(old) => forward.host_port = old.host_port,
                None => {
                    let (port, guard) = choose_port(forward, None)?;
                    forward.host_port = port;
                    held.push(guard);
                }
            }
            let PortForward { protocol, host_port, guest_port } = forward;
            plug.rules.push(format!("net{index} {protocol}:127.0.0.1:{host_port}-{guest}:{guest_port}"));
        }
        lease.nics.push(Nic::User { subnet, forwards: Vec::new(), isolated: false });
        lease.forwards.push(forwards);
    }
    Ok((lease, plug))
}

fn wanted_forwards(nic: &NicSpec) -> Vec<PortForward> {
    let mut all = nic.forwards.clone();
    for (protocol, guest_port) in FORWARDED {
        if !all.iter().any(|forward| forward.protocol == protocol && forward.guest_port == guest_port) {
            all.push(PortForward { protocol: protocol.to_owned(), host_port: 0, guest_port });
        }
    }
    all
}

/// Holds a port while others are chosen.
enum Held {
    Tcp { _socket: TcpListener },
    Udp { _socket: UdpSocket },
}

/// The port that is asked for, or that there was before if it is free, or any that is.
fn choose_port(forward: &PortForward, before: Option<u16>) -> Result<(u16, Held), Problem> {
    let wish = match forward.host_port {
        0 => before.unwrap_or(0),
        port => port,
    };
    let bound = match bind(&forward.protocol, wish)? {
        Err(_) if forward.host_port == 0 => bind(&forward.protocol, 0)?,
        other => other,
    };
    bound.map_err(|error| {
        let message = format!("{} port {wish} can't be forwarded: {error}", forward.protocol);
        Problem::new(ProblemCode::Hypervisor, message).at("host_port", wish, "a free port of the host")
    })
}

fn bind(protocol: &str, port: u16) -> Result<std::io::Result<(u16, Held)>, Problem> {
    let address = SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
    Ok(match protocol {
        "tcp" => TcpListener::bind(address)
            .and_then(|socket| Ok((socket.local_addr()?.port(), Held::Tcp { _socket: socket }))),
        "udp" => UdpSocket::bind(address)
            .and_then(|socket| Ok((socket.local_addr()?.port(), Held::Udp { _socket: socket }))),
        other => return Err(Problem::field("forwards.protocol", other, "tcp or udp")),
    })
}

/// The network that QEMU is to play around a guest whose address was chosen; none: QEMU's own, with DHCP.
fn subnet(index: usize, nic: &NicSpec) -> Result<Option<UserSubnet>, Problem> {
    let Some(address) = &nic.address else { return Ok(None) };
    let wrong = |expected: &str| Problem::field(format!("nics.{index}.address"), address, expected);
    let parsed = address.split_once('/').and_then(|(ip, prefix)| {
        Some((ip.parse::<Ipv4Addr>().ok()?, prefix.parse::<u8>().ok().filter(|&prefix| prefix <= 32)?))
    });
    let (guest, prefix) = parsed.ok_or_else(|| wrong("an IPv4 address with a prefix length"))?;
    if prefix > PREFIX_MAX {
        return Err(wrong("a prefix length of at most 29 on a host with user-mode networking"));
    }
    let mask = if prefix == 0 { 0 } else { u32::MAX << (32 - prefix) };
    let network = u32::from(guest) & mask;
    let gateway = nic.gateway.as_ref().and_then(|gateway| gateway.parse::<Ipv4Addr>().ok());
    let mut free =
        (network + 1..network | !mask).map(Ipv4Addr::from).filter(|&ip| ip != guest && Some(ip) != gateway);
    let host = gateway.filter(|&ip| u32::from(ip) & mask == network && ip != guest).or_else(|| free.next());
    let none_left = || wrong("an address in a network with room for a gateway");
    Ok(Some(UserSubnet {
        network: Ipv4Addr::from(network),
        prefix,
        guest,
        host: host.ok_or_else(none_left)?,
        name_server: free.next().ok_or_else(none_left)?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn the_probe_and_ssh_are_forwarded_and_keep_their_ports() {
        let nics = [testing::nic(None, None), testing::nic(None, None)];
        let first = user(&nics, &[]).expect("lease").forwards;
        let ports: std::collections::BTreeSet<u16> =
            first.iter().flatten().map(|forward| forward.host_port).collect();
        assert_eq!(ports.len(), 4, "all different: {first:?}");
        assert_eq!(user(&nics, &first).expect("again").forwards, first);
        let taken = UdpSocket::bind(("127.0.0.1", first[0][0].host_port)).expect("taken");
        let other = user(&nics, &first).expect("other").forwards;
        assert_ne!(other[0][0].host_port, first[0][0].host_port);
        assert_eq!(other[1], first[1]);
        drop(taken);
    }

    #[test]
    fn a_port_that_was_asked_for_and_is_taken_is_an_error() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("taken");
        let port = taken.local_addr().expect("address").port();
        let mut nic = testing::nic(None, None);
        nic.forwards = vec![PortForward { protocol: "tcp".into(), host_port: port, guest_port: 80 }];
        assert_eq!(user(&[nic], &[]).expect_err("taken").field.as_deref(), Some("host_port"));
    }

    #[test]
    fn a_network_is_made_around_a_chosen_address() {
        let one = |address, gateway| subnet(0, &testing::nic(Some(address), gateway));
        let around = one("198.18.5.1/24", None).expect("good").expect("some");
        assert_eq!(around.host.to_string(), "198.18.5.2");
        assert_eq!(around.name_server.to_string(), "198.18.5.3");
        let around = one("198.18.5.20/24", Some("198.18.5.1")).expect("good").expect("some");
        assert_eq!(
            (around.host.to_string(), around.name_server.to_string()),
            ("198.18.5.1".into(), "198.18.5.2".into())
        );
        assert!(one("198.18.5.20/30", None).is_err());
        assert!(one("nonsense", None).is_err());
    }

    #[test]
    fn the_longest_name_of_a_tap_fits() {
        assert!(tap_name(u32::MAX, 7).len() <= 15);
    }
}
