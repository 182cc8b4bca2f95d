//! Network interfaces on the command line: `address=198.18.5.20/24,mac=52:54:00:…,forward=tcp:2222:22`.

use berth_api::manager::NewNic;
use berth_model::vm::{Nic, PortForward};

use crate::output::NOTHING;

const EXPECTED: &str = "expected KEY=VALUE,… of address=A.B.C.D/BITS or address=dhcp, mac=52:54:00:…, \
     forward=tcp|udp:HOST_PORT:GUEST_PORT (with user-mode networking; host port 0: any)";

/// Reads one.
///
/// # Errors
/// What was expected instead.
pub fn parse(text: &str) -> Result<NewNic, String> {
    let mut nic = NewNic::default();
    // The manager checks addresses; here only what has no place in its request.
    for part in text.split(',').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some(("address", value)) if nic.address.is_none() => nic.address = Some(value.to_owned()),
            Some(("mac", value)) if nic.mac.is_none() => nic.mac = Some(value.to_owned()),
            Some(("forward", value)) => nic.forwards.push(parse_forward(value)?),
            _ => return Err(format!("'{part}': {EXPECTED}")),
        }
    }
    Ok(nic)
}

fn parse_forward(text: &str) -> Result<PortForward, String> {
    let wrong = || format!("'{text}': {EXPECTED}");
    let parts: Vec<&str> = text.split(':').collect();
    let [protocol @ ("tcp" | "udp"), host, guest] = parts[..] else { return Err(wrong()) };
    let host_port = host.parse().map_err(|_| wrong())?;
    let guest_port = guest.parse().ok().filter(|port| *port != 0).ok_or_else(wrong)?;
    Ok(PortForward { protocol: protocol.to_owned(), host_port, guest_port })
}

/// One for people.
pub fn in_words(nic: &Nic) -> String {
    let address = nic.address.as_deref().unwrap_or("address by DHCP");
    let mut text = format!("{}  {address}", nic.mac);
    if let Some(gateway) = &nic.gateway {
        text.push_str(&format!("  gateway {gateway}"));
    }
    for forward in &nic.forwards {
        let PortForward { protocol, host_port, guest_port } = forward;
        text.push_str(&format!("  127.0.0.1:{host_port}/{protocol} leads to its {guest_port}"));
    }
    if text.trim().is_empty() { NOTHING.to_owned() } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_are_read_and_nonsense_is_refused() {
        let nic =
            parse("address=198.18.5.20/24,mac=52:54:00:12:34:56,forward=tcp:2222:22,forward=udp:0:7007");
        let nic = nic.expect("an interface");
        assert_eq!(nic.address.as_deref(), Some("198.18.5.20/24"));
        assert_eq!(nic.mac.as_deref(), Some("52:54:00:12:34:56"));
        let ports: Vec<(u16, u16)> =
            nic.forwards.iter().map(|forward| (forward.host_port, forward.guest_port)).collect();
        assert_eq!(ports, [(2222, 22), (0, 7007)]);
        assert!(parse("").expect("the defaults").forwards.is_empty());
        for text in [
            "address",
            "mac=a,mac=b",
            "bridge=br0",
            "forward=tcp:1",
            "forward=sctp:1:2",
            "forward=tcp:70000:1",
            "forward=tcp:1:0",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
