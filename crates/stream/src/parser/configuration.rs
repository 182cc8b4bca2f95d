//! The configuration: the machine type's name, and parts that are there only when they differ from what is usual.

use crate::error::Fault;

/// Longer than any machine type's name; much higher would only delay the refusal of nonsense.
pub(super) const MACHINE_TYPE_BYTES_MAX: u32 = 256;

/// How the reading of a part's content begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// Content of this many bytes, without interest.
    Plain(usize),
    /// A list of capabilities, each with its name.
    Capabilities,
}

/// What a part's name says of its content.
pub(super) fn part(name: &str) -> Result<Part, Fault> {
    match name {
        "configuration/target-page-bits" => Ok(Part::Plain(4)),
        "configuration/uuid" => Ok(Part::Plain(16)),
        "configuration/capabilities" => Ok(Part::Capabilities),
        _ => Err(Fault::ConfigurationPart { name: name.to_owned() }),
    }
}

/// Refuses capabilities that change the records' form. QEMU lists only those that do when they are on.
pub(super) fn check_capability(name: &str) -> Result<(), Fault> {
    match name {
        "x-ignore-shared" | "mapped-ram" => Err(Fault::Capability { name: name.to_owned() }),
        _ => Ok(()),
    }
}
