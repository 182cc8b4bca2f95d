//! A pool that is full: each thing fails with one clear error and leaves nothing.

use std::path::PathBuf;

use berth_agent::config::NetworkConfig;
use berth_api::agent::{PartQuery, PoolImagePath, PoolImageUpload, TaskSpec};
use berth_model::image::PartRole;
use berth_model::{ImageId, ProblemCode};
use futures_util::StreamExt;

use crate::support::{Host, definition, directory, sha256};

/// A file system of a few MiB in place of a pool; unmounted when dropped.
struct Small(PathBuf);

impl Small {
    fn mount(path: PathBuf) -> Self {
        let flags = rustix::mount::MountFlags::NODEV;
        rustix::mount::mount("tmpfs", &path, "tmpfs", flags, c"size=4m,mode=711").expect("mounted");
        Self(path)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_image_that_does_not_fit_is_refused_before_and_while_it_comes() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let root = directory();
    let _small = Small::mount(root.path().join("pool"));
    let host = Host::start_with(root, NetworkConfig::default()).await;
    let image = ImageId::from_entropy([5; 10]);
    let bytes = vec![7u8; 8 << 20];
    let sum = sha256(&bytes);
    let problem = host.upload(&image, PartRole::Disk, "raw", bytes, sum).await.expect_err("too large");
    assert_eq!(problem.code, ProblemCode::NoSpace);
    // One that fits when it begins, and not any more when it ends.
    let bytes = vec![7u8; 3 << 20];
    let query = PartQuery { format: "raw".into(), size_bytes: bytes.len() as u64, sha256: sha256(&bytes) };
    let filler = host.pool().join("filler");
    let chunks: Vec<_> = bytes.chunks(1 << 20).map(bytes::Bytes::copy_from_slice).collect();
    let path = filler.clone();
    let body = futures_util::stream::iter(chunks.into_iter().enumerate()).map(move |(index, chunk)| {
        if index == 1 {
            std::fs::write(&path, vec![1u8; 2 << 20]).expect("filler");
        }
        Ok::<_, std::io::Error>(chunk)
    });
    let path = PoolImagePath { pool: "local".parse().expect("name"), image, role: PartRole::Disk };
    let body = berth_api::transport::streamed(body);
    let stored = host.client().upload::<PoolImageUpload>(&path, &query, body, query.size_bytes).await;
    assert_eq!(stored.expect_err("full").into_problem().code, ProblemCode::NoSpace);
    assert_eq!(host.files("pool/images"), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_that_can_not_be_made_for_want_of_room_leaves_nothing() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let root = directory();
    let _small = Small::mount(root.path().join("pool"));
    let host = Host::start_with(root, NetworkConfig::default()).await;
    let definition = definition(1, &[]);
    std::fs::write(host.pool().join("filler"), vec![1u8; (4 << 20) - (64 << 10)]).expect("filler");
    let prepare = TaskSpec::PrepareVm { definition: Box::new(definition.clone()) };
    let problem = host.task(&definition.id, prepare.clone()).await.expect_err("full");
    assert_eq!(problem.code, ProblemCode::NoSpace, "{problem}");
    assert_eq!(host.files("pool/vms"), Vec::<String>::new());
    assert_eq!(host.report(&definition.id).await, None);
    std::fs::remove_file(host.pool().join("filler")).expect("room");
    host.task(&definition.id, prepare).await.expect("with room it can be made");
}
