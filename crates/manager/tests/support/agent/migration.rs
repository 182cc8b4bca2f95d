//! The two sides of a migration, as fake as the rest: states are moved over, and what the script says goes wrong.

use berth_api::agent::{MigrationSide, PutTask, Task, TaskOutput, TaskSpec, TaskState};
use berth_model::migration::MigrationReport;
use berth_model::operation::Progress;
use berth_model::{LayerId, OperationId, Problem, ProblemCode, VmId};
use tokio::sync::watch;

use super::{FakeAgent, Machine, MoveScript, Process, TASK_TAKES};

impl FakeAgent {
    pub(super) fn act_in_migration(&self, put: &PutTask) -> Result<TaskOutput, Problem> {
        let done = Ok(TaskOutput::Done);
        let vm = || put.vm.clone().expect("a task about a VM names it");
        match &put.spec {
            TaskSpec::AdmitMigration { migration, put_back, .. } => {
                let machine = Machine {
                    put_back: put_back.clone(),
                    process: Process::Incoming,
                    side: Some(MigrationSide::Target { migration: migration.clone(), loaded: false }),
                    generation: put.generation,
                    ..self.new_machine()
                };
                let mut state = self.lock();
                let known = state.vms.get(&vm()).is_some_and(|known| is_target_of(known, migration));
                if !known {
                    assert!(!state.vms.contains_key(&vm()), "the target has something of the VM already");
                    state.vms.insert(vm(), machine);
                }
                done
            }
            TaskSpec::RefuseMigration { shared_pool, .. } => {
                let mut state = self.lock();
                match state.vms.get(&vm()).map(|machine| machine.process) {
                    Some(Process::Running | Process::Paused) => {
                        return Err(Problem::new(ProblemCode::WrongState, "the guest runs here"));
                    }
                    Some(_) => {
                        state.vms.remove(&vm());
                        drop(state);
                        if !shared_pool {
                            self.pool(|pool| pool.vms.remove(&vm()));
                        }
                    }
                    None => {}
                }
                done
            }
            TaskSpec::TakeOver { migration } => {
                let mut state = self.lock();
                let machine = state.vms.get_mut(&vm());
                match machine {
                    Some(machine) if machine.process == Process::Running => done,
                    Some(machine)
                        if machine.side
                            == Some(MigrationSide::Target { migration: migration.clone(), loaded: true })
                            && machine.process == Process::Incoming
                            // The machine of a snapshot went with the connection.
                            && machine.put_back.is_none() =>
                    {
                        machine.process = Process::Running;
                        machine.side = None;
                        done
                    }
                    _ => Err(Problem::new(ProblemCode::WrongState, "nothing is loaded here")),
                }
            }
            TaskSpec::TakeBack { .. } => self.with(&vm(), |machine, _| {
                if machine.process == Process::GivenAway {
                    machine.process = Process::Running;
                    machine.side = None;
                }
            }),
            other => unreachable!("{other:?}"),
        }
    }

    pub(super) async fn move_vm(
        &self,
        put: PutTask,
        mut cancel: watch::Receiver<bool>,
        task: &watch::Sender<Task>,
    ) -> Result<TaskOutput, Problem> {
        let TaskSpec::MoveVm { migration, target, shared_pool, put_back, .. } = put.spec else {
            unreachable!()
        };
        let vm = put.vm.expect("a task about a VM names it");
        let target = self.net().agent(&target);
        let report = self.measured(&target);
        let machine = self.machine(&vm).ok_or_else(|| Problem::not_found("vm", &vm))?;
        let top = self.files(&vm).map(|files| files.top).expect("a VM has files");
        if machine.process == Process::GivenAway {
            let runs = target.machine(&vm).is_some_and(|machine| machine.process == Process::Running);
            return match runs && *target.reachable.borrow() {
                true => Ok(TaskOutput::Moved { report, top }),
                false => Ok(TaskOutput::HandedOver { report, top }),
            };
        }
        if machine.process != Process::Running && !put_back {
            return Err(Problem::new(ProblemCode::WrongState, "the guest does not run here"));
        }
        self.set_side(
            &vm,
            Some(MigrationSide::Source { migration: migration.clone(), handed_over: false, held: false }),
        );
        for round in 1..=3 {
            let progress = Progress { phase: "warm-up".to_owned(), round, ..Progress::default() };
            task.send_modify(|task| {
                task.version += 1;
                task.state = TaskState::Running { progress };
            });
            tokio::select! {
                () = tokio::time::sleep(TASK_TAKES) => {}
                _ = cancel.wait_for(|cancelled| *cancelled) => {
                    self.set_side(&vm, None);
                    return Err(Problem::new(ProblemCode::Cancelled, "cancelled"));
                }
            }
            let admitted = target.machine(&vm).is_some_and(|machine| is_target_of(&machine, &migration));
            if !admitted || !*target.reachable.borrow() {
                self.set_side(&vm, None);
                return Err(Problem::new(ProblemCode::Unreachable, "the target does not answer"));
            }
        }
        if !put_back && self.machine(&vm).is_none_or(|machine| machine.process != Process::Running) {
            self.set_side(&vm, None);
            return Err(Problem::new(ProblemCode::Hypervisor, "the source's QEMU died"));
        }
        Ok(self.switch(&vm, &migration, &target, shared_pool, report, top))
    }

    fn switch(
        &self,
        vm: &VmId,
        migration: &OperationId,
        target: &FakeAgent,
        shared_pool: bool,
        report: MigrationReport,
        top: LayerId,
    ) -> TaskOutput {
        if !shared_pool {
            let files = self.files(vm).expect("a VM has files");
            target.pool(|pool| pool.vms.insert(vm.clone(), files));
        }
        target.set_side(vm, Some(MigrationSide::Target { migration: migration.clone(), loaded: true }));
        let given =
            Some(MigrationSide::Source { migration: migration.clone(), handed_over: true, held: false });
        if let Some(machine) = self.lock().vms.get_mut(vm) {
            machine.process = Process::GivenAway;
            machine.side = given;
        }
        let script = self.lock().script.take();
        match script {
            Some(MoveScript::LostAtHandOver) => return TaskOutput::HandedOver { report, top },
            Some(MoveScript::TargetDiesAtHandOver) => {
                target.kill(vm);
                return TaskOutput::HandedOver { report, top };
            }
            Some(MoveScript::LostAfterCommit) | None => {}
        }
        let guest = self.lock().guests_are;
        let put_back = target.machine(vm).and_then(|machine| machine.put_back);
        if let Some(put_back) = &put_back {
            target.pool(|pool| pool.vms.get_mut(vm).map(|files| files.top = put_back.new_top.clone()));
        }
        if let Some(machine) = target.lock().vms.get_mut(vm) {
            let stands = put_back.is_some_and(|put_back| put_back.paused);
            machine.process = if stands { Process::Paused } else { Process::Running };
            machine.put_back = None;
            machine.guest = guest;
            machine.side = None;
        }
        target.changed();
        self.net().check_one_owner(vm);
        match script {
            Some(_) => TaskOutput::HandedOver { report, top },
            None => TaskOutput::Moved { report, top },
        }
    }

    fn measured(&self, target: &FakeAgent) -> MigrationReport {
        MigrationReport {
            source: self.id.clone(),
            target: target.id.clone(),
            phases: Vec::new(),
            total_ms: 270,
            blackout_us: 9000,
            memory_bytes: 1 << 20,
            storage_bytes: 0,
            rounds: 3,
            clock_offset_us: 0,
        }
    }

    fn set_side(&self, vm: &VmId, side: Option<MigrationSide>) {
        if let Some(machine) = self.lock().vms.get_mut(vm) {
            machine.side = side;
        }
        self.changed();
    }
}

fn is_target_of(machine: &Machine, wanted: &OperationId) -> bool {
    matches!(&machine.side, Some(MigrationSide::Target { migration, .. }) if migration == wanted)
}
