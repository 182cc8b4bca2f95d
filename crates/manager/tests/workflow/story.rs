//! What people do, and what they are told when it can't be.

use std::future::Future;
use std::task::Poll;

use berth_api::manager::{CreateVm, NewNic, RestoreVm};
use berth_manager::cluster::{Cluster, Settings};
use berth_manager::operations::{Begin, Filter, OperationRequest};
use berth_manager::records::FixedPorts;
use berth_model::operation::{Operation, OperationKind, OperationResult, OperationState};
use berth_model::snapshot::{SnapshotExtent, SnapshotKind};
use berth_model::vm::{GuestState, PortForward, Vm, VmState};
use berth_model::{ImageId, Problem, ProblemCode, VmId};

use crate::agent::Process;
use crate::faults::settle;
use crate::scenario::{snapshot, take};
use crate::world::{
    LONG, Pools, World, begin, create, done, over, quiet, running_vm, until, vm, whole, wish,
};

fn restore(vm: &VmId, snapshot: Option<&str>, no_undo: bool) -> OperationRequest {
    let wish = RestoreVm { snapshot: snapshot.map(str::to_owned), no_undo, ..Default::default() };
    OperationRequest::SnapshotRestore { vm: vm.clone(), wish }
}

fn ask(wish: CreateVm) -> OperationRequest {
    OperationRequest::VmCreate { wish: Box::new(wish) }
}

async fn refused(cluster: &Cluster, request: OperationRequest) -> Problem {
    begin(cluster, request).await.expect_err("a refusal")
}

#[tokio::test(start_paused = true)]
async fn two_changes_to_one_vm_at_once_and_the_second_is_told_which_was_first() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    let all = || [take(&id, "one"), OperationRequest::VmStop { vm: id.clone() }, restore(&id, None, false)];
    let (one, two) = tokio::join!(begin(&cluster, take(&id, "one")), begin(&cluster, take(&id, "two")));
    let (first, problem) = match (one, two) {
        (Ok(first), Err(problem)) | (Err(problem), Ok(first)) => (first.operation.expect("begun"), problem),
        both => panic!("{both:?}"),
    };
    for problem in [problem, refused(&cluster, all()[1].clone()).await] {
        assert_eq!(problem.code, ProblemCode::Busy);
        let expected = format!(
            "default/books is being changed by snapshot.create {}: wait for it or cancel it",
            first.id
        );
        assert_eq!(problem.message, expected);
        assert_eq!(problem.value.as_deref(), Some(first.id.as_str()));
    }
    assert_eq!(over(&cluster, &first.id).await.state, OperationState::Succeeded);
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_hundred_changes_at_once_are_done_one_a_vm() {
    let world = World::new(Pools::Shared).await;
    let cluster = world.manager_with_hosts().await;
    let mut vms = Vec::new();
    for number in 0..8 {
        let operation =
            done(&cluster, ask(CreateVm { memory_mib: Some(64), ..wish(&format!("vm-{number}")) })).await;
        vms.push(operation.vm.expect("a VM"));
    }
    let mut begun = Vec::new();
    for round in 0..12 {
        for id in &vms {
            begun.push(begin(&cluster, take(id, &format!("snap-{round}"))));
        }
    }
    let results = futures_util::future::join_all(begun).await;
    let (granted, busy): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!(granted.len(), vms.len(), "one a VM");
    assert!(busy.iter().all(|one| one.as_ref().is_err_and(|problem| problem.code == ProblemCode::Busy)));
    quiet(&cluster).await;
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn two_vms_of_one_name_at_once_and_there_is_one() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let (one, two) = tokio::join!(begin(&cluster, create("books")), begin(&cluster, create("books")));
    let problem = one.and(two).expect_err("one is refused");
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::AlreadyExists, Some("name")));
    quiet(&cluster).await;
    assert_eq!(cluster.records.list::<Vm>().len(), 1);
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_vm_is_broken_and_brought_back_and_that_can_be_taken_back() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    world.agent(0).set_guests(GuestState::Ready);
    until(&cluster, "the baseline is there", |cluster| vm(cluster, &id).status.baseline.is_some()).await;
    quiet(&cluster).await;
    snapshot(&cluster, &id, "tuesday").await;
    world.agent(0).set_guests(GuestState::Panicked);
    until(&cluster, "the panic is seen", |cluster| vm(cluster, &id).status.guest == GuestState::Panicked)
        .await;

    let operation = done(&cluster, restore(&id, None, false)).await;
    let Some(OperationResult::Restore { snapshot: to, undo, facts }) = operation.result else {
        panic!("{operation:?}")
    };
    assert_eq!((facts.running_us, facts.undo_us), (60_000, 50_000));
    assert_eq!(Some(&to), vm(&cluster, &id).status.baseline.as_ref());
    assert_eq!(vm(&cluster, &id).status.at_snapshot, Some(to));
    let undo = undo.expect("an undo snapshot, of a panicked guest, too");
    let kept = cluster.records.find_snapshot(&id, undo.as_str()).expect("kept");
    assert_eq!(kept.kind, SnapshotKind::Undo);
    assert_eq!(kept.expires_at.expect("a time").millis_since(kept.created_at), 24 * 3600 * 1000);

    // Back to where it was before, without another undo snapshot.
    done(&cluster, restore(&id, Some(undo.as_str()), true)).await;
    assert_eq!(vm(&cluster, &id).status.at_snapshot, Some(undo));
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn the_newest_restore_is_taken_back_and_that_is_too() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    snapshot(&cluster, &id, "first").await;
    let wish = |paused| RestoreVm { newest_undo: true, paused, ..RestoreVm::default() };
    let back = |paused| OperationRequest::SnapshotRestore { vm: id.clone(), wish: wish(paused) };
    let problem = refused(&cluster, back(false)).await;
    assert_eq!((problem.code, problem.field.as_deref()), (ProblemCode::WrongState, Some("newest_undo")));
    let named = RestoreVm { snapshot: Some("first".to_owned()), ..wish(false) };
    let both = OperationRequest::SnapshotRestore { vm: id.clone(), wish: named };
    assert_eq!(refused(&cluster, both).await.field.as_deref(), Some("snapshot"));

    let undo_of = |operation: Operation| match operation.result {
        Some(OperationResult::Restore { undo: Some(undo), .. }) => undo,
        other => panic!("{other:?}"),
    };
    let one = undo_of(done(&cluster, restore(&id, Some("first"), false)).await);
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    let two = undo_of(done(&cluster, back(false)).await);
    assert_eq!(vm(&cluster, &id).status.at_snapshot.as_ref(), Some(&one));
    tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    done(&cluster, back(true)).await;
    let status = vm(&cluster, &id).status;
    assert_eq!((status.at_snapshot, status.state), (Some(two), VmState::Paused), "held, as was asked");
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_restore_that_fails_leaves_the_vm_as_it_was_and_no_undo_snapshot() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    snapshot(&cluster, &id, "first").await;
    let before = world.digest(&cluster);
    for kind in ["snapshot", "restore"] {
        world.agent(0).refuse(kind, Problem::new(ProblemCode::NoSpace, "the pool is full"));
        let operation = whole(&cluster, restore(&id, Some("first"), false)).await;
        assert_eq!(operation.state, OperationState::Failed);
        assert_eq!(operation.problem.expect("a reason").code, ProblemCode::NoSpace);
        settle(&world, &cluster).await;
        world.check_whole(&cluster).await;
        assert_eq!(world.digest(&cluster), before, "{kind}");
        let trouble = vm(&cluster, &id).status.trouble.expect("it is said");
        assert!(trouble.starts_with("snapshot.restore failed: "), "{trouble}");
    }
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_restore_that_breaks_when_the_process_is_gone_puts_the_vm_back_to_where_it_was() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    snapshot(&cluster, &id, "first").await;
    let before = world.digest(&cluster);
    let broken = || Problem::new(ProblemCode::Hypervisor, "QEMU ended with code 1");
    // The first way back may fail, too.
    for problems in [vec![broken()], vec![broken(), broken()]] {
        world.agent(0).break_restores(problems);
        let operation = whole(&cluster, restore(&id, Some("first"), false)).await;
        assert_eq!(operation.state, OperationState::Failed);
        assert_eq!(operation.problem.expect("a reason").code, ProblemCode::Hypervisor);
        assert_eq!(vm(&cluster, &id).status.state, VmState::Running);
        settle(&world, &cluster).await;
        world.check_whole(&cluster).await;
        assert_eq!(world.digest(&cluster), before);
    }
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_undo_snapshot_that_the_vm_can_not_be_put_back_to_is_kept() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    snapshot(&cluster, &id, "first").await;
    world.agent(0).break_restores(vec![Problem::new(ProblemCode::Hypervisor, "QEMU ended with code 1"); 20]);
    let operation = whole(&cluster, restore(&id, Some("first"), false)).await;
    assert_eq!(operation.state, OperationState::Failed);
    let said = operation.problem.expect("a reason").message;
    assert!(said.contains("'restore' could not be undone"), "{said}");
    assert_eq!(vm(&cluster, &id).status.state, VmState::Stopped);
    world.agent(0).break_restores(Vec::new());
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    let undo = cluster.records.snapshots_of(&id).into_iter().find(|one| one.kind == SnapshotKind::Undo);
    let undo = undo.expect("what is left of the guest's memory is kept").value.id.clone();
    done(&cluster, restore(&id, Some(undo.as_str()), true)).await;
    assert_eq!(vm(&cluster, &id).status.state, VmState::Running);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn deleting_a_snapshot_hangs_its_children_on_its_parent() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    let first = snapshot(&cluster, &id, "first").await;
    let second = snapshot(&cluster, &id, "second").await;
    snapshot(&cluster, &id, "third").await;
    done(&cluster, OperationRequest::SnapshotDelete { vm: id.clone(), snapshot: second }).await;
    let third = cluster.records.find_snapshot(&id, "third").expect("it is still there");
    assert_eq!(third.parent, Some(first));
    done(&cluster, restore(&id, Some("third"), true)).await;
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_protected_pinned_or_running_is_not_deleted() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let operation = done(&cluster, ask(CreateVm { protected: true, ..wish("books") })).await;
    let id = operation.vm.expect("a VM");
    let delete = |force| OperationRequest::VmDelete { vm: id.clone(), force };
    assert_eq!(refused(&cluster, delete(true)).await.code, ProblemCode::Protected);
    cluster
        .records
        .update::<Vm, Problem>(id.as_str(), |vm| {
            vm.spec.protected = false;
            Ok(())
        })
        .await
        .expect("a change");
    assert_eq!(refused(&cluster, delete(false)).await.code, ProblemCode::WrongState);
    let request = OperationRequest::SnapshotCreate {
        vm: id.clone(),
        kind: SnapshotKind::Baseline,
        occasion: None,
        name: None,
        note: String::new(),
        extent: SnapshotExtent::Machine,
    };
    done(&cluster, request).await;
    let baseline = vm(&cluster, &id).status.baseline.expect("a baseline");
    let request = OperationRequest::SnapshotDelete { vm: id.clone(), snapshot: baseline };
    let problem = refused(&cluster, request).await;
    assert_eq!(problem.code, ProblemCode::Protected);
    assert!(problem.message.contains("is the baseline of default/books"), "{problem}");
    let request = OperationRequest::ImageDelete { image: world.image.clone() };
    let problem = refused(&cluster, request).await;
    assert_eq!(problem.code, ProblemCode::Protected);
    assert!(problem.message.contains("1 VMs"), "{problem}");
    done(&cluster, delete(true)).await;
    let request = OperationRequest::ImageDelete { image: world.image.clone() };
    done(&cluster, request).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_wish_that_can_not_be_granted_names_the_field_and_leaves_nothing() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let before = world.digest(&cluster);
    let nic = |nic: NewNic| CreateVm { nics: Some(vec![nic]), ..wish("books") };
    let cases = [
        (CreateVm { memory_mib: Some(0), ..wish("books") }, ProblemCode::InvalidInput, "memory_mib"),
        (CreateVm { memory_mib: Some(u64::MAX), ..wish("books") }, ProblemCode::InvalidInput, "memory_mib"),
        (CreateVm { memory_mib: Some(8192), ..wish("books") }, ProblemCode::InvalidInput, "memory_mib"),
        (CreateVm { vcpus: Some(0), ..wish("books") }, ProblemCode::InvalidInput, "vcpus"),
        (CreateVm { disk_mib: Some(0), ..wish("books") }, ProblemCode::InvalidInput, "disk_mib"),
        (CreateVm { disk_mib: Some(511), ..wish("books") }, ProblemCode::InvalidInput, "disk_mib"),
        (CreateVm { disk_mib: Some(u64::MAX), ..wish("books") }, ProblemCode::InvalidInput, "disk_mib"),
        (CreateVm { segment: "nowhere".into(), ..wish("books") }, ProblemCode::NotFound, "segment"),
        (CreateVm { image: "nothing".into(), ..wish("books") }, ProblemCode::NotFound, "image"),
        (CreateVm { host: Some("nobody".into()), ..wish("books") }, ProblemCode::NotFound, "host"),
        (
            CreateVm { pool: Some("other".parse().unwrap()), ..wish("books") },
            ProblemCode::InvalidInput,
            "pool",
        ),
        (CreateVm { cpu_model: Some("z80".into()), ..wish("books") }, ProblemCode::InvalidInput, "cpu_model"),
        (
            CreateVm { machine_type: Some("pc-q35-99".into()), ..wish("books") },
            ProblemCode::InvalidInput,
            "machine_type",
        ),
        (
            CreateVm { user_data: Some("hello".into()), ..wish("books") },
            ProblemCode::InvalidInput,
            "user_data",
        ),
        (
            nic(NewNic { mac: Some("nonsense".into()), ..NewNic::default() }),
            ProblemCode::InvalidInput,
            "nics.0.mac",
        ),
        (
            nic(NewNic { address: Some("198.18.5.300/24".into()), ..NewNic::default() }),
            ProblemCode::InvalidInput,
            "nics.0.address",
        ),
        (
            CreateVm { nics: Some(vec![NewNic::default(); 9]), ..wish("books") },
            ProblemCode::InvalidInput,
            "nics",
        ),
    ];
    for (wish, code, field) in cases {
        let problem = refused(&cluster, ask(wish.clone())).await;
        assert_eq!(problem.code, code, "{wish:?}: {problem:?}");
        assert_eq!(problem.field.as_deref(), Some(field), "{problem:?}");
        assert!(problem.value.is_some() && problem.expected.is_some(), "{problem:?}");
        let tried = Begin::new("tester", ask(wish));
        assert_eq!(cluster.operations.dry_run(tried).await.expect_err("a refusal"), problem);
    }
    assert_eq!(world.digest(&cluster), before);
    assert!(cluster.operations.list(&Filter::default()).is_empty());
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn trying_alone_says_what_would_be_and_changes_nothing() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let before = cluster.records.store().revision().await.expect("a revision");
    let tried = Begin::new("tester", create("books"));
    let would = cluster.operations.dry_run(tried).await.expect("it could be");
    assert!(would.operation.is_none());
    assert_eq!(would.summary, "create default/books on host h1 and start it");
    assert_eq!(would.vm.expect("a VM").name.as_str(), "books");
    assert_eq!(cluster.records.store().revision().await.expect("a revision"), before);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_change_of_something_that_has_changed_is_refused() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    let read = cluster.records.require::<Vm>(id.as_str()).expect("a VM").revision;
    let stop = || OperationRequest::VmStop { vm: id.clone() };
    let with = |if_match| Begin { if_match: Some(if_match), ..Begin::new("tester", stop()) };
    done(&cluster, take(&id, "one")).await;
    let problem = cluster.operations.begin(with(read)).await.expect_err("it has changed");
    assert_eq!(problem.code, ProblemCode::Changed);
    settle(&world, &cluster).await;
    let read = cluster.records.require::<Vm>(id.as_str()).expect("a VM").revision;
    assert!(cluster.operations.begin(with(read)).await.is_ok());
    quiet(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn addresses_and_macs_are_given_once_and_given_back() {
    let mut world = World::new(Pools::Shared).await;
    world.settings =
        Settings { addresses: Some("198.18.5.0/28".parse().expect("a range")), ..Settings::default() };
    let cluster = world.manager_with_hosts().await;
    let small = |name: &str| ask(CreateVm { memory_mib: Some(64), ..wish(name) });
    let mut macs = std::collections::BTreeSet::new();
    let mut last = None;
    for (number, address) in (10..15).enumerate() {
        let id = done(&cluster, small(&format!("vm-{number}"))).await.vm.expect("a VM");
        let nic = vm(&cluster, &id).spec.nics.remove(0);
        assert_eq!(nic.address, Some(format!("198.18.5.{address}/28")));
        assert_eq!(nic.gateway.as_deref(), Some("198.18.5.1"));
        assert!(macs.insert(nic.mac));
        last = Some(id);
    }
    assert_eq!(refused(&cluster, small("one-more")).await.code, ProblemCode::InvalidInput);
    let last = last.expect("a VM");
    done(&cluster, OperationRequest::VmDelete { vm: last, force: true }).await;
    let id = done(&cluster, small("again")).await.vm.expect("a VM");
    let nic = vm(&cluster, &id).spec.nics.remove(0);
    assert_eq!(nic.address.as_deref(), Some("198.18.5.14/28"));
    assert!(macs.insert(nic.mac), "a number is never used twice");
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn room_is_promised_once() {
    let world = World::new(Pools::Shared).await;
    let cluster = world.manager_with_hosts().await;
    // Each host has 3,584 MiB to give: two of these fit on one, with what QEMU itself takes.
    let big = |name: &str| begin(&cluster, ask(CreateVm { memory_mib: Some(1600), ..wish(name) }));
    let (a, b, c, d, e) = tokio::join!(big("a"), big("b"), big("c"), big("d"), big("e"));
    let refused: Vec<_> = [a, b, c, d, e].into_iter().filter_map(Result::err).collect();
    assert_eq!(refused.len(), 1, "{refused:?}");
    assert_eq!(refused[0].code, ProblemCode::NoPlacement);
    assert!(
        refused[0].message.contains("h1: it has 192 MiB to give, and 1696 MiB are wanted"),
        "{}",
        refused[0]
    );
    quiet(&cluster).await;
    // Stopped, it takes no room; and then may not find any.
    let id = cluster.records.find_vm("default/a").expect("a VM").value.id.clone();
    done(&cluster, OperationRequest::VmStop { vm: id.clone() }).await;
    let wish = CreateVm { memory_mib: Some(1600), ..wish("e") };
    done(&cluster, ask(wish)).await;
    let problem = begin(&cluster, OperationRequest::VmStart { vm: id }).await.expect_err("no room");
    assert_eq!(problem.code, ProblemCode::NoPlacement);
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_does_not_power_down_runs_on() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    world
        .agent(0)
        .refuse("shutdown", Problem::new(ProblemCode::Guest, "the guest did not power down in 5 s"));
    let request = OperationRequest::VmShutdown { vm: id.clone(), timeout_s: Some(5) };
    let operation = whole(&cluster, request).await;
    assert_eq!(operation.problem.expect("a reason").code, ProblemCode::Guest);
    assert_eq!(vm(&cluster, &id).status.state, VmState::Running);
    assert_eq!(world.agent(0).machine(&id).expect("a machine").process, Process::Running);
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_operation_can_be_followed_from_its_beginning_to_its_end() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let begun = begin(&cluster, create("books")).await.expect("a beginning").operation.expect("begun");
    let mut shown = cluster.operations.subscribe(&begun.id).expect("an operation");
    let mut phases = vec![];
    loop {
        let operation = shown.borrow_and_update().clone();
        if phases.last() != Some(&operation.progress.phase) {
            phases.push(operation.progress.phase.clone());
        }
        if shown.changed().await.is_err() {
            break;
        }
    }
    assert_eq!(shown.borrow().state, OperationState::Succeeded);
    assert!(phases.contains(&"prepare".to_owned()) && phases.contains(&"start".to_owned()), "{phases:?}");
    let cancelled = cluster.operations.cancel(&begun.id, "tester").await.expect_err("it is over");
    assert_eq!(cancelled.code, ProblemCode::WrongState);
    let listed =
        cluster.operations.list(&Filter { kind: Some(OperationKind::VmCreate), ..Filter::default() });
    assert_eq!(listed.len(), 1);
    assert!(listed[0].finished_at.is_some());
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn an_image_is_fetched_once_for_all_that_need_it() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let on_two = |name: &str| ask(CreateVm { host: Some("h2".into()), memory_mib: Some(64), ..wish(name) });
    let begun = [begin(&cluster, on_two("a")).await, begin(&cluster, on_two("b")).await];
    for one in begun {
        let id = one.expect("a beginning").operation.expect("begun").id;
        assert_eq!(over(&cluster, &id).await.state, OperationState::Succeeded);
    }
    assert_eq!(cluster.records.places_of(&world.image).len(), 2);
    // An image whose only host is away can't be had.
    let other = ImageId::from_entropy([9; 10]);
    world.add_image(&other, "other").await;
    until(&cluster, "the image is seen", |cluster| cluster.records.find_image("other").is_ok()).await;
    world.agent(0).cut();
    until(&cluster, "h1 is offline", |cluster| {
        cluster.records.find_host("h1").is_ok_and(|host| host.offline_reason.is_some())
    })
    .await;
    let operation = whole(&cluster, ask(CreateVm { image: "other".into(), ..wish("c") })).await;
    let problem = operation.problem.expect("a reason");
    assert_eq!(problem.message, "no host that answers has image other in any of its pools");
    world.agent(0).mend();
    quiet(&cluster).await;
    settle(&world, &cluster).await;
    world.check_whole(&cluster).await;
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_port_that_somebody_named_is_asked_for_again_and_one_that_was_chosen_is_not() {
    let world = World::new(Pools::Shared).await;
    let cluster = world.manager_with_hosts().await;
    let forward = |host_port, guest_port| PortForward { protocol: "tcp".into(), host_port, guest_port };
    let nic = NewNic { forwards: vec![forward(8080, 80), forward(0, 22)], ..NewNic::default() };
    let wish = CreateVm { nics: Some(vec![nic]), host: Some("h1".into()), ..wish("books") };
    let id = done(&cluster, ask(wish)).await.vm.expect("a VM");
    let ports = |vm: &Vm| -> Vec<u16> { vm.spec.nics[0].forwards.iter().map(|one| one.host_port).collect() };
    until(&cluster, "the ports are known", |cluster| ports(&vm(cluster, &id)) == [8080, 40_022]).await;
    done(&cluster, OperationRequest::VmStop { vm: id.clone() }).await;
    done(&cluster, OperationRequest::VmStart { vm: id.clone() }).await;
    let wished = world.agent(0).machine(&id).expect("a machine").wished;
    assert_eq!(wished, vec![vec![forward(8080, 80), forward(0, 22)]]);
    done(&cluster, OperationRequest::VmDelete { vm: id.clone(), force: true }).await;
    assert!(cluster.records.list::<FixedPorts>().is_empty());
    cluster.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn whoever_asks_may_hang_up_at_any_moment() {
    for polls in 0..40 {
        let world = World::new(Pools::Local).await;
        let cluster = world.manager_with_hosts().await;
        let id = running_vm(&cluster, "books").await;
        {
            let mut asking = Box::pin(begin(&cluster, take(&id, "one")));
            for _ in 0..polls {
                let once = std::future::poll_fn(|context| Poll::Ready(asking.as_mut().poll(context)));
                if once.await.is_ready() {
                    break;
                }
                tokio::task::yield_now().await;
            }
        }
        // Whether it was begun or not, it does not hold the VM for good.
        until(&cluster, "the slot is free", |cluster| vm(cluster, &id).status.operation.is_none()).await;
        quiet(&cluster).await;
        settle(&world, &cluster).await;
        world.check_whole(&cluster).await;
        cluster.shutdown().await;
    }
}

#[tokio::test(start_paused = true)]
async fn who_follows_an_operation_is_let_go_when_the_manager_stops() {
    let world = World::new(Pools::Local).await;
    let cluster = world.manager_with_hosts().await;
    let id = running_vm(&cluster, "books").await;
    world.agent(0).hold("snapshot");
    let begun = begin(&cluster, take(&id, "one")).await.expect("a beginning").operation.expect("begun");
    let mut shown = cluster.operations.subscribe(&begun.id).expect("an operation");
    let waits = async { cluster.operations.wait(&begun.id, LONG).await.expect("an operation") };
    let follows = async { while shown.changed().await.is_ok() {} };
    let asked = tokio::time::Instant::now();
    let stops = async {
        tokio::time::sleep(std::time::Duration::from_secs(5)).await;
        cluster.shutdown().await;
    };
    let (waited, (), ()) = tokio::join!(waits, follows, stops);
    assert!(!waited.state.is_over());
    assert!(asked.elapsed().as_secs() < 10, "nobody waits for what will not come");
}
