//! The session, the commands and the abilities against a real QEMU: `BERTH_TEST_QEMU`, else the one in the path.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::process::{Child, Command as Process, Stdio};
use std::time::{Duration, Instant};

use berth_qmp::commands::*;
use berth_qmp::{Abilities, CloseReason, ConnectOptions, EventKind, Events, Qmp, QmpError};
use serde_json::{Map, Value, json};

/// A QEMU that is stopped, by its process id, when the test is done with it.
struct Qemu {
    child: Child,
    _directory: tempfile::TempDir,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn start(extra: &[&str]) -> (Qmp, Events, Qemu) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("qmp");
    let program = std::env::var("BERTH_TEST_QEMU").unwrap_or_else(|_| "qemu-system-x86_64".into());
    let child = Process::new(program)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg", "-S"])
        .arg("-qmp")
        .arg(format!("unix:{},server=on,wait=off", path.display()))
        .args(extra)
        .stdin(Stdio::null())
        .spawn()
        .expect("QEMU is installed");
    let qemu = Qemu { child, _directory: directory };
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        match Qmp::connect_with(&path, ConnectOptions::default()).await {
            Ok((qmp, events)) => return (qmp, events, qemu),
            Err(QmpError::Connect { .. }) if Instant::now() < deadline => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            Err(error) => panic!("no session with QEMU: {error:?}"),
        }
    }
}

type Sample = (&'static str, Value);

fn sample<C: Command>(command: C) -> Sample {
    (C::NAME, serde_json::to_value(command).expect("JSON"))
}

fn some(text: &str) -> Option<String> {
    Some(text.to_owned())
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().expect("an object").clone()
}

/// One of each command, every argument given, but for those that older versions do not have.
fn samples() -> Vec<Sample> {
    [machine_samples(), migration_samples(), disk_samples(), merge_samples(), other_samples()].concat()
}

fn machine_samples() -> Vec<Sample> {
    vec![
        sample(QueryVersion {}),
        sample(QueryStatus {}),
        sample(Stop {}),
        sample(Cont {}),
        sample(SystemPowerdown {}),
        sample(SystemReset {}),
        sample(Quit {}),
        sample(QueryCpusFast {}),
        sample(QomListTypes { implements: "device".to_owned() }),
        sample(QueryMachines {}),
        sample(InfoRamBlock::default()),
        sample(QueryQmpSchema {}),
    ]
}

fn migration_samples() -> Vec<Sample> {
    let switches = [("events", true), ("pause-before-switchover", true), ("postcopy-ram", false)];
    vec![
        sample(Migrate::to("unix:x")),
        sample(Migrate::resume_to("unix:x")),
        sample(MigrateIncoming { uri: "unix:x".into() }),
        sample(MigrateContinue { state: MigrationStatus::PreSwitchover }),
        sample(MigrateCancel {}),
        sample(MigrateStartPostcopy {}),
        sample(MigratePause {}),
        sample(MigrateRecover { uri: "unix:x".into() }),
        sample(QueryMigrateCapabilities {}),
        sample(MigrateSetCapabilities::new(switches)),
        sample(MigrateSetParameters {
            bandwidth_bytes_per_second_max: Some(1),
            postcopy_bandwidth_bytes_per_second_max: Some(1),
            switchover_bandwidth_bytes_per_second: None,
            downtime_limit_ms: Some(1),
        }),
        sample(QueryMigrate {}),
    ]
}

fn disk_samples() -> Vec<Sample> {
    let snapshot = TransactionAction::BlockdevSnapshot { node: "x".into(), overlay: "y".into() };
    let nbd = |address| NbdServerStart { address, connections_max: Some(1) };
    vec![
        sample(Transaction { actions: vec![snapshot] }),
        sample(BlockdevAdd { options: object(json!({"driver": "file", "node-name": "n", "filename": "f"})) }),
        sample(BlockdevDel { node_name: "x".into() }),
        sample(QueryNamedBlockNodes { flat: Some(true) }),
        sample(QueryBlock {}),
        sample(QueryBlockstats {}),
        sample(nbd(NbdAddress::Unix { path: "x".into() })),
        sample(nbd(NbdAddress::Fd { str: "x".into() })),
        sample(NbdServerStop {}),
        sample(BlockExportAdd {
            kind: ExportKind::Nbd,
            id: "x".into(),
            node_name: "x".into(),
            name: some("n"),
            writable: Some(true),
        }),
        sample(BlockExportDel { id: "x".into(), mode: some("hard") }),
    ]
}

fn merge_samples() -> Vec<Sample> {
    vec![
        sample(BlockCommit {
            job_id: some("j"),
            device: "x".into(),
            top_node: some("t"),
            base_node: some("b"),
            backing_file: some("f"),
            speed_bytes_per_second: Some(0),
            auto_finalize: Some(true),
            auto_dismiss: Some(false),
        }),
        sample(BlockStream {
            job_id: some("j"),
            device: "x".into(),
            base_node: some("b"),
            speed_bytes_per_second: Some(0),
            auto_finalize: Some(true),
            auto_dismiss: Some(false),
        }),
        sample(BlockdevMirror {
            job_id: some("j"),
            device: "x".into(),
            target: "y".into(),
            sync: "top".into(),
            copy_mode: some("background"),
            speed_bytes_per_second: Some(0),
            auto_finalize: Some(true),
            auto_dismiss: Some(false),
        }),
        sample(BlockJobCancel { device: "x".into(), force: Some(true) }),
        sample(BlockJobSetSpeed { device: "x".into(), speed_bytes_per_second: 1 }),
        sample(QueryJobs {}),
        sample(JobDismiss { id: "x".into() }),
        sample(JobCancel { id: "x".into() }),
        sample(JobComplete { id: "x".into() }),
        sample(JobFinalize { id: "x".into() }),
    ]
}

fn other_samples() -> Vec<Sample> {
    vec![
        sample(GetFd { name: "x".into() }),
        sample(CloseFd { name: "x".into() }),
        sample(AddFd { set_id: Some(1), opaque: some("o") }),
        sample(RemoveFd { set_id: 1 }),
        sample(DeviceAdd { options: object(json!({"driver": "virtio-net-pci", "id": "n"})) }),
        sample(DeviceDel { id: "x".into() }),
        sample(SetLink { name: "x".into(), up: true }),
        sample(AnnounceSelf { initial_ms: 1, max_ms: 1, rounds: 1, step_ms: 1 }),
        sample(QueryBalloon {}),
    ]
}

/// QEMU's schema, for holding our commands against it.
struct Schema(BTreeMap<String, SchemaEntry>);

impl Schema {
    /// What is wrong with a value for a type, as a path and a complaint.
    fn complaint(&self, type_name: &str, value: &Value, path: &str) -> Option<String> {
        let entry = &self.0[type_name];
        match entry.meta_type.as_str() {
            "object" => self.object_complaint(entry, value, path),
            "array" => {
                let element = entry.element_type.as_deref().expect("an element type");
                value.as_array().map_or(Some(format!("{path}: not an array")), |list| {
                    list.iter().find_map(|one| self.complaint(element, one, &format!("{path}[]")))
                })
            }
            "enum" => {
                let known = value.as_str().is_some_and(|word| entry.values.iter().any(|value| value == word));
                (!known).then(|| format!("{path}: {value} is none of {:?}", entry.values))
            }
            "alternate" => {
                let fits =
                    entry.members.iter().any(|one| self.complaint(&one.type_name, value, path).is_none());
                (!fits).then(|| format!("{path}: {value} fits no alternative"))
            }
            "builtin" => {
                let fits = match type_name {
                    "str" => value.is_string(),
                    "int" => value.is_i64() || value.is_u64(),
                    "bool" => value.is_boolean(),
                    "number" => value.is_number(),
                    "null" => value.is_null(),
                    _ => true,
                };
                (!fits).then(|| format!("{path}: {value} is no {type_name}"))
            }
            other => Some(format!("{path}: unexpected {other}")),
        }
    }

    fn object_complaint(&self, entry: &SchemaEntry, value: &Value, path: &str) -> Option<String> {
        let Some(object) = value.as_object() else { return Some(format!("{path}: not an object")) };
        let mut members: Vec<&SchemaMember> = entry.members.iter().collect();
        if let Some(word) = entry.tag.as_ref().and_then(|tag| object.get(tag)).and_then(Value::as_str) {
            let variant = entry.variants.iter().find(|variant| variant.word == word);
            members.extend(variant.iter().flat_map(|variant| &self.0[&variant.type_name].members));
        }
        let missing = members.iter().find(|member| !member.default && !object.contains_key(&member.name));
        if let Some(member) = missing {
            return Some(format!("{path}: {} is missing", member.name));
        }
        // A command whose arguments QEMU does not describe (device_add) takes any.
        let free = path == "device_add";
        object.iter().filter(|(_, value)| !value.is_null()).find_map(|(name, value)| {
            let path = format!("{path}.{name}");
            match members.iter().find(|member| member.name == *name) {
                Some(member) => self.complaint(&member.type_name, value, &path),
                None => (!free).then(|| format!("{path}: not in the schema")),
            }
        })
    }
}

#[tokio::test]
async fn every_command_and_argument_that_we_send_is_in_the_schema() {
    let (qmp, _events, _qemu) = start(&["-machine", "none"]).await;
    let entries = qmp.call(QueryQmpSchema {}).await.expect("a schema");
    let schema = Schema(entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect());
    // The check itself must be able to find fault.
    let dismiss = schema.0["job-dismiss"].arg_type.as_deref().expect("one");
    let fault = |arguments| schema.complaint(dismiss, &arguments, "job-dismiss");
    assert!(fault(json!({"id": "x", "warp": 9})).is_some());
    assert!(fault(json!({})).is_some() && fault(json!({"id": 5})).is_some());
    for (name, arguments) in samples() {
        let command = schema.0.get(name).unwrap_or_else(|| panic!("{name} is not in the schema"));
        assert_eq!(command.meta_type, "command", "{name}");
        let arg_type = command.arg_type.as_deref().expect("commands have one");
        assert_eq!(schema.complaint(arg_type, &arguments, name), None);
    }
}

/// The command types are declared with a macro or by an `impl`; each must have a sample above.
#[test]
fn every_command_has_a_sample() {
    let sampled: BTreeSet<_> = samples().into_iter().map(|(name, _)| name.to_owned()).collect();
    let sources = [
        include_str!("../src/commands/block.rs"),
        include_str!("../src/commands/descriptor.rs"),
        include_str!("../src/commands/device.rs"),
        include_str!("../src/commands/export.rs"),
        include_str!("../src/commands/job.rs"),
        include_str!("../src/commands/machine.rs"),
        include_str!("../src/commands/migration.rs"),
        include_str!("../src/commands/schema.rs"),
    ];
    let mut declared = BTreeSet::new();
    for line in sources.iter().flat_map(|source| source.lines()) {
        if line.contains(" -> ") && line.contains(" = \"") || line.contains("const NAME") {
            declared.insert(line.split('"').nth(1).expect("a name").to_owned());
        }
    }
    assert!(declared.len() > 40);
    assert_eq!(declared, sampled);
}

#[tokio::test]
async fn a_machine_answers_what_we_ask_and_tells_when_it_stops() {
    let machine = ["-machine", "pc-q35-7.2", "-m", "64", "-device", "virtio-balloon-pci"];
    let (qmp, _events, mut qemu) = start(&machine).await;
    let mut events = qmp.events();
    assert!(qmp.call(QueryVersion {}).await.expect("a version").qemu.major >= 7);
    let status = qmp.call(QueryStatus {}).await.expect("a status");
    assert_eq!(status, Status { running: false, status: RunState::Prelaunch });
    qmp.call(Cont {}).await.expect("runs");
    qmp.call(Stop {}).await.expect("stands");
    let resumed = events.wait_for(|kind| *kind == EventKind::Resume).await.expect("RESUME");
    let stopped = events.wait_for(|kind| *kind == EventKind::Stop).await.expect("STOP");
    assert!(stopped.at.us_since(resumed.at).is_some_and(|us| us < 10_000_000));
    assert_eq!(qmp.call(QueryStatus {}).await.expect("a status").status, RunState::Paused);
    assert_eq!(qmp.call(QueryCpusFast {}).await.expect("processors").len(), 1);
    assert_eq!(qmp.call(QueryBalloon {}).await.expect("a balloon").actual_bytes, 64 << 20);
    assert_eq!(qmp.call(QueryMigrate {}).await.expect("none").status, MigrationStatus::None);
    assert_eq!(qmp.call(QueryBlock {}).await.expect("drives"), []);
    assert_eq!(qmp.call(QueryJobs {}).await.expect("jobs"), []);
    let table = qmp.call(InfoRamBlock::default()).await.expect("a table");
    let blocks = parse_ram_blocks(&table);
    assert!(blocks.iter().any(|block| block.name == "pc.ram" && block.used_bytes == 64 << 20), "{table}");
    let refused = qmp.call(JobDismiss { id: "nothing".into() }).await.expect_err("no such job");
    assert!(refused.refusal().is_some(), "{refused:?}");
    qmp.call(Quit {}).await.expect("ends");
    assert_eq!(qmp.closed().await, CloseReason::PeerGone);
    assert!(qemu.child.wait().expect("ended").success());
}

#[tokio::test]
async fn disks_are_added_overlaid_listed_and_removed() {
    let (qmp, _events, qemu) = start(&["-machine", "none"]).await;
    for name in ["base", "top"] {
        let path = qemu._directory.path().join(name);
        std::fs::File::create(&path).and_then(|file| file.set_len(1 << 20)).expect("a file");
        let options = json!({"driver": "file", "node-name": name, "filename": path});
        let options = options.as_object().expect("an object").clone();
        qmp.call(BlockdevAdd { options }).await.expect("added");
    }
    let nodes = qmp.call(QueryNamedBlockNodes { flat: Some(true) }).await.expect("nodes");
    let names: BTreeSet<_> = nodes.iter().filter_map(|node| node.node_name.as_deref()).collect();
    assert_eq!(names, BTreeSet::from(["base", "top"]));
    assert!(nodes.iter().all(|node| node.driver == "file" && !node.read_only));
    let path = qemu._directory.path().join("nbd").display().to_string();
    let address = NbdAddress::Unix { path };
    qmp.call(NbdServerStart { address, connections_max: Some(1) }).await.expect("listens");
    let export = BlockExportAdd {
        kind: ExportKind::Nbd,
        id: "e".into(),
        node_name: "top".into(),
        name: None,
        writable: Some(true),
    };
    qmp.call(export).await.expect("offered");
    qmp.call(BlockExportDel { id: "e".into(), mode: Some("hard".into()) }).await.expect("withdrawn");
    qmp.call(NbdServerStop {}).await.expect("stopped");
    let action = TransactionAction::BlockdevSnapshot { node: "base".into(), overlay: "top".into() };
    let refused = qmp.call(Transaction { actions: vec![action] }).await.expect_err("no backing support");
    assert!(refused.refusal().is_some());
    qmp.call(BlockdevDel { node_name: "top".into() }).await.expect("removed");
}

#[tokio::test]
async fn abilities_are_asked_for() {
    let (qmp, _events, _qemu) = start(&["-machine", "none"]).await;
    let abilities = Abilities::ask(&qmp).await.expect("told");
    assert!(abilities.has_command("migrate") && !abilities.has_command("teleport"));
    assert!(abilities.has_argument("migrate", "uri") && !abilities.has_argument("migrate", "warp"));
    assert!(abilities.has_event("MIGRATION_PASS"));
    assert!(abilities.has_migration_capability("pause-before-switchover"));
    assert!(abilities.has_migration_parameter("downtime-limit"));
    assert!(abilities.has_machine_type("pc-q35-7.2") && abilities.has_machine_type("q35"));
}

/// A migration is sent into files given by descriptor: several at once, so that none may take another's place.
#[tokio::test]
async fn descriptors_arrive_each_under_its_own_name_and_carry_a_migration() {
    let (qmp, mut events, _qemu) = start(&["-machine", "pc-q35-7.2", "-m", "64"]).await;
    let mut files: Vec<_> = (0..100).map(|_| tempfile::tempfile().expect("a file")).collect();
    let given: Vec<_> = files
        .iter()
        .enumerate()
        .map(|(number, file)| {
            let (qmp, fd) = (qmp.clone(), file.as_fd().try_clone_to_owned().expect("a duplicate"));
            tokio::spawn(
                async move { qmp.call_with_fds(GetFd { name: format!("file{number}") }, vec![fd]).await },
            )
        })
        .collect();
    for one in given {
        one.await.expect("no panic").expect("taken");
    }
    for name in ["file0", "file1", "file2", "file4"] {
        qmp.call(CloseFd { name: name.into() }).await.expect("known by its name");
    }
    qmp.call(MigrateSetCapabilities::new([("events", true)])).await.expect("switched on");
    qmp.call(Migrate::to("fd:file3")).await.expect("starts");
    let ended = events.wait_for(|kind| {
        matches!(kind, EventKind::Migration(MigrationStatus::Completed | MigrationStatus::Failed))
    });
    let ended = tokio::time::timeout(Duration::from_secs(30), ended).await.expect("in time").expect("an end");
    assert_eq!(ended.kind, EventKind::Migration(MigrationStatus::Completed));
    let info = qmp.call(QueryMigrate {}).await.expect("told");
    let ram = info.ram.expect("memory");
    assert!(
        ram.total_bytes >= 64 << 20 && ram.page_size_bytes == 4096 && ram.duplicate_pages > 0,
        "{info:?}"
    );
    assert!(info.downtime_ms.is_some() && info.total_time_ms.is_some());
    let mut magic = [0; 4];
    files[3].seek(SeekFrom::Start(0)).and_then(|_| files[3].read_exact(&mut magic)).expect("a stream");
    assert_eq!(&magic, b"QEVM");
}
