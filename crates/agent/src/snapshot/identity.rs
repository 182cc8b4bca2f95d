//! Who a guest believes to be whose memory is another VM's.
//!
//! A clone goes on where its origin stood: with the origin's Ethernet addresses, IP addresses and host name in its
//! memory. On a bridge two such guests would answer for one another, so a clone's interfaces have their link down before
//! its guest runs its first instruction. They get it when the guest begins anew, from its disk: it then learns from its
//! seed who it is. Until then the VM says so as its trouble.
//!
//! With user-mode networking nothing clashes, since each QEMU plays a network of its own: it is the one that the guest
//! knows, and the link stays up.

use berth_api::agent::VmDefinition;
use berth_model::Problem;
use berth_model::host::NetworkMode;
use berth_model::vm::Nic;
use serde_json::json;

use super::layers::refused;
use crate::vm::VmRuntime;

/// What is said of a VM whose network stays off.
const ISOLATED: &str = "its network is off: the guest still has the addresses of the VM that it was cloned from; \
    'berth vm restart' makes it take its own";

/// The VM with the interfaces as its guest knows them: what a network of QEMU's own has to be made for.
///
/// # Errors
/// When the VM was not prepared here.
pub fn as_the_guest_knows(vm: &VmRuntime) -> Result<VmDefinition, Problem> {
    let mut definition = vm.definition()?.clone();
    if let Some(borrowed) = &vm.host_record()?.borrowed_nics {
        for (own, known) in definition.spec.nics.iter_mut().zip(borrowed) {
            let Nic { address, gateway, .. } = known.clone();
            (own.address, own.gateway) = (address, gateway);
        }
    }
    Ok(definition)
}

/// Whether the guest's addresses may not be seen by others.
///
/// # Errors
/// When this host has nothing of the VM.
pub fn must_be_isolated(vm: &VmRuntime) -> Result<bool, Problem> {
    let is_shared = vm.services().config.network.mode == NetworkMode::Bridge;
    Ok(is_shared && vm.host_record()?.borrowed_nics.is_some())
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
    vm.change_host_record(|record| record.trouble = Some(ISOLATED.to_owned())).await
}

async fn set_link(vm: &VmRuntime, up: bool) -> Result<(), Problem> {
    let qmp = vm.qmp()?;
    for index in 0..vm.definition()?.spec.nics.len() {
        let arguments = json!({"name": format!("nic{index}"), "up": up});
        qmp.call_untyped("set_link", arguments).await.map_err(refused)?;
    }
    Ok(())
}
