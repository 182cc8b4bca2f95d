//! A hundred agents and two thousand VMs in one process.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use berth_model::host::HostState;
use berth_model::vm::VmState;
use berth_sim::qemu::Guests;
use berth_sim::{Plan, SimCluster};

const HOSTS: usize = 100;
const VMS: usize = 2000;
/// Unoptimised, on two cores, with other tests beside it.
const DEADLINE: Duration = Duration::from_secs(600);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_agents_and_two_thousand_vms_come_up_and_are_listed() {
    let began = Instant::now();
    let told = tokio::time::timeout(DEADLINE, async {
        // Mute guests get no baseline: two thousand of them are another matter.
        let cluster = SimCluster::with(Plan { guests: Guests::AreMute, ..Plan::new(HOSTS, 1) }).await;
        let hosts_up = began.elapsed();
        let made = cluster.create_vms(VMS).await;
        assert_eq!(made.len(), VMS);
        let vms_up = began.elapsed();
        let asked = Instant::now();
        let listed = cluster.vms().await.expect("listed");
        let listing = asked.elapsed();
        assert_eq!(listed.len(), VMS);
        let mut on: BTreeMap<String, usize> = BTreeMap::new();
        for vm in &listed {
            assert_eq!(vm.status.state, VmState::Running, "{}", vm.full_name());
            *on.entry(vm.status.host.clone().expect("a host").to_string()).or_default() += 1;
        }
        assert_eq!(on.len(), HOSTS, "every host has some: {on:?}");
        assert_eq!(cluster.world().oracle.running(), VMS);
        let hosts = cluster.host_records().await.expect("hosts");
        assert!(hosts.iter().all(|host| host.state == HostState::Online), "none is lost under load");
        if let Err(wrong) = cluster.world().oracle.verdict() {
            panic!("{wrong}");
        }
        cluster.shut_down().await;
        (hosts_up, vms_up, listing)
    });
    let (hosts_up, vms_up, listing) = told.await.expect("in time");
    println!("{HOSTS} hosts up after {hosts_up:.1?}, {VMS} VMs after {vms_up:.1?}; listed in {listing:.1?}");
}
