//! What several tests need.

use berth_api::agent::VmDefinition;
use berth_model::image::{Image, ImagePart, ImageState, PartFormat, PartRole};
use berth_model::vm::{Nic, VmSpec};
use berth_model::{ImageId, LayerId, Timestamp, VmId};

pub(crate) fn nic(address: Option<&str>, gateway: Option<&str>) -> Nic {
    Nic {
        mac: "52:54:00:12:34:56".into(),
        address: address.map(str::to_owned),
        gateway: gateway.map(str::to_owned),
        forwards: Vec::new(),
    }
}

pub(crate) fn part(role: PartRole, format: PartFormat) -> ImagePart {
    ImagePart { role, format, size_bytes: 1 << 20, sha256: "0".repeat(64), virtual_size_bytes: Some(1 << 20) }
}

pub(crate) fn definition(number: u8) -> VmDefinition {
    let image = ImageId::from_entropy([number; 10]);
    VmDefinition {
        id: VmId::from_entropy([number; 10]),
        number: number.into(),
        full_name: format!("default/vm{number}"),
        hostname: format!("vm{number}").parse().expect("name"),
        spec: VmSpec {
            vcpus: 2,
            memory_mib: 256,
            disk_mib: 64,
            data_disks_mib: Vec::new(),
            image: image.clone(),
            pool: "local".parse().expect("name"),
            machine_type: "pc-q35-7.2".into(),
            firmware: berth_model::vm::Firmware::default(),
            tpm: false,
            cpu_model: "qemu64".into(),
            nics: Vec::new(),
            user_data: None,
            protected: false,
            class: berth_model::vm::standard_class(),
            ready_timeout_s: 60,
            isolated: false,
        },
        image: Image {
            id: image,
            name: "tiny".parse().expect("name"),
            segment: None,
            state: ImageState::Ready,
            parts: vec![part(PartRole::Disk, PartFormat::Raw)],
            kernel_command_line: String::new(),
            arrived: vec![PartRole::Disk],
            created_at: Timestamp::from_millis(0),
        },
        first_layer: LayerId::from_entropy([number; 10]),
    }
}
