//! Reads the part of a NoCloud `network-config` (version 2) that the test guest can do: the first interface's
//! addresses, gateway, DHCP and name servers.
//!
//! The guest's init is a shell script, so what it gets is a list of words that were checked here: nothing that
//! is not an address reaches a command line. The file is read as block-style YAML with inline lists, which is
//! what generators write; other styles are refused rather than half understood.

use std::net::IpAddr;

/// What to do with the interface, in order; each prints as `WORD VALUE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Give the interface this address.
    Address(IpAddr, u8),
    /// Send what is not local to this address.
    Gateway(IpAddr),
    /// Ask this server for names.
    Nameserver(IpAddr),
    /// Get an address by DHCP.
    Dhcp,
}

impl std::fmt::Display for Step {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Address(address, prefix) => write!(to, "address {address}/{prefix}"),
            Self::Gateway(address) => write!(to, "gateway {address}"),
            Self::Nameserver(address) => write!(to, "nameserver {address}"),
            Self::Dhcp => write!(to, "dhcp -"),
        }
    }
}

/// Reads the text of a `network-config`.
///
/// # Errors
/// With the line number and the reason, when a value that matters can't be understood.
pub fn parse(text: &str) -> Result<Vec<Step>, String> {
    let mut steps = Vec::new();
    let mut keys: Vec<(usize, String)> = Vec::new();
    let mut interface = None;
    for (index, raw) in text.lines().enumerate() {
        let line = without_comment(raw);
        let indent = line.len() - line.trim_start().len();
        let (depth, content) = list_item(indent, line.trim());
        if content.is_empty() || content == "---" {
            continue;
        }
        let is_item = depth != indent || line.trim().starts_with("- ");
        keys.retain(|(level, _)| *level < depth || (is_item && *level == indent));
        let value = match content.split_once(':').filter(|(key, rest)| is_key(key, rest)) {
            Some((key, rest)) => {
                keys.push((depth, unquoted(key).to_owned()));
                rest.trim()
            }
            None => content,
        };
        let path: Vec<&str> = keys.iter().map(|(_, key)| key.as_str()).collect();
        if !belongs(&path, &mut interface) {
            continue;
        }
        take(&path, value, &mut steps).map_err(|why| format!("line {}: {why}", index + 1))?;
    }
    Ok(steps)
}

/// Whether a path is about the first interface; the first one that is seen becomes it.
fn belongs(path: &[&str], interface: &mut Option<String>) -> bool {
    let path = if path.first() == Some(&"network") { &path[1..] } else { path };
    let ["ethernets", name, ..] = path else { return false };
    interface.get_or_insert_with(|| (*name).to_owned()) == name
}

fn take(path: &[&str], value: &str, steps: &mut Vec<Step>) -> Result<(), String> {
    if value.is_empty() {
        return Ok(());
    }
    match path {
        [.., "nameservers", "addresses"] => {
            for word in list(value)? {
                steps.push(Step::Nameserver(address(word)?));
            }
        }
        [.., "nameservers", _] => {}
        [.., "addresses"] => {
            for word in list(value)? {
                let (ip, prefix) =
                    word.split_once('/').ok_or_else(|| format!("{word:?} has no prefix length"))?;
                steps.push(prefixed(address(ip)?, prefix)?);
            }
        }
        [.., "gateway4" | "gateway6"] | [.., "routes", "via"] => {
            steps.push(Step::Gateway(address(unquoted(value))?));
        }
        [.., "dhcp4"] if matches!(unquoted(value), "true" | "yes" | "on") => steps.push(Step::Dhcp),
        _ => {}
    }
    Ok(())
}

fn prefixed(ip: IpAddr, prefix: &str) -> Result<Step, String> {
    let most = if ip.is_ipv4() { 32 } else { 128 };
    match prefix.parse::<u8>() {
        Ok(prefix) if prefix <= most => Ok(Step::Address(ip, prefix)),
        _ => Err(format!("{prefix:?} is no prefix length, expected 0 to {most}")),
    }
}

fn address(word: &str) -> Result<IpAddr, String> {
    word.parse().map_err(|_| format!("{word:?} is no IP address"))
}

fn list(value: &str) -> Result<Vec<&str>, String> {
    if value.starts_with('[') {
        let inner = value.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let inner = inner.ok_or_else(|| format!("{value:?} does not end on its line"))?;
        return Ok(inner
            .split(',')
            .map(|word| unquoted(word.trim()))
            .filter(|word| !word.is_empty())
            .collect());
    }
    Ok(vec![unquoted(value)])
}

/// The depth and content of what may be a list item: the content of `- x` stands two columns deeper.
fn list_item(mut indent: usize, mut content: &str) -> (usize, &str) {
    while let Some(rest) = content.strip_prefix("- ") {
        let inner = rest.trim_start();
        indent += content.len() - inner.len();
        content = inner;
    }
    (indent, content)
}

/// A colon makes a key only at a word's end; IPv6 addresses are full of others.
fn is_key(key: &str, rest: &str) -> bool {
    !key.is_empty() && !key.contains(['[', '{', ' ']) && (rest.is_empty() || rest.starts_with(' '))
}

fn unquoted(word: &str) -> &str {
    let quoted = |quote: char| word.strip_prefix(quote).and_then(|rest| rest.strip_suffix(quote));
    quoted('"').or_else(|| quoted('\'')).unwrap_or(word)
}

fn without_comment(line: &str) -> &str {
    if line.trim_start().starts_with('#') {
        return "";
    }
    line.split_once(" #").map_or(line, |(before, _)| before)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(text: &str) -> Vec<String> {
        parse(text).expect("a good configuration").iter().map(ToString::to_string).collect()
    }

    #[test]
    fn block_lists_and_inline_lists_say_the_same() {
        let block = "version: 2\nethernets:\n  eth0:\n    match:\n      macaddress: \"52:54:00:00:00:01\"\n    \
                     addresses:\n    - 10.9.0.5/24\n    - 'fd00::5/64'\n    routes:\n    - to: default\n      \
                     via: 10.9.0.1\n    nameservers:\n      addresses:\n      - 10.9.0.2\n";
        let inline = "network:\n  version: 2\n  ethernets:\n    eth0: # the only one\n      \
                      addresses: [10.9.0.5/24, \"fd00::5/64\"]\n      gateway4: 10.9.0.1\n      \
                      nameservers:\n        search: [example.test]\n        addresses: [10.9.0.2]\n";
        let expected =
            ["address 10.9.0.5/24", "address fd00::5/64", "gateway 10.9.0.1", "nameserver 10.9.0.2"];
        assert_eq!(steps(block), expected);
        assert_eq!(steps(inline), expected);
    }

    #[test]
    fn dhcp_is_asked_for_only_when_it_says_so() {
        assert_eq!(steps("version: 2\nethernets:\n  e:\n    dhcp4: true\n"), ["dhcp -"]);
        assert!(steps("version: 2\nethernets:\n  e:\n    dhcp4: false\n    dhcp6: true\n").is_empty());
    }

    #[test]
    fn a_second_interface_is_left_alone() {
        let text = "ethernets:\n  a:\n    dhcp4: true\n  b:\n    addresses: [10.0.0.1/8]\n";
        assert_eq!(steps(text), ["dhcp -"]);
    }

    #[test]
    fn nothing_but_addresses_gets_through() {
        for value in ["[10.0.0.5/24; reboot]", "[10.0.0.5]", "[10.0.0.5/33]", "[10.0.0.5/24", "$(reboot)/1"] {
            let text = format!("ethernets:\n  e:\n    addresses: {value}\n");
            assert!(parse(&text).is_err_and(|why| why.starts_with("line 3")), "{value}");
        }
        for nonsense in ["", "\u{0}\u{1}", ":::", "- - -", "ethernets: [", "a: b: c", "-", "\t- x:"] {
            assert_eq!(parse(nonsense), Ok(vec![]), "{nonsense:?}");
        }
    }
}
