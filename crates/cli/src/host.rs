//! `berth host`: machines with an agent.

use berth_api::endpoint::Nothing;
use berth_api::manager::{
    CreateJoinToken, HostDelete, HostList, HostPath, HostShow, JoinTokenCreate, PageQuery,
};
use berth_model::access::Action;
use berth_model::host::{Accelerator, Host, Inventory};
use clap::Subcommand;

use crate::arguments::{DryRunArguments, ListArguments};
use crate::exit::Failure;
use crate::output::{Facts, NOTHING, Table, instant, word};
use crate::session::Session;
use crate::units;

/// What can be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the hosts
    List(ListArguments),
    /// Show a host
    Show {
        /// Its name or id
        host: String,
    },
    /// Take a host without VMs out of the cluster
    Delete {
        /// Its name or id
        host: String,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
    /// Make a token with which one machine can join ('berth agent join' on that machine)
    JoinToken {
        /// How long it may be used, at most; an hour without it
        #[arg(long, value_name = "DURATION", value_parser = units::parse_duration_s)]
        expires: Option<u64>,
        #[command(flatten)]
        dry_run: DryRunArguments,
    },
}

/// Does it.
///
/// # Errors
/// When the manager refuses or can't be reached.
pub async fn run(session: &Session, verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::List(arguments) => {
            let query = |limit, cursor| PageQuery { limit, cursor };
            let hosts = session.pages::<HostList, _>(&Nothing {}, arguments.limit, query).await?;
            session.output.list(&hosts, || table(&hosts))
        }
        Verb::Show { host } => {
            let host = session.ask::<HostShow>(&HostPath { host }, &Nothing {}).await?;
            session.output.one(&host, || facts(&host))
        }
        Verb::Delete { host, dry_run } => delete(session, host, dry_run).await,
        Verb::JoinToken { expires, dry_run } => join_token(session, expires, dry_run).await,
    }
}

async fn delete(session: &Session, host: String, dry_run: DryRunArguments) -> Result<(), Failure> {
    let path = HostPath { host };
    let found = session.ask::<HostShow>(&path, &Nothing {}).await?;
    if dry_run.dry_run {
        let summary = format!("would take host {} out of the cluster, if no VM is on it", found.name);
        return session.would(Action::HostRemove, Some(found.name.as_str()), &summary).await;
    }
    session.ask::<HostDelete>(&path, &Nothing {}).await?;
    session.output.done(&found, || format!("host {} is no longer in the cluster", found.name))
}

async fn join_token(
    session: &Session,
    expires_s: Option<u64>,
    dry_run: DryRunArguments,
) -> Result<(), Failure> {
    if dry_run.dry_run {
        return session.would(Action::HostJoin, None, "would make a join token").await;
    }
    let wish = CreateJoinToken { expires_s };
    let token = session.send::<JoinTokenCreate>(&Nothing {}, &Nothing {}, &wish).await?;
    let manager = session.client.address();
    session.output.done(&token, || {
        format!(
            "{}\n\ngood once, until {}; on the machine that is to join:\n  \
             berth agent join --manager {manager} --token {} --name NAME",
            token.token,
            instant(token.expires_at),
            token.token
        )
    })
}

fn table(hosts: &[Host]) -> Table {
    let headers = &["NAME", "STATE", "ADDRESS", "CPUS", "MEMORY", "FREE", "ACCELERATOR", "QEMU", "POOLS"];
    Table::of(headers, hosts, |host| {
        let known = |value: &dyn Fn(&Inventory) -> String| {
            host.inventory.as_ref().map_or_else(|| NOTHING.to_owned(), value)
        };
        [
            host.name.to_string(),
            word(&host.state),
            host.address.clone(),
            known(&|inventory| inventory.cpus.to_string()),
            known(&|inventory| units::mib(inventory.memory_mib)),
            known(&|inventory| units::mib(inventory.memory_available_mib)),
            known(&|inventory| word(&inventory.accelerator)),
            known(&|inventory| inventory.qemu.version.clone()),
            known(&|inventory| {
                let names: Vec<&str> = inventory.pools.iter().map(|pool| pool.name.as_str()).collect();
                names.join(",")
            }),
        ]
    })
}

fn facts(host: &Host) -> Facts {
    let facts = Facts::new()
        .with("name", &host.name)
        .with("id", &host.id)
        .with("state", word(&host.state))
        .with_some("offline because", host.offline_reason.as_ref())
        .with("address", &host.address)
        .with("joined", instant(host.joined_at))
        .with_some("last seen", host.last_seen_at.map(instant));
    match &host.inventory {
        Some(inventory) => inventory_facts(facts, inventory),
        None => facts.with("inventory", "none reported yet"),
    }
}

fn inventory_facts(facts: Facts, inventory: &Inventory) -> Facts {
    let accelerator = match (inventory.accelerator, &inventory.accelerator_note) {
        (Accelerator::Kvm, _) | (_, None) => word(&inventory.accelerator),
        (Accelerator::Tcg, Some(note)) => format!("{} ({note})", word(&inventory.accelerator)),
    };
    let mut facts = facts
        .with("machine", &inventory.hostname)
        .with("cpus", inventory.cpus)
        .with("memory", units::mib(inventory.memory_mib))
        .with("memory free", units::mib(inventory.memory_available_mib))
        .with("accelerator", accelerator)
        .with("network", word(&inventory.network))
        .with("each vm own user", if inventory.isolated_users { "yes" } else { "no" })
        .with("qemu", &inventory.qemu.version)
        .with_some("newest machine type", inventory.qemu.machine_types.first())
        .with("uefi", if inventory.uefi { "yes" } else { "no" })
        .with("tpm", if inventory.tpm { "yes" } else { "no" })
        .with("agent", &inventory.agent_version);
    for pool in &inventory.pools {
        let (free, size) = (units::bytes(pool.free_bytes), units::bytes(pool.size_bytes));
        facts = facts.with(format!("pool {}", pool.name), format!("{free} free of {size}"));
    }
    facts
}
