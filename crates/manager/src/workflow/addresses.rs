//! Which addresses VMs are given: the next free one of one range.
//!
//! Thin on purpose: networks come later. A free address is one that no VM has in its record.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::str::FromStr;

use berth_model::Problem;
use serde::{Deserialize, Serialize};

/// Host numbers at the beginning of a range that are left to bridges, hosts and routers. Fewer: a host's own address
/// is given to a VM. More: small ranges are used up by nobody.
const LEFT_TO_HOSTS: u32 = 9;

/// A range of IPv4 addresses, as `198.18.5.0/24`; its first address (`198.18.5.1`) is taken for the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AddressRange {
    network: u32,
    prefix_bits: u8,
}

impl AddressRange {
    /// The gateway that VMs are told.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::from(self.network + 1)
    }

    /// Whether an address is of this range.
    pub fn contains(&self, address: Ipv4Addr) -> bool {
        u32::from(address) & !(u32::MAX >> self.prefix_bits) == self.network
    }

    /// The first free address, with the prefix length.
    ///
    /// # Errors
    /// That all are taken.
    pub fn next_free(&self, taken: &BTreeSet<Ipv4Addr>) -> Result<String, Problem> {
        let size = 1u32 << (32 - u32::from(self.prefix_bits));
        (1 + LEFT_TO_HOSTS..size - 1)
            .map(|number| Ipv4Addr::from(self.network + number))
            .find(|address| !taken.contains(address))
            .map(|address| format!("{address}/{}", self.prefix_bits))
            .ok_or_else(|| {
                Problem::field("nics", "address", format!("a free address in {self}; all are taken"))
            })
    }
}

/// Text that is not a range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is not a range of IPv4 addresses: expected one like 198.18.5.0/24, with a prefix of 8 to 28 bits"
)]
pub struct AddressRangeError {
    /// What was given.
    pub text: String,
}

impl FromStr for AddressRange {
    type Err = AddressRangeError;
    fn from_str(text: &str) -> Result<Self, AddressRangeError> {
        let wrong = || AddressRangeError { text: text.chars().take(64).collect() };
        let (address, bits) = text.split_once('/').ok_or_else(wrong)?;
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let prefix_bits: u8 = bits.parse().map_err(|_| wrong())?;
        let network = u32::from(address);
        let host_mask =
            if (8..=28).contains(&prefix_bits) { u32::MAX >> prefix_bits } else { return Err(wrong()) };
        if network & host_mask != 0 {
            return Err(wrong());
        }
        Ok(Self { network, prefix_bits })
    }
}

impl TryFrom<String> for AddressRange {
    type Error = AddressRangeError;
    fn try_from(text: String) -> Result<Self, AddressRangeError> {
        text.parse()
    }
}

impl From<AddressRange> for String {
    fn from(range: AddressRange) -> Self {
        range.to_string()
    }
}

impl std::fmt::Display for AddressRange {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{}/{}", Ipv4Addr::from(self.network), self.prefix_bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_given_once_and_never_the_ends() {
        let range: AddressRange = "198.18.5.0/28".parse().expect("a range");
        let mut taken = BTreeSet::new();
        while let Ok(address) = range.next_free(&taken) {
            let plain: Ipv4Addr =
                address.split('/').next().and_then(|text| text.parse().ok()).expect("address");
            assert!(taken.insert(plain), "{address} twice");
        }
        let expected: BTreeSet<Ipv4Addr> = (10..15).map(|last| Ipv4Addr::new(198, 18, 5, last)).collect();
        assert_eq!(taken, expected);
        assert_eq!(range.gateway(), Ipv4Addr::new(198, 18, 5, 1));
    }

    #[test]
    fn nonsense_is_no_range() {
        for text in ["", "198.18.5.0", "198.18.5.1/24", "198.18.5.0/31", "0.0.0.0/0", "198.18.5/24", "::/64"]
        {
            assert!(text.parse::<AddressRange>().is_err(), "{text}");
        }
    }
}
