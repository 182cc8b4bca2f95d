//! A VM with the test guest in it: what it says, what it hears, and how it is reached.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use berth_agent::config::NetworkConfig;
use berth_api::agent::{TaskOutput, TaskSpec, VmDefinition};
use berth_model::host::NetworkMode;
use berth_model::vm::{GuestState, Nic, VmState};
use berth_qmp::guest_agent::GuestAgent;
use guest_probe::client::ProbeClient;

use crate::support::{DEADLINE, Host, directory};

fn nic(address: Option<&str>) -> Nic {
    Nic {
        mac: "52:54:00:00:00:01".into(),
        address: address.map(str::to_owned),
        gateway: None,
        forwards: Vec::new(),
    }
}

async fn boot(host: &Host, definition: &VmDefinition) -> String {
    let start = TaskSpec::StartVm { definition: Box::new(definition.clone()) };
    host.task(&definition.id, start).await.expect("started");
    match host.task(&definition.id, TaskSpec::WaitReady { timeout_ms: 60_000 }).await {
        Ok(TaskOutput::Ready { signal, .. }) => signal,
        other => panic!("{other:?}: {}", console(host, definition)),
    }
}

fn console(host: &Host, definition: &VmDefinition) -> String {
    let kept = host.agent().vms().get(&definition.id).expect("known").console.attach().kept;
    String::from_utf8_lossy(&kept).into_owned()
}

async fn tick(address: SocketAddr) -> u64 {
    let asked = tokio::task::spawn_blocking(move || {
        let client = ProbeClient::new(address).expect("client");
        client.tick_within(Duration::from_secs(20)).expect("the guest answers").tick
    });
    asked.await.expect("asked")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_says_that_it_is_ready_is_reached_by_a_forward_and_powers_down_when_asked() {
    let host = Host::start().await;
    let definition = host.guest(1, vec![nic(Some("198.18.5.20/24"))]).await;
    let vm = &definition.id;
    let signal = boot(&host, &definition).await;
    assert!(matches!(signal.as_str(), "probe" | "guest-agent"), "{signal}");
    let report = host.report(vm).await.expect("known");
    assert_eq!(report.guest, GuestState::Ready);
    let forward = report.forwards[0].iter().find(|forward| forward.guest_port == 7007).expect("forward");
    let first = tick(([127, 0, 0, 1], forward.host_port).into()).await;
    assert!(tick(([127, 0, 0, 1], forward.host_port).into()).await >= first);
    // A reset makes it boot again, and be ready again.
    host.task(vm, TaskSpec::RestartVm).await.expect("restarted");
    assert_eq!(host.report(vm).await.expect("known").guest, GuestState::Booting);
    host.task(vm, TaskSpec::WaitReady { timeout_ms: 60_000 }).await.expect("ready again");
    host.task(vm, TaskSpec::ShutdownVm { timeout_ms: 60_000 }).await.expect("powered down");
    let report = host.report(vm).await.expect("known");
    assert_eq!((report.state, report.trouble), (VmState::Stopped, None));
    // It gets its ports again, so that whoever knows them finds it.
    boot(&host, &definition).await;
    assert_eq!(host.report(vm).await.expect("known").forwards[0][0].host_port, forward.host_port);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_panic_is_reported() {
    let host = Host::start().await;
    let definition = host.guest(1, vec![nic(None)]).await;
    boot(&host, &definition).await;
    let report = host.report(&definition.id).await.expect("known");
    let forward = report.forwards[0].iter().find(|forward| forward.guest_port == 7007).expect("forward");
    let address = SocketAddr::from(([127, 0, 0, 1], forward.host_port));
    tick(address).await;
    // The driver that tells of a panic is loaded before the guest agent starts.
    let socket = host.root.path().join("run").join(definition.id.as_str()).join("guest-agent.sock");
    let agent = GuestAgent::connect(socket).await.expect("the port is open");
    tokio::time::timeout(DEADLINE, async { while agent.ping(Duration::from_secs(1)).await.is_err() {} })
        .await
        .expect("the guest agent answers");
    let panicking =
        tokio::task::spawn_blocking(move || ProbeClient::new(address).expect("client").break_panic());
    host.until(&definition.id, |report| report.guest == GuestState::Panicked).await;
    panicking.await.expect("asked").expect("it panicked");
    // It is still there to be looked at, and says so on its console.
    assert_eq!(host.report(&definition.id).await.expect("known").state, VmState::Running);
    assert!(console(&host, &definition).contains("Kernel panic"), "{}", console(&host, &definition));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_console_shows_and_takes_and_outlives_the_agent() {
    let mut host = Host::start().await;
    let mut definition = host.guest(1, Vec::new()).await;
    // A shell in place of the guest's first process: it echoes, and answers.
    definition.image.kernel_command_line.push_str(" rdinit=/bin/sh");
    let start = TaskSpec::StartVm { definition: Box::new(definition.clone()) };
    host.task(&definition.id, start).await.expect("started");
    for round in ["one", "two"] {
        let mut viewer = host.agent().vms().get(&definition.id).expect("known").console.attach();
        let typed = format!("echo $((40 + 2))-{round}\n");
        let wanted = format!("42-{round}");
        let seen = async {
            let mut seen = String::new();
            let mut again = tokio::time::interval(Duration::from_secs(2));
            while !seen.contains(&wanted) {
                tokio::select! {
                    output = viewer.output.recv() => {
                        seen.push_str(&String::from_utf8_lossy(&output.unwrap_or_default()));
                    }
                    // The shell hears only once it is up.
                    _ = again.tick() => viewer.input.send(typed.clone().into()).await.expect("typed"),
                }
            }
        };
        tokio::time::timeout(DEADLINE, seen).await.expect("the console answers");
        host.stop_agent();
        host.start_agent().await;
    }
}

/// In a network of its own: a bridge, and the host with an address on it.
#[test]
fn a_guest_on_a_bridge_is_a_neighbour_and_its_tap_goes_with_it() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    // Deprecated because some of its flags are not safe; this one is.
    #[allow(deprecated)]
    rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET).expect("a network of our own");
    for line in [
        "link set lo up",
        "link add br-test type bridge",
        "link set br-test up",
        "address add 198.18.5.1/24 dev br-test",
    ] {
        ip(line);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("runtime").block_on(async {
        let network = NetworkConfig { mode: NetworkMode::Bridge, bridge: Some("br-test".into()) };
        let host = Host::start_with(directory(), network).await;
        let definition = host.guest(1, vec![nic(Some("198.18.5.20/24"))]).await;
        boot(&host, &definition).await;
        assert!(ip("-o link show master br-test").contains("bt1n0"));
        tick(([198, 18, 5, 20], 7007).into()).await;
        assert_eq!(host.report(&definition.id).await.expect("known").forwards, Vec::<Vec<_>>::new());
        host.task(&definition.id, TaskSpec::StopVm).await.expect("stopped");
        assert_eq!(ip("-o link show master br-test"), "");
        let start = TaskSpec::StartVm { definition: Box::new(definition.clone()) };
        ip("link delete br-test");
        let problem = host.task(&definition.id, start).await.expect_err("no bridge");
        assert!(problem.message.contains("br-test"), "{problem}");
        assert!(!ip("-o link").contains("bt1n0"));
    });
}

fn ip(line: &str) -> String {
    let output = Command::new("ip").args(line.split_whitespace()).output().expect("ip");
    assert!(output.status.success(), "ip {line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
