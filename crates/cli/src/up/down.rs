//! `berth down`: stop what `berth up` started, and leave nothing behind.
//!
//! Agents first, so that none starts a QEMU again; then the QEMUs; the manager last. What is stopped is what the
//! process files name and what carries the cluster's own mark, nothing else.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::directory::{self, Directory, MANAGER};
use super::record::{Mode, Record};
use super::{network, process};
use crate::exit::Failure;
use crate::output::{Format, Output};

/// What to take down.
#[derive(Debug, Args)]
pub struct DownArguments {
    /// Where the cluster is [default: /var/lib/berth-up as root, else ~/.local/share/berth-up]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Remove its VMs, images and records too: all that 'berth up' made
    #[arg(long)]
    purge: bool,
}

/// What programs are told.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
enum Event<'a> {
    /// It is down.
    Down { directory: &'a Path, processes_ended: usize, purged: bool },
}

/// Takes it down.
///
/// # Errors
/// When there is no cluster, or something of it can't be stopped or removed.
pub async fn run(arguments: DownArguments, output: &Output) -> Result<(), Failure> {
    let path = directory::choose(arguments.dir)?;
    take_down(&path, arguments.purge, output).await
}

/// The same for a directory that is known.
///
/// # Errors
/// As [`run`].
pub async fn take_down(path: &Path, purge: bool, output: &Output) -> Result<(), Failure> {
    let directory = Directory::open_existing(path)?;
    let Some(mut record) = directory.record()? else {
        return Err(Failure::field("dir", path.display(), "a directory with a cluster that 'berth up' made"));
    };
    record.check_user(path)?;
    let ended = end_processes(&directory, &record).await?;
    if record.mode == Mode::Root {
        network::take_down(&record)?;
        record.network_of_boot = None;
        directory.save(&record)?;
    }
    if purge {
        directory.purge(&record)?;
    }
    if output.format() == Format::Json {
        return output.event(&Event::Down { directory: path, processes_ended: ended, purged: purge });
    }
    let rest = if purge {
        "nothing of it is left".to_owned()
    } else {
        let path = path.display();
        format!(
            "{path} keeps its VMs (those that ran are powered off), images and records; 'berth up --dir {path}' starts it again"
        )
    };
    output.done(&record, || format!("down: {ended} processes ended; {rest}"))
}

async fn end_processes(directory: &Directory, record: &Record) -> Result<usize> {
    let mut ended = 0;
    let hosts = record.hosts.iter().map(|host| host.name.as_str());
    for name in hosts {
        ended += end(directory, name).await?;
    }
    // All of them at once: each may take a while to flush its disk.
    let manager = process::alive(directory, MANAGER);
    let strays = process::strays(directory).into_iter().filter(|stray| Some(stray) != manager.as_ref());
    let ending: Vec<_> = strays.map(|stray| async move { process::end(&stray).await }).collect();
    ended += ending.len();
    for result in futures_util::future::join_all(ending).await {
        result?;
    }
    Ok(ended + end(directory, MANAGER).await?)
}

async fn end(directory: &Directory, name: &str) -> Result<usize> {
    let ended = match process::alive(directory, name) {
        Some(known) => {
            process::end(&known).await?;
            1
        }
        None => 0,
    };
    // A file of a process that is gone is worth nothing, and may be gone itself.
    let _ = std::fs::remove_file(directory.pid_file(name));
    Ok(ended)
}
