//! The NoCloud seed: a small FAT disk labelled `CIDATA` from which cloud-init in the guest learns who it is, what its
//! interfaces are, and what its owner wants done.

use std::io::{Cursor, Write};

use berth_api::agent::VmDefinition;
use berth_model::vm::Nic;
use berth_model::{Problem, ProblemCode};

/// Size of the disk in bytes: FAT12's smallest comfortable one, with room for the longest user data.
const DISK_BYTES: u32 = 512 * 1024;
const SECTOR_BYTES: u16 = 512;
/// The label, filled up to the eleven bytes that FAT has for it.
const LABEL: [u8; 11] = *b"CIDATA     ";

/// The disk's bytes; the same definition gives the same bytes.
///
/// # Errors
/// When the file system can't be made, which is a fault of ours.
pub fn image(definition: &VmDefinition) -> Result<Vec<u8>, Problem> {
    let files = [
        ("meta-data", meta_data(definition)),
        ("user-data", user_data(definition)),
        ("network-config", network_config(&definition.spec.nics)),
    ];
    disk(&files)
        .map_err(|error| Problem::new(ProblemCode::Internal, format!("the seed can't be made: {error}")))
}

fn disk(files: &[(&str, String)]) -> std::io::Result<Vec<u8>> {
    let mut disk = Cursor::new(vec![0u8; DISK_BYTES as usize]);
    let options = fatfs::FormatVolumeOptions::new()
        .total_sectors(DISK_BYTES / u32::from(SECTOR_BYTES))
        .bytes_per_sector(SECTOR_BYTES)
        .volume_id(0x4245_5254)
        .volume_label(LABEL);
    fatfs::format_volume(&mut disk, options)?;
    {
        let volume = fatfs::FileSystem::new(&mut disk, fatfs::FsOptions::new())?;
        for (name, content) in files {
            volume.root_dir().create_file(name)?.write_all(content.as_bytes())?;
        }
        volume.unmount()?;
    }
    Ok(disk.into_inner())
}

fn meta_data(definition: &VmDefinition) -> String {
    format!("instance-id: {}\nlocal-hostname: {}\n", definition.id, definition.hostname)
}

fn user_data(definition: &VmDefinition) -> String {
    definition.spec.user_data.clone().unwrap_or_else(|| "#cloud-config\n{}\n".to_owned())
}

/// Version 2, by Ethernet address, so that the guest's own names for its interfaces don't matter.
fn network_config(nics: &[Nic]) -> String {
    let mut text = "version: 2\nethernets:\n".to_owned();
    for (index, nic) in nics.iter().enumerate() {
        let mac = nic.mac.to_lowercase();
        text.push_str(&format!("  nic{index}:\n    match:\n      macaddress: \"{mac}\"\n"));
        match &nic.address {
            Some(address) => {
                text.push_str(&format!("    dhcp4: false\n    addresses:\n      - {address}\n"));
                if let Some(gateway) = &nic.gateway {
                    text.push_str(&format!("    routes:\n      - to: 0.0.0.0/0\n        via: {gateway}\n"));
                }
            }
            None => text.push_str("    dhcp4: true\n"),
        }
    }
    if nics.is_empty() {
        text = "version: 2\nethernets: {}\n".to_owned();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    use crate::testing;

    #[test]
    fn the_seed_reads_back_with_its_label_and_its_three_files() {
        let mut definition = testing::definition(1);
        definition.spec.user_data = Some("#cloud-config\nruncmd: [echo, hello]\n".into());
        definition.spec.nics = vec![testing::nic(Some("198.18.5.20/24"), Some("198.18.5.1"))];
        let bytes = image(&definition).expect("image");
        assert_eq!(image(&definition).expect("again"), bytes);
        let volume = fatfs::FileSystem::new(Cursor::new(bytes), fatfs::FsOptions::new()).expect("FAT");
        assert_eq!(volume.volume_label(), "CIDATA");
        let read = |name: &str| {
            let mut text = String::new();
            volume.root_dir().open_file(name).expect(name).read_to_string(&mut text).expect("text");
            text
        };
        assert!(read("meta-data").contains(definition.id.as_str()));
        assert!(read("user-data").starts_with("#cloud-config\nruncmd"));
        insta::assert_snapshot!(read("network-config"), @r#"
        version: 2
        ethernets:
          nic0:
            match:
              macaddress: "52:54:00:12:34:56"
            dhcp4: false
            addresses:
              - 198.18.5.20/24
            routes:
              - to: 0.0.0.0/0
                via: 198.18.5.1
        "#);
    }

    #[test]
    fn the_longest_user_data_has_room() {
        let mut definition = testing::definition(1);
        definition.spec.user_data = Some("x".repeat(berth_model::vm::USER_DATA_BYTES_MAX));
        image(&definition).expect("image");
    }

    #[test]
    fn a_vm_without_interfaces_has_a_configuration_all_the_same() {
        assert_eq!(network_config(&[]), "version: 2\nethernets: {}\n");
    }
}
