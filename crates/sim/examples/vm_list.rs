//! How long `vm list` takes with 2,000 VMs: a real manager with its store on the disk, asked over TLS on loopback.
//!
//! A list is what the command line asks for: page after page of the default length over one connection, until there is
//! none. Prints one line of JSON: milliseconds for a whole list (`vm_list_2000_…`) and for one that comes as a single
//! page (`vm_list_2000_one_page_…`).

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_api::Client;
use berth_api::endpoint::Nothing;
use berth_api::manager::{PAGE_LIMIT_MAX, Segment, VmList, VmListQuery};
use berth_api::pki::MANAGER_NAME;
use berth_api::tls::{client_config, server_name};
use berth_api::transport::TlsTransport;
use berth_manager::ManagerConfig;
use berth_manager::cluster::Cluster;
use berth_manager::records::{Transaction, UniqueName};
use berth_model::vm::{GuestState, Nic, Vm, VmSpec, VmState, VmStatus};
use berth_model::{HostId, ImageId, LayerId, SnapshotId, Timestamp, VmId};

const VMS: u32 = 2000;
const ROUNDS: usize = 500;
/// Rounds before it counts: connections, caches, the allocator.
const WARM_UP: usize = 20;

#[tokio::main]
async fn main() {
    let directory = tempfile::tempdir().expect("a directory");
    let state_dir = directory.path().join("manager");
    let token_file = directory.path().join("token");
    let config = ManagerConfig {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        state_dir,
        first_token_file: Some(token_file.clone()),
        ..ManagerConfig::default()
    };
    let bound = berth_manager::run::bind(config).await.expect("a manager");
    record_vms(bound.manager().cluster()).await;
    let (address, ca_pem) = (bound.address().to_string(), bound.ca_pem().to_owned());
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let serving = tokio::spawn(bound.serve(stopped));

    let token = std::fs::read_to_string(token_file).expect("the first token");
    let tls = client_config(&ca_pem, None).expect("TLS");
    let name = server_name(MANAGER_NAME).expect("a name");
    let client = Client::new(Arc::new(TlsTransport::new(address, name, tls))).with_token(token.trim());
    let pages = measure(&client, None).await;
    let one_page = measure(&client, Some(PAGE_LIMIT_MAX)).await;
    println!("{{{}, {}}}", figures("vm_list_2000", &pages), figures("vm_list_2000_one_page", &one_page));
    stop.send(true).expect("it serves");
    serving.await.expect("it ends").expect("in order");
}

/// Records so many VMs, as the manager would have recorded them.
async fn record_vms(cluster: &Cluster) {
    let segment = cluster.records.list::<Segment>().first().expect("the first segment").value.clone();
    let mut transaction = Transaction::new();
    for number in 0..VMS {
        let vm = vm(number, &segment);
        transaction.create(&vm);
        transaction.claim(&UniqueName::vm(&vm.segment, &vm.name), vm.id.as_str());
        if transaction.is_full() {
            cluster.records.commit(std::mem::take(&mut transaction)).await.expect("recorded");
        }
    }
    cluster.records.commit(transaction).await.expect("recorded");
}

fn vm(number: u32, segment: &Segment) -> Vm {
    let [_, _, high, low] = number.to_be_bytes();
    let entropy = |noun: u8| [noun, high, low, 7, 99, 3, 250, 17, 0, 1];
    Vm {
        id: VmId::from_entropy(entropy(1)),
        number,
        segment: segment.id.clone(),
        segment_name: segment.name.clone(),
        name: format!("vm-{number:04}").parse().expect("a name"),
        spec: VmSpec {
            vcpus: 2,
            memory_mib: 2048,
            disk_mib: 20_480,
            data_disks_mib: Vec::new(),
            image: ImageId::from_entropy(entropy(2)),
            pool: "default".parse().expect("a name"),
            machine_type: "pc-q35-7.2".to_owned(),
            firmware: berth_model::vm::Firmware::default(),
            tpm: false,
            cpu_model: "qemu64".to_owned(),
            nics: vec![Nic {
                mac: format!("52:54:00:00:{high:02x}:{low:02x}"),
                address: Some(format!("198.18.{high}.{low}/15")),
                gateway: Some("198.18.0.1".to_owned()),
                forwards: Vec::new(),
            }],
            user_data: None,
            protected: false,
            class: berth_model::vm::standard_class(),
            ready_timeout_s: 300,
            isolated: false,
        },
        status: VmStatus {
            state: VmState::Running,
            host: Some(HostId::from_entropy([low % 100; 10])),
            guest: GuestState::Ready,
            baseline: Some(SnapshotId::from_entropy(entropy(3))),
            baseline_note: None,
            at_snapshot: Some(SnapshotId::from_entropy(entropy(3))),
            top_layer: LayerId::from_entropy(entropy(4)),
            layers: 1,
            operation: None,
            generation: 3,
            trouble: None,
        },
        created_at: Timestamp::from_millis(1_795_352_752_000),
    }
}

/// How long whole lists take, shortest first.
async fn measure(client: &Client, limit: Option<u32>) -> Vec<Duration> {
    let mut took = Vec::with_capacity(ROUNDS);
    for round in 0..WARM_UP + ROUNDS {
        let began = Instant::now();
        let listed = list(client, limit).await;
        assert_eq!(listed, VMS as usize);
        if round >= WARM_UP {
            took.push(began.elapsed());
        }
    }
    took.sort();
    took
}

async fn list(client: &Client, limit: Option<u32>) -> usize {
    let (mut listed, mut cursor) = (0, None);
    loop {
        let query = VmListQuery { limit, cursor, ..VmListQuery::default() };
        let page = client.call::<VmList>(&Nothing {}, &query, &()).await.expect("a page");
        listed += page.items.len();
        cursor = page.next_cursor;
        if cursor.is_none() {
            return listed;
        }
    }
}

fn figures(name: &str, took: &[Duration]) -> String {
    let ms = |at: usize| took[at.min(took.len() - 1)].as_secs_f64() * 1000.0;
    format!(
        "\"{name}_p50_ms\": {:.2}, \"{name}_p99_ms\": {:.2}, \"{name}_worst_ms\": {:.2}",
        ms(took.len() / 2),
        ms(took.len() * 99 / 100),
        ms(took.len() - 1)
    )
}
