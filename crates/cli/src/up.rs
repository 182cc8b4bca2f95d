//! `berth up` and `berth down`: a whole cluster on this machine, to try it.
//!
//! What is started is the real thing: one `berth manager` and a `berth agent` for each host, as processes of their own
//! that talk over TLS. As root each host is a network namespace and VMs are on a bridge; as an ordinary user all
//! listen on loopback and VMs have user-mode networking.
//!
//! Everything is in one directory with a record of what was made ([`directory`], [`record`]). Running `up` again on it starts what
//! is dead and leaves what lives alone; `down` stops what the record and the processes' own marks name, and nothing
//! else.

mod directory;
mod down;
mod hosts;
mod manager;
mod network;
mod process;
mod record;

pub use down::{DownArguments, run as down};

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Args;
use serde::Serialize;

use crate::exit::Failure;
use crate::join::pool_reserve;
use crate::output::Output;
use crate::session::Session;
use directory::Directory;
use hosts::Before;
use record::{Mode, Record};

/// How many hosts there are when nothing is said: the least with which a VM can move.
const HOSTS_DEFAULT: u8 = 2;
/// Most hosts: the addresses below the first one that VMs are given.
const HOSTS_MAX: u8 = 8;
/// How often a cluster in the foreground is looked at.
const WATCH_INTERVAL: Duration = Duration::from_secs(1);

/// What to bring up.
#[derive(Debug, Args)]
pub struct UpArguments {
    /// How many hosts [default: 2, or as many as there were]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(HOSTS_MAX)))]
    hosts: Option<u8>,
    /// Where everything is put [default: /var/lib/berth-up as root, else ~/.local/share/berth-up]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Come back when it is up; 'berth down' stops it
    #[arg(long)]
    detach: bool,
    /// Shape each host's link to this many megabits a second (as root)
    #[arg(long, value_name = "M", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    link_mbit: Option<u32>,
    /// How much of each pool, in percent, has to stay free for schedules to take snapshots there; for hosts started now
    /// [default: 10, or as it was]
    #[arg(long, value_name = "PERCENT", value_parser = pool_reserve())]
    pool_reserve: Option<u8>,
}

/// What programs are told when it is up.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    /// All hosts are online.
    Up { config: PathBuf, url: String, hosts: Vec<&'a str>, directory: &'a std::path::Path },
}

/// Brings the cluster up, and, unless told to come back, stays until Ctrl-C and takes it down.
///
/// # Errors
/// What could not be brought up, with the end of its log. What was brought up stays, to be looked at.
pub async fn run(arguments: UpArguments, output: &Output) -> Result<(), Failure> {
    let path = directory::choose(arguments.dir.clone())?;
    let (directory, record) = bring_up(&path, &arguments, output).await?;
    tell(&directory, &record, output)?;
    if arguments.detach {
        return Ok(());
    }
    // Others must be able to run `berth down` while this one only watches.
    directory.unlock();
    output.remark("\nCtrl-C takes it down");
    watch(&directory, &record, output).await
}

async fn bring_up(
    path: &std::path::Path,
    arguments: &UpArguments,
    output: &Output,
) -> Result<(Directory, Record), Failure> {
    let directory = Directory::open_or_make(path)?;
    let mut record = match directory.record()? {
        Some(record) => record,
        None => Record::new(directory.made_it())?,
    };
    record.check_user(path)?;
    let hosts = usize::from(arguments.hosts.unwrap_or(HOSTS_DEFAULT));
    record.add_hosts(if record.hosts.is_empty() || arguments.hosts.is_some() { hosts } else { 0 })?;
    if let Some(asked) = arguments.hosts.filter(|asked| usize::from(*asked) < record.hosts.len()) {
        output.remark(&format!(
            "there are {} hosts already; none is taken away for {asked}",
            record.hosts.len()
        ));
    }
    if arguments.link_mbit.is_some() && record.mode == Mode::User {
        return Err(Failure::field(
            "link-mbit",
            arguments.link_mbit.unwrap_or(0),
            "root, who may shape links",
        ));
    }
    directory.save(&record)?;

    if record.mode == Mode::Root {
        network::bring_up(&directory, &mut record, arguments.link_mbit)?;
    }
    let before = Before::now(&directory);
    let session = manager::bring_up(&directory, &mut record, output).await?;
    hosts::bring_up(&directory, &mut record, &session, before, arguments.pool_reserve).await?;
    Ok((directory, record))
}

fn tell(directory: &Directory, record: &Record, output: &Output) -> Result<(), Failure> {
    let config = directory.client_config();
    let url = record.url();
    if output.format() == crate::output::Format::Json {
        let hosts = record.hosts.iter().map(|host| host.name.as_str()).collect();
        return output.event(&Event::Up { config, url, hosts, directory: directory.path() });
    }
    let names: Vec<&str> = record.hosts.iter().map(|host| host.name.as_str()).collect();
    let network = match (record.mode, record.subnet) {
        (Mode::Root, Some(subnet)) => {
            format!("VMs get addresses in {subnet}, and this machine reaches them there")
        }
        _ => "VMs have user-mode networking: they get out, and in by forwarded ports ('--nic forward=…')"
            .to_owned(),
    };
    let (dir, config) = (directory.path().display(), config.display());
    let how_to = format!(
        "up: a manager at {url} and hosts {}; everything is in {dir}\n{network}\n\n  \
         export BERTH_CONFIG={config}\n  \
         berth host list\n  \
         berth image import disk.qcow2 --format qcow2 --name my-image\n  \
         berth vm create books --image my-image\n  \
         berth vm migrate books\n  \
         berth snapshot restore books\n  \
         berth down --dir {dir}",
        names.join(", "),
    );
    output.done(record, || how_to)
}

/// Stays until Ctrl-C, and says what has ended meanwhile.
async fn watch(directory: &Directory, record: &Record, output: &Output) -> Result<(), Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("signals can't be waited for")?;
    let mut gone: Vec<String> = Vec::new();
    loop {
        tokio::select! {
            _ = tokio::signal::ctrl_c() => break,
            _ = terminate.recv() => break,
            () = tokio::time::sleep(WATCH_INTERVAL) => {}
        }
        let names = directory.process_names(record);
        let alive = names.iter().filter(|name| process::alive(directory, name).is_some()).count();
        if alive == 0 {
            output.remark("the cluster has been taken down");
            return Ok(());
        }
        for name in names {
            if process::alive(directory, &name).is_none() && !gone.contains(&name) {
                let log = directory.log(&name);
                let dir = directory.path().display();
                output.remark(&format!(
                    "{name} has ended: see {}; 'berth up --dir {dir}' starts it again",
                    log.display()
                ));
                gone.push(name);
            }
        }
    }
    output.remark("taking it down");
    down::take_down(directory.path(), false, output).await
}

/// A session with the manager of this directory.
fn session(directory: &Directory, output: &Output) -> Result<Session, Failure> {
    let environment = crate::config::Environment {
        file: Some((directory.client_config(), true)),
        ..crate::config::Environment::default()
    };
    Session::with_config(&crate::config::resolve(&environment)?, output.clone())
}
