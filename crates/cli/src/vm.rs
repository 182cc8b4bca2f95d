//! `berth vm`: virtual machines.

mod create;
mod nic;
mod ready;

use berth_api::Endpoint;
use berth_api::endpoint::Nothing;
use berth_api::manager::{
    ChangeQuery, DeleteQuery, OperationRef, ShutdownVm, UpdateVm, VmDelete, VmList, VmListQuery, VmPath,
    VmPause, VmRestart, VmResume, VmShow, VmShutdown, VmStart, VmStop, VmUpdate,
};
use berth_model::name::Name;
use berth_model::vm::{GuestState, Vm};
use clap::{Args, Subcommand};

use crate::arguments::{ChangeArguments, DryRunArguments};
use crate::exit::Failure;
use crate::lookup::{HostNames, VmRef, parse_name};
use crate::options::named;
use crate::output::{Facts, NOTHING, Table, instant, or_nothing, word};
use crate::session::Session;
use crate::{console, migration, units, wait};

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make a VM, start it, and wait until its guest is ready and its baseline is there
    Create(Box<create::Arguments>),
    /// List the VMs
    List {
        /// Only those of this segment
        #[arg(long)]
        segment: Option<String>,
        /// Only those on this host
        #[arg(long)]
        host: Option<String>,
        /// At most so many; all without it
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
        limit: Option<u32>,
    },
    /// Show a VM
    Show {
        /// The VM
        vm: VmRef,
    },
    /// Start a stopped VM
    Start(One),
    /// Ask the guest to power down, and wait until it has
    Shutdown {
        #[command(flatten)]
        one: One,
        /// How long the guest may take; two minutes without it
        #[arg(long, value_name = "DURATION", value_parser = units::parse_duration_s32)]
        timeout: Option<u32>,
    },
    /// Take the power away
    Stop(One),
    /// Take the power away and give it back
    Restart(One),
    /// Hold the guest, its memory kept
    Pause(One),
    /// Let a held guest go on
    Resume(One),
    /// Use the serial console; Ctrl-] leaves
    Console {
        /// The VM
        vm: VmRef,
    },
    /// Delete a VM with its disk and snapshots
    Delete {
        #[command(flatten)]
        one: One,
        /// Also when it runs; a protected VM must be unprotected first
        #[arg(long)]
        force: bool,
    },
    /// Move a VM to another host while it runs
    Migrate(migration::MigrateArguments),
    /// Change a VM's settings; what is not named stays
    Update(UpdateArguments),
    /// Hold a VM against deletion
    Protect {
        /// The VM
        vm: VmRef,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Hold a VM against deletion no longer
    Unprotect {
        /// The VM
        vm: VmRef,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// What to change.
#[derive(Debug, Args)]
#[group(id = "settings", required = true, multiple = true, args = ["class", "ready_timeout"])]
pub struct UpdateArguments {
    /// The VM
    vm: VmRef,
    /// What kind of VM it is to the policies; restoring one of class 'production' needs a second person
    #[arg(long, value_parser = parse_name)]
    class: Option<Name>,
    /// How long its guest may take to be ready
    #[arg(long, value_name = "DURATION", value_parser = units::parse_duration_s32)]
    ready_timeout: Option<u32>,
    #[command(flatten)]
    dry_run: DryRunArguments,
}

/// A VM that is to be changed.
#[derive(Debug, Args)]
pub struct One {
    /// The VM
    vm: VmRef,
    #[command(flatten)]
    change: ChangeArguments,
}

impl One {
    const fn query(&self) -> ChangeQuery {
        ChangeQuery { dry_run: if self.change.dry_run { Some(true) } else { None } }
    }
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached, and the operation's failure.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Create(arguments) => create::run(session, *arguments).await,
        Verb::List { segment, host, limit } => list(session, segment, host, limit).await,
        Verb::Show { vm } => show(session, &vm).await,
        Verb::Start(one) => simple::<VmStart>(session, &one, "runs").await,
        Verb::Shutdown { one, timeout } => shutdown(session, &one, timeout).await,
        Verb::Stop(one) => simple::<VmStop>(session, &one, "is stopped").await,
        Verb::Restart(one) => simple::<VmRestart>(session, &one, "was restarted").await,
        Verb::Pause(one) => simple::<VmPause>(session, &one, "is paused").await,
        Verb::Resume(one) => simple::<VmResume>(session, &one, "goes on").await,
        Verb::Console { vm } => console::run(session, &vm).await,
        Verb::Delete { one, force } => delete(session, &one, force).await,
        Verb::Migrate(arguments) => migration::migrate(session, arguments).await,
        Verb::Update(arguments) => update(session, arguments).await,
        Verb::Protect { vm, dry_run } => protect(session, &vm, true, dry_run).await,
        Verb::Unprotect { vm, dry_run } => protect(session, &vm, false, dry_run).await,
    }
}

async fn simple<E>(session: &Session, one: &One, outcome: &str) -> Result<(), Failure>
where
    E: Endpoint<Path = VmPath, Query = ChangeQuery, Body = (), Reply = OperationRef>,
{
    let reply = session.ask::<E>(&one.vm.path(), &one.query()).await?;
    wait::carry_through_and_tell(session, one.change, reply, |over| format!("{} {outcome}", over.subject))
        .await
}

async fn shutdown(session: &Session, one: &One, timeout_s: Option<u32>) -> Result<(), Failure> {
    let wish = ShutdownVm { timeout_s };
    let reply = session.send::<VmShutdown>(&one.vm.path(), &one.query(), &wish).await?;
    wait::carry_through_and_tell(session, one.change, reply, |over| {
        format!("{} has powered down", over.subject)
    })
    .await
}

async fn delete(session: &Session, one: &One, force: bool) -> Result<(), Failure> {
    let query = DeleteQuery { force: force.then_some(true), dry_run: one.query().dry_run };
    let reply = session.ask::<VmDelete>(&one.vm.path(), &query).await?;
    wait::carry_through_and_tell(session, one.change, reply, |over| format!("{} is deleted", over.subject))
        .await
}

async fn update(session: &Session, arguments: UpdateArguments) -> Result<(), Failure> {
    let UpdateArguments { vm, class, ready_timeout, dry_run } = arguments;
    let query = ChangeQuery { dry_run: dry_run.dry_run.then_some(true) };
    let wish = UpdateVm { class, ready_timeout_s: ready_timeout, ..UpdateVm::default() };
    let pairs = [("ready_timeout_s", "ready-timeout")];
    let changed = named(session.send::<VmUpdate>(&vm.path(), &query, &wish).await, &pairs)?;
    let is_now =
        format!("of class {}, its guest given {} s", changed.spec.class, changed.spec.ready_timeout_s);
    let name = changed.full_name();
    if dry_run.dry_run {
        return session.tried(&format!("would have {name} be {is_now}"));
    }
    session.output.done(&changed, || format!("{name} is {is_now}"))
}

async fn protect(
    session: &Session,
    vm: &VmRef,
    protected: bool,
    dry_run: DryRunArguments,
) -> Result<(), Failure> {
    let query = ChangeQuery { dry_run: dry_run.dry_run.then_some(true) };
    let wish = UpdateVm { protected: Some(protected), ..UpdateVm::default() };
    let changed = session.send::<VmUpdate>(&vm.path(), &query, &wish).await?;
    let not = if protected { "" } else { "no longer " };
    let name = changed.full_name();
    if dry_run.dry_run {
        let summary = format!("would see to it that {name} is {not}held against deletion");
        return session.tried(&summary);
    }
    session.output.done(&changed, || format!("{name} is {not}held against deletion"))
}

async fn list(
    session: &Session,
    segment: Option<String>,
    host: Option<String>,
    limit: Option<u32>,
) -> Result<(), Failure> {
    let query = |limit, cursor| VmListQuery { segment: segment.clone(), host: host.clone(), limit, cursor };
    let vms = session.pages::<VmList, _>(&Nothing {}, limit, query);
    let (vms, hosts) = tokio::join!(vms, HostNames::load(session));
    let vms = vms?;
    session.output.list(&vms, || table(&vms, &hosts))
}

async fn show(session: &Session, vm: &VmRef) -> Result<(), Failure> {
    let vm = session.ask::<VmShow>(&vm.path(), &Nothing {}).await?;
    let hosts = HostNames::load(session).await;
    session.output.one(&vm, || facts(&vm, &hosts))
}

fn table(vms: &[Vm], hosts: &HostNames) -> Table {
    let headers = &["NAME", "STATE", "GUEST", "HOST", "VCPUS", "MEMORY", "BASELINE", "ADDRESS", "TROUBLE"];
    Table::of(headers, vms, |vm| {
        [
            vm.full_name(),
            vm.status.state.to_string(),
            word(&vm.status.guest),
            hosts.of_some(vm.status.host.as_ref()),
            vm.spec.vcpus.to_string(),
            units::mib(vm.spec.memory_mib),
            if vm.status.baseline.is_some() { "yes" } else { "none yet" }.to_owned(),
            address(vm),
            vm.status.trouble.clone().unwrap_or_default(),
        ]
    })
}

fn address(vm: &Vm) -> String {
    let addresses: Vec<&str> = vm
        .spec
        .nics
        .iter()
        .filter_map(|nic| nic.address.as_deref())
        .map(|address| address.split_once('/').map_or(address, |(address, _)| address))
        .collect();
    if addresses.is_empty() { NOTHING.to_owned() } else { addresses.join(",") }
}

fn facts(vm: &Vm, hosts: &HostNames) -> Facts {
    let (spec, status) = (&vm.spec, &vm.status);
    let mut facts = Facts::new()
        .with("name", vm.full_name())
        .with("id", &vm.id)
        .with("state", status.state)
        .with("guest", guest(status.guest))
        .with("host", hosts.of_some(status.host.as_ref()))
        .with("baseline", or_nothing(status.baseline.as_ref()))
        .with_some("no baseline because", status.baseline_note.as_ref())
        .with_some("at snapshot", status.at_snapshot.as_ref())
        .with_some("operation", status.operation.as_ref())
        .with_some("trouble", status.trouble.as_ref())
        .with("vcpus", spec.vcpus)
        .with("memory", units::mib(spec.memory_mib))
        .with("disk", units::mib(spec.disk_mib))
        .with_some("layers", (status.layers > 0).then_some(status.layers))
        .with("image", &spec.image)
        .with("pool", &spec.pool)
        .with("machine type", &spec.machine_type)
        .with("cpu model", &spec.cpu_model)
        .with("firmware", word(&spec.firmware))
        .with("tpm", if spec.tpm { "yes" } else { "no" })
        .with("class", &spec.class)
        .with("protected", if spec.protected { "yes" } else { "no" })
        .with("made", instant(vm.created_at));
    for (index, size_mib) in spec.data_disks_mib.iter().enumerate() {
        facts = facts.with(format!("data disk {}", index + 1), units::mib(*size_mib));
    }
    for (index, nic) in spec.nics.iter().enumerate() {
        facts = facts.with(format!("nic {index}"), nic::in_words(nic));
    }
    facts
}

const fn guest(state: GuestState) -> &'static str {
    match state {
        GuestState::Off => "off",
        GuestState::Booting => "running, and has not said that it is ready",
        GuestState::Ready => "ready",
        GuestState::Panicked => "its kernel has panicked",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake;

    #[test]
    fn the_list_says_what_matters_in_a_line() {
        let mut vm = fake::vm("books");
        vm.status.trouble = Some("qemu\x1b[2J ended".into());
        let hosts = HostNames::single(vm.status.host.clone().expect("placed"), "h1");
        let expected = "\
NAME           STATE    GUEST  HOST  VCPUS  MEMORY   BASELINE  ADDRESS      TROUBLE
default/books  running  ready  h1    2      256 MiB  none yet  198.18.5.20  qemu\u{fffd}[2J ended";
        assert_eq!(table(&[vm], &hosts).render(), expected);
    }
}
