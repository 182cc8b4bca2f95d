//! Layers as files: made, frozen, checked.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use berth_api::agent::VmDefinition;
use berth_api::transport::BoxFuture;
use berth_model::image::{PartFormat, PartRole};
use berth_model::{LayerId, Problem, ProblemCode};

use self::merging::Merging;
use self::pace::Pace;
use crate::disks;
use crate::durable::{self, FileError, blocking};
use crate::layout::{VmDirs, part_file};
use crate::vm::VmRuntime;

pub mod clusters;
pub mod merging;
pub mod pace;
pub mod tool;

/// Mode of a file that is never written again.
pub const FROZEN_MODE: u32 = 0o444;
/// Mode of the writable layer, which its VM's own user has.
pub const WRITABLE_MODE: u32 = 0o600;

/// What a new layer is to lie on, for tools that look into its head; QEMU itself is told by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingFile {
    /// Where it is, from the layer's own directory, so that a pool may be mounted anywhere.
    pub relative_path: PathBuf,
    /// Its format.
    pub format: PartFormat,
}

/// A new layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewLayer {
    /// Where.
    pub path: PathBuf,
    /// The size that the guest sees, in bytes.
    pub virtual_size_bytes: u64,
    /// What it lies on.
    pub backing: Option<BackingFile>,
    /// Who may write to it; none: the agent's own user.
    pub user_id: Option<u32>,
}

/// Works on image files; what a stranger made is only opened in a process that can do nothing else.
pub trait ImageTool: Send + Sync {
    /// Makes an empty layer. On an error there is none.
    fn create_layer(&self, layer: NewLayer) -> BoxFuture<'_, Result<(), Problem>>;

    /// Makes one new layer of several, at this pace. On an error there is none.
    fn merge_layers(&self, work: Merging, pace: Pace) -> BoxFuture<'_, Result<(), Problem>>;

    /// How much data several layers would have as one, in bytes.
    fn measure_layers(&self, layers: Vec<PathBuf>) -> BoxFuture<'_, Result<u64, Problem>>;

    /// Checks a file that a stranger brought, which is said to be qcow2 and whose head was found to be in order.
    fn check_qcow2<'a>(&'a self, path: &'a Path) -> BoxFuture<'a, Result<(), Problem>>;
}

/// Makes a new, empty layer of a VM's disk on the layer below it (on the disk's bottom when there is none). If the file is
/// there already it is made anew: it is not on record, so it is what is left of an attempt.
///
/// # Errors
/// When there is no room, or the tool fails; there is then no such file.
pub async fn create_layer(
    vm: &VmRuntime,
    disk: usize,
    layer: &LayerId,
    below: Option<&LayerId>,
) -> Result<(), Problem> {
    let place = Place { dirs: vm.dirs()?, definition: vm.definition()?, disk };
    let new = new_layer(place, vm.user_id()?, layer, below);
    vm.services().images.create_layer(new).await
}

/// Where a layer is to be.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The VM's directories.
    pub dirs: &'a VmDirs,
    /// The VM.
    pub definition: &'a VmDefinition,
    /// Which of its disks.
    pub disk: usize,
}

/// What a new layer is to be.
pub fn new_layer(
    place: Place<'_>,
    user_id: Option<u32>,
    layer: &LayerId,
    below: Option<&LayerId>,
) -> NewLayer {
    let Place { dirs, definition, disk } = place;
    let on_layer = |below: &LayerId| BackingFile {
        relative_path: format!("{below}.qcow2").into(),
        format: PartFormat::Qcow2,
    };
    let on_image = || {
        let bottom = definition.image.part(PartRole::Disk).filter(|_| disk == disks::ROOT);
        bottom.map(|part| BackingFile {
            relative_path: Path::new("../../../images")
                .join(definition.image.id.as_str())
                .join(part_file(PartRole::Disk, part.format)),
            format: part.format,
        })
    };
    NewLayer {
        path: dirs.layer(layer),
        virtual_size_bytes: disks::size_bytes(definition, disk),
        backing: below.map(on_layer).or_else(on_image),
        user_id,
    }
}

/// Makes a layer read-only for good. QEMU, which has it open, must have let go of writing before.
///
/// # Errors
/// When the system refuses.
pub async fn freeze_layer(dirs: &VmDirs, layer: &LayerId) -> Result<(), Problem> {
    let path = dirs.layer(layer);
    blocking(move || {
        let mode = std::fs::Permissions::from_mode(FROZEN_MODE);
        Ok(std::fs::set_permissions(&path, mode).map_err(FileError::io(&path, "frozen"))?)
    })
    .await
}

/// Removes a layer's file; nothing if there is none.
///
/// # Errors
/// When the system refuses.
pub async fn remove_layer(dirs: &VmDirs, layer: &LayerId) -> Result<(), Problem> {
    let path = dirs.layer(layer);
    blocking(move || Ok(durable::remove_file(&path)?)).await
}

/// A problem for a disk that is full, whatever said so.
pub fn no_space(where_to: &Path) -> Problem {
    Problem::new(ProblemCode::NoSpace, format!("there is no room left in {}", where_to.display()))
}
