//! What QEMU can do here: asked of one that is started for the question and has no machine.

use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Command, Stdio};

use berth_model::host::{Accelerator, QemuAbilities};
use berth_qmp::commands::{QueryVersion, Quit};
use berth_qmp::{Abilities, ConnectOptions, Qmp, QmpError};
use serde::Deserialize;
use serde_json::json;

use super::{GREETING_TIMEOUT, ProcessLauncher, failed};
use crate::fittings::{GENERATION_DEVICE, TPM_DEVICE};
use crate::launcher::{Exit, Hypervisor, LaunchError};
use crate::sandbox::{self, Confinement, Limits};

pub mod kvm;

/// The devices that a VM is given only where QEMU has them.
const OPTIONAL_DEVICES: [&str; 2] = [GENERATION_DEVICE, TPM_DEVICE];

#[derive(Deserialize)]
struct CpuDefinition {
    name: String,
    #[serde(rename = "unavailable-features", default)]
    unavailable_features: Vec<String>,
}

pub(super) async fn inspect(launcher: &ProcessLauncher) -> Result<Hypervisor, LaunchError> {
    let probed = tokio::task::spawn_blocking(kvm::probe).await;
    let (accelerator, accelerator_note) = match probed {
        Ok(Ok(())) => (Accelerator::Kvm, None),
        Ok(Err(reason)) => (Accelerator::Tcg, Some(reason)),
        Err(error) => (Accelerator::Tcg, Some(format!("the probe of KVM broke: {error}"))),
    };
    let abilities = ask(launcher, accelerator).await?;
    Ok(Hypervisor { accelerator, accelerator_note, abilities })
}

async fn ask(launcher: &ProcessLauncher, accelerator: Accelerator) -> Result<QemuAbilities, LaunchError> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().map_err(failed("making a socket"))?;
    ours.set_nonblocking(true).map_err(failed("making a socket"))?;
    let ours = tokio::net::UnixStream::from_std(ours).map_err(failed("making a socket"))?;
    let mut command = tokio::process::Command::from(command(launcher, accelerator, theirs.into()));
    let mut child = command.kill_on_drop(true).spawn().map_err(failed("starting its program"))?;
    // The command holds QEMU's end of the socket: QEMU's death would not be noticed here.
    drop(command);
    let options = ConnectOptions { connect_timeout: GREETING_TIMEOUT, ..ConnectOptions::default() };
    let answered = async {
        let (qmp, _) = Qmp::over_unix(ours, options).await?;
        let answer = answers(&qmp).await?;
        // It ends when it is dropped in any case.
        let _ = qmp.call(Quit {}).await;
        Ok::<_, QmpError>(answer)
    };
    match answered.await {
        Ok(abilities) => Ok(abilities),
        Err(source) => {
            // What it has to say is short: it is over by the time that it has closed its monitor.
            let _ = child.start_kill();
            match child.wait_with_output().await {
                Ok(output) if !output.stderr.is_empty() => {
                    let last_words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                    Err(LaunchError::Died {
                        exit: Exit { code: output.status.code(), signal: None, last_words },
                    })
                }
                _ => Err(LaunchError::Monitor { source, process: None }),
            }
        }
    }
}

fn command(launcher: &ProcessLauncher, accelerator: Accelerator, monitor: OwnedFd) -> Command {
    let accelerator = match accelerator {
        Accelerator::Kvm => "kvm",
        Accelerator::Tcg => "tcg",
    };
    let chardev = format!("socket,id=qmp,fd={}", monitor.as_raw_fd());
    let mut command = Command::new(&launcher.binary);
    command.args(&launcher.first_arguments);
    command.args(["-machine", "none", "-accel", accelerator, "-no-user-config", "-nodefaults"]);
    command.args(["-display", "none", "-chardev", &chardev, "-mon", "chardev=qmp,mode=control"]);
    command.args(["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let confinement = Confinement {
        user_id: launcher.probe_user,
        groups: launcher.probe_user.and(launcher.kvm_group).into_iter().collect(),
        limits: Limits { cpu_s: Some(60), ..Limits::default() },
    };
    sandbox::confine(&mut command, confinement, vec![monitor]);
    command
}

async fn answers(qmp: &Qmp) -> Result<QemuAbilities, QmpError> {
    let abilities = Abilities::ask(qmp).await?;
    let version = qmp.call(QueryVersion {}).await?;
    let number = version.qemu;
    let text = format!("{}.{}.{} {}", number.major, number.minor, number.micro, version.package);
    let definitions = qmp.call_untyped("query-cpu-definitions", json!({})).await?;
    let definitions: Vec<CpuDefinition> = serde_json::from_value(definitions)
        .map_err(|source| QmpError::Reply { command: "query-cpu-definitions".into(), source })?;
    let mut cpu_models: Vec<String> = definitions
        .into_iter()
        .filter(|cpu| cpu.unavailable_features.is_empty())
        .map(|cpu| cpu.name)
        .collect();
    cpu_models.sort();
    Ok(QemuAbilities {
        version: text.trim().to_owned(),
        machine_types: versioned(abilities.machine_types()),
        cpu_models,
        migration_capabilities: abilities.migration_capabilities().map(str::to_owned).collect(),
        devices: OPTIONAL_DEVICES
            .into_iter()
            .filter(|name| abilities.has_device(name))
            .map(str::to_owned)
            .collect(),
    })
}

/// The machine types of the two families whose name has a version in it, newest first within each.
fn versioned<'a>(all: impl Iterator<Item = &'a str>) -> Vec<String> {
    let key = |name: &'a str| {
        let (family, version) = name.rsplit_once('-')?;
        let rank = ["pc-q35", "pc-i440fx"].iter().position(|&known| known == family)?;
        let version: Option<Vec<u32>> = version.split('.').map(|part| part.parse().ok()).collect();
        Some(((rank, std::cmp::Reverse(version?)), name))
    };
    let mut found: Vec<_> = all.filter_map(key).collect();
    found.sort();
    found.into_iter().map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_types_are_newest_first_and_only_those_with_a_version() {
        let all =
            ["microvm", "none", "pc", "pc-i440fx-7.2", "pc-q35-10.0", "pc-q35-7.2", "pc-q35-8.1", "q35"];
        assert_eq!(versioned(all.into_iter()), ["pc-q35-10.0", "pc-q35-8.1", "pc-q35-7.2", "pc-i440fx-7.2"]);
    }
}
