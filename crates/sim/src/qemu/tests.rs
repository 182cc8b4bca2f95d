use std::os::fd::OwnedFd;
use std::path::Path;

use berth_model::LayerId;
use berth_qmp::commands::{
    BlockdevAdd, Cont, GetFd, Migrate, MigrateCancel, MigrateContinue, MigrateIncoming,
    MigrateSetCapabilities, MigrationStatus, QueryMigrate, QueryStatus, Quit, RunState as State, Stop,
    SystemPowerdown, SystemReset, Transaction, TransactionAction,
};
use berth_qmp::guest_agent::GuestAgent;
use berth_qmp::{ConnectOptions, EventKind, Events, Qmp};
use tempfile::TempDir;

use super::*;
use crate::fault::{Fault, Moment};

const DEADLINE: Duration = Duration::from_secs(20);

struct Scene {
    world: Arc<World>,
    directory: TempDir,
    vm: VmId,
    next: u64,
}

impl Scene {
    fn new(guests: Guests) -> Self {
        let world = World {
            oracle: Oracle::default(),
            faults: Faults::default(),
            chance: Chance::new(1),
            pace: Pace::default(),
            guests,
            runtime: Handle::current(),
        };
        let directory = tempfile::tempdir().expect("directory");
        Self { world: Arc::new(world), directory, vm: VmId::from_entropy([1; 10]), next: 1 }
    }

    fn layer(&self, number: u8) -> std::path::PathBuf {
        let path = self.directory.path().join(format!("{}.qcow2", LayerId::from_entropy([number; 10])));
        std::fs::OpenOptions::new().create(true).append(true).open(&path).expect("layer");
        path
    }

    async fn start(&mut self, incoming: bool) -> (FakeQemu, Qmp, Events) {
        let options = json!({"driver": "qcow2", "node-name": "top", "read-only": false,
            "file": {"driver": "file", "filename": self.layer(1)}});
        let mut words: Vec<String> =
            ["-S", "-blockdev", &options.to_string(), "-device"].map(str::to_owned).into();
        words.push("virtio-blk-pci,id=disk0,drive=top,bus=pcie.0".into());
        if incoming {
            words.extend(["-incoming".to_owned(), "defer".to_owned()]);
        }
        let process = ProcessName { number: self.next, host: format!("host-{}", self.next) };
        self.next += 1;
        let start = Start { vm: self.vm.clone(), process, words, memory_bytes: (32 << 20) - 8192 };
        let qemu = FakeQemu::start(start, Arc::clone(&self.world)).expect("started");
        let (qmp, events) = monitor(&qemu).await;
        (qemu, qmp, events)
    }

    fn verdict(&self) {
        if let Err(wrong) = self.world.oracle.verdict() {
            panic!("{wrong}");
        }
    }
}

async fn monitor(qemu: &FakeQemu) -> (Qmp, Events) {
    let stream = tokio::net::UnixStream::from_std(qemu.open_monitor().expect("pair")).expect("stream");
    Qmp::over_unix(stream, ConnectOptions::default()).await.expect("greeted")
}

async fn heard(events: &mut Events, wanted: EventKind) {
    let found = tokio::time::timeout(DEADLINE, events.wait_for(|kind| *kind == wanted)).await;
    assert!(matches!(found, Ok(Some(_))), "{wanted:?} was not heard");
}

async fn give(qmp: &Qmp) -> std::os::unix::net::UnixStream {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("pair");
    qmp.call_with_fds(GetFd { name: "it".into() }, vec![OwnedFd::from(theirs)]).await.expect("given");
    ours
}

async fn capabilities(qmp: &Qmp, names: &[&str]) {
    let on = names.iter().map(|name| (*name, true));
    qmp.call(MigrateSetCapabilities::new(on)).await.expect("set");
}

/// Carries bytes both ways between two machines.
fn relay(one: std::os::unix::net::UnixStream, other: std::os::unix::net::UnixStream) {
    let stream = |std: std::os::unix::net::UnixStream| {
        std.set_nonblocking(true).expect("non-blocking");
        tokio::net::UnixStream::from_std(std).expect("stream")
    };
    let (mut one, mut other) = (stream(one), stream(other));
    tokio::spawn(async move { tokio::io::copy_bidirectional(&mut one, &mut other).await });
}

async fn exit(qemu: &FakeQemu) -> Exit {
    let mut ended = qemu.ended();
    let end = tokio::time::timeout(DEADLINE, ended.wait_for(Option::is_some)).await;
    end.expect("in time").expect("told").clone().expect("an end")
}

#[tokio::test]
async fn a_machine_runs_is_held_goes_on_and_ends() {
    let mut scene = Scene::new(Guests::Speak);
    let (qemu, qmp, mut events) = scene.start(false).await;
    assert_eq!(qmp.call(QueryStatus {}).await.expect("status").status, State::Prelaunch);
    qmp.call(Cont {}).await.expect("cont");
    heard(&mut events, EventKind::Resume).await;
    qmp.call(Stop {}).await.expect("stop");
    heard(&mut events, EventKind::Stop).await;
    let held = qemu.memory();
    qmp.call(Cont {}).await.expect("cont");
    qmp.call(SystemReset {}).await.expect("reset");
    assert_ne!(qemu.memory().token, held.token, "a reset guest is another one");
    qmp.call(Quit {}).await.expect("its answer is still heard");
    assert_eq!(exit(&qemu).await, Exit { code: Some(0), signal: None, last_words: String::new() });
    assert!(qmp.call(QueryStatus {}).await.is_err());
    scene.verdict();
}

#[tokio::test]
async fn a_guest_says_that_it_is_ready_and_powers_down_when_asked() {
    for number in 0..2 {
        let mut scene = Scene::new(Guests::Speak);
        // One speaks by its agent, the other by the probe.
        let mut entropy = [1; 10];
        entropy[9] = number;
        scene.vm = VmId::from_entropy(entropy);
        let (qemu, qmp, _events) = scene.start(false).await;
        qmp.call(Cont {}).await.expect("cont");
        let agent = GuestAgent::over(qemu.open_port(Port::GuestAgent));
        let by_agent = async { while agent.ping(Duration::from_millis(100)).await.is_err() {} };
        let by_probe = async {
            use tokio::io::AsyncBufReadExt;
            let mut lines = tokio::io::BufReader::new(qemu.open_port(Port::Probe)).lines();
            let line = lines.next_line().await.expect("read").expect("a line");
            assert!(line.contains("ready"), "{line}");
        };
        let ready = async {
            tokio::select! { () = by_agent => {}, () = by_probe => {} }
        };
        tokio::time::timeout(DEADLINE, ready).await.expect("ready in time");
        qmp.call(SystemPowerdown {}).await.expect("powerdown");
        assert_eq!(exit(&qemu).await.code, Some(0));
        scene.verdict();
    }
}

#[tokio::test]
async fn a_guest_moves_with_all_that_it_remembers() {
    let mut scene = Scene::new(Guests::Speak);
    let (source, from, mut sent) = scene.start(false).await;
    let (target, to, mut received) = scene.start(true).await;
    from.call(Cont {}).await.expect("cont");
    capabilities(&from, &["events", "pause-before-switchover", "return-path"]).await;
    capabilities(&to, &["events", "return-path", "late-block-activate"]).await;
    relay(give(&from).await, give(&to).await);
    to.call(MigrateIncoming { uri: "fd:it".into() }).await.expect("incoming");
    from.call(Migrate::to("fd:it")).await.expect("migrate");
    heard(&mut sent, EventKind::Migration(MigrationStatus::PreSwitchover)).await;
    assert!(from.call(Cont {}).await.is_err(), "not while it is being finished");
    from.call(MigrateContinue { state: MigrationStatus::PreSwitchover }).await.expect("go on");
    heard(&mut sent, EventKind::Migration(MigrationStatus::Completed)).await;
    heard(&mut received, EventKind::Migration(MigrationStatus::Completed)).await;
    assert_eq!(to.call(QueryStatus {}).await.expect("status").status, State::Paused);
    assert_eq!(from.call(QueryStatus {}).await.expect("status").status, State::PostMigrate);
    assert_eq!(target.memory(), source.memory());
    to.call(Cont {}).await.expect("cont");
    assert_eq!(scene.world.oracle.running_on(&scene.vm), ["host-2"]);
    scene.verdict();
    // What must never be done is found.
    from.call(Cont {}).await.expect("QEMU itself would do it");
    assert!(scene.world.oracle.verdict().is_err());
}

#[tokio::test]
async fn a_migration_that_is_cut_or_cancelled_lets_the_guest_go_on() {
    let mut scene = Scene::new(Guests::Speak);
    let (_source, from, mut sent) = scene.start(false).await;
    from.call(Cont {}).await.expect("cont");
    capabilities(&from, &["events", "pause-before-switchover", "return-path"]).await;
    for cancelled in [true, false] {
        let mut ours = give(&from).await;
        let drain = std::thread::spawn(move || {
            // Until the other end closes, or ours is closed because it is to be cut.
            std::io::Read::read_exact(&mut ours, &mut [0; 8]).expect("the head");
            ours
        });
        from.call(Migrate::to("fd:it")).await.expect("migrate");
        let ours = tokio::task::spawn_blocking(|| drain.join().expect("joined")).await.expect("head");
        if cancelled {
            from.call(MigrateCancel {}).await.expect("cancel");
            heard(&mut sent, EventKind::Migration(MigrationStatus::Cancelled)).await;
        } else {
            heard(&mut sent, EventKind::Migration(MigrationStatus::PreSwitchover)).await;
            drop(ours);
            from.call(MigrateContinue { state: MigrationStatus::PreSwitchover }).await.expect("go on");
            heard(&mut sent, EventKind::Migration(MigrationStatus::Failed)).await;
            heard(&mut sent, EventKind::Resume).await;
        }
        assert!(from.call(QueryStatus {}).await.expect("status").running);
    }
    scene.verdict();
}

#[tokio::test]
async fn a_stream_that_breaks_never_wakes_the_target() {
    let mut scene = Scene::new(Guests::Speak);
    let (target, to, mut received) = scene.start(true).await;
    capabilities(&to, &["events"]).await;
    let mut ours = give(&to).await;
    to.call(MigrateIncoming { uri: "fd:it".into() }).await.expect("incoming");
    std::io::Write::write_all(&mut ours, &stream::head(32 << 20)).expect("written");
    drop(ours);
    heard(&mut received, EventKind::Migration(MigrationStatus::Failed)).await;
    assert!(!target.shared.lock().guest.runs());
    // It ends, or stays and says why.
    if let Ok(info) = to.call(QueryMigrate {}).await {
        assert!(info.error_desc.is_some());
    }
    scene.verdict();
}

#[tokio::test]
async fn faults_come_when_they_are_planned() {
    let mut scene = Scene::new(Guests::AreMute);
    let plan = |scene: &Scene, fault| scene.world.faults.plan(&scene.vm, fault);
    plan(&scene, Fault::Refuse { moment: Moment::next("cont"), words: "no".into() });
    let (qemu, qmp, _events) = scene.start(false).await;
    assert_eq!(qmp.call(Cont {}).await.expect_err("refused").refusal(), Some("no"));
    qmp.call(Cont {}).await.expect("only once");
    plan(&scene, Fault::Hang(Moment::next("stop")));
    assert!(qmp.call_within(Stop {}, Duration::from_millis(50)).await.is_err());
    assert!(qmp.call_within(QueryStatus {}, Duration::from_millis(50)).await.is_err());
    qemu.kill();
    assert_eq!(exit(&qemu).await.signal, Some(9));
    plan(&scene, Fault::DieAt(Moment::nth_command(2)));
    let (qemu, qmp, _events) = scene.start(false).await;
    qmp.call(Cont {}).await.expect("the first");
    assert!(qmp.call(QueryStatus {}).await.expect_err("the second").is_connection_lost());
    assert_eq!(exit(&qemu).await.signal, Some(11));
    plan(&scene, Fault::DieAtStart { words: "no such machine".into() });
    let process = ProcessName { number: 9, host: "host-9".into() };
    let start = Start { vm: scene.vm.clone(), process, words: Vec::new(), memory_bytes: (32 << 20) - 8192 };
    assert_eq!(FakeQemu::start(start, Arc::clone(&scene.world)).expect_err("dies"), "no such machine");
    assert!(scene.world.oracle.running_on(&scene.vm).is_empty());
    scene.verdict();
}

#[tokio::test]
async fn a_switched_layer_takes_what_the_guest_writes() {
    let mut scene = Scene::new(Guests::AreMute);
    let (qemu, qmp, _events) = scene.start(false).await;
    qmp.call(Cont {}).await.expect("cont");
    let options = json!({"driver": "qcow2", "node-name": "next", "read-only": false, "backing": null,
        "file": {"driver": "file", "filename": scene.layer(2)}});
    let serde_json::Value::Object(options) = options else { panic!("an object") };
    qmp.call(BlockdevAdd { options }).await.expect("added");
    qmp.call(Stop {}).await.expect("stop");
    let actions = vec![TransactionAction::BlockdevSnapshot { node: "top".into(), overlay: "next".into() }];
    qmp.call(Transaction { actions }).await.expect("switched");
    qmp.call(Cont {}).await.expect("cont");
    qmp.call(Quit {}).await.expect("quit");
    exit(&qemu).await;
    let written = |path: &Path| std::fs::metadata(path).expect("file").len() > 0;
    assert!(written(&scene.layer(1)) && written(&scene.layer(2)));
    scene.verdict();
}

#[tokio::test]
async fn a_second_client_is_greeted_when_the_first_has_gone() {
    let mut scene = Scene::new(Guests::AreMute);
    let (qemu, first, _events) = scene.start(false).await;
    let waiting = tokio::spawn(async move { monitor(&qemu).await.0 });
    tokio::time::timeout(Duration::from_millis(50), first.closed()).await.expect_err("it stays");
    assert!(!waiting.is_finished());
    drop(first);
    drop(_events);
    let second = tokio::time::timeout(DEADLINE, waiting).await.expect("in time").expect("greeted");
    second.call(QueryStatus {}).await.expect("status");
}
