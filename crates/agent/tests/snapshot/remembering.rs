//! What a guest has its machine remember beside its disk: variables of its firmware, and what its TPM holds.

use std::path::PathBuf;
use std::time::Duration;

use berth_model::VmId;
use berth_qmp::guest_agent::GuestAgent;
use serde_json::Value;

use crate::host::{LONG, TestHost};

/// What the host has on record of a VM.
pub fn host_record(host: &TestHost, vm: &VmId) -> Value {
    let path = host.root().join("state/vms").join(vm.as_str()).join("host.json");
    serde_json::from_slice(&std::fs::read(path).expect("record")).expect("JSON")
}

/// The run directory of a VM's present process.
pub fn run_dir(host: &TestHost, vm: &VmId) -> PathBuf {
    let run_dir = host.root().join("run").join(vm.as_str());
    host_record(host, vm)["sockets"].as_str().map_or(run_dir.clone(), |name| run_dir.join(name))
}

/// What a command in the guest ends with.
pub async fn in_guest(host: &TestHost, vm: &VmId, command: &str) -> i64 {
    let run = async {
        loop {
            let agent = GuestAgent::connect(run_dir(host, vm).join("guest-agent.sock")).await.expect("open");
            if agent.ping(Duration::from_secs(2)).await.is_ok() {
                return agent.run("/bin/sh", &["-c", command], LONG).await.expect("it runs commands");
            }
        }
    };
    tokio::time::timeout(LONG, run).await.expect("the guest agent answers").expect("the command ends")
}

/// Has the guest write a variable of its firmware, or look whether it is as it was written.
fn variable(word: &str, value: &str) -> String {
    // One of the few vendors whose variables Linux lets be written anew.
    let path = "/run/efi/Berth-cfc8fc79-be2e-4ddc-97f0-9f98bfe298a0";
    let mounted = "mkdir -p /run/efi; mount -t efivarfs none /run/efi 2> /dev/null;";
    let content = format!(r"printf '\007\000\000\000{value}'");
    match word {
        "write" => format!("{mounted} {content} > {path}"),
        _ => format!("{mounted} {content} | cmp -s - {path}"),
    }
}

pub async fn write_variable(host: &TestHost, vm: &VmId, value: &str) {
    assert_eq!(in_guest(host, vm, &variable("write", value)).await, 0, "{value} can't be written");
}

pub async fn has_variable(host: &TestHost, vm: &VmId, value: &str) -> bool {
    in_guest(host, vm, &variable("look", value)).await == 0
}

/// A guest's TPM, spoken to in its own words.
pub struct Tpm<'a> {
    pub host: &'a TestHost,
    pub vm: &'a VmId,
}

/// An empty password, as the authorisation of a command.
const NO_PASSWORD: [u8; 13] = [0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0];
/// Who may make places in its memory: the owner, whose password is empty.
const OWNER: u32 = 0x4000_0001;
/// The place that is used.
const PLACE: u32 = 0x0150_0001;

impl Tpm<'_> {
    /// Makes a place for eight bytes.
    pub async fn define(&self) {
        let public = [&PLACE.to_be_bytes()[..], &[0, 0x0b, 0, 6, 0, 6, 0, 0, 0, 8]].concat();
        let rest = [&[0, 0, 0, 14][..], &public].concat();
        assert!(self.succeeds(&command(0x12a, &[OWNER], &rest)).await, "no place can be made");
    }

    /// Puts eight bytes into the place.
    pub async fn write(&self, value: &str) {
        let rest = [&[0, 8][..], value.as_bytes(), &[0, 0]].concat();
        assert!(self.succeeds(&command(0x137, &[OWNER, PLACE], &rest)).await, "{value} can't be written");
    }

    /// Whether the place holds this.
    pub async fn holds(&self, value: &str) -> bool {
        let read = command(0x14e, &[OWNER, PLACE], &[0, 8, 0, 0]);
        self.answers(&read, &format!("dd bs=1 skip=16 count=8 2> /dev/null | grep -qx '{value}'")).await
    }

    /// Adds something to a register that begins anew with the machine.
    pub async fn extend(&self) {
        let rest = [&[0, 0, 0, 1, 0, 0x0b][..], &[0x5a; 32]].concat();
        assert!(self.succeeds(&command(0x182, &[16], &rest)).await, "the register can't be extended");
    }

    /// Whether something was added to that register since.
    pub async fn is_extended(&self) -> bool {
        in_guest(self.host, self.vm, "grep -q '[1-9A-Fa-f]' /sys/class/tpm/tpm0/pcr-sha256/16").await == 0
    }

    async fn succeeds(&self, command: &[u8]) -> bool {
        // The answer's code is zero.
        self.answers(command, "dd bs=1 skip=6 count=4 2> /dev/null | tr '\\000' '0' | grep -qx '0000'").await
    }

    async fn answers(&self, command: &[u8], look: &str) -> bool {
        let bytes: String = command.iter().map(|byte| format!("\\{byte:03o}")).collect();
        let script =
            format!("exec 3<> /dev/tpm0; printf '{bytes}' >&3; dd bs=4096 count=1 <&3 2> /dev/null | {look}");
        in_guest(self.host, self.vm, &script).await == 0
    }
}

/// A command of these handles, authorised by an empty password.
fn command(code: u32, handles: &[u32], rest: &[u8]) -> Vec<u8> {
    let handles: Vec<u8> = handles.iter().flat_map(|handle| handle.to_be_bytes()).collect();
    let body = [&handles[..], &NO_PASSWORD, rest].concat();
    let length = u32::try_from(10 + body.len()).expect("short").to_be_bytes();
    [&[0x80, 2][..], &length, &code.to_be_bytes(), &body].concat()
}
