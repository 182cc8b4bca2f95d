//! Whatever dies in whichever phase of a migration: the VM runs once afterwards, and nothing is left behind.
//!
//! A migration is held up at a command that QEMU is given in it; then somebody dies, the command goes on, and the dead
//! come back. What died and when is told by what fails.

use std::time::Duration;

use berth_model::VmId;
use berth_model::vm::VmState;
use berth_sim::cluster::act::{Act, show};
use berth_sim::cluster::{VmWish, done};
use berth_sim::fault::{Fault, Gate, Moment};
use berth_sim::network::Cut;
use berth_sim::{Plan, SimCluster, settled};

/// How long a phase may take to come.
const DEADLINE: Duration = Duration::from_secs(60);
/// How long all may take to be well again: a host is believed to be gone for some seconds first.
const SETTLE: Duration = Duration::from_secs(90);
/// How long those who died stay dead after the command that was held up went on.
const GONE: Duration = Duration::from_millis(300);
const SOURCE: usize = 0;
const TARGET: usize = 1;

/// The commands by which the phases are known, and which of that name it is: the target's QEMU is given its stream before
/// the source's.
const PHASES: [(&str, u64); 6] = [
    ("getfd", 1),
    ("migrate-incoming", 1),
    ("getfd", 2),
    ("migrate", 1),
    ("migrate-continue", 1),
    ("cont", 1),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    SourceAgent,
    TargetAgent,
    BothAgents,
    Manager,
    Everyone,
    SourceQemu,
    TargetQemu,
    TargetHost,
    Link(Cut),
}

impl Victim {
    async fn dies(self, cluster: &SimCluster, vm: &VmId) {
        match self {
            Self::SourceAgent => cluster.kill_agent(SOURCE).await,
            Self::TargetAgent => cluster.kill_agent(TARGET).await,
            Self::BothAgents => {
                cluster.kill_agent(SOURCE).await;
                cluster.kill_agent(TARGET).await;
            }
            Self::Manager => cluster.kill_manager().await,
            Self::Everyone => {
                cluster.kill_manager().await;
                cluster.kill_agent(SOURCE).await;
                cluster.kill_agent(TARGET).await;
            }
            Self::SourceQemu => cluster.kill_qemu(SOURCE, vm),
            Self::TargetQemu => cluster.kill_qemu(TARGET, vm),
            Self::TargetHost => cluster.cut_power(TARGET).await,
            Self::Link(how) => cluster.network().cut("host-1", "host-2", how),
        }
    }

    /// Whether the only copy of the guest's memory may have died with it.
    fn takes_the_guest_along(self) -> bool {
        matches!(self, Self::SourceQemu | Self::TargetQemu | Self::TargetHost)
    }
}

async fn heal(cluster: &SimCluster) {
    cluster.network().heal_all();
    cluster.start_manager().await;
    cluster.start_agent(SOURCE).await;
    cluster.start_agent(TARGET).await;
}

/// A VM on the first of two hosts, which nobody is doing anything with.
async fn stage(seed: u64, shared_pool: bool) -> Result<(SimCluster, VmId), String> {
    let cluster = SimCluster::with(Plan { shared_pool, ..Plan::new(2, seed) }).await;
    let wish = VmWish { name: "books".into(), host: Some("host-1".into()), stopped: false };
    let vm = cluster.create_vm(&wish).await.map_err(|error| format!("not made: {error}"))?;
    settled::wait(&cluster, SETTLE).await?;
    while show(&cluster.client(), &vm).await.is_ok_and(|vm| vm.status.baseline.is_none()) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    settled::wait(&cluster, SETTLE).await?;
    Ok((cluster, vm))
}

async fn scene(victim: Victim, (command, nth): (&str, u64), shared_pool: bool) -> Result<(), String> {
    let (cluster, vm) = stage(nth, shared_pool).await?;
    let gate = Gate::default();
    let moment = Moment { command: Some(command.to_owned()), nth };
    cluster.world().faults.plan(&vm, Fault::Wait(moment, gate.clone()));
    let client = cluster.client();
    let begun =
        Act::Migrate(Some("host-2".into())).begin(&client, &vm).await.map_err(|error| error.to_string())?;
    let reached = tokio::time::timeout(DEADLINE, gate.reached()).await;
    reached.map_err(|_| format!("the migration never came to {command}"))?;
    victim.dies(&cluster, &vm).await;
    gate.open();
    tokio::time::sleep(GONE).await;
    heal(&cluster).await;
    // How it ends is free; that it does is not.
    let outcome = done(&client, begun).await.map(drop).map_err(|error| error.to_string());
    settled::wait(&cluster, SETTLE).await?;
    let now = show(&client, &vm).await.map_err(|error| error.to_string())?;
    let story = || cluster.world().oracle.story(&vm);
    let stopped = now.status.state == VmState::Stopped && victim.takes_the_guest_along();
    if now.status.state != VmState::Running && !stopped {
        return Err(format!("it is {} ({outcome:?})\n{}", now.status.state, story()));
    }
    let acts = [Act::Stop, Act::Start, Act::Migrate(None), Act::Restore(None), Act::Delete];
    for act in acts.into_iter().skip(usize::from(stopped)) {
        let begun = act.begin(&client, &vm).await;
        let ended = match begun {
            Ok(begun) => done(&client, begun).await.map(drop),
            Err(error) => Err(error),
        };
        ended
            .map_err(|error| format!("afterwards not {act:?}: {error} (it was: {outcome:?})\n{}", story()))?;
    }
    settled::wait(&cluster, SETTLE).await?;
    cluster.shut_down().await;
    Ok(())
}

/// The target's QEMU dies at the command that lets the guest run, or after it, and perhaps its agent too before it can
/// write that down. Gives where the VM is in the end, and how.
async fn dies_about_the_switch(
    faults: &[Fault],
    agent_dies: bool,
    shared_pool: bool,
) -> Result<(String, VmState), String> {
    let (cluster, vm) = stage(7, shared_pool).await?;
    faults.iter().for_each(|fault| cluster.world().faults.plan(&vm, fault.clone()));
    let client = cluster.client();
    let begun =
        Act::Migrate(Some("host-2".into())).begin(&client, &vm).await.map_err(|error| error.to_string())?;
    if agent_dies {
        let deadline = tokio::time::Instant::now() + DEADLINE;
        while !cluster.world().oracle.story(&vm).contains(" at cont\n")
            && !cluster.world().oracle.story(&vm).contains(" after cont\n")
        {
            if tokio::time::Instant::now() > deadline {
                return Err("the migration never came to the switch".to_owned());
            }
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
        cluster.kill_agent(TARGET).await;
        tokio::time::sleep(GONE).await;
        cluster.start_agent(TARGET).await;
    }
    // How it ends is free; that it does is not.
    let _ = done(&client, begun).await;
    settled::wait(&cluster, SETTLE).await?;
    let now = show(&client, &vm).await.map_err(|error| error.to_string())?;
    let hosts = cluster.host_records().await.map_err(|error| error.to_string())?;
    let host = hosts.iter().find(|host| Some(&host.id) == now.status.host.as_ref());
    let found = (host.map(|host| host.name.to_string()).unwrap_or_default(), now.status.state);
    let acts = if found.1 == VmState::Stopped { &[Act::Start][..] } else { &[] };
    for act in acts.iter().chain(&[Act::Migrate(None), Act::Restore(None), Act::Delete]) {
        let ended = match act.begin(&client, &vm).await {
            Ok(begun) => done(&client, begun).await.map(drop),
            Err(error) => Err(error),
        };
        ended.map_err(|error| {
            format!("afterwards not {act:?}: {error}\n{}", cluster.world().oracle.story(&vm))
        })?;
    }
    settled::wait(&cluster, SETTLE).await?;
    cluster.shut_down().await;
    Ok(found)
}

fn about_the_switch(faults: &[Fault], agent_dies: bool, expected: (&str, VmState)) {
    let runtime = runtime();
    for shared_pool in [true, false] {
        let found = runtime.block_on(dies_about_the_switch(faults, agent_dies, shared_pool));
        let found = found.unwrap_or_else(|wrong| panic!("shared pool {shared_pool}: {wrong}"));
        assert_eq!((found.0.as_str(), found.1), expected, "shared pool {shared_pool}");
    }
}

fn runtime() -> tokio::runtime::Runtime {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime")
}

fn in_every_phase(victim: Victim) {
    let runtime = runtime();
    let mut wrong = Vec::new();
    for (index, phase) in PHASES.into_iter().enumerate() {
        let shared_pool = index % 2 == 1;
        if let Err(how) = runtime.block_on(scene(victim, phase, shared_pool)) {
            wrong.push(format!("{victim:?} at {phase:?}, shared pool {shared_pool}: {how}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn a_guest_that_ran_on_a_target_that_died_stays_there_and_never_goes_on_at_the_source() {
    about_the_switch(&[Fault::DieAfter(Moment::next("cont"))], false, ("host-2", VmState::Stopped));
}

#[test]
fn a_guest_that_ran_on_a_target_that_died_with_its_agent_stays_there() {
    about_the_switch(&[Fault::DieAfter(Moment::next("cont"))], true, ("host-2", VmState::Stopped));
}

#[test]
fn a_guest_of_which_nobody_can_say_whether_it_ran_on_the_target_stays_there() {
    about_the_switch(&[Fault::DieAt(Moment::next("cont"))], false, ("host-2", VmState::Stopped));
    about_the_switch(&[Fault::DieAt(Moment::next("cont"))], true, ("host-2", VmState::Stopped));
}

#[test]
fn a_guest_that_the_target_refuses_to_run_goes_on_at_the_source() {
    let refusal = Fault::Refuse { moment: Moment::next("cont"), words: "the disk is locked".into() };
    about_the_switch(std::slice::from_ref(&refusal), false, ("host-2", VmState::Running));
    about_the_switch(&[refusal.clone(), refusal], false, ("host-1", VmState::Running));
}

#[test]
fn the_sources_agent_may_die_in_every_phase() {
    in_every_phase(Victim::SourceAgent);
}

#[test]
fn the_targets_agent_may_die_in_every_phase() {
    in_every_phase(Victim::TargetAgent);
}

#[test]
fn both_agents_may_die_in_every_phase() {
    in_every_phase(Victim::BothAgents);
}

#[test]
fn the_manager_may_die_in_every_phase() {
    in_every_phase(Victim::Manager);
}

#[test]
fn manager_and_agents_may_die_at_once_in_every_phase() {
    in_every_phase(Victim::Everyone);
}

#[test]
fn the_sources_qemu_may_die_in_every_phase() {
    in_every_phase(Victim::SourceQemu);
}

#[test]
fn the_targets_qemu_may_die_in_every_phase() {
    in_every_phase(Victim::TargetQemu);
}

#[test]
fn the_targets_host_may_die_in_every_phase() {
    in_every_phase(Victim::TargetHost);
}

#[test]
fn the_link_may_break_in_every_phase() {
    in_every_phase(Victim::Link(Cut::Hard));
}

#[test]
fn the_link_may_fall_silent_in_every_phase() {
    in_every_phase(Victim::Link(Cut::Silent));
}
