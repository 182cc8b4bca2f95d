//! A VM's directory in its pool: made so that the VM's own user can pass and read, and nobody else.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use berth_api::agent::VmDefinition;
use berth_model::Problem;
use berth_model::image::PartRole;

use crate::disk;
use crate::disks;
use crate::durable::{self, FileError, blocking};
use crate::image;
use crate::layout::VmDirs;
use crate::seed;
use crate::services::Services;

/// Mode of a VM's directories: the VM's group may pass, not list.
const DIRECTORY_MODE: u32 = 0o710;
/// Mode of the seed, which may hold secrets: its VM may read it.
const SEED_MODE: u32 = 0o440;

/// Makes a VM's directories, its disks' first layers, and its seed.
///
/// # Errors
/// When the image is not there, the disk is smaller than it, there is no room, or a file can't be made.
pub async fn make(services: &Services, dirs: &VmDirs, definition: &VmDefinition) -> Result<(), Problem> {
    image::check_present(&dirs.pool, &definition.image).await?;
    check_disk_size(definition)?;
    make_directories(services, dirs, definition).await?;
    let user_id = services.user_id(definition.number);
    for (number, layer) in disks::tops(&definition.first_layer, disks::count(definition)).enumerate() {
        let place = disk::Place { dirs, definition, disk: number };
        services.images.create_layer(disk::new_layer(place, user_id, &layer, None)).await?;
    }
    write_seed(services, dirs, definition).await
}

/// Makes a VM's directories; nothing if they are there.
///
/// # Errors
/// When the system refuses.
pub async fn make_directories(
    services: &Services,
    dirs: &VmDirs,
    definition: &VmDefinition,
) -> Result<(), Problem> {
    let group = services.user_id(definition.number);
    let all = [dirs.disk.clone(), dirs.layers(), dirs.snapshots()];
    blocking(move || {
        for directory in &all {
            make_directory(directory, group)?;
        }
        all.iter().try_for_each(|directory| Ok(durable::sync_parent(directory)?))
    })
    .await
}

/// Makes a directory that a VM's group may pass; nothing if it is there.
///
/// # Errors
/// When the system refuses.
pub fn make_directory(directory: &Path, group: Option<u32>) -> Result<(), FileError> {
    fs::create_dir_all(directory).map_err(FileError::io(directory, "made"))?;
    let mode = fs::Permissions::from_mode(DIRECTORY_MODE);
    fs::set_permissions(directory, mode).map_err(FileError::io(directory, "given its mode"))?;
    give_group(directory, group)
}

/// Makes a VM's group the group of a file, so that the group's rights in its mode are that VM's.
///
/// # Errors
/// When the system refuses.
pub fn give_group(path: &Path, group: Option<u32>) -> Result<(), FileError> {
    match group {
        Some(group) => std::os::unix::fs::lchown(path, None, Some(group))
            .map_err(FileError::io(path, "given to the VM's group")),
        None => Ok(()),
    }
}

/// Writes the VM's cloud-init seed.
///
/// # Errors
/// When it can't be written.
pub async fn write_seed(
    services: &Services,
    dirs: &VmDirs,
    definition: &VmDefinition,
) -> Result<(), Problem> {
    let content = seed::image(definition)?;
    let (path, group) = (dirs.seed(), services.user_id(definition.number));
    blocking(move || {
        durable::write(&path, &content, SEED_MODE)?;
        Ok(give_group(&path, group)?)
    })
    .await
}

fn check_disk_size(definition: &VmDefinition) -> Result<(), Problem> {
    let image_bytes =
        definition.image.part(PartRole::Disk).and_then(|part| part.virtual_size_bytes).unwrap_or(0);
    if definition.spec.disk_mib.saturating_mul(1 << 20) >= image_bytes {
        return Ok(());
    }
    let least = image_bytes.div_ceil(1 << 20);
    Err(Problem::field("disk_mib", definition.spec.disk_mib, format!("at least {least}, the image's size")))
}
