//! Images: immutable bottom layers that VMs start from.
//!
//! An image has parts. A disk image has one part, `disk`; a kernel image (for guests that boot without a boot loader,
//! such as the test guest) has `kernel` and `initrd`, and may have a `disk` too. Formats are always stated by whoever
//! imports, never probed: a raw disk whose first bytes a guest chose must not become a qcow2 that names a host's file.

use serde::{Deserialize, Serialize};

use crate::name::Name;
use crate::{ImageId, SegmentId, Timestamp};

/// What a part of an image is for.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum PartRole {
    /// The boot disk.
    Disk,
    /// A Linux kernel, started directly.
    Kernel,
    /// The initial RAM disk that goes with the kernel.
    Initrd,
}

impl PartRole {
    /// The role as it stands in paths.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Kernel => "kernel",
            Self::Initrd => "initrd",
        }
    }
}

/// How a part's bytes are laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PartFormat {
    /// The bytes are the content.
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3, without backing file, data file, encryption or unknown features.
    Qcow2,
}

impl PartFormat {
    /// The format as QEMU and qemu-img call it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// A part as the importer declares it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ImagePart {
    /// What it is for.
    pub role: PartRole,
    /// How it is laid out; kernels and initrds are raw.
    pub format: PartFormat,
    /// The file's length in bytes.
    pub size_bytes: u64,
    /// SHA-256 of the file, in hexadecimal.
    pub sha256: String,
    /// The size that a guest sees, in bytes; known once the part has been checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size_bytes: Option<u64>,
}

/// Where an image stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ImageState {
    /// Declared; parts are still to come.
    Uploading,
    /// Whole, checked, and usable.
    Ready,
}

/// An image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Image {
    /// Its id.
    pub id: ImageId,
    /// Its name, unique in its segment, or among those that are for all.
    pub name: Name,
    /// The segment whose VMs may use it; none: all segments.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub segment: Option<SegmentId>,
    /// Where it stands.
    pub state: ImageState,
    /// Its parts.
    pub parts: Vec<ImagePart>,
    /// The kernel's command line, for images with a kernel.
    #[serde(default)]
    pub kernel_command_line: String,
    /// The parts that have arrived and were found right.
    #[serde(default)]
    pub arrived: Vec<PartRole>,
    /// When it was declared.
    pub created_at: Timestamp,
}

impl Image {
    /// The part with this role, if the image has one.
    pub fn part(&self, role: PartRole) -> Option<&ImagePart> {
        self.parts.iter().find(|part| part.role == role)
    }
}
