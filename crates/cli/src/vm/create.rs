//! `berth vm create`: make a VM and wait until it is what was wished for.

use std::fs;
use std::io::Read as _;
use std::path::PathBuf;

use anyhow::Context as _;
use berth_api::endpoint::Nothing;
use berth_api::manager::{ChangeQuery, CreateVm, NewNic, OperationRef, VmCreate};
use berth_model::name::Name;
use berth_model::vm::{Firmware, USER_DATA_BYTES_MAX, Vm};
use clap::Args;
use serde::Serialize;

use super::{nic, ready};
use crate::arguments::ChangeArguments;
use crate::exit::Failure;
use crate::lookup::{HostNames, NewVmName, VmRef, parse_name};
use crate::output::Format;
use crate::session::Session;
use crate::{units, wait};

/// What to make.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Its name: SEGMENT/NAME, or NAME in segment 'default'
    name: NewVmName,
    /// The image that it starts from: one of its segment, else one for all
    #[arg(long)]
    image: String,
    /// Virtual CPUs [default: 1]
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    vcpus: Option<u32>,
    /// Memory [default: 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size_mib, allow_hyphen_values = true)]
    memory: Option<u64>,
    /// Disk [default: the image's own size, at least 1GiB]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_size_mib, allow_hyphen_values = true)]
    disk: Option<u64>,
    /// A data disk, empty at first (its serial number in the guest: data1, data2, …); may be given several times
    #[arg(long = "data-disk", value_name = "SIZE", value_parser = units::parse_size_mib, allow_hyphen_values = true)]
    data_disks: Vec<u64>,
    /// The pool for its disk and snapshots [default: default]
    #[arg(long, value_parser = parse_name)]
    pool: Option<Name>,
    /// A network interface: address=A.B.C.D/BITS|dhcp,mac=…,forward=tcp:HOST_PORT:GUEST_PORT; may be given several
    /// times [default: one with an address of the cluster's own range]
    #[arg(long = "nic", value_name = "NIC", value_parser = nic::parse)]
    nics: Vec<NewNic>,
    /// No network interface
    #[arg(long, conflicts_with = "nics")]
    no_nic: bool,
    /// File with cloud-init user data; - is standard input
    #[arg(long, value_name = "FILE")]
    user_data: Option<PathBuf>,
    /// The CPU model [default: one that every host offers]
    #[arg(long, value_name = "MODEL")]
    cpu_model: Option<String>,
    /// The versioned machine type [default: the newest that every host offers]
    #[arg(long, value_name = "TYPE")]
    machine_type: Option<String>,
    /// What starts it [default: bios]
    #[arg(long, value_enum)]
    firmware: Option<FirmwareWord>,
    /// With a TPM (2.0); what it holds is part of the VM and of its snapshots
    #[arg(long)]
    tpm: bool,
    /// The host to start on [default: Berth chooses]
    #[arg(long)]
    host: Option<String>,
    /// Hold it against deletion
    #[arg(long)]
    protected: bool,
    /// What kind of VM it is to the policies, like production [default: standard]
    #[arg(long, value_parser = parse_name)]
    class: Option<Name>,
    /// How long the guest may take to be ready [default: 5m]
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration_s32)]
    ready_timeout: Option<u32>,
    /// Make it, but don't start it
    #[arg(long, conflicts_with = "wait_for")]
    stopped: bool,
    /// What to wait for
    #[arg(long, value_enum, default_value = "baseline")]
    wait_for: ready::Goal,
    #[command(flatten)]
    change: ChangeArguments,
}

/// What starts a machine.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum FirmwareWord {
    /// A BIOS
    Bios,
    /// UEFI; its variables are part of the VM and of its snapshots
    Uefi,
}

impl From<FirmwareWord> for Firmware {
    fn from(word: FirmwareWord) -> Self {
        match word {
            FirmwareWord::Bios => Self::Bios,
            FirmwareWord::Uefi => Self::Uefi,
        }
    }
}

/// What programs are told at the end.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    /// All that was waited for is there.
    Done { vm: &'a Vm },
}

/// Makes it.
///
/// # Errors
/// When the manager refuses or can't be reached; when the guest is not ready in time.
pub async fn run(session: &Session, arguments: Arguments) -> Result<(), Failure> {
    let change = arguments.change;
    let goal = if arguments.stopped { ready::Goal::Running } else { arguments.wait_for };
    let name = format!("{}/{}", arguments.name.segment, arguments.name.name);
    let query = ChangeQuery { dry_run: change.dry_run.then_some(true) };
    let wish = wish(arguments)?;
    let reply: OperationRef = session.send::<VmCreate>(&Nothing {}, &query, &wish).await?;
    let Some(_) = wait::carry_through(session, change, reply).await? else { return Ok(()) };

    let vm: VmRef = name.parse().map_err(anyhow::Error::msg)?;
    let farewell = format!("left {name} coming up; look further:  berth vm show {name}");
    let started = std::time::Instant::now();
    let made = session.unless_interrupted(&farewell, ready::wait_for(session, &vm, goal)).await?;
    let waited = started.elapsed();
    let hosts = HostNames::load(session).await;
    match session.output.format() {
        Format::Json => session.output.event(&Event::Done { vm: &made }),
        Format::Table | Format::Yaml => session.output.done(&made, || told(&made, goal, &hosts, waited)),
    }
}

fn told(vm: &Vm, goal: ready::Goal, hosts: &HostNames, waited: std::time::Duration) -> String {
    let name = vm.full_name();
    let place = hosts.of_some(vm.status.host.as_ref());
    let waited = units::millis(u64::try_from(waited.as_millis()).unwrap_or(u64::MAX));
    match goal {
        ready::Goal::Running => format!("{name} is made on {place} and {}", vm.status.state),
        ready::Goal::Ready => format!("{name} runs on {place}, its guest ready {waited} after the start"),
        ready::Goal::Baseline => {
            format!(
                "{name} runs on {place}, its guest is ready and its baseline taken, {waited} after the start"
            )
        }
    }
}

fn wish(arguments: Arguments) -> Result<CreateVm, Failure> {
    let Arguments { nics, no_nic, user_data, .. } = arguments;
    let nics = if no_nic || !nics.is_empty() { Some(nics) } else { None };
    Ok(CreateVm {
        class: arguments.class,
        segment: arguments.name.segment.to_string(),
        name: arguments.name.name,
        image: arguments.image,
        vcpus: arguments.vcpus,
        memory_mib: arguments.memory,
        disk_mib: arguments.disk,
        data_disks_mib: arguments.data_disks,
        pool: arguments.pool,
        nics,
        user_data: user_data.map(read_user_data).transpose()?,
        cpu_model: arguments.cpu_model,
        machine_type: arguments.machine_type,
        firmware: arguments.firmware.map(Firmware::from),
        tpm: arguments.tpm,
        host: arguments.host,
        protected: arguments.protected,
        ready_timeout_s: arguments.ready_timeout,
        stopped: arguments.stopped,
    })
}

fn read_user_data(path: PathBuf) -> Result<String, Failure> {
    // One byte more than is allowed shows that there is too much, however much there is.
    let limit = USER_DATA_BYTES_MAX as u64 + 1;
    let mut text = String::new();
    let read = if path.as_os_str() == "-" {
        std::io::stdin().lock().take(limit).read_to_string(&mut text)
    } else {
        fs::File::open(&path).and_then(|file| file.take(limit).read_to_string(&mut text))
    };
    read.with_context(|| format!("user data can't be read from {}", path.display())).map_err(|error| {
        Failure::field(
            "user-data",
            path.display(),
            &format!("a text file that can be read ({:#})", error.root_cause()),
        )
    })?;
    if text.len() > USER_DATA_BYTES_MAX {
        let expected = format!("at most {USER_DATA_BYTES_MAX} bytes");
        return Err(Failure::field("user-data", path.display(), &expected));
    }
    Ok(text)
}
