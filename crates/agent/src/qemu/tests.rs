//! The command line, word for word: whoever changes one sees which.

use super::*;
use berth_model::image::{PartFormat, PartRole};
use berth_model::vm::Nic as NicSpec;

use crate::disks::Disks;
use crate::fittings::Fittings;
use crate::layout::{PoolDirs, VmDirs};
use crate::testing;

fn dirs() -> VmDirs {
    let definition = testing::definition(1);
    let pool = PoolDirs { name: "local".parse().expect("name"), path: "/pool".into() };
    VmDirs {
        disk: pool.vm(&definition.id),
        pool,
        state: format!("/state/vms/{}", definition.id).into(),
        run: format!("/run/{}", definition.id).into(),
    }
}

/// JSON with its fields by name: how they are ordered otherwise depends on which features another crate asks of
/// `serde_json` in the same build.
fn sorted(value: &serde_json::Value) -> String {
    let serde_json::Value::Object(fields) = value else { return value.to_string() };
    let fields: std::collections::BTreeMap<_, _> = fields.iter().collect();
    let fields: Vec<String> =
        fields.iter().map(|(name, value)| format!("\"{name}\":{}", sorted(value))).collect();
    format!("{{{}}}", fields.join(","))
}

fn lines(machine: &Machine<'_>) -> String {
    let mut text = String::new();
    for argument in machine.arguments() {
        let word = match argument {
            Argument::Text(text) => match serde_json::from_str::<serde_json::Value>(&text) {
                Ok(value @ serde_json::Value::Object(_)) => sorted(&value),
                Ok(_) | Err(_) => text,
            },
            Argument::WithDescriptor { before, descriptor, after } => {
                format!("{before}<{descriptor:?}>{after}")
            }
        };
        text.push_str(if word.starts_with('-') { "\n" } else { " " });
        text.push_str(&word);
    }
    text.trim_start().to_owned()
}

fn chain(layers: &[u8]) -> Vec<LayerId> {
    layers.iter().map(|layer| LayerId::from_entropy([*layer; 10])).collect()
}

fn root(layers: &[u8]) -> Disks {
    Disks::new(chain(layers), Vec::new())
}

#[test]
fn data_disks_have_chains_and_places_of_their_own() {
    let definition = testing::definition(1);
    let disks = Disks::new(chain(&[2, 3]), vec![chain(&[4, 5]), chain(&[6])]);
    let plan = LaunchPlan::cold(disks, Fittings::default());
    let machine = Machine {
        definition: &definition,
        dirs: &dirs(),
        plan: &plan,
        accelerator: Accelerator::Tcg,
        nics: &[],
        direct_io: true,
        firmware_code: Path::new("/firmware/code.fd"),
    };
    let without = LaunchPlan::cold(root(&[2, 3]), Fittings::default());
    let without = lines(&Machine { plan: &without, ..machine.clone() });
    let text = lines(&machine);
    // The first word after a line's break is an option: what a machine without data disks has is all there, unchanged.
    let more: Vec<&str> = text.lines().filter(|line| !without.lines().any(|one| one == *line)).collect();
    assert_eq!(text.lines().count(), without.lines().count() + more.len());
    insta::assert_snapshot!(more.join("\n"));
}

#[test]
fn a_cold_start_on_a_raw_image_with_two_layers() {
    let mut definition = testing::definition(1);
    definition.spec.nics = vec![testing::nic(None, None), testing::nic(None, None)];
    let plan = LaunchPlan::cold(
        root(&[2, 3]),
        Fittings {
            generation_id: Some("11111111-2222-4333-8444-555555555555".into()),
            ..Fittings::default()
        },
    );
    let machine = Machine {
        definition: &definition,
        dirs: &dirs(),
        plan: &plan,
        accelerator: Accelerator::Tcg,
        nics: &[Nic::Tap, Nic::Tap],
        direct_io: true,
        firmware_code: Path::new("/firmware/code.fd"),
    };
    insta::assert_snapshot!(lines(&machine));
    assert_eq!(machine.summary().nodes.len(), 3);
}

#[test]
fn a_restored_guest_of_a_kernel_image_with_user_mode_network() {
    let mut definition = testing::definition(1);
    definition.image.parts =
        [PartRole::Kernel, PartRole::Initrd].map(|role| testing::part(role, PartFormat::Raw)).to_vec();
    definition.image.kernel_command_line = "console=ttyS0 quiet".into();
    definition.spec.machine_type = "pc-i440fx-10.0".into();
    definition.spec.firmware = Firmware::Uefi;
    definition.spec.tpm = true;
    definition.spec.nics = vec![testing::nic(Some("198.18.5.20/24"), Some("198.18.5.1"))];
    let plan = LaunchPlan {
        disks: root(&[2]),
        memory: Memory::Image("/pool/vms/a,b/memory.raw".into()),
        fittings: Fittings { nvram: Some(LayerId::from_entropy([2; 10])), ..Fittings::default() },
        incoming: true,
    };
    let subnet = UserSubnet {
        network: Ipv4Addr::new(198, 18, 5, 0),
        prefix: 24,
        guest: Ipv4Addr::new(198, 18, 5, 20),
        host: Ipv4Addr::new(198, 18, 5, 1),
        name_server: Ipv4Addr::new(198, 18, 5, 2),
    };
    let forwards = vec![PortForward { protocol: "udp".into(), host_port: 40007, guest_port: 7007 }];
    let machine = Machine {
        definition: &definition,
        dirs: &dirs(),
        plan: &plan,
        accelerator: Accelerator::Kvm,
        nics: &[Nic::User { subnet: Some(subnet), forwards, isolated: false }],
        direct_io: false,
        firmware_code: Path::new("/firmware/code.fd"),
    };
    insta::assert_snapshot!(lines(&machine));
}

#[test]
fn an_isolated_machine_has_its_interface_and_it_leads_nowhere() {
    let mut definition = testing::definition(1);
    definition.spec.nics = vec![testing::nic(None, None)];
    let plan = LaunchPlan::cold(root(&[2]), Fittings::default());
    let machine = Machine {
        definition: &definition,
        dirs: &dirs(),
        plan: &plan,
        accelerator: Accelerator::Tcg,
        nics: &[Nic::User { subnet: None, forwards: Vec::new(), isolated: true }],
        direct_io: false,
        firmware_code: Path::new("/firmware/code.fd"),
    };
    let text = lines(&machine);
    assert!(text.contains("user,id=net0,ipv6=off,restrict=on") && text.contains("netdev=net0"), "{text}");
    assert!(!text.contains("hostfwd"), "{text}");
}

#[test]
fn what_people_wrote_can_not_become_an_option() {
    let mut definition = testing::definition(1);
    definition.spec.machine_type = "q35,kernel=/etc/shadow".into();
    definition.spec.cpu_model = "max,enforce".into();
    definition.spec.nics = vec![NicSpec { mac: "52:54:00:12:34:56,x=y".into(), ..testing::nic(None, None) }];
    let plan = LaunchPlan::cold(root(&[2]), Fittings::default());
    let machine = Machine {
        definition: &definition,
        dirs: &dirs(),
        plan: &plan,
        accelerator: Accelerator::Tcg,
        nics: &[Nic::Tap],
        direct_io: false,
        firmware_code: Path::new("/firmware/code.fd"),
    };
    let text = lines(&machine);
    for escaped in ["q35,,kernel=", "max,,enforce", "56,,x=y"] {
        assert!(text.contains(escaped), "{text}");
    }
}

#[test]
fn the_machines_identity_is_that_of_the_vm() {
    let one = uuid("vm-1");
    assert_eq!(one, uuid("vm-1"));
    assert_ne!(one, uuid("vm-2"));
    assert_eq!(one.len(), 36);
    assert_eq!(one.as_bytes()[14], b'8');
}

#[test]
fn a_translated_guest_has_a_little_less_memory_unless_its_machine_is_newer_than_the_fault() {
    let bytes = |accelerator, machine_type| memory_bytes(256, accelerator, machine_type);
    let (whole, shorter) = (256 << 20, (256 << 20) - 8192);
    for (machine_type, expected) in [
        ("pc-q35-7.2", shorter),
        ("pc-i440fx-8.2", shorter),
        ("pc-q35-9.0", whole),
        ("pc-i440fx-10.0", whole),
        // Names that say nothing that we know of.
        ("q35", shorter),
        ("pc-q35-rhel9.4.0", shorter),
        ("pc-q35-noble", shorter),
        ("microvm-10.0", shorter),
    ] {
        assert_eq!(bytes(Accelerator::Tcg, machine_type), expected, "{machine_type}");
        assert_eq!(bytes(Accelerator::Kvm, machine_type), whole, "{machine_type}");
    }
}
