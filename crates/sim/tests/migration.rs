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

async fn scene(victim: Victim, (command, nth): (&str, u64), shared_pool: bool) -> Result<(), String> {
    let cluster = SimCluster::with(Plan { shared_pool, ..Plan::new(2, nth) }).await;
    let wish = VmWish { name: "books".into(), host: Some("host-1".into()), stopped: false };
    let vm = cluster.create_vm(&wish).await.map_err(|error| format!("not made: {error}"))?;
    settled::wait(&cluster, SETTLE).await?;
    while show(&cluster.client(), &vm).await.is_ok_and(|vm| vm.status.baseline.is_none()) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    settled::wait(&cluster, SETTLE).await?;
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

fn in_every_phase(victim: Victim) {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("runtime");
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
