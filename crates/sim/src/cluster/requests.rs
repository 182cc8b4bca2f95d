//! What is asked of a cluster: the user's side of the door.

use std::time::Duration;

use berth_api::agent::{AgentReport, ReportQuery, ReportShow};
use berth_api::endpoint::Nothing;
use berth_api::manager as contract;
use berth_api::pki::Peer;
use berth_api::transport::full;
use berth_api::{Client, ClientError};
use berth_model::host::{Host, HostState};
use berth_model::image::{ImagePart, PartFormat, PartRole};
use berth_model::operation::{Operation, OperationState};
use berth_model::vm::Vm;
use berth_model::{OperationId, Problem, VmId};
use sha2::{Digest, Sha256};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{SimCluster, address_of};
use crate::launcher::{CPU_MODEL, MACHINE_TYPE};

/// The image's name.
pub const IMAGE: &str = "tiny";
/// The pool's name.
pub const POOL: &str = "default";
/// The segment that there is from the start.
const SEGMENT: &str = "default";
/// How long anything may take to come about.
const DEADLINE: Duration = Duration::from_secs(120);
/// How many VMs are made at a time.
const AT_A_TIME: usize = 64;
const PAGE: u32 = 500;

/// A VM that is wished for.
#[derive(Debug, Clone, Default)]
pub struct VmWish {
    /// Its name.
    pub name: String,
    /// On this host; none: the manager chooses.
    pub host: Option<String>,
    /// Made, but not started.
    pub stopped: bool,
}

/// Why a wish did not come true.
#[derive(Debug)]
pub enum RequestError {
    /// It was refused.
    Refused(Problem),
    /// The manager could not be reached.
    Unreachable(ClientError),
    /// The operation came to nothing.
    Failed(Box<Operation>),
    /// It took too long.
    Late(OperationId),
}

impl std::fmt::Display for RequestError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Refused(problem) => write!(formatter, "refused: {problem}"),
            Self::Unreachable(error) => write!(formatter, "{error}"),
            Self::Failed(operation) => {
                let why = operation.problem.as_ref().map(ToString::to_string).unwrap_or_default();
                write!(formatter, "{} {}: {why}", operation.kind, operation.state.as_str())
            }
            Self::Late(operation) => write!(formatter, "{operation} takes too long"),
        }
    }
}

impl From<ClientError> for RequestError {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Problem(problem) => Self::Refused(*problem),
            ClientError::Transport(_) | ClientError::Nonsense { .. } => Self::Unreachable(error),
        }
    }
}

impl SimCluster {
    /// Makes so many VMs and waits until all run.
    ///
    /// # Panics
    /// When one does not.
    pub async fn create_vms(&self, count: usize) -> Vec<VmId> {
        let (mut made, mut making) = (Vec::with_capacity(count), JoinSet::new());
        for number in 0..count {
            if making.len() == AT_A_TIME {
                made.extend(making.join_next().await);
            }
            let client = self.client();
            let wish = VmWish { name: format!("vm-{number:04}"), ..VmWish::default() };
            making.spawn(async move { create_vm(&client, &wish).await });
        }
        while let Some(one) = making.join_next().await {
            made.push(one);
        }
        let id = |made: Result<Result<VmId, RequestError>, _>| match made.expect("not cancelled") {
            Ok(id) => id,
            Err(error) => panic!("a VM was not made: {error}"),
        };
        made.into_iter().map(id).collect()
    }

    /// Makes a VM and waits until it runs.
    ///
    /// # Errors
    /// When it does not.
    pub async fn create_vm(&self, wish: &VmWish) -> Result<VmId, RequestError> {
        create_vm(&self.client(), wish).await
    }

    /// All VMs, page by page.
    ///
    /// # Errors
    /// When the manager does not answer.
    pub async fn vms(&self) -> Result<Vec<Vm>, ClientError> {
        let (client, mut all, mut cursor) = (self.client(), Vec::new(), None);
        loop {
            let query =
                contract::VmListQuery { limit: Some(PAGE), cursor, ..contract::VmListQuery::default() };
            let page = client.call::<contract::VmList>(&Nothing {}, &query, &()).await?;
            all.extend(page.items);
            cursor = page.next_cursor;
            if cursor.is_none() {
                return Ok(all);
            }
        }
    }

    /// All operations that are not over.
    ///
    /// # Errors
    /// When the manager does not answer.
    pub async fn operations_under_way(&self) -> Result<Vec<Operation>, ClientError> {
        let query =
            contract::OperationListQuery { active: Some(true), ..contract::OperationListQuery::default() };
        Ok(self.client().call::<contract::OperationList>(&Nothing {}, &query, &()).await?.items)
    }

    /// All hosts.
    ///
    /// # Errors
    /// When the manager does not answer.
    pub async fn host_records(&self) -> Result<Vec<Host>, ClientError> {
        let query = contract::PageQuery { limit: Some(PAGE), cursor: None };
        Ok(self.client().call::<contract::HostList>(&Nothing {}, &query, &()).await?.items)
    }

    /// What a host's agent says of its VMs, asked as the manager would.
    ///
    /// # Errors
    /// When it does not answer.
    pub async fn report_of(&self, number: usize) -> Result<AgentReport, ClientError> {
        let address = address_of(&self.hosts[number].config);
        // From a place of its own: whatever is cut, the checker is not.
        let client = Client::new(self.network().transport("checker", Peer::Manager, &address));
        client.call::<ReportShow>(&Nothing {}, &ReportQuery::default(), &()).await
    }

    /// Waits until all hosts are online.
    ///
    /// # Panics
    /// When they do not come.
    pub async fn until_online(&self) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let hosts = self.host_records().await.unwrap_or_default();
            let online = |host: &Host| host.state == HostState::Online && host.inventory.is_some();
            if hosts.len() == self.hosts.len() && hosts.iter().all(online) {
                return;
            }
            let missing: Vec<_> = hosts.iter().filter(|host| !online(host)).map(|host| &host.name).collect();
            assert!(Instant::now() < deadline, "hosts are not online: {missing:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Brings in an image of a kernel that is none.
    pub(super) async fn import_image(&self) {
        let parts = [(PartRole::Kernel, &b"a kernel"[..]), (PartRole::Initrd, &b"an initrd"[..])];
        let part = |(role, bytes): &(PartRole, &[u8])| ImagePart {
            role: *role,
            format: PartFormat::Raw,
            size_bytes: bytes.len() as u64,
            sha256: Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect(),
            virtual_size_bytes: None,
        };
        let wish = contract::CreateImage {
            name: IMAGE.parse().expect("a name"),
            segment: None,
            parts: parts.iter().map(part).collect(),
            kernel_command_line: "console=ttyS0".to_owned(),
            pool: None,
        };
        let client = self.client();
        client.call::<contract::ImageCreate>(&Nothing {}, &Nothing {}, &wish).await.expect("declared");
        for (role, bytes) in parts {
            let path = contract::ImagePartPath { image: IMAGE.to_owned(), role };
            let uploaded = client
                .upload::<contract::ImagePartUpload>(
                    &path,
                    &Nothing {},
                    full(bytes.to_vec()),
                    bytes.len() as u64,
                )
                .await;
            uploaded.expect("uploaded");
        }
    }
}

async fn create_vm(client: &Client, wish: &VmWish) -> Result<VmId, RequestError> {
    let body = contract::CreateVm {
        segment: SEGMENT.to_owned(),
        name: wish.name.parse().expect("a name"),
        image: IMAGE.to_owned(),
        vcpus: Some(1),
        memory_mib: Some(32),
        disk_mib: Some(64),
        data_disks_mib: Vec::new(),
        pool: None,
        nics: Some(Vec::new()),
        user_data: None,
        cpu_model: Some(CPU_MODEL.to_owned()),
        machine_type: Some(MACHINE_TYPE.to_owned()),
        firmware: None,
        tpm: false,
        host: wish.host.clone(),
        protected: false,
        class: None,
        ready_timeout_s: None,
        stopped: wish.stopped,
    };
    let query = contract::ChangeQuery::default();
    let begun = client.call::<contract::VmCreate>(&Nothing {}, &query, &body).await?;
    let vm = begun.vm.map(|vm| vm.id);
    let operation = done(client, begun.operation).await?;
    Ok(vm.or(operation.vm).expect("a VM that was made"))
}

/// Waits until an operation is over.
///
/// # Errors
/// When it fails, or takes too long. A manager that does not answer is asked again.
pub async fn done(client: &Client, operation: Option<Operation>) -> Result<Operation, RequestError> {
    let mut operation = operation.expect("what is not only tried has an operation");
    let deadline = Instant::now() + DEADLINE;
    while !operation.state.is_over() {
        if Instant::now() > deadline {
            return Err(RequestError::Late(operation.id));
        }
        let path = contract::OperationPath { operation: operation.id.clone() };
        let query = contract::WaitQuery { wait_ms: Some(20_000) };
        match client.call::<contract::OperationWait>(&path, &query, &()).await {
            Ok(now) => operation = now,
            Err(ClientError::Problem(problem)) => return Err(RequestError::Refused(*problem)),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    match operation.state {
        OperationState::Succeeded => Ok(operation),
        _ => Err(RequestError::Failed(Box::new(operation))),
    }
}
