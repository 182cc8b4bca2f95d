//! Hosts that are not there: agents in this process, which keep the contract of tasks to the letter.
//!
//! What a real agent keeps on disk or in a running QEMU is kept in [`Machine`] and survives [`FakeAgent::restart`]; its
//! tasks and incarnation do not. Two promises are checked at every change: a VM runs on one host at most, and a command
//! of an older generation is refused.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use berth_api::agent::{
    AgentReport, MigrationSide, PutBack, PutTask, Task, TaskOutput, TaskSpec, TaskState, VmDefinition,
    VmReport,
};
use berth_api::transport::{Body, BoxFuture, full};
use berth_api::{Client, Transport, TransportError};
use berth_manager::agents::AgentConnector;
use berth_model::host::{Accelerator, Host, Inventory, NetworkMode, PoolReport, QemuAbilities};
use berth_model::name::Name;
use berth_model::operation::Progress;
use berth_model::repository::{ExportFacts, ImportFacts};
use berth_model::snapshot::{CloneFacts, RestoreFacts, SnapshotFacts};
use berth_model::verification::{SnapshotFault, VerificationFacts};
use berth_model::vm::{GuestState, PortForward, VmState};
use berth_model::{HostId, ImageId, LayerId, Problem, ProblemCode, SnapshotId, VmId};
use http::{Request, Response};
use http_body_util::BodyExt;
use tokio::sync::watch;

/// What a task takes at least: long enough to be seen under way.
const TASK_TAKES: Duration = Duration::from_millis(50);

/// All hosts, by id, and the pools that they see.
#[derive(Default)]
pub struct Net {
    agents: Mutex<HashMap<HostId, Arc<FakeAgent>>>,
    pub pools: Mutex<BTreeMap<String, Pool>>,
}

/// A directory.
#[derive(Default, Clone, Debug, PartialEq)]
pub struct Pool {
    pub images: BTreeSet<ImageId>,
    pub vms: BTreeMap<VmId, Files>,
    /// What was fetched out of a repository for a VM that is to be made.
    pub fetched: BTreeSet<VmId>,
}

/// A VM's files.
#[derive(Clone, Debug, PartialEq)]
pub struct Files {
    pub top: LayerId,
    pub snapshots: BTreeMap<SnapshotId, bool>,
}

/// What a host has of a VM besides its files.
#[derive(Clone, Debug, PartialEq)]
pub struct Machine {
    pub process: Process,
    pub guest: GuestState,
    pub side: Option<MigrationSide>,
    pub generation: u64,
    /// The ports that were wished for when it was last started.
    pub wished: Vec<Vec<PortForward>>,
    /// What it is put back to where it comes to.
    pub put_back: Option<PutBack>,
    pool_uuid: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Process {
    None,
    Running,
    Paused,
    /// A migration's target: loaded, perhaps, and not running.
    Incoming,
    /// A migration's source after the hand-over.
    GivenAway,
}

/// What is to go wrong with a migration, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MoveScript {
    /// The link is lost after the hand-over: the target never hears of it.
    LostAtHandOver,
    /// The same, and the target's process dies.
    TargetDiesAtHandOver,
    /// The target runs, and the source never learns of it.
    LostAfterCommit,
}

#[path = "agent/migration.rs"]
mod migration;

pub struct FakeAgent {
    pub id: HostId,
    pool_uuid: String,
    net: std::sync::Weak<Net>,
    state: Mutex<State>,
    news: watch::Sender<u64>,
    reachable: watch::Sender<bool>,
    /// Kinds of tasks that are held, and do not end.
    held: watch::Sender<BTreeSet<&'static str>>,
    incarnations: AtomicU64,
}

struct State {
    incarnation: u64,
    tasks: HashMap<String, (watch::Sender<Task>, PutTask)>,
    running: HashMap<String, (tokio::task::AbortHandle, watch::Sender<bool>)>,
    vms: BTreeMap<VmId, Machine>,
    refusals: HashMap<&'static str, Problem>,
    /// How the next restores end once the process is gone.
    broken_restores: Vec<Problem>,
    script: Option<MoveScript>,
    /// Snapshots that are not what they were.
    faults: BTreeMap<SnapshotId, SnapshotFault>,
    guests_are: GuestState,
    lag: Duration,
    pool_free_bytes: u64,
}

impl Net {
    pub fn add(self: &Arc<Self>, id: HostId, pool_uuid: &str) -> Arc<FakeAgent> {
        let agent = Arc::new(FakeAgent {
            id: id.clone(),
            pool_uuid: pool_uuid.to_owned(),
            net: Arc::downgrade(self),
            state: Mutex::new(State {
                incarnation: 1,
                tasks: HashMap::new(),
                running: HashMap::new(),
                vms: BTreeMap::new(),
                refusals: HashMap::new(),
                broken_restores: Vec::new(),
                script: None,
                faults: BTreeMap::new(),
                guests_are: GuestState::Booting,
                lag: Duration::ZERO,
                pool_free_bytes: 90 << 30,
            }),
            news: watch::Sender::new(1),
            reachable: watch::Sender::new(true),
            held: watch::Sender::default(),
            incarnations: AtomicU64::new(1),
        });
        self.pools.lock().unwrap().entry(pool_uuid.to_owned()).or_default();
        self.agents.lock().unwrap().insert(id, Arc::clone(&agent));
        agent
    }

    pub fn agent(&self, id: &HostId) -> Arc<FakeAgent> {
        Arc::clone(&self.agents.lock().unwrap()[id])
    }

    pub fn agents(&self) -> Vec<Arc<FakeAgent>> {
        let mut agents: Vec<_> = self.agents.lock().unwrap().values().cloned().collect();
        agents.sort_by(|a, b| a.id.cmp(&b.id));
        agents
    }

    /// Hosts on which a VM's guest runs or is held.
    pub fn owners(&self, vm: &VmId) -> Vec<HostId> {
        let live = |agent: &Arc<FakeAgent>| {
            agent
                .machine(vm)
                .is_some_and(|machine| matches!(machine.process, Process::Running | Process::Paused))
        };
        self.agents().iter().filter(|agent| live(agent)).map(|agent| agent.id.clone()).collect()
    }

    fn check_one_owner(&self, vm: &VmId) {
        let owners = self.owners(vm);
        assert!(owners.len() <= 1, "{vm} runs on {owners:?}");
    }
}

impl AgentConnector for Net {
    fn connect(&self, host: &Host) -> Client {
        let agent = self.agents.lock().unwrap().get(&host.id).cloned();
        Client::new(Arc::new(Wire { agent, address: host.address.clone() }))
    }
}

struct Wire {
    agent: Option<Arc<FakeAgent>>,
    address: String,
}

impl Transport for Wire {
    fn send(&self, request: Request<Body>) -> BoxFuture<'_, Result<Response<Body>, TransportError>> {
        Box::pin(async move {
            let address = self.address.clone();
            let gone = || TransportError::Connect { address: address.clone(), source: "refused".into() };
            let agent = self.agent.as_ref().ok_or_else(gone)?;
            let mut reachable = agent.reachable.subscribe();
            if !*reachable.borrow_and_update() {
                return Err(gone());
            }
            tokio::select! {
                answer = agent.answer(request) => Ok(answer),
                _ = reachable.changed() => {
                    Err(TransportError::Broken { address: address.clone(), source: "cut".into() })
                }
            }
        })
    }

    fn address(&self) -> &str {
        &self.address
    }
}

impl FakeAgent {
    // What tests do to it.

    pub fn cut(&self) {
        self.reachable.send_replace(false);
    }

    pub fn mend(&self) {
        self.reachable.send_replace(true);
    }

    /// The agent dies and comes back: tasks are forgotten half-done, machines go on.
    pub fn restart(&self) {
        let mut state = self.lock();
        for (_, (task, _)) in state.running.drain() {
            task.abort();
        }
        state.tasks.clear();
        state.incarnation = self.incarnations.fetch_add(1, Ordering::SeqCst) + 1;
        drop(state);
        self.reachable.send_replace(false);
        self.reachable.send_replace(true);
        self.changed();
    }

    /// Tasks of this kind are begun and do not end until [`Self::release`].
    pub fn hold(&self, kind: &'static str) {
        self.held.send_modify(|held| {
            held.insert(kind);
        });
    }

    pub fn release(&self) {
        self.held.send_modify(BTreeSet::clear);
    }

    /// The next restores, as many as there are problems, fail after they have killed the VM's process.
    pub fn break_restores(&self, problems: Vec<Problem>) {
        self.lock().broken_restores = problems;
    }

    /// The next task of this kind fails.
    pub fn refuse(&self, kind: &'static str, problem: Problem) {
        self.lock().refusals.insert(kind, problem);
    }

    /// From now on a snapshot has this fault; none: it is whole.
    pub fn damage(&self, snapshot: &SnapshotId, fault: Option<SnapshotFault>) {
        let faults = &mut self.lock().faults;
        faults.remove(snapshot);
        faults.extend(fault.map(|fault| (snapshot.clone(), fault)));
    }

    /// From now on so much of its pool, of which a tenth of a hundred GiB has to stay free, is free.
    pub fn leave_free(&self, bytes: u64) {
        self.lock().pool_free_bytes = bytes;
    }

    pub fn script(&self, script: MoveScript) {
        self.lock().script = Some(script);
    }

    pub fn set_guests(&self, guest: GuestState) {
        let mut state = self.lock();
        state.guests_are = guest;
        for machine in state.vms.values_mut().filter(|machine| machine.process == Process::Running) {
            machine.guest = guest;
        }
        drop(state);
        self.changed();
    }

    /// The VM's QEMU dies.
    pub fn kill(&self, vm: &VmId) {
        if let Some(machine) = self.lock().vms.get_mut(vm) {
            machine.process = Process::None;
            machine.guest = GuestState::Off;
        }
        self.changed();
    }

    /// Reports take this long on their way.
    pub fn lag(&self, lag: Duration) {
        self.lock().lag = lag;
    }

    pub fn machine(&self, vm: &VmId) -> Option<Machine> {
        self.lock().vms.get(vm).cloned()
    }

    pub fn machines(&self) -> BTreeMap<VmId, Machine> {
        self.lock().vms.clone()
    }

    pub fn is_idle(&self) -> bool {
        self.lock().running.is_empty()
    }

    /// Something that no manager ordered.
    pub fn plant(&self, vm: &VmId) {
        let machine = self.new_machine();
        self.lock().vms.insert(vm.clone(), machine);
        self.changed();
    }

    pub fn files(&self, vm: &VmId) -> Option<Files> {
        self.pool(|pool| pool.vms.get(vm).cloned())
    }

    // What it answers.

    async fn answer(self: &Arc<Self>, request: Request<Body>) -> Response<Body> {
        let (parts, body) = request.into_parts();
        let body = body.collect().await.expect("a body").to_bytes();
        let path = parts.uri.path().to_owned();
        let query: HashMap<String, String> =
            serde_urlencoded::from_str(parts.uri.query().unwrap_or_default()).expect("a query");
        let wait = Duration::from_millis(query.get("wait_ms").map_or(0, |text| text.parse().unwrap()));
        let after = query.get("after").map(|text| text.parse::<u64>().unwrap());
        let segments: Vec<&str> = path.trim_start_matches("/v1/").split('/').collect();
        match (parts.method.as_str(), segments.as_slice()) {
            ("GET", ["inventory"]) => reply(Ok(self.inventory())),
            ("GET", ["report"]) => {
                let same = query.get("incarnation") == Some(&self.lock().incarnation.to_string());
                if let (true, Some(after)) = (same, after) {
                    let mut news = self.news.subscribe();
                    let _ = tokio::time::timeout(wait, news.wait_for(|now| *now > after)).await;
                }
                let report = self.report();
                let lag = self.lock().lag;
                tokio::time::sleep(lag).await;
                reply(Ok(report))
            }
            ("PUT", ["tasks", id]) => reply(self.put(id, serde_json::from_slice(&body).expect("a task"))),
            ("GET", ["tasks", id]) => {
                let Some(mut task) = self.lock().tasks.get(*id).map(|(task, _)| task.subscribe()) else {
                    return reply::<Task>(Err(Problem::not_found("task", id)));
                };
                let newer = task.wait_for(|task| after.is_none_or(|after| task.version > after));
                let _ = tokio::time::timeout(wait, newer).await;
                let now = task.borrow().clone();
                reply(Ok(now))
            }
            ("POST", ["tasks", id, "cancel"]) => {
                let state = self.lock();
                let Some((task, _)) = state.tasks.get(*id) else {
                    return reply::<Task>(Err(Problem::not_found("task", id)));
                };
                if let Some((_, cancel)) = state.running.get(*id) {
                    cancel.send_replace(true);
                }
                reply(Ok(task.borrow().clone()))
            }
            (method, _) => panic!("the fake agent has no {method} {path}"),
        }
    }

    fn put(self: &Arc<Self>, id: &str, put: PutTask) -> Result<Task, Problem> {
        let mut state = self.lock();
        if let Some((known, was)) = state.tasks.get(id) {
            if *was != put {
                let message = format!("task '{id}' was put before with other content");
                return Err(Problem::new(ProblemCode::AlreadyExists, message));
            }
            return Ok(known.borrow().clone());
        }
        // What changes nothing is done at any generation.
        let changes = !matches!(put.spec, TaskSpec::VerifySnapshot { .. });
        if let Some(machine) = put.vm.as_ref().filter(|_| changes).and_then(|vm| state.vms.get_mut(vm)) {
            if put.generation < machine.generation {
                let message = format!("{} is older than {}", put.generation, machine.generation);
                return Err(Problem::new(ProblemCode::WrongState, message));
            }
            machine.generation = put.generation;
        }
        let progress = Progress { phase: kind_of(&put.spec).to_owned(), ..Progress::default() };
        let task = Task { id: id.to_owned(), version: 1, state: TaskState::Running { progress } };
        let sender = watch::Sender::new(task.clone());
        state.tasks.insert(id.to_owned(), (sender.clone(), put.clone()));
        let cancel = watch::Sender::new(false);
        let (agent, id, heard) = (Arc::clone(self), id.to_owned(), cancel.subscribe());
        let name = id.clone();
        let running = tokio::spawn(async move {
            let result = agent.run(put, heard, &sender).await;
            agent.changed();
            agent.lock().running.remove(&id);
            sender.send_modify(|task| {
                task.version += 1;
                task.state = match result {
                    Ok(output) => TaskState::Succeeded { output },
                    Err(problem) => TaskState::Failed { problem },
                };
            });
        });
        state.running.insert(name, (running.abort_handle(), cancel));
        Ok(task)
    }

    async fn run(
        self: &Arc<Self>,
        put: PutTask,
        mut cancel: watch::Receiver<bool>,
        task: &watch::Sender<Task>,
    ) -> Result<TaskOutput, Problem> {
        let kind = kind_of(&put.spec);
        let mut held = self.held.subscribe();
        tokio::select! {
            _ = async {
                tokio::time::sleep(TASK_TAKES).await;
                let _ = held.wait_for(|held| !held.contains(kind)).await;
            } => {}
            _ = cancel.wait_for(|cancelled| *cancelled) => {
                return Err(Problem::new(ProblemCode::Cancelled, "cancelled"));
            }
        }
        if let Some(problem) = self.lock().refusals.remove(kind) {
            return Err(problem);
        }
        if let TaskSpec::MoveVm { .. } = &put.spec {
            return self.move_vm(put, cancel, task).await;
        }
        let output = self.act(&put)?;
        if let Some(vm) = &put.vm {
            self.net().check_one_owner(vm);
        }
        Ok(output)
    }

    fn act(&self, put: &PutTask) -> Result<TaskOutput, Problem> {
        let done = Ok(TaskOutput::Done);
        let vm = || put.vm.clone().expect("a task about a VM names it");
        match &put.spec {
            TaskSpec::FetchImage { .. }
            | TaskSpec::DeleteImage { .. }
            | TaskSpec::ExportSnapshot { .. }
            | TaskSpec::FetchBackup { .. }
            | TaskSpec::DropFetched { .. }
            | TaskSpec::PrepareVm { .. } => self.act_on_files(put),
            TaskSpec::ImportVm { .. } => self.import_vm(put),
            TaskSpec::StartVm { definition } => self.with(&vm(), |machine, guest| {
                machine.wished = definition.spec.nics.iter().map(|nic| nic.forwards.clone()).collect();
                if machine.process == Process::None {
                    machine.process = Process::Running;
                    machine.guest = guest;
                }
            }),
            TaskSpec::ShutdownVm { .. } | TaskSpec::StopVm => {
                if let Some(machine) = self.lock().vms.get_mut(&vm()) {
                    machine.process = Process::None;
                    machine.guest = GuestState::Off;
                }
                done
            }
            TaskSpec::RestartVm => self.with_process(&vm(), |machine, guest| machine.guest = guest),
            TaskSpec::PauseVm => self.with_process(&vm(), |machine, _| machine.process = Process::Paused),
            TaskSpec::ResumeVm => self.with_process(&vm(), |machine, _| machine.process = Process::Running),
            TaskSpec::WaitReady { .. } => done,
            TaskSpec::DeleteVm { keep_files, .. } => {
                self.lock().vms.remove(&vm());
                if !keep_files {
                    self.pool(|pool| pool.vms.remove(&vm()));
                }
                done
            }
            TaskSpec::TakeSnapshot { snapshot, new_top, .. } => self.take_snapshot(&vm(), snapshot, new_top),
            TaskSpec::TakeDiskSnapshot { snapshot, new_top, .. } => {
                self.take_disk_snapshot(&vm(), snapshot, new_top)
            }
            TaskSpec::RestoreSnapshot { snapshot, new_top, paused, .. } => {
                self.restore(&vm(), snapshot, new_top, *paused)
            }
            TaskSpec::CloneVm { .. } => self.clone_vm(put),
            TaskSpec::VerifySnapshot { snapshot } => self.verify(&vm(), snapshot),
            TaskSpec::DeleteSnapshot { snapshot } => {
                self.pool(|pool| pool.vms.get_mut(&vm()).map(|files| files.snapshots.remove(snapshot)));
                done
            }
            _ => self.act_in_migration(put),
        }
    }

    fn act_on_files(&self, put: &PutTask) -> Result<TaskOutput, Problem> {
        let done = Ok(TaskOutput::Done);
        let vm = || put.vm.clone().expect("a task about a VM names it");
        match &put.spec {
            TaskSpec::FetchImage { image, pool, from, .. } => {
                let has = self.net().agent(from).pool(|pool| pool.images.contains(&image.id));
                if !has {
                    return Err(Problem::not_found("image", &image.id));
                }
                assert_eq!(pool.as_str(), "default");
                self.pool(|pool| pool.images.insert(image.id.clone()));
                done
            }
            TaskSpec::DeleteImage { image, .. } => {
                self.pool(|pool| pool.images.remove(image));
                done
            }
            TaskSpec::ExportSnapshot { vm, snapshot, operation, access, .. } => {
                assert_eq!(access.keys.password.reveal(), "hunter2hunter2");
                let has = self.pool(|pool| {
                    pool.vms.get(vm).is_some_and(|files| files.snapshots.contains_key(snapshot))
                });
                if !has {
                    return Err(Problem::not_found("snapshot", snapshot));
                }
                let facts = ExportFacts { backup: operation.to_string(), files: 7, ..ExportFacts::default() };
                Ok(TaskOutput::Exported { facts })
            }
            TaskSpec::FetchBackup { vm, contents, access, .. } => {
                assert_eq!(access.keys.password.reveal(), "hunter2hunter2");
                self.pool(|pool| {
                    pool.images.insert(contents.image.id.clone());
                    pool.fetched.insert(vm.clone());
                });
                Ok(TaskOutput::Fetched { facts: ImportFacts::default() })
            }
            TaskSpec::DropFetched { vm, .. } => {
                self.pool(|pool| pool.fetched.remove(vm));
                done
            }
            TaskSpec::PrepareVm { definition } => {
                if !self.pool(|pool| pool.images.contains(&definition.image.id)) {
                    return Err(Problem::not_found("image", &definition.image.id));
                }
                let top = definition.first_layer.clone();
                self.pool(|pool| {
                    pool.vms.entry(vm()).or_insert(Files { top, snapshots: BTreeMap::new() });
                });
                let machine = self.new_machine();
                self.lock().vms.entry(vm()).or_insert(machine).generation = put.generation;
                done
            }
            other => unreachable!("{other:?}"),
        }
    }

    fn take_snapshot(
        &self,
        vm: &VmId,
        snapshot: &SnapshotId,
        new_top: &LayerId,
    ) -> Result<TaskOutput, Problem> {
        let machine = self.machine(vm).ok_or_else(|| Problem::not_found("vm", vm))?;
        Ok(self.keep_snapshot(vm, snapshot, new_top, machine.process != Process::None))
    }

    fn take_disk_snapshot(
        &self,
        vm: &VmId,
        snapshot: &SnapshotId,
        new_top: &LayerId,
    ) -> Result<TaskOutput, Problem> {
        self.machine(vm).ok_or_else(|| Problem::not_found("vm", vm))?;
        Ok(self.keep_snapshot(vm, snapshot, new_top, false))
    }

    fn keep_snapshot(
        &self,
        vm: &VmId,
        snapshot: &SnapshotId,
        new_top: &LayerId,
        has_memory: bool,
    ) -> TaskOutput {
        self.pool(|pool| {
            let files = pool.vms.get_mut(vm).expect("a VM has files");
            if !files.snapshots.contains_key(snapshot) {
                files.snapshots.insert(snapshot.clone(), has_memory);
                files.top = new_top.clone();
            }
        });
        let facts = SnapshotFacts { has_memory, paused_us: 8000, total_ms: 50, ..SnapshotFacts::default() };
        TaskOutput::Snapshot { facts }
    }

    fn verify(&self, vm: &VmId, snapshot: &SnapshotId) -> Result<TaskOutput, Problem> {
        let has =
            self.pool(|pool| pool.vms.get(vm).is_some_and(|files| files.snapshots.contains_key(snapshot)));
        if !has {
            return Err(Problem::not_found("snapshot", snapshot));
        }
        let faults = self.lock().faults.get(snapshot).cloned().into_iter().collect();
        Ok(TaskOutput::Verified { facts: VerificationFacts { faults, ..VerificationFacts::default() } })
    }

    fn clone_vm(&self, put: &PutTask) -> Result<TaskOutput, Problem> {
        let TaskSpec::CloneVm { definition, origin, snapshot, first_snapshot, paused, .. } = &put.spec else {
            unreachable!("{:?}", put.spec)
        };
        let has = self
            .pool(|pool| pool.vms.get(origin).is_some_and(|files| files.snapshots.contains_key(snapshot)));
        if !has {
            return Err(Problem::not_found("snapshot", snapshot));
        }
        self.be_made(put, definition, first_snapshot.as_ref(), *paused)
    }

    fn be_made(
        &self,
        put: &PutTask,
        definition: &VmDefinition,
        first_snapshot: Option<&SnapshotId>,
        paused: bool,
    ) -> Result<TaskOutput, Problem> {
        let vm = &definition.id;
        let snapshots = first_snapshot.map(|first| (first.clone(), true)).into_iter().collect();
        let files = Files { top: definition.first_layer.clone(), snapshots };
        self.pool(|pool| pool.vms.insert(vm.clone(), files));
        let machine = self.new_machine();
        self.lock().vms.entry(vm.clone()).or_insert(machine).generation = put.generation;
        self.with(vm, |machine, guest| {
            machine.process = if paused { Process::Paused } else { Process::Running };
            machine.guest = guest;
        })?;
        let state = if paused { VmState::Paused } else { VmState::Running };
        Ok(TaskOutput::Cloned { facts: CloneFacts { running_us: 60_000, ..CloneFacts::default() }, state })
    }

    fn import_vm(&self, put: &PutTask) -> Result<TaskOutput, Problem> {
        let TaskSpec::ImportVm { definition, first_snapshot, paused, .. } = &put.spec else {
            unreachable!("{:?}", put.spec)
        };
        let vm = &definition.id;
        let is_made = self.pool(|pool| pool.vms.contains_key(vm));
        if !is_made && !self.pool(|pool| pool.fetched.remove(vm)) {
            return Err(Problem::not_found("backup", vm));
        }
        if !self.pool(|pool| pool.images.contains(&definition.image.id)) {
            return Err(Problem::not_found("image", &definition.image.id));
        }
        self.be_made(put, definition, first_snapshot.as_ref(), *paused)
    }

    fn restore(
        &self,
        vm: &VmId,
        snapshot: &SnapshotId,
        new_top: &LayerId,
        paused: bool,
    ) -> Result<TaskOutput, Problem> {
        let has_memory = self
            .pool(|pool| pool.vms.get(vm).and_then(|files| files.snapshots.get(snapshot).copied()))
            .ok_or_else(|| Problem::not_found("snapshot", snapshot))?;
        let broken = self.lock().broken_restores.pop();
        if let Some(problem) = broken {
            self.with(vm, |machine, _| {
                machine.process = Process::None;
                machine.guest = GuestState::Off;
            })?;
            return Err(problem);
        }
        self.pool(|pool| {
            if let Some(files) = pool.vms.get_mut(vm) {
                files.top = new_top.clone();
            }
        });
        self.with(vm, |machine, guest| {
            machine.process = match (has_memory, paused) {
                (true, true) => Process::Paused,
                (true, false) => Process::Running,
                (false, _) => Process::None,
            };
            machine.guest = if has_memory { guest } else { GuestState::Off };
        })?;
        Ok(TaskOutput::Restored { facts: RestoreFacts { running_us: 60_000, ..RestoreFacts::default() } })
    }

    fn with(&self, vm: &VmId, change: impl FnOnce(&mut Machine, GuestState)) -> Result<TaskOutput, Problem> {
        let mut state = self.lock();
        let guest = state.guests_are;
        match state.vms.get_mut(vm) {
            Some(machine) => {
                change(machine, guest);
                Ok(TaskOutput::Done)
            }
            None => Err(Problem::not_found("vm", vm)),
        }
    }

    fn with_process(
        &self,
        vm: &VmId,
        change: impl FnOnce(&mut Machine, GuestState),
    ) -> Result<TaskOutput, Problem> {
        if self.machine(vm).is_none_or(|machine| machine.process == Process::None) {
            return Err(Problem::new(ProblemCode::WrongState, "there is no process"));
        }
        self.with(vm, change)
    }

    fn new_machine(&self) -> Machine {
        Machine {
            process: Process::None,
            guest: GuestState::Off,
            side: None,
            generation: 0,
            wished: Vec::new(),
            put_back: None,
            pool_uuid: self.pool_uuid.clone(),
        }
    }

    fn report(&self) -> AgentReport {
        let generation = *self.news.borrow();
        let state = self.lock();
        let vms = state.vms.iter().map(|(vm, machine)| VmReport {
            vm: vm.clone(),
            generation: machine.generation,
            state: match machine.process {
                Process::None => VmState::Stopped,
                Process::Running => VmState::Running,
                Process::Paused | Process::GivenAway => VmState::Paused,
                Process::Incoming => VmState::Starting,
            },
            guest: machine.guest,
            migration: machine.side.clone(),
            top: self.pool(|pool| pool.vms.get(vm).map(|files| files.top.clone())),
            layers: 1,
            forwards: machine.wished.iter().map(|nic| nic.iter().map(given).collect()).collect(),
            trouble: None,
        });
        let vms = vms.collect();
        AgentReport { incarnation: state.incarnation.to_string(), generation, vms }
    }

    fn inventory(&self) -> Inventory {
        let (incarnation, free_bytes) = {
            let state = self.lock();
            (state.incarnation, state.pool_free_bytes)
        };
        Inventory {
            hostname: self.id.to_string(),
            cpus: 2,
            memory_mib: 4096,
            memory_available_mib: 4096,
            accelerator: Accelerator::Tcg,
            accelerator_note: None,
            qemu: QemuAbilities {
                version: "10.0.2".to_owned(),
                machine_types: vec!["pc-q35-10.0".to_owned(), "pc-q35-7.2".to_owned()],
                cpu_models: vec!["qemu64".to_owned()],
                migration_capabilities: Vec::new(),
                devices: Vec::new(),
            },
            pools: vec![PoolReport {
                name: default_pool(),
                pool_uuid: self.pool_uuid.clone(),
                size_bytes: 100 << 30,
                free_bytes,
                reserve_bytes: 10 << 30,
            }],
            network: NetworkMode::User,
            uefi: true,
            tpm: true,
            isolated_users: false,
            agent_version: incarnation.to_string(),
        }
    }

    fn pool<R>(&self, look: impl FnOnce(&mut Pool) -> R) -> R {
        let net = self.net();
        let mut pools = net.pools.lock().unwrap();
        look(pools.get_mut(&self.pool_uuid).expect("a host's pool"))
    }

    fn changed(&self) {
        self.news.send_modify(|generation| *generation += 1);
    }

    fn net(&self) -> Arc<Net> {
        self.net.upgrade().expect("the net outlives its agents")
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

fn given(wish: &PortForward) -> PortForward {
    let free = if wish.host_port == 0 { 40_000 + wish.guest_port } else { wish.host_port };
    PortForward { host_port: free, ..wish.clone() }
}

pub fn default_pool() -> Name {
    "default".parse().unwrap()
}

fn reply<T: serde::Serialize>(result: Result<T, Problem>) -> Response<Body> {
    let (status, json) = match result {
        Ok(value) => (200, serde_json::to_vec(&value).unwrap()),
        Err(problem) => (problem.code.http_status(), serde_json::to_vec(&problem).unwrap()),
    };
    Response::builder().status(status).body(full(json)).unwrap()
}

fn kind_of(spec: &TaskSpec) -> &'static str {
    match spec {
        TaskSpec::FetchImage { .. } => "fetch-image",
        TaskSpec::DeleteImage { .. } => "delete-image",
        TaskSpec::PrepareVm { .. } => "prepare",
        TaskSpec::StartVm { .. } => "start",
        TaskSpec::ShutdownVm { .. } => "shutdown",
        TaskSpec::StopVm => "stop",
        TaskSpec::RestartVm => "restart",
        TaskSpec::PauseVm => "pause",
        TaskSpec::ResumeVm => "resume",
        TaskSpec::WaitReady { .. } => "wait-ready",
        TaskSpec::DeleteVm { .. } => "delete",
        TaskSpec::TakeSnapshot { .. } => "snapshot",
        TaskSpec::TakeDiskSnapshot { .. } => "disk-snapshot",
        TaskSpec::RestoreSnapshot { .. } => "restore",
        TaskSpec::CloneVm { .. } => "clone",
        TaskSpec::VerifySnapshot { .. } => "verify",
        TaskSpec::ExportSnapshot { .. } => "export",
        TaskSpec::FetchBackup { .. } => "fetch-backup",
        TaskSpec::DropFetched { .. } => "drop-fetched",
        TaskSpec::ImportVm { .. } => "import",
        TaskSpec::DeleteSnapshot { .. } => "delete-snapshot",
        TaskSpec::AdmitMigration { .. } => "admit",
        TaskSpec::RefuseMigration { .. } => "refuse",
        TaskSpec::TakeOver { .. } => "take-over",
        TaskSpec::MoveVm { .. } => "move",
        TaskSpec::TakeBack { .. } => "take-back",
    }
}

/// Every kind of task that a manager gives.
pub const KINDS: &[&str] = &[
    "fetch-image",
    "delete-image",
    "prepare",
    "start",
    "shutdown",
    "stop",
    "restart",
    "pause",
    "resume",
    "delete",
    "snapshot",
    "disk-snapshot",
    "restore",
    "clone",
    "verify",
    "export",
    "fetch-backup",
    "drop-fetched",
    "import",
    "delete-snapshot",
    "admit",
    "refuse",
    "take-over",
    "move",
    "take-back",
];
