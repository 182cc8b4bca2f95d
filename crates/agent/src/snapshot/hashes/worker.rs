//! Hashing frozen layers in the background: after each piece of a VM's work its layers are looked at, and those that have
//! no hashes yet get them.

use berth_model::{LayerId, Problem};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::LayerHashes;
use crate::disk::pace::Pace;
use crate::durable::blocking;
use crate::layout::VmDirs;
use crate::snapshot::layers_present;
use crate::snapshot::verify::Ground;
use crate::snapshot::verify::quiet::Reader;
use crate::vm::VmRuntime;

/// Hashes one VM's layers, and holds back whoever reads its snapshots in the background while there is other work.
pub struct Worker {
    pace: Pace,
    ground: watch::Sender<Option<Ground>>,
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.pace.break_off();
    }
}

impl Worker {
    /// One that has nothing to do yet.
    pub fn start() -> Self {
        let (ground, changed) = watch::channel(None);
        tokio::spawn(work(changed));
        Self { pace: Pace::default(), ground }
    }

    /// The pace of all who read this VM's snapshots in the background.
    pub const fn pace(&self) -> &Pace {
        &self.pace
    }

    /// Work is about to be done on the VM: until [`Self::go_on`], the disk is left to it.
    pub fn make_way(&self) {
        self.pace.hold(true);
    }

    /// The work is done; there may be layers that were just frozen.
    pub fn go_on(&self, vm: &VmRuntime) {
        self.pace.hold(false);
        // Whoever has a VM in the end of its journey sees to its layers.
        let at_home = vm.host_record().is_ok_and(|record| record.migration.is_none());
        let ground = if at_home && vm.vm_record().is_ok() { Ground::of(vm, &self.pace).ok() } else { None };
        self.ground.send_replace(ground);
    }
}

async fn work(mut changed: watch::Receiver<Option<Ground>>) {
    while changed.changed().await.is_ok() {
        let Some(ground) = changed.borrow_and_update().clone() else { continue };
        if let Err(problem) = hash_all(&ground).await {
            tracing::warn!(directory = %ground.dirs.disk.display(), %problem, "a layer could not be hashed");
        }
    }
}

async fn hash_all(ground: &Ground) -> Result<(), Problem> {
    let dirs = ground.dirs.clone();
    let wanting = blocking(move || without_hashes(&dirs)).await?;
    if wanting.is_empty() {
        return Ok(());
    }
    let place = ground.services.reading.place();
    let Ok(_place) = place.acquire_owned().await else { return Ok(()) };
    let cancel = CancellationToken::new();
    let _ends = cancel.clone().drop_guard();
    let (dirs, pace) = (ground.dirs.clone(), ground.pace.clone());
    ground
        .read(move || {
            let mut reader = Reader::new(&pace, &cancel);
            wanting.iter().try_for_each(|layer| hash(&dirs, layer, &mut reader))
        })
        .await
}

/// The frozen layers that nobody has hashed.
fn without_hashes(dirs: &VmDirs) -> Result<Vec<LayerId>, Problem> {
    if !dirs.layers().is_dir() {
        return Ok(Vec::new());
    }
    let mut layers = layers_present(dirs)?;
    layers.retain(|layer| {
        let is_frozen = dirs.layer(layer).metadata().is_ok_and(|file| super::is_frozen(&file));
        is_frozen && !dirs.layer_hashes(layer).exists()
    });
    Ok(layers)
}

pub(super) fn hash(dirs: &VmDirs, layer: &LayerId, reader: &mut Reader<'_>) -> Result<(), Problem> {
    // Whoever verified it meanwhile hashed it. What it was then is what it is held against, whatever became of it since.
    if dirs.layer_hashes(layer).exists() {
        return Ok(());
    }
    let path = dirs.layer(layer);
    // It may have been merged, or its VM deleted, since.
    let Ok((file, _)) = super::open(&path) else { return Ok(()) };
    match LayerHashes::make(layer, reader, &file) {
        Ok(made) => match super::write(dirs, &made) {
            Err(_) if !path.exists() => Ok(()),
            written => Ok(written?),
        },
        Err(broken) => {
            let error = broken.into_io()?;
            Err(crate::durable::FileError::io(&path, "read")(error).into())
        }
    }
}
