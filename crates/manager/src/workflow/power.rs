//! Starting, stopping and holding: `vm.start`, `vm.shutdown`, `vm.stop`, `vm.restart`, `vm.pause`, `vm.resume`.
//!
//! All of them happen on the host that owns the VM. Starting a VM elsewhere needs proof that its owner does not run
//! it, and is left to recovery; until then a VM whose host is offline stays where it is, with the reason.

use berth_api::agent::TaskSpec;
use berth_model::operation::OperationKind;
use berth_model::placement;
use berth_model::vm::{GuestState, Vm, VmState};
use berth_model::{HostId, Problem, ProblemCode, VmId};
use serde::{Deserialize, Serialize};

use super::vm::{definition, look, lost, reachable_host, settle, with_candidates, wrong_state};
use crate::operations::OperationRequest;
use crate::operations::step::{
    About, Command, Desk, Plan, Reached, Run, Step, Workflow, step, wrong_request,
};
use crate::records::Transaction;

/// How long a guest may take to power down when nobody says, in seconds. Shorter: busy guests fail to. Longer: whoever
/// waits for a guest that ignores the button waits long.
pub const SHUTDOWN_TIMEOUT_S: u32 = 120;

/// What is known of any of them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PowerRecord {
    vm: VmId,
    host: HostId,
    #[serde(default)]
    timeout_s: u32,
}

/// `vm.start`: afterwards the VM runs, or is stopped as before.
pub enum StartVm {}

impl Workflow for StartVm {
    type Record = PowerRecord;
    const KIND: OperationKind = OperationKind::VmStart;
    const DECIDES: bool = true;
    const STEPS: &'static [Step<Self>] = &[step!("start", start, unstart)];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::VmStart { .. } = request else { return Err(wrong_request()) };
        let plan = plan(desk, "start", &[VmState::Stopped])?;
        let vm = desk.vm()?;
        let host = reachable_host(desk.cluster, vm)?;
        let refusal = with_candidates(desk.cluster, std::slice::from_ref(&host), |candidates| {
            candidates.first().and_then(|candidate| placement::refusal(&vm.spec, candidate))
        });
        match refusal {
            Some(reason) => {
                let message =
                    format!("{} is on host {}, which can't take it: {reason}", vm.full_name(), host.name);
                Err(Problem::new(ProblemCode::NoPlacement, message))
            }
            None => Ok(plan),
        }
    }
}

async fn start(run: &mut Run<StartVm>) -> Result<(), Problem> {
    let PowerRecord { vm, host, .. } = &run.record;
    start_on(run, vm, host).await?;
    run.change_status(vm, |status| settle(status, VmState::Running)).await?;
    Ok(())
}

async fn unstart(run: &mut Run<StartVm>) -> Result<(), Problem> {
    let PowerRecord { vm, host, .. } = &run.record;
    let command = Command { host, vm: Some(vm), label: "stop", spec: TaskSpec::StopVm };
    let reached = run.command_or_pass(command).await?;
    run.change_status(vm, |status| match reached {
        Reached::Yes => settle(status, VmState::Stopped),
        Reached::No => lost(status),
    })
    .await?;
    Ok(())
}

/// Has a host start a VM; the record says that it is starting.
pub(super) async fn start_on<W: Workflow>(run: &Run<W>, vm: &VmId, host: &HostId) -> Result<(), Problem> {
    let row = run
        .change_status(vm, |status| {
            if status.state == VmState::Stopped {
                settle(status, VmState::Starting);
            }
        })
        .await?;
    let spec = TaskSpec::StartVm { definition: definition(&run.cluster, &row)? };
    run.command(Command { host, vm: Some(vm), label: "start", spec }).await?;
    Ok(())
}

/// `vm.shutdown`: afterwards the VM is stopped; a guest that does not power down in time runs on.
pub enum ShutdownVm {}

impl Workflow for ShutdownVm {
    type Record = PowerRecord;
    const KIND: OperationKind = OperationKind::VmShutdown;
    const STEPS: &'static [Step<Self>] =
        &[step!("shutdown", shutdown, look_again; no_return), step!("record", now_stopped)];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::VmShutdown { timeout_s, .. } = request else { return Err(wrong_request()) };
        if *timeout_s == Some(0) {
            return Err(Problem::field("timeout_s", 0, "at least 1"));
        }
        let mut plan: Plan<Self> = plan(desk, "shut down", &[VmState::Running])?;
        plan.record.timeout_s = timeout_s.unwrap_or(SHUTDOWN_TIMEOUT_S);
        Ok(plan)
    }
}

async fn shutdown(run: &mut Run<ShutdownVm>) -> Result<(), Problem> {
    let PowerRecord { vm, host, timeout_s } = &run.record;
    run.phase("waiting for the guest to power down");
    let spec = TaskSpec::ShutdownVm { timeout_ms: u64::from(*timeout_s) * 1000 };
    run.command(Command { host, vm: Some(vm), label: "shutdown", spec }).await?;
    Ok(())
}

/// `vm.stop`: afterwards the VM is stopped, whatever its guest was doing.
pub enum StopVm {}

impl Workflow for StopVm {
    type Record = PowerRecord;
    const KIND: OperationKind = OperationKind::VmStop;
    const STEPS: &'static [Step<Self>] =
        &[step!("stop", stop, look_again; no_return), step!("record", now_stopped)];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::VmStop { .. } = request else { return Err(wrong_request()) };
        let running = [VmState::Starting, VmState::Running, VmState::Paused, VmState::Migrating];
        plan(desk, "stop", &running)
    }
}

async fn stop(run: &mut Run<StopVm>) -> Result<(), Problem> {
    let PowerRecord { vm, host, .. } = &run.record;
    run.command(Command { host, vm: Some(vm), label: "stop", spec: TaskSpec::StopVm }).await?;
    Ok(())
}

/// `vm.restart`: afterwards the VM runs and its guest boots anew.
pub enum RestartVm {}

impl Workflow for RestartVm {
    type Record = PowerRecord;
    const KIND: OperationKind = OperationKind::VmRestart;
    const STEPS: &'static [Step<Self>] =
        &[step!("restart", restart, look_again; no_return), step!("record", now_booting)];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::VmRestart { .. } = request else { return Err(wrong_request()) };
        plan(desk, "restart", &[VmState::Running])
    }
}

async fn restart(run: &mut Run<RestartVm>) -> Result<(), Problem> {
    let PowerRecord { vm, host, .. } = &run.record;
    run.command(Command { host, vm: Some(vm), label: "restart", spec: TaskSpec::RestartVm }).await?;
    Ok(())
}

async fn now_booting(run: &mut Run<RestartVm>) -> Result<(), Problem> {
    run.change_status(&run.record.vm, |status| {
        settle(status, VmState::Running);
        status.guest = GuestState::Booting;
    })
    .await?;
    Ok(())
}

/// `vm.pause`: afterwards the guest is held, or runs as before.
pub enum PauseVm {}

impl Workflow for PauseVm {
    type Record = PowerRecord;
    const KIND: OperationKind = OperationKind::VmPause;
    const STEPS: &'static [Step<Self>] = &[step!("pause", hold::<PauseVm>, release::<PauseVm>)];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::VmPause { .. } = request else { return Err(wrong_request()) };
        plan(desk, "pause", &[VmState::Running])
    }
}

/// `vm.resume`: afterwards the guest runs, or is held as before.
pub enum ResumeVm {}

impl Workflow for ResumeVm {
    type Record = PowerRecord;
    const KIND: OperationKind = OperationKind::VmResume;
    const STEPS: &'static [Step<Self>] = &[step!("resume", release::<ResumeVm>, hold::<ResumeVm>)];

    async fn check<'a>(desk: &'a Desk<'a>, request: &'a OperationRequest) -> Result<Plan<Self>, Problem> {
        let OperationRequest::VmResume { .. } = request else { return Err(wrong_request()) };
        plan(desk, "resume", &[VmState::Paused])
    }
}

async fn hold<W: Workflow<Record = PowerRecord>>(run: &mut Run<W>) -> Result<(), Problem> {
    turn(run, "pause", TaskSpec::PauseVm, VmState::Paused).await
}

async fn release<W: Workflow<Record = PowerRecord>>(run: &mut Run<W>) -> Result<(), Problem> {
    turn(run, "resume", TaskSpec::ResumeVm, VmState::Running).await
}

async fn turn<W: Workflow<Record = PowerRecord>>(
    run: &Run<W>,
    label: &'static str,
    spec: TaskSpec,
    state: VmState,
) -> Result<(), Problem> {
    let PowerRecord { vm, host, .. } = &run.record;
    let command = Command { host, vm: Some(vm), label, spec };
    let reached = if run.is_undoing() {
        run.command_or_pass(command).await?
    } else {
        run.command(command).await?;
        Reached::Yes
    };
    run.change_status(vm, |status| match reached {
        Reached::Yes => settle(status, state),
        Reached::No => lost(status),
    })
    .await?;
    Ok(())
}

async fn now_stopped<W: Workflow<Record = PowerRecord>>(run: &mut Run<W>) -> Result<(), Problem> {
    run.change_status(&run.record.vm, |status| settle(status, VmState::Stopped)).await?;
    Ok(())
}

/// Power that was taken can't be given back: what is left to do after a failure is to say how the VM is.
async fn look_again<W: Workflow<Record = PowerRecord>>(run: &mut Run<W>) -> Result<(), Problem> {
    look(run, &run.record.vm, &run.record.host).await
}

fn plan<W: Workflow<Record = PowerRecord>>(
    desk: &Desk<'_>,
    doing: &str,
    states: &[VmState],
) -> Result<Plan<W>, Problem> {
    let row = desk.vm()?;
    let vm: &Vm = row;
    let host = reachable_host(desk.cluster, vm)?;
    if !states.contains(&vm.status.state) {
        let expected: Vec<&str> = states.iter().map(|state| state.as_str()).collect();
        return Err(wrong_state(vm, &format!("to {doing}"), &expected.join(" or ")));
    }
    Ok(Plan {
        subject: vm.full_name(),
        summary: format!("{doing} {} on host {}", vm.full_name(), host.name),
        record: PowerRecord { vm: vm.id.clone(), host: host.value.id.clone(), timeout_s: 0 },
        about: About::Vm(std::sync::Arc::clone(row)),
        transaction: Transaction::new(),
    })
}
