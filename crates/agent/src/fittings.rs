//! What a VM's machine is fitted with beside what its definition says: made here, kept with the disk, and as much a part
//! of a snapshot as the disk is.
//!
//! The **generation id** is a number that a guest reads from its machine (`vmgenid`) and is told of when it changes. It
//! says which of several lives this one is: a guest that was put back to a snapshot, or made from one, has another, and
//! takes new random numbers instead of those that its other life had, too. One that is moved, or started anew, keeps it.
//!
//! QEMU takes it from the command line, and has only the address in the stream: so a process that loads a snapshot with
//! another number on its command line puts that into the guest's memory and tells the guest, before it runs. A machine
//! that was made without the device stays without: a stream loads only into a machine with the same devices.

use berth_model::{LayerId, Problem, ProblemCode};
use serde::{Deserialize, Serialize};

use crate::launcher::Hypervisor;

/// The device with the generation id, by QEMU's name.
pub const GENERATION_DEVICE: &str = "vmgenid";

/// The TPM's device, by QEMU's name.
pub const TPM_DEVICE: &str = "tpm-crb";

/// What a machine is fitted with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fittings {
    /// The generation id, as a UUID; none: the machine has no such device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation_id: Option<String>,
    /// The directory with what the machine remembers beside its disk ([`crate::nvram`]); none: it remembers nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nvram: Option<LayerId>,
}

impl Fittings {
    /// Those of a new VM that remembers nothing: all that this QEMU has.
    ///
    /// # Errors
    /// When the system gives no random numbers.
    pub fn new(hypervisor: &Hypervisor) -> Result<Self, Problem> {
        let has_generation = hypervisor.abilities.devices.iter().any(|device| device == GENERATION_DEVICE);
        Ok(Self { generation_id: has_generation.then(random_uuid).transpose()?, nvram: None })
    }

    /// Those of another life of the same machine, which begins with this writable layer.
    ///
    /// # Errors
    /// When the system gives no random numbers.
    pub fn renewed(&self, top: &LayerId) -> Result<Self, Problem> {
        Ok(Self {
            generation_id: self.generation_id.as_ref().map(|_| random_uuid()).transpose()?,
            nvram: self.nvram.as_ref().map(|_| top.clone()),
        })
    }
}

fn random_uuid() -> Result<String, Problem> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)
        .map_err(|error| Problem::new(ProblemCode::Internal, format!("no random numbers: {error}")))?;
    // The marks of a UUID that is random.
    bytes[6] = (bytes[6] & 0x0f) | 0x40;
    bytes[8] = (bytes[8] & 0x3f) | 0x80;
    Ok(uuid_text(bytes))
}

/// A UUID as it is written.
pub fn uuid_text(bytes: [u8; 16]) -> String {
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Whether a text is a UUID as it is written here.
pub fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_life_has_another_generation_and_a_machine_without_one_gets_none() {
        let [born, top] = [1, 2].map(|number| LayerId::from_entropy([number; 10]));
        let first = Fittings { generation_id: Some(random_uuid().expect("random")), nvram: Some(born) };
        let second = first.renewed(&top).expect("random");
        assert!(second.generation_id.is_some() && second.generation_id != first.generation_id);
        assert!(second.generation_id.as_deref().is_some_and(is_uuid));
        assert!(!is_uuid("0") && !is_uuid("01234567-89ab-cdef-0123-456789abcde,"));
        assert_eq!(second.nvram.as_ref(), Some(&top));
        assert_eq!(Fittings::default().renewed(&top).expect("random"), Fittings::default());
    }
}
