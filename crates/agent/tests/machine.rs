//! What a machine is fitted with beside its disk, on a real QEMU.

#[path = "snapshot/host.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod host;
#[path = "snapshot/remembering.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod remembering;

use std::time::Duration;

use berth_api::agent::TaskSpec;
use berth_model::vm::{Firmware, Nic};
use berth_model::{SnapshotId, VmId};
use berth_qmp::{ConnectOptions, Qmp};
use host::{LONG, TestHost, TestVm, definition, layer, snapshot};
use remembering::{Tpm, has_variable, host_record, in_guest, run_dir, write_variable};
use serde_json::{Value, json};

/// The generation id that a VM's present process says; none: it has no such device.
async fn generation(host: &TestHost, vm: &VmId) -> Option<String> {
    let stream = tokio::net::UnixStream::connect(run_dir(host, vm).join("observe.sock")).await.expect("open");
    let (qmp, _events) = Qmp::over_unix(stream, ConnectOptions::default()).await.expect("a monitor");
    let answer = qmp.call_untyped("query-vm-generation-id", json!({})).await.ok()?;
    Some(answer["guid"].as_str().expect("a GUID").to_owned())
}

/// How often the guest was told that it has another life than before: by the event that the device is given in ACPI's
/// tables. What its kernel does then is the kernel's affair; Debian's small one has no driver for it.
async fn lives_told_of(host: &TestHost, vm: &VmId) -> i64 {
    in_guest(host, vm, "set -- $(cat /sys/firmware/acpi/interrupts/gpe05); exit $1").await
}

async fn take(host: &TestHost, vm: &TestVm) -> SnapshotId {
    let taken = snapshot();
    let spec = TaskSpec::TakeSnapshot { snapshot: taken.clone(), new_top: layer(), next: None };
    host.task(&vm.id, spec).await.expect("taken");
    taken
}

async fn restore(host: &TestHost, vm: &TestVm, snapshot: &SnapshotId) {
    let (definition, snapshot, new_top) = (vm.boxed(), snapshot.clone(), layer());
    let spec = TaskSpec::RestoreSnapshot { definition, snapshot, new_top, paused: false };
    host.task(&vm.id, spec).await.expect("restored");
}

async fn clone(host: &TestHost, origin: &TestVm, from: &SnapshotId) -> TestVm {
    let other = definition(origin.definition.spec.memory_mib);
    let mut made = TestVm { id: other.id.clone(), definition: other };
    made.definition.spec.firmware = origin.definition.spec.firmware;
    made.definition.spec.tpm = origin.definition.spec.tpm;
    made.definition.image = origin.definition.image.clone();
    made.definition.spec.image = origin.definition.spec.image.clone();
    made.definition.spec.nics = vec![Nic { forwards: Vec::new(), ..made.definition.spec.nics[0].clone() }];
    let spec = TaskSpec::CloneVm {
        definition: made.boxed(),
        origin: origin.id.clone(),
        snapshot: from.clone(),
        first_snapshot: Some(snapshot()),
        share: true,
        paused: false,
    };
    host.task(&made.id, spec).await.expect("cloned");
    made
}

async fn restart_cold(host: &TestHost, vm: &TestVm) {
    host.task(&vm.id, TaskSpec::StopVm).await.expect("stopped");
    host.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
    host.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 300_000 }).await.expect("ready");
}

/// A VM with UEFI firmware that runs and whose guest answers.
async fn uefi_vm(host: &TestHost) -> TestVm {
    let mut definition = definition(256);
    definition.spec.firmware = Firmware::Uefi;
    host.vm_of(definition).await
}

fn nvrams(host: &TestHost, vm: &VmId) -> usize {
    std::fs::read_dir(host.vm_directory(vm).join("nvram")).expect("directory").count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_variables_of_the_firmware_are_those_of_each_snapshot_and_of_no_other() {
    let mut host = TestHost::start().await;
    let vm = uefi_vm(&host).await;
    host.probe(&vm.id).write(3).expect("files");
    write_variable(&host, &vm.id, "first").await;
    let first = take(&host, &vm).await;
    write_variable(&host, &vm.id, "later").await;
    let disk = snapshot();
    let spec = TaskSpec::TakeDiskSnapshot { snapshot: disk.clone(), new_top: layer(), quiesce: false };
    host.task(&vm.id, spec).await.expect("taken");
    write_variable(&host, &vm.id, "last").await;

    restore(&host, &vm, &first).await;
    assert!(has_variable(&host, &vm.id, "first").await);
    let found = host.probe(&vm.id).verify(LONG).expect("verified");
    assert_eq!((found.pages_wrong, found.files, found.files_wrong), (0, 3, 0));
    host.replace_agent().await;
    assert_eq!(nvrams(&host, &vm.id), 1, "the other one went with its process");
    // What the guest writes after a restore is its own, and stays when it starts anew.
    write_variable(&host, &vm.id, "own").await;
    restart_cold(&host, &vm).await;
    assert!(has_variable(&host, &vm.id, "own").await);

    let other = clone(&host, &vm, &first).await;
    assert!(has_variable(&host, &other.id, "first").await);
    write_variable(&host, &other.id, "other").await;
    restart_cold(&host, &other).await;
    assert!(has_variable(&host, &other.id, "other").await && has_variable(&host, &vm.id, "own").await);

    restore(&host, &vm, &disk).await;
    host.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
    host.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 300_000 }).await.expect("ready");
    assert!(has_variable(&host, &vm.id, "later").await);
    restore(&host, &vm, &first).await;
    assert!(has_variable(&host, &vm.id, "first").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn variables_that_are_not_what_they_were_are_refused_and_the_vm_runs_on() {
    let host = TestHost::start().await;
    let vm = uefi_vm(&host).await;
    let first = take(&host, &vm).await;
    let path = host.vm_directory(&vm.id).join("snapshots").join(first.as_str()).join("vars.fd");
    let mut bytes = std::fs::read(&path).expect("read");
    bytes[1000] ^= 1;
    std::fs::remove_file(&path).expect("removed");
    std::fs::write(&path, bytes).expect("written");
    let spec = TaskSpec::RestoreSnapshot {
        definition: vm.boxed(),
        snapshot: first.clone(),
        new_top: layer(),
        paused: false,
    };
    let problem = host.task(&vm.id, spec).await.expect_err("refused");
    assert!(problem.message.contains("vars.fd"), "{problem:?}");
    assert_eq!(nvrams(&host, &vm.id), 1, "nothing is left of it");
    host.probe(&vm.id).tick().expect("it runs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_dies_in_a_restore_leaves_the_variables_whole() {
    let mut host = TestHost::start().await;
    let vm = uefi_vm(&host).await;
    write_variable(&host, &vm.id, "first").await;
    let first = take(&host, &vm).await;
    write_variable(&host, &vm.id, "later").await;
    for delay_ms in [20, 60, 120, 250] {
        let (snapshot, new_top) = (first.clone(), layer());
        let spec = TaskSpec::RestoreSnapshot { definition: vm.boxed(), snapshot, new_top, paused: false };
        host.put(&vm.id, spec.clone());
        tokio::time::sleep(Duration::from_millis(delay_ms)).await;
        host.replace_agent().await;
        host.task(&vm.id, spec).await.expect("restored in the end");
        assert!(has_variable(&host, &vm.id, "first").await, "after {delay_ms} ms");
        assert_eq!(nvrams(&host, &vm.id), 1, "after {delay_ms} ms");
        write_variable(&host, &vm.id, "later").await;
    }
    restart_cold(&host, &vm).await;
    assert!(has_variable(&host, &vm.id, "later").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_with_another_life_is_told_so_and_one_that_lives_on_is_not() {
    let mut host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let born = generation(&host, &vm.id).await.expect("it has one");
    assert_eq!(lives_told_of(&host, &vm.id).await, 0);
    let first = take(&host, &vm).await;
    host.replace_agent().await;
    assert_eq!(generation(&host, &vm.id).await.as_ref(), Some(&born), "it is the same life");

    restore(&host, &vm, &first).await;
    let second = generation(&host, &vm.id).await.expect("it has one");
    assert_ne!(second, born);
    assert_eq!(lives_told_of(&host, &vm.id).await, 1);
    restore(&host, &vm, &first).await;
    let third = generation(&host, &vm.id).await.expect("it has one");
    assert!(third != born && third != second, "{third}");
    assert_eq!(lives_told_of(&host, &vm.id).await, 1, "it is where it was, and was told once since");

    let other = clone(&host, &vm, &first).await;
    let others = generation(&host, &other.id).await.expect("it has one");
    assert!(![&born, &second, &third].contains(&&others), "{others}");
    assert_eq!(lives_told_of(&host, &other.id).await, 1);

    restart_cold(&host, &vm).await;
    assert_eq!(generation(&host, &vm.id).await, Some(third), "a start is no other life");
    assert_eq!(lives_told_of(&host, &vm.id).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_was_made_without_a_generation_stays_so_in_every_snapshot() {
    let mut host = TestHost::start().await;
    let vm = host.running_vm(128).await;
    let with = take(&host, &vm).await;
    // As one is on record that was made before there were any.
    host.task(&vm.id, TaskSpec::StopVm).await.expect("stopped");
    let path = host.vm_directory(&vm.id).join("vm.json");
    let mut record: Value = serde_json::from_slice(&std::fs::read(&path).expect("record")).expect("JSON");
    record.as_object_mut().expect("object").remove("fittings").expect("it had some");
    std::fs::write(&path, record.to_string()).expect("written");
    host.replace_agent().await;

    restart_cold(&host, &vm).await;
    assert_eq!(generation(&host, &vm.id).await, None);
    let without = take(&host, &vm).await;
    restore(&host, &vm, &with).await;
    assert!(generation(&host, &vm.id).await.is_some(), "the machine is the snapshot's");
    restore(&host, &vm, &without).await;
    assert_eq!(generation(&host, &vm.id).await, None);
    host.probe(&vm.id).tick().expect("it runs");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_tpm_holds_is_that_of_each_snapshot_and_of_no_other() {
    let mut host = TestHost::start().await;
    let mut definition = definition(128);
    definition.spec.tpm = true;
    let vm = host.vm_of(definition).await;
    let tpm = Tpm { host: &host, vm: &vm.id };
    tpm.define().await;
    tpm.write("first---").await;
    assert!(!tpm.is_extended().await);
    tpm.extend().await;
    let first = take(&host, &vm).await;
    tpm.write("later---").await;
    let disk = snapshot();
    let spec = TaskSpec::TakeDiskSnapshot { snapshot: disk.clone(), new_top: layer(), quiesce: false };
    host.task(&vm.id, spec).await.expect("taken");
    tpm.write("last----").await;
    restart_cold(&host, &vm).await;
    assert!(tpm.holds("last----").await && !tpm.is_extended().await, "only what is permanent stays");

    restore(&host, &vm, &first).await;
    assert!(tpm.holds("first---").await && tpm.is_extended().await, "and what is not, with the memory");
    tpm.write("own-----").await;
    restart_cold(&host, &vm).await;
    assert!(tpm.holds("own-----").await);
    let other = clone(&host, &vm, &first).await;
    let others = Tpm { host: &host, vm: &other.id };
    assert!(others.holds("first---").await && others.is_extended().await);
    others.write("other---").await;
    assert!(tpm.holds("own-----").await);
    restore(&host, &vm, &disk).await;
    host.task(&vm.id, TaskSpec::StartVm { definition: vm.boxed() }).await.expect("started");
    host.task(&vm.id, TaskSpec::WaitReady { timeout_ms: 300_000 }).await.expect("ready");
    assert!(tpm.holds("later---").await);
    assert_eq!(nvrams(&host, &vm.id), 1);

    host.replace_agent().await;
    let tpm = Tpm { host: &host, vm: &vm.id };
    restore(&host, &vm, &first).await;
    assert!(tpm.holds("first---").await && tpm.is_extended().await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tpm_ends_with_its_machine_and_its_death_is_reported() {
    let mut host = TestHost::start().await;
    let mut definition = definition(128);
    definition.spec.tpm = true;
    let vm = host.vm_of(definition).await;
    Tpm { host: &host, vm: &vm.id }.define().await;
    Tpm { host: &host, vm: &vm.id }.write("kept----").await;
    let pid = || host_record(&host, &vm.id)["process"]["tpm"]["pid"].as_i64().expect("a TPM");
    let lives = |pid: i64| std::path::Path::new(&format!("/proc/{pid}")).exists();
    let first = pid();
    assert!(lives(first));
    restart_cold(&host, &vm).await;
    assert!(!lives(first) && lives(pid()), "the old one went with its QEMU");

    let second = pid();
    host.replace_agent().await;
    host::kill(i32::try_from(second).expect("a number"));
    let reported = async {
        while !host.trouble(&vm.id).is_some_and(|trouble| trouble.contains("its TPM")) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(LONG, reported).await.expect("its death is reported");
    host.probe(&vm.id).tick().expect("the guest runs on");
    let spec = TaskSpec::TakeSnapshot { snapshot: snapshot(), new_top: layer(), next: None };
    let problem = host.task(&vm.id, spec).await.expect_err("its state can't be had");
    println!("without its TPM: {problem:?}");
    host.probe(&vm.id).tick().expect("the guest runs on");
    restart_cold(&host, &vm).await;
    assert_eq!(host.trouble(&vm.id), None);
    assert!(Tpm { host: &host, vm: &vm.id }.holds("kept----").await);
}
