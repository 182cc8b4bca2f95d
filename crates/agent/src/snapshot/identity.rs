//! Who a guest believes to be whose memory is another VM's.
//!
//! A clone goes on where its origin stood: with the origin's Ethernet addresses, IP addresses and host name in its
//! memory. On a bridge two such guests would answer for one another, so a clone's interfaces have their link down before
//! its guest runs its first instruction. They get it when the guest is somebody of its own:
//!
//! - it is told so by its guest agent, where that may run commands ([`Introduction`]): the addresses of its interfaces, its
//!   host name and its machine id, of what runs; the rest is cloud-init's at the next start, by the new instance id;
//! - or it begins anew, from its disk, and learns from its seed who it is.
//!
//! Until then the VM says so as its trouble.
//!
//! With user-mode networking nothing clashes, since each QEMU plays a network of its own: it is the one that the guest
//! knows, and the link stays up.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use berth_api::agent::VmDefinition;
use berth_model::host::NetworkMode;
use berth_model::vm::{NETWORK_OFF, Nic};
use berth_model::{Problem, ProblemCode};
use berth_qmp::QmpError;
use berth_qmp::guest_agent::GuestAgent;
use serde_json::json;

use super::layers::refused;
use crate::launcher::{Launcher, Socket};
use crate::vm::VmRuntime;

/// What is run in the guest. Its words: the host name, the machine id, and for each interface the address that it has,
/// the one that it shall have, its IP address and its gateway (`-` for none). Run twice it does the same.
const SCRIPT: &str = include_str!("identity/introduce.sh");
/// How long a guest agent may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// How long the script may take in a guest on a busy host.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(30);
/// First and longest pause between two tries: a guest agent that comes up late is worth waiting for, one that never
/// comes costs next to nothing.
const TRY_AGAIN: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(30));

/// The VM with the interfaces as its guest knows them: what a network of QEMU's own has to be made for.
///
/// # Errors
/// When the VM was not prepared here.
pub fn as_the_guest_knows(vm: &VmRuntime) -> Result<VmDefinition, Problem> {
    Ok(known_by_guest(vm.definition()?, vm.host_record()?.borrowed_nics.as_deref()))
}

/// The same of a guest with these interfaces in its memory; none: its own.
pub fn known_by_guest(definition: &VmDefinition, borrowed: Option<&[Nic]>) -> VmDefinition {
    let mut definition = definition.clone();
    for (own, known) in definition.spec.nics.iter_mut().zip(borrowed.unwrap_or_default()) {
        let Nic { address, gateway, .. } = known.clone();
        (own.address, own.gateway) = (address, gateway);
    }
    definition
}

/// Whether the guest's addresses may not be seen by others.
///
/// # Errors
/// When this host has nothing of the VM.
pub fn must_be_isolated(vm: &VmRuntime) -> Result<bool, Problem> {
    // One without any network is seen by nobody.
    let is_shared =
        vm.services().config.network.mode == NetworkMode::Bridge && !vm.definition()?.spec.isolated;
    Ok(is_shared && vm.host_record()?.borrowed_nics.is_some())
}

/// Refuses to send a guest away that goes by another's addresses: the target would have to make them a network.
///
/// # Errors
/// When it does, with what to do.
pub fn check_may_move(vm: &VmRuntime) -> Result<(), Problem> {
    let definition = vm.definition()?;
    let differs = |known: &[Nic]| {
        known.iter().zip(&definition.spec.nics).any(|(known, own)| known.address != own.address)
    };
    let borrowed = vm.host_record()?.borrowed_nics.as_deref();
    if !must_be_isolated(vm)? && !borrowed.is_some_and(differs) {
        return Ok(());
    }
    let message = format!(
        "the guest of {} still has the addresses of the VM that it was cloned from: \
         'berth vm restart {}' lets it begin anew with its own, and then it can be moved",
        vm.id(),
        definition.full_name
    );
    Err(Problem::new(ProblemCode::WrongState, message))
}

/// Takes the link from a loaded guest that does not run yet, if its addresses are another's.
///
/// # Errors
/// When QEMU refuses: the guest must not run then.
pub async fn isolate(vm: &mut VmRuntime) -> Result<(), Problem> {
    if !must_be_isolated(vm)? || vm.definition()?.spec.nics.is_empty() {
        return Ok(());
    }
    set_link(vm, false).await?;
    vm.change_host_record(|record| record.trouble = Some(NETWORK_OFF.to_owned())).await
}

/// The guest has its own addresses: it may be seen.
///
/// # Errors
/// When QEMU refuses, or it can't be written down: the guest stays off the network then.
pub async fn join(vm: &mut VmRuntime) -> Result<(), Problem> {
    if vm.host_record()?.borrowed_nics.is_none() {
        return Ok(());
    }
    set_link(vm, true).await?;
    vm.change_host_record(|record| {
        record.borrowed_nics = None;
        if record.trouble.as_deref() == Some(NETWORK_OFF) {
            record.trouble = None;
        }
    })
    .await
}

async fn set_link(vm: &VmRuntime, up: bool) -> Result<(), Problem> {
    let qmp = vm.qmp()?;
    for index in 0..vm.definition()?.spec.nics.len() {
        let arguments = json!({"name": format!("nic{index}"), "up": up});
        qmp.call_untyped("set_link", arguments).await.map_err(refused)?;
    }
    Ok(())
}

/// What a guest has to be told, and how it is reached.
pub struct Introduction {
    launcher: Arc<dyn Launcher>,
    run_dir: PathBuf,
    words: Vec<String>,
}

impl Introduction {
    /// Of a VM's guest that has another's addresses; none when it may go by them.
    ///
    /// # Errors
    /// When the VM was not prepared here.
    pub fn of(vm: &VmRuntime) -> Result<Option<Self>, Problem> {
        if !must_be_isolated(vm)? {
            return Ok(None);
        }
        let services = vm.services();
        let borrowed = vm.host_record()?.borrowed_nics.clone().unwrap_or_default();
        let words = words(vm.definition()?, &borrowed);
        let launcher = Arc::clone(&services.launcher);
        Ok(Some(Self { launcher, run_dir: vm.run_dir(), words }))
    }

    /// Tells the guest who it is, as soon as somebody in it listens; comes back when it has taken that.
    pub async fn introduce(&self) {
        let (mut pause, longest) = TRY_AGAIN;
        loop {
            match self.run_script().await {
                Ok(Some(0)) => return,
                Ok(code) => tracing::debug!(?code, "a clone's guest could not take its addresses"),
                Err(error) => tracing::debug!(%error, "a clone's guest agent can't tell it its addresses"),
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    async fn run_script(&self) -> Result<Option<i64>, QmpError> {
        let connected = self.launcher.connect(&self.run_dir, Socket::GuestAgent).await;
        let path = self.run_dir.join(Socket::GuestAgent.file_name());
        let stream = connected.map_err(|source| QmpError::Connect { path, source })?;
        let agent = GuestAgent::over(stream);
        agent.ping(ANSWER_TIMEOUT).await?;
        let words: Vec<&str> =
            ["-c", SCRIPT, "introduce"].into_iter().chain(self.words.iter().map(String::as_str)).collect();
        agent.run("/bin/sh", &words, SCRIPT_TIMEOUT).await
    }
}

fn words(definition: &VmDefinition, borrowed: &[Nic]) -> Vec<String> {
    let id = blake3::hash(definition.id.as_str().as_bytes()).to_hex();
    let mut words = vec![definition.hostname.to_string(), id.as_str()[..32].to_owned()];
    for (own, known) in definition.spec.nics.iter().zip(borrowed) {
        let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
        words.extend([known.mac.to_lowercase(), own.mac.to_lowercase()]);
        words.extend([or_none(&own.address), or_none(&own.gateway)]);
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn a_guest_is_told_its_name_and_what_each_interface_was_and_is() {
        let mut definition = testing::definition(1);
        definition.spec.nics =
            vec![testing::nic(Some("198.18.5.21/24"), Some("198.18.5.1")), testing::nic(None, None)];
        definition.spec.nics[0].mac = "52:54:00:00:00:AA".into();
        let borrowed = [testing::nic(Some("198.18.5.20/24"), None), testing::nic(None, None)];
        let words = words(&definition, &borrowed);
        assert_eq!(words[0], definition.hostname.as_str());
        assert!(words[1].len() == 32 && words[1].bytes().all(|byte| byte.is_ascii_hexdigit()));
        let (old, new) = (borrowed[0].mac.to_lowercase(), "52:54:00:00:00:aa");
        assert_eq!(words[2..6], [old.as_str(), new, "198.18.5.21/24", "198.18.5.1"]);
        assert_eq!(words[8..], ["-", "-"]);
    }
}
