//! The source's side: what is sent before memory is.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_model::Problem;
use berth_model::migration::MigrationPhase;
use berth_model::operation::Progress;

use super::sending::{Pace, send_file};
use super::{Checksum, checksum, unchanging};
use crate::durable::{FileError, blocking};
use crate::migration::link::Link;
use crate::migration::source::{Order, SLOW_ANSWER_TIMEOUT, answer};
use crate::migration::wire::{FromSource, FromTarget};
use crate::snapshot::layers;
use crate::task::TaskContext;
use crate::vm::VmRuntime;

/// Tops that hold more together are frozen first, so that it is read once and not in each pass: reading it again costs about a
/// millisecond for each 2 MiB, of which the last time is in the pause.
const TOP_BYTES_MAX: u64 = 16 << 20;
/// How often it is said how far the copying is.
const SAY_EVERY: Duration = Duration::from_millis(200);

/// Freezes the disks' tops if they are large, and sends all that does not change and that the target lacks.
///
/// # Errors
/// When something can't be read, the target fails, or somebody cancels. Tops that were frozen stay so: each chain has one
/// layer more.
pub async fn copy_unchanging(
    vm: &mut VmRuntime,
    context: &TaskContext,
    order: &Order,
    link: &mut Link<FromTarget>,
) -> Result<(), Problem> {
    context.phase(MigrationPhase::Storage.as_str());
    // What a VM that is put back has written since is not wanted there.
    let spares = if order.put_back { &[][..] } else { &order.spare_layers };
    for spare in spares {
        context.check_cancelled()?;
        if stored_bytes_of_tops(vm)? > TOP_BYTES_MAX {
            layers::freeze_tops(vm, spare).await?;
        }
        send_missing(vm, context, order, link).await?;
        // What the guest wrote meanwhile may be too much again.
        if stored_bytes_of_tops(vm)? <= TOP_BYTES_MAX {
            return Ok(());
        }
    }
    send_missing(vm, context, order, link).await
}

async fn send_missing(
    vm: &VmRuntime,
    context: &TaskContext,
    order: &Order,
    link: &mut Link<FromTarget>,
) -> Result<(), Problem> {
    let (dirs, writable) = (vm.dirs()?.clone(), vm.disks()?);
    let offers = blocking({
        let dirs = dirs.clone();
        move || unchanging(&dirs, &writable)
    })
    .await?;
    link.sender.say(&FromSource::Offer { files: offers.clone() }).await?;
    let have = |message: &FromTarget| matches!(message, FromTarget::Have { .. });
    let reply = answer(&mut link.messages, SLOW_ANSWER_TIMEOUT, "what the target has", have).await?;
    let FromTarget::Have { checksums } = reply else { return Ok(()) };
    let mut missing = Vec::new();
    for (number, (offer, theirs)) in (0_u32..).zip(offers.iter().zip(checksums)) {
        let path = offer.name.path(&dirs);
        let same = match theirs {
            Some(_) if offer.link_to.is_some() => true,
            Some(theirs) => {
                let path = path.clone();
                blocking(move || Ok(checksum(&path)?)).await? == theirs
            }
            None => false,
        };
        if !same {
            missing.push((number, path));
        }
    }
    let is_link = |number: u32| offers[number as usize].link_to.is_some();
    let sent = missing.iter().filter(|(number, _)| !is_link(*number));
    let total_bytes = stored_bytes(sent.map(|(_, path)| path.clone()).collect()).await?;
    let mut pace = Pace::new(order.bandwidth_bytes_per_second);
    let mut counter = StorageProgress::new(context, total_bytes);
    for (number, path) in missing {
        if is_link(number) {
            let nothing = Checksum::default().finish(offers[number as usize].length_bytes);
            link.sender.file_end(number, &nothing).await?;
            continue;
        }
        let sent =
            send_file(&link.sender, number, &path, &mut pace, context.cancel(), |bytes| counter.add(bytes));
        let checksum = sent.await?;
        link.sender.file_end(number, &checksum).await?;
    }
    link.sender.say(&FromSource::Sync { top_lengths_bytes: Vec::new() }).await?;
    let synced = |message: &FromTarget| matches!(message, FromTarget::Synced);
    answer(&mut link.messages, SLOW_ANSWER_TIMEOUT, "that files are stored", synced).await.map(|_| ())
}

fn stored_bytes_of_tops(vm: &VmRuntime) -> Result<u64, Problem> {
    let stored = |path: &PathBuf| -> Result<u64, Problem> {
        let metadata = std::fs::metadata(path).map_err(FileError::io(path, "examined"))?;
        Ok(metadata.blocks() * 512)
    };
    layers::top_files(vm.dirs()?, &vm.disks()?).iter().map(stored).sum()
}

async fn stored_bytes(paths: Vec<PathBuf>) -> Result<u64, Problem> {
    blocking(move || {
        let sizes = paths.iter().map(|path| {
            let metadata = std::fs::metadata(path).map_err(FileError::io(path, "examined"))?;
            Ok((metadata.blocks() * 512).min(metadata.len()))
        });
        sizes.sum()
    })
    .await
}

/// Says how far the copying of files is.
struct StorageProgress<'a> {
    context: &'a TaskContext,
    started: Instant,
    total_bytes: u64,
    done_bytes: u64,
    said: Instant,
}

impl<'a> StorageProgress<'a> {
    fn new(context: &'a TaskContext, total_bytes: u64) -> Self {
        let now = Instant::now();
        Self { context, started: now, total_bytes, done_bytes: 0, said: now }
    }

    fn add(&mut self, bytes: u64) {
        self.done_bytes += bytes;
        if self.said.elapsed() < SAY_EVERY {
            return;
        }
        self.said = Instant::now();
        let rate = (self.done_bytes as f64 / self.started.elapsed().as_secs_f64().max(0.001)) as u64;
        let left = self.total_bytes.saturating_sub(self.done_bytes);
        self.context.progress(Progress {
            phase: MigrationPhase::Storage.as_str().to_owned(),
            done_bytes: self.done_bytes,
            total_bytes: self.total_bytes,
            bytes_per_second: rate,
            left_ms: (left * 1000).checked_div(rate),
            ..Progress::default()
        });
    }
}
