//! A small cluster from its start to its end, in good weather and with one thing gone at a time.

use std::time::Duration;

use berth_model::VmId;
use berth_model::operation::Operation;
use berth_model::vm::{GuestState, Vm, VmState};
use berth_sim::cluster::act::{Act, show, snapshots};
use berth_sim::cluster::{RequestError, VmWish, done};
use berth_sim::fault::{Fault, Moment};
use berth_sim::{Plan, SimCluster};

const DEADLINE: Duration = Duration::from_secs(60);

fn tell() {
    let filter = tracing_subscriber::EnvFilter::from_default_env();
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_test_writer().try_init();
}

async fn act(cluster: &SimCluster, vm: &VmId, act: Act) -> Result<Operation, RequestError> {
    let client = cluster.client();
    let begun = act.begin(&client, vm).await?;
    done(&client, begun).await
}

async fn good(cluster: &SimCluster, vm: &VmId, what: Act) -> Operation {
    match act(cluster, vm, what.clone()).await {
        Ok(operation) => operation,
        Err(error) => panic!("{what:?}: {error}\n{}", cluster.world().oracle.story(vm)),
    }
}

async fn until(cluster: &SimCluster, vm: &VmId, what: &str, is: impl Fn(&Vm) -> bool) -> Vm {
    let client = cluster.client();
    let waited = tokio::time::timeout(DEADLINE, async {
        loop {
            match show(&client, vm).await {
                Ok(now) if is(&now) => return now,
                _ => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    });
    match waited.await {
        Ok(vm) => vm,
        Err(_) => {
            let now = show(&client, vm).await.map(|now| format!("{:?}", now.status));
            panic!("not {what}: {now:?}\n{}", cluster.world().oracle.story(vm))
        }
    }
}

async fn with_baseline(cluster: &SimCluster, vm: &VmId) -> Vm {
    until(cluster, vm, "with a baseline", |vm| vm.status.baseline.is_some() && vm.status.operation.is_none())
        .await
}

fn verdict(cluster: &SimCluster) {
    if let Err(wrong) = cluster.world().oracle.verdict() {
        panic!("{wrong}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_lives_its_life() {
    tell();
    for shared_pool in [false, true] {
        let cluster = SimCluster::with(Plan { shared_pool, ..Plan::new(2, 1) }).await;
        let wish = VmWish { name: "books".into(), host: Some("host-1".into()), stopped: false };
        let vm = cluster.create_vm(&wish).await.expect("made");
        let ready = with_baseline(&cluster, &vm).await;
        assert_eq!((ready.status.state, ready.status.guest), (VmState::Running, GuestState::Ready));
        good(&cluster, &vm, Act::Snapshot).await;
        good(&cluster, &vm, Act::Migrate(Some("host-2".into()))).await;
        assert_eq!(cluster.world().oracle.running_on(&vm), ["host-2"]);
        good(&cluster, &vm, Act::Restore(None)).await;
        assert_eq!(cluster.world().oracle.running_on(&vm), ["host-2"]);
        good(&cluster, &vm, Act::Migrate(None)).await;
        assert_eq!(cluster.world().oracle.running_on(&vm), ["host-1"]);
        good(&cluster, &vm, Act::Restore(Some(1))).await;
        good(&cluster, &vm, Act::Pause).await;
        good(&cluster, &vm, Act::Resume).await;
        good(&cluster, &vm, Act::Restart).await;
        until(&cluster, &vm, "ready", |vm| vm.status.guest == GuestState::Ready).await;
        good(&cluster, &vm, Act::Shutdown).await;
        assert!(cluster.world().oracle.running_on(&vm).is_empty());
        good(&cluster, &vm, Act::Start).await;
        good(&cluster, &vm, Act::Stop).await;
        good(&cluster, &vm, Act::Restore(None)).await;
        assert_eq!(cluster.world().oracle.running_on(&vm), ["host-1"]);
        assert!(
            snapshots(&cluster.client(), &vm).await.expect("snapshots").len() >= 4,
            "undo ones among them"
        );
        good(&cluster, &vm, Act::Delete).await;
        assert!(cluster.vms().await.expect("list").is_empty());
        verdict(&cluster);
        cluster.shut_down().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_was_killed_finds_its_vms_again() {
    tell();
    let cluster = SimCluster::new(1, 2).await;
    let vms = cluster.create_vms(5).await;
    for vm in &vms {
        with_baseline(&cluster, vm).await;
    }
    let before = cluster.world().oracle.running();
    cluster.kill_agent(0).await;
    assert_eq!(cluster.world().oracle.running(), before, "QEMU outlives its agent");
    cluster.start_agent(0).await;
    for vm in &vms {
        until(&cluster, vm, "running", |vm| vm.status.state == VmState::Running).await;
        good(&cluster, vm, Act::Stop).await;
    }
    verdict(&cluster);
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_host_without_power_comes_back_with_its_vms_stopped() {
    tell();
    let cluster = SimCluster::new(2, 3).await;
    let wish = VmWish { name: "books".into(), host: Some("host-1".into()), stopped: false };
    let vm = cluster.create_vm(&wish).await.expect("made");
    cluster.cut_power(0).await;
    until(&cluster, &vm, "unknown", |vm| vm.status.state == VmState::Unknown).await;
    assert!(
        act(&cluster, &vm, Act::Start).await.is_err(),
        "never a second one while the first is not known to be gone"
    );
    cluster.start_agent(0).await;
    until(&cluster, &vm, "stopped", |vm| vm.status.state == VmState::Stopped).await;
    good(&cluster, &vm, Act::Start).await;
    verdict(&cluster);
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qemu_that_fails_is_told_of_in_its_own_words_and_leaves_nothing() {
    tell();
    let cluster = SimCluster::new(2, 4).await;
    let vm = cluster.create_vms(1).await.remove(0);
    with_baseline(&cluster, &vm).await;
    let faults = &cluster.world().faults;
    good(&cluster, &vm, Act::Stop).await;
    faults.plan(&vm, Fault::DieAtStart { words: "qemu-system-x86_64: no such luck".into() });
    let error = act(&cluster, &vm, Act::Start).await.expect_err("it died").to_string();
    assert!(error.contains("no such luck"), "{error}");
    good(&cluster, &vm, Act::Start).await;
    for command in ["getfd", "migrate-incoming", "migrate", "migrate-continue"] {
        faults
            .plan(&vm, Fault::Refuse { moment: Moment::next(command), words: format!("no {command} today") });
        let error = act(&cluster, &vm, Act::Migrate(None)).await.expect_err(command).to_string();
        assert!(error.contains(&format!("no {command} today")), "{command}: {error}");
        assert_eq!(cluster.world().oracle.running_on(&vm).len(), 1, "{command}");
        until(&cluster, &vm, "running", |vm| vm.status.state == VmState::Running).await;
    }
    good(&cluster, &vm, Act::Migrate(None)).await;
    verdict(&cluster);
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_whose_qemu_hangs_can_be_stopped_and_put_back() {
    tell();
    let cluster = SimCluster::new(1, 5).await;
    let vm = cluster.create_vms(1).await.remove(0);
    with_baseline(&cluster, &vm).await;
    let faults = &cluster.world().faults;
    faults.plan(&vm, Fault::Hang(Moment::next("stop")));
    assert!(act(&cluster, &vm, Act::Pause).await.is_err(), "it says nothing");
    good(&cluster, &vm, Act::Stop).await;
    assert!(cluster.processes_of(&vm).is_empty());
    good(&cluster, &vm, Act::Restore(None)).await;
    assert_eq!(cluster.world().oracle.running_on(&vm), ["host-1"]);
    verdict(&cluster);
    cluster.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_qemu_that_a_new_agent_can_not_speak_to_is_never_taken_for_stopped() {
    tell();
    let cluster = SimCluster::new(1, 6).await;
    let vm = cluster.create_vms(1).await.remove(0);
    with_baseline(&cluster, &vm).await;
    cluster.world().faults.plan(&vm, Fault::Hang(Moment::next("stop")));
    assert!(act(&cluster, &vm, Act::Pause).await.is_err(), "it says nothing");
    cluster.kill_agent(0).await;
    cluster.start_agent(0).await;
    cluster.until_online().await;
    let report = cluster.report_of(0).await.expect("a report");
    assert_ne!(report.vms[0].state, VmState::Stopped, "its guest runs: {report:?}");
    assert_eq!(cluster.world().oracle.running_on(&vm), ["host-1"]);
    good(&cluster, &vm, Act::Stop).await;
    assert!(cluster.processes_of(&vm).is_empty());
    good(&cluster, &vm, Act::Start).await;
    verdict(&cluster);
    cluster.shut_down().await;
}
